"""Points references to an object at the place where the site describes it, whatever module the reference names."""

from __future__ import annotations

import builtins
import importlib
import typing
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

PACKAGE = "lightning_gif"


def found(target: str) -> Any:
    """The object with a dotted name, or None."""
    parts = target.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            at: Any = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for name in parts[cut:]:
            fields = {key for base in getattr(at, "__mro__", ()) for key in vars(base).get("__annotations__", {})}
            at = getattr(at, name, name if name in fields else None)
        return at
    return None


def resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Element) -> nodes.Node | None:
    """A link to the same object under the name by which it is described.

    If the object exists, but is not described here, it is text. If it does not exist, there is no result, so that the
    build warns.
    """
    if node.get("refdomain") != "py":
        return None
    target, module, cls = node["reftarget"], node.get("py:module") or PACKAGE, node.get("py:class")
    within = [f"{module}.{cls}.{target}"] if cls else []
    wanted = next((it for name in (*within, f"{module}.{target}", target) if (it := found(name)) is not None), None)
    if wanted is None:
        outside = target == "None" or hasattr(builtins, target) or hasattr(typing, target)
        return content if outside else None
    last = target.rpartition(".")[2]
    for name, entry in env.domains.python_domain.objects.items():
        if name.rpartition(".")[2] == last and found(name) is wanted:
            page = app.builder.get_relative_uri(node["refdoc"], entry.docname)
            return nodes.reference("", "", content, internal=True, refuri=f"{page}#{entry.node_id}")
    return content


def setup(app: Sphinx) -> dict[str, Any]:
    """Connects the resolver."""
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True}

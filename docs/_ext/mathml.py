"""Formulas as MathML, which browsers show without a script. So neither the build nor the reader needs the network."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util.logging import getLogger

logger = getLogger(__name__)


def write(writer: Any, node: nodes.Element, display: str) -> None:
    """Writes a formula. A command that is not known would be shown as it is, so it is a warning."""
    formula = convert(node.astext(), display=display)
    if "\\" in formula:
        logger.warning("unknown command in the formula %s", node.astext(), location=node)
    writer.body.append(formula)
    raise nodes.SkipNode


def inline(writer: Any, node: nodes.math) -> None:
    """Writes a formula in a line of text."""
    write(writer, node, "inline")


def block(writer: Any, node: nodes.math_block) -> None:
    """Writes a formula on a line of its own."""
    write(writer, node, "block")


def setup(app: Sphinx) -> dict[str, Any]:
    """Adds the renderer that ``html_math_renderer`` names."""
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""Warns if a page of the site would load something from the network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.util.logging import getLogger

logger = getLogger(__name__)

LOADED = {
    ".html": re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=\"((?:https?:)?//[^\"]+)\""),
    ".css": re.compile(r"(?:@import\s+|url\()[\"']?((?:https?:)?//[^\"')\s]+)"),
}


def check(app: Sphinx, exception: Exception | None) -> None:
    """Looks through all pages and styles after a build."""
    if exception is None:
        for kind, pattern in LOADED.items():
            for file in sorted(Path(app.outdir).rglob(f"*{kind}")):
                for address in pattern.findall(file.read_text()):
                    logger.warning("%s loads %s from the network", file.relative_to(app.outdir), address)


def setup(app: Sphinx) -> dict[str, Any]:
    """Connects the check."""
    app.connect("build-finished", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

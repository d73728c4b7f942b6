"""Pictures in the cells of tables, and tables as text."""

from __future__ import annotations

import struct
import zlib
from typing import Any

from .contents import Table

__all__ = ["has_pictures", "is_picture", "markdown", "plain", "png", "words"]


def is_picture(value: Any) -> bool:
    """Whether a cell of a table is a picture: an array of two or three axes."""
    return hasattr(value, "__array_interface__") and getattr(value, "ndim", 0) >= 2


def has_pictures(table: Table) -> bool:
    """Whether some cell of a table is a picture."""
    return any(is_picture(value) for row in table.rows for value in row)


def plain(value: Any) -> Any:
    """The cell of a table without pictures: the word "picture" in place of one."""
    return "picture" if is_picture(value) else value


def png(image: Any) -> bytes:
    """A picture ``(H, W)`` or ``(H, W, 3)`` uint8 as a PNG file."""
    height, width = image.shape[:2]
    lines = b"".join(b"\0" + image[row].tobytes() for row in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if image.ndim == 2 else 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def markdown(table: Table) -> str:
    """A table in Markdown, without pictures."""
    rows = [[str(column) for column in table.columns], ["---"] * len(table.columns)]
    rows += [[words(plain(value)).replace("|", "\\|") for value in row] for row in table.rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def words(value: Any) -> str:
    """A cell of a table in one line of text; empty if it has no value."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())

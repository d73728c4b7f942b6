"""Tables as text and as pages with pictures. They are complete in themselves: no other file is needed."""

from __future__ import annotations

import base64
import html
import struct
import zlib
from typing import Any

from .contents import Table

__all__ = ["has_pictures", "is_picture", "markdown", "page", "plain", "png"]

_STYLE = (
    "<style>body{font-family:sans-serif;font-size:13px}td,th{padding:2px 10px;text-align:left}"
    "img{image-rendering:pixelated;height:64px}</style>"
)


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


def page(table: Table) -> str:
    """A table as an HTML page that contains its pictures."""
    head = "".join(f"<th>{html.escape(str(column))}</th>" for column in table.columns)
    body = "".join(f"<tr>{''.join(f'<td>{_cell(value)}</td>' for value in row)}</tr>" for row in table.rows)
    return f"{_STYLE}<table><tr>{head}</tr>{body}</table>"


def markdown(table: Table) -> str:
    """A table in Markdown, without pictures."""
    rows = [[str(column) for column in table.columns], ["---"] * len(table.columns)]
    rows += [[_words(plain(value)).replace("|", "\\|") for value in row] for row in table.rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(value: Any) -> str:
    if not is_picture(value):
        return html.escape(_words(value))
    return f'<img src="data:image/png;base64,{base64.b64encode(png(value)).decode()}">'


def _words(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())

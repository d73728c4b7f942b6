"""Reports as HTML: a part of a notebook, or one page that needs nothing else. Pictures are inside, and no scripts."""

from __future__ import annotations

import base64
import html
import importlib.util
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..storage.atomic import replace_file
from .charts import LOWERS, RAISES
from .contents import Table
from .pictures import is_picture, png, words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Coloured", "HtmlReport", "Page"]


_DPI = 110

# How opaque the colour of the largest value of a text is, in hexadecimal digits.
_OPAQUE = 0xC0

# All rules are for the report alone, because a notebook has other content.
_STYLE = """
.lightning-gif { font-family: system-ui, sans-serif; font-size: 15px; line-height: 1.45; max-width: 72rem; }
.lightning-gif h2 { font-size: 1.4em; margin: 0 0 .3em; }
.lightning-gif h3 { font-size: 1.05em; margin: 1.4em 0 .4em; }
.lightning-gif img { max-width: 100%; height: auto; background: white; }
.lightning-gif .tables { display: flex; flex-wrap: wrap; gap: 0 3rem; }
.lightning-gif table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.lightning-gif th, .lightning-gif td { padding: .25em .8em .25em 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid rgba(128, 128, 128, .35); }
.lightning-gif th.number, .lightning-gif td.number { text-align: right; }
.lightning-gif td { overflow-wrap: anywhere; max-width: 36rem; }
.lightning-gif td img { image-rendering: pixelated; height: 64px; }
.lightning-gif span.token { border-radius: 3px; padding: 0 1px; white-space: pre-wrap; }
.lightning-gif pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85em; }
.lightning-gif summary { cursor: pointer; margin-top: 1.2em; }
"""

_DOCUMENT = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>body {{ margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #1a1a1a; background: white; }}</style>
</head>
<body>
{body}
</body>
</html>
"""


@dataclass(frozen=True)
class Coloured:
    """A text in the cell of a table, whose tokens have a colour by a number.

    Attributes:
        tokens: Each token and its number.
        separator: What is between two tokens.
    """

    tokens: Sequence[tuple[str, float]]
    separator: str = ""


@dataclass(frozen=True)
class Page:
    """The content of a report as HTML.

    Attributes:
        title: The heading.
        lead: The sentence below the heading: the answer, or a verdict.
        pictures: For each picture its description, and the function that draws it.
        tables: The tables by their headings; an empty one is not shown.
        notes: What the reader should know.
        details: The text of the whole report, which can be unfolded.
    """

    title: str
    lead: str = ""
    pictures: Sequence[tuple[str, Callable[[], Figure]]] = ()
    tables: Mapping[str, Table] = field(default_factory=dict)
    notes: Sequence[str] = ()
    details: str = field(default="", kw_only=True)

    def fragment(self) -> str:
        """The content as a part of another page, such as a notebook."""
        parts = [f"<h2>{_text(self.title)}</h2>"]
        parts += [f"<p>{_text(self.lead)}</p>"] if self.lead else []
        parts += [_picture(*picture) for picture in self._drawn()]
        if self.pictures and not self._drawn():
            parts.append("<p>Pictures need matplotlib: <code>pip install matplotlib</code>.</p>")
        if self.tables:
            parts.append('<div class="tables">' + "\n".join(_table(*item) for item in self.tables.items()) + "</div>")
        if self.notes:
            parts.append("<h3>Notes</h3>\n<ul>" + "".join(f"<li>{_text(note)}</li>" for note in self.notes) + "</ul>")
        if self.details:
            unfolded = "" if self.lead or self.pictures or self.tables else " open"
            text = f"<summary>The report as text</summary><pre>{_text(self.details)}</pre>"
            parts.append(f"<details{unfolded}>{text}</details>")
        return f'<div class="lightning-gif">\n<style>{_STYLE}</style>\n' + "\n".join(parts) + "\n</div>"

    def document(self) -> str:
        """The content as a page of its own. A browser that shows it loads nothing else, and runs no scripts."""
        return _DOCUMENT.format(title=_text(self.title), body=self.fragment())

    def _drawn(self) -> Sequence[tuple[str, Callable[[], Figure]]]:
        return self.pictures if importlib.util.find_spec("matplotlib") is not None else ()


class HtmlReport:
    """A report that notebooks show as HTML, and that can be written as one HTML page."""

    def page(self, *, whole: bool) -> Page:
        """The content of the report as HTML.

        Args:
            whole: Whether to include all pictures and tables; a notebook gets the first ones.
        """
        raise NotImplementedError

    def _repr_html_(self) -> str:
        return self.page(whole=False).fragment()

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Writes the report as one HTML page, for readers without Python, a notebook or an account of a logger.

        Pictures are inside the file. A browser that shows it loads nothing else, and runs no scripts. Without
        matplotlib, the page has no pictures, and says so. An existing file is replaced atomically. In a distributed
        run the first process writes.

        Args:
            path: The file, such as ``"report.html"``. Missing folders are created.
        """
        if getattr(getattr(self, "processes", None), "rank", 0):
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_file(target, self.page(whole=True).document().encode())


def _picture(description: str, draw: Callable[[], Figure]) -> str:
    content = io.BytesIO()
    draw().savefig(content, format="png", dpi=_DPI)
    return f"<p>{_image(description, content.getvalue())}</p>"


def _image(description: str, content: bytes) -> str:
    """A PNG file as a part of the page."""
    return f'<img alt="{_text(description)}" src="data:image/png;base64,{base64.b64encode(content).decode()}">'


def _table(heading: str, table: Table) -> str:
    """A table; columns of numbers are aligned to the right."""
    marks = [
        ' class="number"' if all(_is_number(row[i]) for row in table.rows) else "" for i in range(len(table.columns))
    ]
    head = "".join(f"<th{mark}>{_text(name)}</th>" for name, mark in zip(table.columns, marks, strict=True))
    lines = (
        "<tr>" + "".join(f"<td{mark}>{_cell(cell)}</td>" for cell, mark in zip(row, marks, strict=True)) + "</tr>"
        for row in table.rows
    )
    title = f"<h3>{_text(heading)}</h3>\n" if heading else ""
    return f"<div>{title}<table>\n<tr>{head}</tr>\n" + "\n".join(lines) + "\n</table></div>"


def _cell(value: Any) -> str:
    if isinstance(value, Coloured):
        return _tokens(value)
    return _image("", png(value)) if is_picture(value) else _text(words(value))


def _tokens(text: Coloured) -> str:
    """A text whose tokens have a colour by their values, and show these when a pointer is on them."""
    largest = max((abs(value) for _, value in text.tokens), default=0.0) or 1.0
    parts = []
    for token, value in text.tokens:
        style = f"background: {RAISES if value > 0 else LOWERS}{round(_OPAQUE * abs(value) / largest):02x}"
        # Tokenizers mark the beginning of a word by a character of its own, or none.
        shown = token.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n")
        parts.append(f'<span class="token" style="{style}" title="{value:+.2g}">{_text(shown)}</span>')
    return text.separator.join(parts)


def _text(value: Any) -> str:
    return html.escape(str(value))


def _is_number(value: Any) -> bool:
    """Whether a value is a number, also if it is formatted, or missing."""
    if value is None or isinstance(value, (int, float)) or is_picture(value):
        return not is_picture(value)
    try:
        float(str(value).rstrip("?% ").partition(" ±")[0])
    except ValueError:
        return False
    return True

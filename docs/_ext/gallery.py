"""Runs the examples before the pages are read, and shows on a page what an example prints and draws.

``{example} NAME`` shows the docstring, the printed text, the pictures and the code of ``examples/NAME.py``.
``{printed} NAME`` shows the printed text alone. Pictures are files below ``outputs/gallery/outputs/NAME``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.logging import getLogger

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
FOLDER = ROOT / "outputs" / "gallery"  # the examples run here, so the paths that they print are those of a user

logger = getLogger(__name__)


def scripts() -> Iterator[Path]:
    """The examples that are commands."""
    return (file for file in sorted(EXAMPLES.glob("*.py")) if '__name__ == "__main__"' in file.read_text())


def printed_by(name: str) -> Path:
    return FOLDER / f"{name}.txt"


def pictures_of(name: str) -> list[Path]:
    return sorted((FOLDER / "outputs" / name).glob("*.png"))


def changed() -> float:
    """The time of the last change of an example or of the package."""
    files = [*EXAMPLES.glob("*.py"), *(ROOT / "lightning_gif").rglob("*.py")]
    return max(file.stat().st_mtime for file in files)


def readable(printed: str) -> str:
    """The text without colours, without W&B's own lines, and without progress bars, each of which ends in a number."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", printed).splitlines()
    return "\n".join(line.rstrip() for line in lines if not re.match(r"\s*Epoch \d+/\d+|wandb: ", line)).strip()


def run_all(app: Sphinx) -> None:
    """Runs each example whose output is missing or older than the code. An example that fails ends the build."""
    since = changed()
    environment = {**os.environ, "COLUMNS": "110", "NO_COLOR": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    environment |= {"MPLBACKEND": "Agg", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    FOLDER.mkdir(parents=True, exist_ok=True)
    for script in scripts():
        output = printed_by(script.stem)
        if output.exists() and output.stat().st_mtime > since:
            continue
        logger.info("running %s", script.name)
        for old in pictures_of(script.stem):
            old.unlink()
        command = [sys.executable, str(script)]
        done = subprocess.run(command, cwd=FOLDER, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{script.name} failed:\n{done.stderr[-3000:]}")
        output.write_text(readable(done.stdout) + "\n")


class Printed(SphinxDirective):
    """Shows what an example prints."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        self.env.note_dependency(str(printed_by(name)))
        text = printed_by(name).read_text().rstrip()
        return [nodes.literal_block(text, text, language="text", classes=["printed"])]


class Example(Printed):
    """Shows an example: its docstring, what it prints and draws, and its code."""

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        script = EXAMPLES / f"{name}.py"
        self.env.note_dependency(str(script))
        _, docstring, code = script.read_text().split('"""', 2)
        text = re.sub(r"^ {4}(python .*)$", r"```bash\n\1\n```", docstring, flags=re.M)
        shown = self.parse_text_to_nodes(text)
        for picture in pictures_of(name):
            shown.append(nodes.image(uri=f"/{picture.relative_to(ROOT)}", alt=f"{picture.stem}, drawn by {name}.py"))
        code = code.strip()
        return [
            *shown,
            nodes.rubric("", "What it prints"),
            *super().run(),
            nodes.rubric("", "The code"),
            nodes.literal_block(code, code, language="python"),
        ]


def setup(app: Sphinx) -> dict[str, Any]:
    """Adds the directives, and the run of the examples at the start of a build."""
    app.connect("builder-inited", run_all)
    app.add_directive("example", Example)
    app.add_directive("printed", Printed)
    return {"parallel_read_safe": True}

"""Logging to Weights & Biases.

W&B is imported only if a logger has a run of it. An offline run can be moved before it is synced. So what is drawn lies
in the folder of the run: tables of an offline run are not copied into artifacts of W&B, whose files lie elsewhere.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .._compat import rank_zero_warn
from ..errors import GIFWarning
from .contents import Contents, Files, Table
from .page import Page
from .pictures import has_pictures, is_picture

__all__ = ["LARGEST_FILES", "log", "takes"]

LARGEST_FILES = 512 * 2**20
"""The files of a report are logged as an artifact if they have at most this many bytes."""

_BINS = 64

_SMALLEST_SHOWN = 64  # tables do not enlarge small pictures

_LONGEST_NAME = 80  # W&B allows 128 signs for the name of an artifact, with the id of the run


def takes(logger: Any) -> bool:
    """Whether a logger logs to a run of W&B, which takes W&B's own objects. It is not imported for that."""
    run = type(getattr(logger, "experiment", None))
    return any(base.__module__.partition(".")[0] == "wandb" for base in run.__mro__)


def log(logger: Any, contents: Contents) -> None:
    """Logs a report to the run of a logger.

    Args:
        logger: A ``WandbLogger``.
        contents: The report.
    """
    run = logger.experiment
    joined = f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}" if getattr(logger, "_prefix", "") else ""
    start = f"{joined}{contents.section}"
    axis = {f"{start}/{contents.axis}": float(contents.step), "trainer/global_step": contents.step}
    points = [{f"{start}/{name}": value for name, value in _finite(point).items()} for point in contents.points]
    *earlier, last = points or [{}]
    disabled = getattr(run, "disabled", False)
    media = {} if disabled else _media(run, start, contents)
    _define(run, f"{start}/{contents.axis}", [*last, *media])
    for point in earlier:
        run.log({**axis, **point})
    run.log({**axis, **last, **media})
    for name, text in contents.state.items():
        run.summary[f"{start}/{name}"] = text
    if contents.settings:
        run.config.update({contents.section: dict(contents.settings)}, allow_val_change=True)
    if contents.alert is not None:
        title, text = contents.alert
        run.alert(title, text, level="WARN")
    if contents.files is not None and not disabled:
        _log_files(run, contents.section, contents.files)


def _finite(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value) for name, value in values.items() if isinstance(value, (int, float)) and math.isfinite(value)
    }


def _define(run: Any, axis: str, keys: list[str]) -> None:
    """Gives keys their own step axis. Each is named, since a pattern could lose to the pattern ``*`` of Lightning."""
    run.define_metric(axis, hidden=True)
    for key in keys:
        if key != axis:
            run.define_metric(key, step_metric=axis)


def _media(run: Any, start: str, contents: Contents) -> dict[str, Any]:
    """W&B's objects for a report, by key."""
    import wandb

    media: dict[str, Any] = {}
    if contents.text is not None:
        media[f"{start}/report"] = wandb.Html(f"<pre>{_escaped(contents.text)}</pre>", data_is_not_path=True)
    if contents.draw is not None and importlib.util.find_spec("matplotlib") is not None:
        media[f"{start}/plot"] = wandb.Image(contents.draw())
    for name, values in contents.histograms.items():
        counts = np.histogram(values.numpy(), bins=_BINS)
        media[f"{start}/{name}"] = wandb.Histogram(np_histogram=counts)
    for name, table in contents.all_tables().items():
        key = f"{start}/{name}"
        if table.bars is not None:
            label, value = table.bars
            chart = wandb.plot.bar(_table(run, f"{key}_table", table), label, value, title=f"{name}: {value}")
            media[key] = chart
        else:
            media[key] = _table(run, key, table)
        if has_pictures(table):
            media[f"{key}_pictures"] = wandb.Html(Page(name, tables={"": table}).document(), data_is_not_path=True)
    return media


def _table(run: Any, key: str, table: Table) -> Any:
    """A table of W&B. In an offline run it is a file in the folder of the run only."""
    import wandb

    rows = [[_cell(value) for value in row] for row in table.rows]
    made = wandb.Table(columns=list(table.columns), data=rows, allow_mixed_types=True)
    if run.offline:
        made.bind_to_run(run, key, run.step)
    return made


def _cell(value: Any) -> Any:
    import wandb

    if is_picture(value):
        factor = -(-_SMALLEST_SHOWN // min(value.shape[:2]))
        return wandb.Image(value.repeat(factor, axis=0).repeat(factor, axis=1))
    return value


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


# --------------------------------------------------------------------------------------------------------------------
# Artifacts
# --------------------------------------------------------------------------------------------------------------------


def _log_files(run: Any, section: str, files: Files) -> None:
    """Logs the files of a report as an artifact, after the weights that it leads from and before those it leads to."""
    import wandb

    if files.size > LARGEST_FILES:
        rank_zero_warn(
            f"The files of the report take {files.size / 2**20:.0f} MiB, more than {LARGEST_FILES >> 20}, so W&B gets"
            " no artifact of them. To keep them, call report.save(path), and run.log_artifact(path) if W&B should have"
            " them.",
            category=GIFWarning,
        )
        return
    lineage = None if files.lineage is None else files.lineage()
    name = f"{_as_artifact_name(section)}-{run.id}"
    folder = Path(run.dir).parent / "artifacts" / f"{name}-{run.step}"
    folder.mkdir(parents=True, exist_ok=True)
    files.write(folder / files.name)
    artifact = wandb.Artifact(name, type=files.kind, metadata={**files.metadata, **(vars(lineage) if lineage else {})})
    _add(artifact, folder)
    if lineage is None:
        run.log_artifact(artifact)
        return
    _use(run, _weights(run, lineage.before))
    run.log_artifact(artifact)
    run.log_artifact(_weights(run, lineage.after))


def _as_artifact_name(section: str) -> str:
    """A section with the signs that names of artifacts may have, with a digest if others could become the same."""
    plain = section.replace("/", "-").replace(" ", "_")
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", plain)[:_LONGEST_NAME]
    return name if name == plain else f"{name}-{hashlib.sha256(section.encode()).hexdigest()[:8]}"


def _weights(run: Any, digest: str) -> Any:
    """An artifact that stands for weights: it has their digest. The same weights are one version of it."""
    import wandb

    folder = Path(run.dir).parent / "artifacts" / f"gif_weights-{digest[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sha256.txt").write_text(digest + "\n")
    artifact = wandb.Artifact(f"gif_weights-{run.id}", type="weights-digest", metadata={"sha256": digest})
    _add(artifact, folder)
    return artifact


def _add(artifact: Any, folder: Path) -> None:
    """Adds the files of a folder to an artifact, which are not copied elsewhere."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            artifact.add_file(str(file.resolve()), name=file.relative_to(folder).as_posix(), policy="immutable")


def _use(run: Any, artifact: Any) -> None:
    """Notes an artifact as an input of a run. ``use_artifact`` does the same, but refuses offline runs."""
    if run.offline:
        run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
    else:
        run.use_artifact(artifact)

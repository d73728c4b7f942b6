"""A W&B report with the panels that show the results of influence calls and edits."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..errors import ConfigurationError
from .contents import check_log_name, section_of

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2 import H2, P, PanelGrid, Report

__all__ = ["wandb_report"]


def wandb_report(
    entity: str, project: str, *, queries: Sequence[str | None] = (None,), edits: Sequence[str | None] = (None,)
) -> Report:
    """A W&B report for the runs of a project: for each query the strongest examples, for each edit what it did.

    Building it needs no network and no account. ``save()`` of the result publishes it, which needs ``wandb login``.
    Needs ``pip install wandb-workspaces``, which the extra ``wandb`` installs.

    Args:
        entity: The user or the team of W&B.
        project: The project, as in ``WandbLogger(project=…)``.
        queries: The names of the queries, as in ``trainer.influence(batch, name=…)``; ``None`` for calls without one.
        edits: The names of the edits, as in ``trainer.unlearn(batch, name=…)``; ``None`` for calls without one.

    Returns:
        A ``wandb_workspaces.reports.v2.Report``, to which other blocks can be added.

    Raises:
        ConfigurationError: If a name is not one that calls accept, a name is given in place of a list, or ``entity``
            or ``project`` is empty.
        ModuleNotFoundError: If wandb-workspaces is not installed.

    Example::

        report = wandb_report("my-team", "digits", queries=["worst image"], edits=["opponents"])
        report.save()
    """
    for argument, given in (("entity", entity), ("project", project)):
        if not isinstance(given, str) or not given:
            raise ConfigurationError(f"`{argument}` must be a text, and not empty, got {given!r}.")
    for argument, names in (("queries", queries), ("edits", edits)):
        if isinstance(names, str):
            raise ConfigurationError(f"`{argument}` must be a list of names, got {names!r}. Write [{names!r}].")
        for name in names:
            check_log_name(name)
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise ModuleNotFoundError("W&B reports need wandb-workspaces: pip install wandb-workspaces.")
    from wandb_workspaces.reports import v2

    blocks = [v2.P("A score is the predicted change of the query's loss if the training example were removed.")]
    for name in queries:
        blocks += _query(name)
    for name in edits:
        blocks += _edit(name)
    return v2.Report(entity=entity, project=project, title="Influence and unlearning", blocks=blocks)


def _query(name: str | None) -> Iterator[H2 | P | PanelGrid]:
    """The strongest examples for a query, and the highest and lowest score over the training."""
    from wandb_workspaces.reports import v2

    section = section_of("gif_influence", name)
    yield v2.H2(f"Which training examples raise or lower the loss on {'the query' if name is None else name}?")
    yield v2.PanelGrid(
        runsets=[v2.Runset()],
        panels=[
            v2.MediaBrowser(title="The strongest examples", media_keys=[f"{section}/plot"]),
            v2.LinePlot(
                title="The highest and the lowest score over the training",
                x=f"{section}/step",
                y=[f"{section}/score_max", f"{section}/score_min"],
            ),
            v2.WeavePanelSummaryTable(table_name=f"{section}/examples"),
        ],
    )


def _edit(name: str | None) -> Iterator[H2 | P | PanelGrid]:
    """What an edit did, and whether it is in the weights."""
    from wandb_workspaces.reports import v2

    section = section_of("gif_unlearn", name)
    yield v2.H2(f"What did the edit{'' if name is None else f' {name}'} do?")
    yield v2.PanelGrid(
        runsets=[v2.Runset()],
        panels=[
            v2.LinePlot(
                title="Mean losses after each event",
                x=f"{section}/event",
                y=[f"{section}/forget_loss", f"{section}/retain_loss"],
            ),
            v2.ScalarChart(title="Edits that are in the weights", metric=f"{section}/edits_in_weights"),
            v2.MediaBrowser(title="Before and after", media_keys=[f"{section}/plot"]),
            v2.WeavePanelSummaryTable(table_name=f"{section}/events"),
            v2.WeavePanelSummaryTable(table_name=f"{section}/forgotten"),
        ],
    )

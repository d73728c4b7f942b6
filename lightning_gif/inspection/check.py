"""The check of a module: how its losses are computed, which layers may change, and what calls will cost."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch.utils.data import Subset

from .._compat import rank_zero_warn
from ..config import AUTO, Settings
from ..curvature.methods import METHODS
from ..data.batch import Batch
from ..data.examples import Examples
from ..defaults import for_matching, for_unlearning
from ..errors import GIFWarning
from ..objective.losses import OwnLoss
from ..objective.objective import Objective
from ..reporting.page import HtmlReport, Page
from ..reporting.progress import duration
from ..selection import is_name
from ..session import Session, TargetsChoice
from ..solvers import SOLVERS
from ..unlearning.matching import Matching
from ..unlearning.step import can_match
from ..unlearning.task import SampleSizes
from .costs import Costs, Estimate, measure

__all__ = ["Agreement", "CheckReport", "LayerShare", "check", "collected"]

# The number of examples on which the losses are compared with `training_step`.
_COMPARED = 64

# If there are fewer target parameters than this share of what `ratio` asks for, a warning names layers without any.
_COVERED = 0.5

# At this relative difference from the step, a warning says that defined losses are others.
_DIFFERENT = 0.01

_SHOWN_LAYERS = 20


@dataclass(frozen=True)
class Agreement:
    """A comparison of the losses of single examples with the loss of ``training_step`` for a batch of them.

    Attributes:
        examples: The number of examples.
        step: The loss of ``training_step``, in evaluation mode.
        losses: The mean or the sum of the losses, whichever is closer to ``step``.
        reduction: ``"mean"`` or ``"sum"``.
    """

    examples: int
    step: float
    losses: float
    reduction: str

    @property
    def difference(self) -> float:
        """The relative difference."""
        return abs(self.step - self.losses) / max(abs(self.step), abs(self.losses), 1e-30)


@dataclass(frozen=True)
class LayerShare:
    """How much of a layer an edit may change.

    Attributes:
        name: The name of the layer; empty for the module itself.
        kind: The class of the layer.
        size: The number of its trainable parameters.
        targets: How many of them are target parameters.
    """

    name: str
    kind: str
    size: int
    targets: int


@dataclass(frozen=True)
class CheckReport(HtmlReport):
    """How this package computes the losses of a module, which layers an edit may change, and what calls will cost.

    Attributes:
        module: The class of the module.
        n_train: The number of training examples.
        is_subset: Whether the training loader draws from a ``Subset``. Dataset indices are then positions in it.
        batch_size: The number of examples in a measured batch.
        losses: How the losses of single examples are computed.
        agreement: The comparison of the losses with ``training_step``; ``None`` if the step returns no loss.
        curvature: The kind of curvature for scores and for edits, under the keys ``"scores"`` and ``"edits"``.
        ratio: The share of the parameters that the settings ask for; ``None`` if they name parameters.
        layers: All layers with trainable parameters.
        costs: What calls will cost. A registered inverse as ``solver`` has no estimates of scores, and a solver that
            cannot solve for an edit has none of an edit.
        warnings: All warnings that the losses, the data and the targets cause.
        seconds: The time that the check took, in seconds.
        matches: Whether an edit of single examples changes all parameters (by ``step="match"``).
        training_seconds: The time of all recorded fits in seconds; 0 if none was recorded, and NaN if a part of one was
            not.
    """

    module: str
    n_train: int
    is_subset: bool
    batch_size: int
    losses: str
    agreement: Agreement | None
    curvature: dict[str, str]
    ratio: float | None
    layers: list[LayerShare]
    costs: list[Estimate]
    warnings: list[str]
    seconds: float
    matches: bool = False
    training_seconds: float = 0.0

    @property
    def n_parameters(self) -> int:
        """The number of trainable parameters."""
        return sum(layer.size for layer in self.layers)

    @property
    def n_targets(self) -> int:
        """The number of target parameters."""
        return sum(layer.targets for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """All values as numbers, text, lists and dictionaries, for JSON."""
        return asdict(self)

    def page(self, *, whole: bool) -> Page:
        """The report as HTML."""
        return Page("Check of the module, and estimated costs", details=str(self))

    def __str__(self) -> str:
        return "\n".join(_lines(self))

    __repr__ = __str__


def check(
    session: Session,
    seconds: float,
    caught: list[str],
    *,
    n_queries: int = 1,
    n_forget: int = 64,
    unseen: Examples | None = None,
) -> CheckReport:
    """Checks the module of an open session.

    Args:
        session: The session, with the settings that the call requested.
        seconds: The seconds that it took to open the session.
        caught: The messages of the warnings while it was opened.
        n_queries: The number of queries whose cost is estimated.
        n_forget: The number of forget examples whose edit is estimated.
        unseen: The unseen examples that an edit would use.
    """
    begin = time.perf_counter()
    objective, train, requested = session.objective, session.train, session.settings
    with collected() as more:
        scores = session.influence_settings(requested, on_targets=False, queries=n_queries)
        itself = session.influence_settings(requested, on_targets=False, queries=len(train), itself=True)
        solves = requested.solver == AUTO or requested.solver in SOLVERS  # else a registered inverse, for scores only
        edits = for_unlearning(requested if solves else replace(requested, solver=AUTO))
        edits = replace(edits, curvature="hessian") if edits.curvature == AUTO else edits
        matching = for_matching(requested, selects=False)
        if matching is not None and can_match(objective):
            edits = matching
        agreement = _agreement(objective, train)
        layers = _layers(session)
        objective.learn_derivatives(train)
        start = seconds + time.perf_counter() - begin
        passes = measure(objective, train, (scores.curvature, edits.curvature), scores, n_queries)
    costs = Costs(objective, passes, len(train), start)
    estimates = []
    n_states = 1 + len(session.tracker.snapshots.chosen())
    if solves or passes.layers is not None:
        with collected():  # the same warnings as before
            one = session.influence_settings(requested, on_targets=False, queries=1)
        estimates = [costs.query(one, 1, n_states)]
        estimates += [costs.query(scores, n_queries, n_states)] if n_queries > 1 else []
        estimates.append(costs.self_influence(itself))
    if edits is matching or _solves_edits(edits):
        n_forget, n_unseen = min(n_forget, len(train) - 1), 0 if unseen is None else len(unseen)
        if edits is matching:
            damping = session.tracker.length.damping(objective.space, objective.theta)
            known = edits.damping is not None or damping is not None
            estimates.append(
                costs.match(edits, n_forget, n_unseen, SampleSizes(), Matching(), n_states, knows_damping=known)
            )
        else:
            estimates.append(costs.edit(edits, n_forget, n_unseen, SampleSizes()))
    return CheckReport(
        module=type(objective.module).__name__,
        n_train=len(train),
        is_subset=isinstance(train.dataset, Subset),
        batch_size=passes.size,
        losses=objective.loss.origin,
        agreement=agreement,
        curvature={"scores": scores.curvature, "edits": edits.curvature},
        matches=edits is matching and not METHODS[edits.method].selects,
        ratio=requested.ratio if is_name(requested.selector) else None,
        layers=layers,
        costs=estimates,
        warnings=list(dict.fromkeys([*caught, *more, *_doubts(objective, agreement)])),
        seconds=seconds + time.perf_counter() - begin,
        training_seconds=session.tracker.length.seconds,
    )


def _solves_edits(settings: Settings) -> bool:
    """Whether the solver takes the matrix and the damping of an edit."""
    solver, method = SOLVERS[settings.solver], METHODS[settings.method]
    is_fit = method.is_symmetric or not solver.requires_symmetric_psd
    return is_fit and bool(settings.damping or not solver.requires_damping)


@contextmanager
def collected() -> Iterator[list[str]]:
    """Collects the messages of this package's warnings in a list at the end of the block, and does not show them."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    for warning in caught:
        if issubclass(warning.category, GIFWarning):
            messages.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _agreement(objective: Objective, train: Examples) -> Agreement | None:
    """Compares the losses of a few examples with the loss of their batch. ``None`` if the step returns no loss."""
    module = objective.module
    if not module.automatic_optimization:
        return None
    sample = train.sample(_COMPARED, 0)
    losses = objective.all_losses(objective.readable(sample))
    batch = (
        Batch.join(list(sample.batches()))
        if sample.divisible
        else next(replace(sample, batch_size=len(sample)).batches())
    )
    with torch.no_grad():
        step = float(objective.shadow.training_step(objective.theta, batch.data))
    values = {"mean": float(losses.mean()), "sum": float(losses.sum())}
    reduction = min(values, key=lambda name: abs(values[name] - step))
    return Agreement(len(sample), step, values[reduction], reduction)


def _doubts(objective: Objective, agreement: Agreement | None) -> list[str]:
    """A warning if losses that the user defined are others than those of the step."""
    if agreement is None or not isinstance(objective.loss, OwnLoss) or agreement.difference < _DIFFERENT:
        return []
    return [
        f"The losses of `influence_loss` are not those of training_step: on {agreement.examples} examples their"
        f" {agreement.reduction} is {agreement.losses:.4g}, but the step returns {agreement.step:.4g}. This is right if"
        " the step weights examples or draws at random. Otherwise scores are about another loss than training."
    ]


def _layers(session: Session) -> list[LayerShare]:
    """All layers with trainable parameters, with the numbers of their target parameters.

    Targets are those that training picked. If it picked none, they are those that a few examples pick.
    """
    objective, settings = session.objective, session.settings
    choice: TargetsChoice = "cached" if session.tracker.targets is not None and not session.repicks else "batch"
    targets = session.choose_targets(session.train.sample(2 * session.train.batch_size, 0), choice)
    layers: dict[str, LayerShare] = {}
    modules = dict(objective.module.named_modules())
    for name, slot in objective.space.slots.items():
        owner = name.rpartition(".")[0]
        before = layers.get(owner) or LayerShare(owner, type(modules[owner]).__name__, 0, 0)
        chosen = len(targets[name]) if name in targets else 0
        layers[owner] = replace(before, size=before.size + slot.size, targets=before.targets + chosen)
    shares = list(layers.values())
    size, count = sum(layer.size for layer in shares), sum(layer.targets for layer in shares)
    if is_name(settings.selector) and count < _COVERED * settings.ratio * size:
        without = [layer.name or "the module itself" for layer in shares if not layer.targets]
        rank_zero_warn(
            f"An edit may change {count} of {size} parameters, but ratio={settings.ratio:g} asks for"
            f" {round(settings.ratio * size)}. These layers have no target parameters: {', '.join(without[:5])}"
            f"{' …' if len(without) > 5 else ''}. To include them, name them in `influence_parameters`, or pass"
            " their names as `selector`.",
            category=GIFWarning,
        )
    return shares


def _lines(report: CheckReport) -> Iterator[str]:
    """The report as text, one line for each fact."""
    yield f"{report.module}: {report.n_train} training examples, {report.n_parameters} trainable parameters"
    if report.is_subset:
        yield "dataset indices are positions in the Subset that the training loader draws from"
    yield f"losses of single examples: {report.losses}"
    agreement = report.agreement
    if agreement is not None:
        close = "agrees with" if agreement.difference < 1e-4 else f"differs by {agreement.difference:.1%} from"
        yield (
            f"  training_step on {agreement.examples} examples: {agreement.step:.6g}, which {close} the"
            f" {agreement.reduction} of their losses, {agreement.losses:.6g}"
        )
    names = {"ggn": "Gauss–Newton matrix", "hessian": "Hessian"}
    kinds = {use: names.get(kind, kind) for use, kind in report.curvature.items()}
    yield f"curvature: {kinds['scores']} for scores, {kinds['edits']} for the first change of an edit"
    asked = "" if report.ratio is None else f" (ratio={report.ratio:g})"
    if report.matches:
        yield "an edit of single examples changes all parameters, unless a call names `ratio` or `selector`"
    which = "another edit" if report.matches else "an edit"
    yield f"{which} may change {report.n_targets} parameters, {report.n_targets / report.n_parameters:.1%}{asked}:"
    width = max(len(layer.name or "(module)") for layer in report.layers)
    for layer in report.layers[:_SHOWN_LAYERS]:
        yield (
            f"  {layer.name or '(module)':<{width}}  {layer.kind}: {layer.targets} of {layer.size}"
            f" ({layer.targets / layer.size:.1%})"
        )
    if len(report.layers) > _SHOWN_LAYERS:
        yield f"  … and {len(report.layers) - _SHOWN_LAYERS} further layers (`report.layers`)"
    yield f"expected cost, from passes over two batches of {report.batch_size} examples:"
    for cost in report.costs:
        per_change, most = cost.seconds_per_change, cost.further_changes
        further = "the match, if it is needed" if most == 1 else f"each of up to {most} further changes"
        change = "" if per_change is None else f", and {duration(per_change)} for {further}"
        yield f"  {cost.call}: {duration(cost.seconds)}{change}; {max(cost.gib, 0.01):.2f} GiB"
        if per_change is not None and 0 < report.training_seconds < cost.seconds:
            yield f"    retraining is cheaper: the whole training took {duration(report.training_seconds)}"
    for message in report.warnings:
        yield f"warning: {message}"

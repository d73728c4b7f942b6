"""Modules composed at random: each is right, warned of, or refused with what to do, and none is changed by a call."""

from __future__ import annotations

import copy
import random
import re
import warnings
from collections import Counter
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from lightning_gif import GIFCallback, GIFError, GIFWarning

from ..conftest import make_trainer
from .composed import SEQUENCES, Composed, Composition, Short, collate_of, compose, exact_scores, items_of
from .reference import CONVERGED, DAMPING, Items, error

QUERY = [0, 5, 9]
ALL = 200
# Of coupled losses with recurrent layers or attention, examples are evaluated one by one, which takes long.
QUICK = [n for n in range(ALL) if not (compose(n).causes and compose(n).body in SEQUENCES)]
IN_DEFAULT_SUITE = [*QUICK[:10], *[n for n in QUICK[14:] if compose(n).refusal][:2]]

# Whatever is refused names one of these.
REMEDY = re.compile(
    r"influence_loss|a `damping`|curvature=|DataLoader|method=|solver=|Pass |Use |Give |Define |view_as_complex|"
    r"[Ww]ithout double=True"
)
NOT_THE_LOSS = re.compile(r"losses of the single examples.*?\((they are .*?)\)", re.S)
NOT_SYMMETRIC = re.compile(r"second derivative of the loss is not symmetric.*once_differentiable.*hook.*no_grad")
NEVER = re.compile(r"An evaluation has changed|returns different values each time")

COUNTS: Counter[str] = Counter()


# ----------------------------------------------------------------------------------------------------------------------
# The state that no call may change
# ----------------------------------------------------------------------------------------------------------------------


def plain(value: Any, values: bool = True, depth: int = 0) -> Any:
    """What compares equal to that of an equal object: the contents, and which object holds them.

    Args:
        value: The object.
        values: Whether the values of trainable parameters are part of it.
        depth: How deep the object is in others.
    """
    if isinstance(value, Tensor):
        held = values or not isinstance(value, nn.Parameter) or not value.requires_grad
        return id(value), value.dtype, value.requires_grad, value.detach().tolist() if held else None
    if isinstance(value, np.ndarray):
        return id(value), value.tobytes()
    if isinstance(value, torch.Generator):
        return id(value), value.get_state().tolist()
    if isinstance(value, dict):
        return [(key, plain(item, values, depth + 1)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [plain(item, values, depth + 1) for item in value]
    if isinstance(value, nn.Module) and depth:
        return id(value), plain(value.state_dict(keep_vars=True), values, depth + 1)
    return value if isinstance(value, (int, float, str, bool, type(None))) else id(value)


def snapshot(module: Composed, trainer: pl.Trainer, *, values: bool = True) -> dict[str, Any]:
    """All that a call must leave as it is; without ``values``, all but the values of trainable parameters."""
    state: dict[str, Any] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        state[f"parameter {name}"] = plain(parameter, values)
        state[f"gradient {name}"] = plain(parameter.grad)
    for name, buffer in module.named_buffers(remove_duplicate=False):
        state[f"buffer {name}"] = plain(buffer)
    internal = ("_parameters", "_buffers", "_modules", "_trainer")
    for name, one in module.named_modules(remove_duplicate=False):
        state[f"mode {name}"] = one.training
        for key, value in vars(one).items():
            if key not in internal:
                state[f"attribute {name}.{key}"] = plain(value, values)
        state[f"members {name}"] = [list(getattr(one, key).keys()) for key in internal[:3]]
    state["optimizers"] = [
        [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups]
        for optimizer in trainer.optimizers
    ]
    state["optimizer states"] = [plain(optimizer.state_dict()) for optimizer in trainer.optimizers]
    state["trainer"] = trainer.state.fn, trainer.state.stage, trainer.current_epoch, trainer.global_step
    state["random"] = torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())  # noqa: NPY002
    state["torch"] = torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return state


def check_unchanged(before: dict[str, Any], after: dict[str, Any], what: str) -> None:
    changed = [key for key in {**before, **after} if before.get(key, ...) != after.get(key, ...)]
    assert not changed, f"{what} has changed {changed}"


# ----------------------------------------------------------------------------------------------------------------------
# Calls
# ----------------------------------------------------------------------------------------------------------------------


def loader_of(spec: Composition, indices: list[int] | None = None) -> DataLoader[Any]:
    data = Items(items_of(spec))
    if indices is not None:
        return DataLoader(Subset(data, indices), len(indices), collate_fn=collate_of(spec))
    return DataLoader(data, 4, shuffle=True, collate_fn=collate_of(spec))


def trained(spec: Composition, *, callback: bool) -> tuple[Composed, pl.Trainer]:
    torch.manual_seed(spec.number)
    module = Short(spec) if spec.state == "short-signature" else Composed(spec)
    options: dict[str, Any] = {}
    if spec.optimizer == "clip" and spec.state != "manual":
        options["gradient_clip_val"] = 0.5
    if spec.optimizer == "accumulate" and spec.state != "manual":
        options["accumulate_grad_batches"] = 2
    trainer = make_trainer(GIFCallback(ratio=0.5, unconverged="ignore") if callback else None, max_epochs=1, **options)
    fit(module, trainer, loader_of(spec))
    return module, trainer


def fit(module: Composed, trainer: pl.Trainer, data: DataLoader[Any]) -> None:
    torch.manual_seed(1)
    trainer.fit(module, data)


class Outcome:
    """What a call gave: a report, or an error of this package, and the warnings."""

    def __init__(self, call: Any, *args: Any, **options: Any) -> None:
        self.report: Any = None
        self.refusal = ""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                self.report = call(*args, **options)
            except GIFError as refused:
                self.refusal = str(refused)
                assert REMEDY.search(self.refusal), f"no remedy in: {self.refusal}"
        self.warnings = [str(one.message) for one in caught if issubclass(one.category, GIFWarning)]
        causes = [found[1] for text in self.warnings if (found := NOT_THE_LOSS.search(text))]
        self.cause = causes[0] if causes else ""
        assert not any(NEVER.search(text) for text in self.warnings), self.warnings

    @property
    def kind(self) -> str:
        if self.refusal:
            return "refused"
        return "warned" if self.cause or any(map(NOT_SYMMETRIC.search, self.warnings)) else "right"


def refused_in_fit(spec: Composition) -> str:
    """The message with which the callback refuses a module before training; empty if it does not."""
    try:
        trained(spec, callback=True)
    except GIFError as refused:
        return str(refused)
    return ""


def check(number: int) -> str:
    """Checks one composition.

    Returns:
        ``"right"``, ``"warned"`` or ``"refused"``.
    """
    spec = compose(number)
    # TorchScript observes the first runs of a process and computes differently in them: two plain fits may differ.
    trained(spec, callback=False)
    plain_module, plain_trainer = trained(spec, callback=False)
    plain_random = torch.get_rng_state()
    if spec.state == "manual":
        assert re.search(spec.refusal, refused_in_fit(spec))
        return "refused"
    module, trainer = trained(spec, callback=True)
    assert torch.equal(torch.get_rng_state(), plain_random)
    check_same_weights(plain_module, module)

    query = loader_of(spec, QUERY)
    batch = query if spec.form in ("object", "ragged", "time-first", "padded", "shared-vector") else next(iter(query))
    before, but_values = (snapshot(module, trainer, values=values) for values in (True, False))
    options = {**CONVERGED, "double": not spec.narrow}
    outcome = Outcome(trainer.influence, batch, **options)
    check_unchanged(before, snapshot(module, trainer), "influence")
    of_itself = Outcome(trainer.self_influence, **options)
    check_unchanged(before, snapshot(module, trainer), "self_influence")
    check_outcome(spec, outcome)
    check_outcome(spec, of_itself)
    if outcome.report is not None and of_itself.report is not None and "random" not in spec.causes:
        check_scores(module, trainer, outcome, of_itself)

    # One change is enough to see whether anything else is changed; twelve are tried for the modules of the slow tests.
    step = "natural" if number in IN_DEFAULT_SUITE else "relinearise"
    edited = Outcome(trainer.unlearn, [1, 2], max_iter=5, step=step)
    check_unchanged(but_values, snapshot(module, trainer, values=False), "unlearn")
    assert spec.causes or not edited.cause, edited.warnings
    assert not spec.refusal or edited.refusal
    if edited.report is not None:
        edited.report.undo()
    check_unchanged(before, snapshot(module, trainer), "undo")

    if can_be_copied(plain_module):
        copy.deepcopy(module)
    for one, other in ((plain_trainer, plain_module), (trainer, module)):
        one.fit_loop.max_epochs = 2
        fit(other, one, loader_of(spec))
    check_same_weights(plain_module, module)
    return outcome.kind


def can_be_copied(module: nn.Module) -> bool:
    """Whether a trained module can be copied: old norms, and metrics that are the loss, hold tensors of a graph."""
    try:
        copy.deepcopy(module)
    except RuntimeError:
        return False
    return True


def check_same_weights(one: nn.Module, other: nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"training differs in {different}"


def check_outcome(spec: Composition, outcome: Outcome) -> None:
    if spec.refusal:
        assert re.search(spec.refusal, outcome.refusal), outcome.refusal or "it was not refused"
        return
    if spec.causes:
        assert outcome.cause or outcome.refusal, f"no warning of a loss that is {spec.causes}: {outcome.warnings}"
        assert not outcome.cause or any(cause in outcome.cause for cause in spec.causes), outcome.cause
        return
    assert not outcome.refusal, outcome.refusal
    assert not outcome.cause, f"a warning of a loss of single examples: {outcome.warnings}"


def check_scores(module: Composed, trainer: pl.Trainer, outcome: Outcome, of_itself: Outcome) -> None:
    kind = outcome.report.curvature["kind"]
    assert not outcome.report.scores.requires_grad
    assert not of_itself.report.scores.requires_grad
    if any(NOT_SYMMETRIC.search(text) for text in outcome.warnings):
        assert kind == "hessian"
        assert module.spec.has_no_second_derivative
        return
    indefinite = of_itself.report.curvature["negative_eigenvalues"] > 0
    exact = exact_scores(module, trainer, QUERY, kind, DAMPING, indefinite=indefinite)
    assert of_itself.report.curvature["kind"] == kind
    tolerance = 1e-3 if module.spec.narrow else 1e-4
    wrong = error(outcome.report.scores[0], exact.influence)
    assert wrong <= tolerance, f"influence by {kind}: relative error {wrong:.2e} {outcome.report.settings['losses']}"
    wrong = error(of_itself.report.scores[0], exact.self_influence)
    assert wrong <= tolerance, f"self-influence by {kind}: relative error {wrong:.2e}"


NUMBERS = [
    pytest.param(number, id=str(compose(number)), marks=() if number in IN_DEFAULT_SUITE else pytest.mark.slow)
    for number in range(ALL)
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.xdist_group("composed")
@pytest.mark.parametrize("number", NUMBERS)
def test_a_composed_module_is_right_warned_of_or_refused(number: int) -> None:
    COUNTS[check(number)] += 1


@pytest.mark.xdist_group("composed")
def test_all_outcomes_occur() -> None:
    if sum(COUNTS.values()) < len(IN_DEFAULT_SUITE):
        pytest.skip("counts the tests before it")
    print("composed modules:", ", ".join(f"{COUNTS[kind]} {kind}" for kind in ("right", "warned", "refused")))
    assert all(COUNTS[kind] > 0 for kind in ("right", "warned", "refused"))

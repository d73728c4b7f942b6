"""After any fault, weights and files are the old ones or the new ones, and the error has the reason."""

from __future__ import annotations

import errno
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_gif import (
    ConfigurationError,
    ConvergenceError,
    GIFCallback,
    GIFWarning,
    InfluenceReport,
    NonFiniteError,
    SelectionError,
    UnlearnReport,
)
from lightning_gif.attribution.score_store import ScoreStore
from lightning_gif.edit import Edit
from lightning_gif.storage.interrupts import uninterrupted

from .conftest import WEIGHTS_ONLY, Classifier, batch_of, fitted, loader, make_trainer, same_weights, weights
from .test_bad_input import equal, state

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import faults
from faults import CALLS, FAULTS, Campaign, World

GOOD = ("as before", "done")


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    handler = signal.getsignal(signal.SIGINT)
    with warnings.catch_warnings():
        yield Campaign(World(tmp_path_factory.mktemp("faults") / "files"), random.Random(0))
    signal.signal(signal.SIGINT, handler)
    faults.Net.fails = float("inf")


# Some faults of each kind, in each call that can have them.
INJECTIONS = [
    (kind, call)
    for kind in FAULTS
    for call in CALLS
    if not (kind.startswith("SIGKILL") and not hasattr(os, "fork"))
    and (kind.startswith(("Ctrl-C before", "full", "error in a tensor")) or call.name in ("unlearn", "save scores"))
]


@pytest.mark.mostly_slow(8)
@pytest.mark.parametrize(("kind", "call"), INJECTIONS, ids=lambda value: getattr(value, "name", value))
def test_a_fault_leaves_no_partial_result(kind: str, call: faults.Call, campaign: Campaign) -> None:
    for _ in range(2):
        assert campaign.inject(kind, call) in (*GOOD, "not applicable")


@pytest.mark.slow
def test_damage_to_files_is_detected(campaign: Campaign) -> None:
    for _ in range(12):
        what, outcome = faults.damage(campaign.world, campaign.generator)
        assert outcome in GOOD, what


@pytest.mark.parametrize("call", [call for call in CALLS if call.name in ("undo", "apply")], ids=lambda call: call.name)
def test_an_interrupt_before_any_line_leaves_the_whole_edit_or_none(call: faults.Call, campaign: Campaign) -> None:
    world = campaign.world
    lines = len(campaign.measure(call)["lines"])
    assert lines > 20
    for number in range(1, lines + 1):
        world.reset(edited=call.edited)
        with (
            pytest.raises(KeyboardInterrupt),
            faults.before_line(number, lambda: signal.raise_signal(signal.SIGINT), []),
        ):
            call.run(world)
        now = world.module.state_dict()
        assert faults.same(now, world.weights) or faults.same(now, world.edited)
        assert torch.is_grad_enabled()


def test_the_campaign_detects_half_an_edit(campaign: Campaign, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(*args: Any) -> None:
        with torch.no_grad():
            campaign.world.module.net[0].weight[0, 0] += 1
        raise KeyboardInterrupt

    broken = next(call for call in CALLS if call.name == "unlearn")
    monkeypatch.setattr(Edit, "apply", half)
    assert campaign._broken(broken, lambda: faults.full_disk(float("inf"), [])) == "half an edit"
    campaign.world.reset(edited=False)


# --------------------------------------------------------------------------------------------------------------------
# Interrupts
# --------------------------------------------------------------------------------------------------------------------


def test_an_interrupt_waits_for_the_end_of_a_section() -> None:
    handler = signal.getsignal(signal.SIGINT)
    done = []

    def interrupted() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            done.append(1)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done == [1]
    assert signal.getsignal(signal.SIGINT) is handler
    with pytest.raises(ValueError, match="mine"), uninterrupted():
        raise ValueError("mine")
    assert signal.getsignal(signal.SIGINT) is handler


def test_sections_in_other_threads_and_without_interrupts_are_unaffected() -> None:
    found: list[bool] = []

    def work() -> None:
        with uninterrupted():
            found.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with uninterrupted():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, handler)
    assert found == [True]


def test_an_edit_is_undone_if_its_report_is_not_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, module, data = fitted()
    before = weights(module)
    original = Edit.apply

    def interrupted(self: Edit, module: nn.Module) -> None:
        original(self, module)
        raise KeyboardInterrupt

    monkeypatch.setattr(Edit, "apply", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.unlearn(batch_of(data, slice(4)), step=1.0)
    assert same_weights(before, weights(module))


@pytest.mark.parametrize("options", [{}, {"curvature_sampling": "features", "curvature_examples": 20}])
def test_ctrl_c_while_hooks_are_removed_leaves_none(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    trainer, module, data = fitted()

    def hooks() -> list[int]:
        return [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules()]

    before, remove = hooks(), RemovableHandle.remove

    def interrupted(self: RemovableHandle) -> None:
        signal.raise_signal(signal.SIGINT)
        remove(self)

    monkeypatch.setattr(RemovableHandle, "remove", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.influence(batch_of(data, slice(4)), targets="batch", **options)
    assert hooks() == before


def test_an_interrupt_while_a_report_is_logged_leaves_the_weights() -> None:
    class Interrupted:
        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            raise KeyboardInterrupt

    trainer, module, data = fitted()
    trainer.loggers = [Interrupted()]
    before = weights(module)
    with pytest.raises(KeyboardInterrupt):
        trainer.unlearn(batch_of(data, slice(4)), step=1.0)
    assert same_weights(before, weights(module))


# --------------------------------------------------------------------------------------------------------------------
# Values that are NaN
# --------------------------------------------------------------------------------------------------------------------


class _Poisoned(torch.autograd.Function):
    """The identity; its derivative of the given order is NaN."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, order: int) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.order = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return (gradient * torch.nan if ctx.order == 1 else _Poisoned.apply(gradient, ctx.order - 1)), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> Tensor:
        return tangent * torch.nan if ctx.order == 1 else _Poisoned.apply(tangent, ctx.order - 1)


class Poisoned(nn.Module):
    order = 0

    def forward(self, x: Tensor) -> Tensor:
        return _Poisoned.apply(x, self.order) if self.order else x


def poisoned() -> Classifier:
    return Classifier(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), Poisoned(), nn.Tanh(), nn.Linear(8, 3)))


@pytest.mark.parametrize("order", [1, 2], ids=["gradients", "Hessian products"])
@pytest.mark.parametrize("ask", ["influence", "gif", "self_influence", "unlearn", "relinearise"])
def test_derivatives_that_are_nan_raise_and_change_nothing(ask: str, order: int) -> None:
    trainer, module, data = fitted(poisoned())
    batch = batch_of(data, slice(4))
    calls: dict[str, Callable[[], Any]] = {
        "influence": lambda: trainer.influence(batch, curvature="hessian"),
        "gif": lambda: trainer.influence(batch, method="gif"),
        "self_influence": lambda: trainer.self_influence(curvature="hessian"),
        "unlearn": lambda: trainer.unlearn(batch, step=1.0),
        "relinearise": lambda: trainer.unlearn(lambda batch: batch[1] == 1),
    }
    module.net[2].order = order
    before, everything = weights(module), state(module)
    with pytest.raises((NonFiniteError, ConvergenceError), match=r"finite|diverge"):
        calls[ask]()
    assert same_weights(before, weights(module))
    assert [key for key, value in state(module).items() if not equal(value, everything[key])] == []


@pytest.mark.mostly_slow(3)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("ask", ["influence", "many queries", "self_influence", "scores in a file"])
def test_a_training_example_that_is_not_finite_is_named(ask: str, bad: float, tmp_path: Path) -> None:
    trainer, _, data = fitted()
    data.tensors[0][17, 2] = bad
    batch = batch_of(data, slice(4))
    # The curvature examples do not include it.
    seed = next(s for s in range(99) if 17 not in torch.randperm(48, generator=torch.Generator().manual_seed(s))[:4])
    options: dict[str, Any] = {"curvature_examples": 4, "seed": seed}
    calls: dict[str, Callable[[], Any]] = {
        "influence": lambda: trainer.influence(batch, **options),
        "many queries": lambda: trainer.influence(batch_of(data, slice(17)), per_example=True, **options),
        "self_influence": lambda: trainer.self_influence(**options),
        "scores in a file": lambda: trainer.influence(batch, scores_to=tmp_path / "scores", **options),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GIFWarning)
        with pytest.raises(NonFiniteError, match=r"1 training examples are not finite, at dataset indices 17"):
            calls[ask]()


# --------------------------------------------------------------------------------------------------------------------
# The disk
# --------------------------------------------------------------------------------------------------------------------


def scores_of(folder: Path) -> ScoreStore:
    return ScoreStore.open(folder, 3, 1000, {"weights": "mark"})


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="room cannot be reserved here")
def test_scores_that_do_not_fit_on_the_disk_are_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*scores\.bin'"):
            scores_of(tmp_path / "scores")
    assert os.listdir(tmp_path / "scores") == ["manifest.json"]
    scores_of(tmp_path / "scores").write(0, torch.ones(3, 1000))
    assert scores_of(tmp_path / "scores").done.all()


def test_a_file_system_that_cannot_reserve_space_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(handle: int, start: int, size: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unknown, raising=False)
    scores_of(tmp_path / "scores").write(0, torch.ones(3, 1000))
    assert scores_of(tmp_path / "scores").done.all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process to limit")
@pytest.mark.parametrize("what", ["edit", "report", "scores"])
def test_files_that_exceed_the_size_limit_are_not_started(what: str, campaign: Campaign) -> None:
    import resource

    world = campaign.world
    world.reset(edited=False)
    world.further.save(world.folder / "edit")
    world.other.save(world.folder / "report")
    child = os.fork()
    if not child:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
            if what == "edit":
                world.edit.save(world.folder / "edit")
            elif what == "report":
                world.scores.save(world.folder / "report")
            else:
                scores_of(world.folder / "scores")
        except OSError as error:
            code = 0 if error.errno == errno.EFBIG else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert faults.saved_edit(world)
    assert faults.saved_scores(world)


def test_an_impossible_path_is_named_in_the_error(tmp_path: Path, campaign: Campaign) -> None:
    world = campaign.world
    world.reset(edited=False)
    (tmp_path / "file").write_text("mine")
    below = tmp_path / "file" / "below"
    for save in (
        lambda: world.edit.save(below),
        lambda: world.scores.save(below),
        lambda: world.trainer.influence(world.batch, scores_to=below),
    ):
        with pytest.raises((OSError, ConfigurationError), match="file"):
            save()
    assert (tmp_path / "file").read_text() == "mine"
    assert os.listdir(tmp_path) == ["file"]


# --------------------------------------------------------------------------------------------------------------------
# Edits one after the other, and checkpoints
# --------------------------------------------------------------------------------------------------------------------


def test_edits_by_the_trainer_are_undone_in_any_allowed_order(tmp_path: Path) -> None:
    trainer, module, data = fitted(callback=GIFCallback(ratio=0.5, unconverged="ignore", max_iter=2))
    before = weights(module)
    edits: list[UnlearnReport] = []
    for i, selector in enumerate((["net.0.*"], ["net.2.*"], ["net.0.weight"], ["net.2.bias"])):
        edits.append(trainer.unlearn(batch_of(data, slice(4 * i, 4 * i + 4)), selector=selector, step=1.0))
        edits[-1].save(tmp_path / str(i))
    edits = [UnlearnReport.load(tmp_path / str(i), module) for i in range(4)]
    with pytest.raises(Exception, match="changed since"):
        edits[0].undo()
    edits[3].undo()  # net.2.bias
    edits[1].undo()  # net.2, although an edit of net.0 came after it
    edits[2].undo()
    edits[2].apply()
    edits[2].undo()
    edits[0].undo()
    assert same_weights(before, weights(module))


def test_a_report_interrupted_in_training_does_not_lose_the_statistics() -> None:
    class Stopped(GIFCallback):
        def influence(self, *args: Any, **kwargs: Any) -> InfluenceReport:
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("not reached")

    _, _, data = fitted(max_epochs=0)
    callback = Stopped(report_every_n_epochs=1, query=batch_of(data, slice(2)))
    module = Classifier()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        make_trainer(callback, max_epochs=1).fit(module, loader(data))
    assert callback.targets is not None
    assert all(not submodule._forward_hooks for submodule in module.modules())


DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "nothing": lambda state: state.clear(),
    "no targets": lambda state: state.pop("targets"),
    "targets that are no indices": lambda state: state.update(targets={"net.0.weight": torch.tensor([0.5])}),
    "targets that are no tensors": lambda state: state.update(targets={"net.0.weight": [0, 1]}),
    "targets below zero": lambda state: state["targets"].update({"net.0.weight": torch.tensor([-1])}),
    "targets out of range": lambda state: state["targets"].update({"net.0.weight": torch.tensor([10**6])}),
    "targets of another model": lambda state: state["targets"].update({"net.9.weight": torch.tensor([1])}),
    "statistics that are missing": lambda state: state["neurons"].pop("outputs"),
    "statistics in words": lambda state: state["neurons"]["outputs"].update({"net.0": "many"}),
    "statistics of another shape": lambda state: state["neurons"]["gradients"].update({"net.0": torch.zeros(2, 99)}),
    "statistics that are NaN": lambda state: state["neurons"]["outputs"]["net.0"].fill_(torch.nan),
    "gradients of another shape": lambda state: state["gradients"]["squares"].update({"net.0.weight": torch.zeros(3)}),
    "steps below zero": lambda state: state["gradients"]["steps"].update({"net.0.weight": -1}),
    "snapshots in words": lambda state: state["snapshots"].update(kept="all"),
    "snapshots of another model": lambda state: state["snapshots"]["kept"].update({0: {"a": torch.zeros(2)}}),
    "snapshots of another shape": lambda state: state["snapshots"]["kept"][0].update({"net.0.weight": torch.zeros(2)}),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_state_in_a_checkpoint_is_ignored_with_a_warning(kind: str, tmp_path: Path) -> None:
    trainer, _, data = fitted(callback=GIFCallback(snapshots=1), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    DAMAGES[kind](checkpoint["lightning_gif"])
    torch.save(checkpoint, tmp_path / "a.ckpt")
    callback = GIFCallback(snapshots=1)
    fresh = make_trainer(callback, max_epochs=3)
    options: dict[str, Any] = {"ckpt_path": tmp_path / "a.ckpt", **WEIGHTS_ONLY}
    with pytest.warns(GIFWarning, match="The checkpoint's state of GIFCallback is damaged or does not fit the model"):
        fresh.validate(Classifier(), loader(data), verbose=False, **options)
    assert callback.targets is None
    assert not callback.neurons
    assert not callback.gradients
    with pytest.raises(SelectionError, match="no cached targets"):
        fresh.influence(batch_of(data, slice(2)), targets="cached", dataloader=loader(data))
    with pytest.warns(GIFWarning, match="does not fit"):
        fresh.fit(Classifier(), loader(data), **options)  # the run continues
    assert callback.targets is not None


def test_networks_without_poison_behave_normally() -> None:
    trainer, _, data = fitted(poisoned())
    assert trainer.influence(batch_of(data, slice(4))).scores.isfinite().all()

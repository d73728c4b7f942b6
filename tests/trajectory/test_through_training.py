"""Scores through training are the derivatives of the run: by autograd through it, and by fits with other weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.swa_utils import get_ema_avg_fn, get_ema_multi_avg_fn
from torch.utils.data import TensorDataset

from lightning_gif import ConfigurationError, GIFCallback, InfluenceReport
from lightning_gif.attribution.leave_outs import LeaveOuts
from lightning_gif.trajectory.leaving_out import draws, measured_at, smoothness_of
from lightning_gif.trajectory.record import Trajectory
from lightning_gif.trajectory.replay import Replay

from ..conftest import Classifier, batch_of, loader, make_trainer
from ..conftest import weights as weights_of
from ..nets import NETS, make
from .runs import N, derivatives, numbered, recorded

QUERIES = 3


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def query(count: int = QUERIES) -> list[Tensor]:
    return [tensor[:count] for tensor in numbered().tensors]


def of_kind(kind: type[torch.optim.Optimizer], **options: Any) -> Callable[[nn.Module], Any]:
    return lambda module: kind(module.parameters(), **options)


RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "SGD": ({"kind": "SGD", "lr": 0.3}, {}),
    "momentum": ({"kind": "SGD", "lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1}, {}),
    "Nesterov": ({"kind": "SGD", "lr": 0.1, "momentum": 0.9, "nesterov": True}, {}),
    "maximize": ({"kind": "SGD", "lr": 0.1, "maximize": True}, {}),
    "Adam": ({"kind": "Adam", "lr": 0.05, "eps": 1e-3, "weight_decay": 0.1}, {}),
    "amsgrad": ({"kind": "Adam", "lr": 0.05, "eps": 1e-3, "amsgrad": True, "betas": (0.8, 0.6)}, {}),
    "AdamW": ({"kind": "AdamW", "lr": 0.05, "eps": 1e-3, "weight_decay": 0.2}, {}),
    "clipped norm": ({"kind": "SGD", "lr": 0.3, "momentum": 0.5}, {"gradient_clip_val": 0.3}),
    "clipped values": (
        {"kind": "SGD", "lr": 0.3},
        {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
    ),
    "accumulation": ({"kind": "AdamW", "lr": 0.05, "eps": 1e-3}, {"accumulate_grad_batches": 5}),
}


@pytest.mark.mostly_slow(4)
@pytest.mark.parametrize("name", RUNS)
def test_scores_are_the_derivatives_by_autograd_through_the_whole_run(name: str, tmp_path: Path) -> None:
    options, of_trainer = RUNS[name]
    kind = {"SGD": SGD, "Adam": Adam, "AdamW": AdamW}[options["kind"]]
    given = {key: value for key, value in options.items() if key != "kind"}
    trainer, module = recorded(tmp_path, net, of_kind(kind, **given), **of_trainer)
    torch.manual_seed(1)
    steps = Trajectory.open(tmp_path).steps(0, trainer.global_step)
    limit = of_trainer.get("gradient_clip_val")
    clip = None if limit is None else (of_trainer.get("gradient_clip_algorithm", "norm"), limit)
    final, of = derivatives(net(), [[batch.ids for batch in step.batches] for step in steps], options, clip)
    own = torch.cat([parameter.detach().reshape(-1) for parameter in module.parameters()])
    assert torch.allclose(own, final, rtol=1e-10, atol=1e-12)  # the reference is this run
    report = trainer.influence(query(), through="training", per_example=True)
    expected = torch.stack([-of(number) for number in range(QUERIES)])
    assert (report.scores - expected).abs().max() < 1e-8 * expected.abs().max()
    assert report.settings["replay_difference"] == 0
    assert report.by_epoch is not None
    assert torch.allclose(report.by_epoch.sum(1), report.scores, rtol=1e-12, atol=1e-15)
    mean = trainer.influence(query(), through="training")
    assert torch.allclose(mean.scores[0], report.scores.mean(0), rtol=1e-9, atol=1e-12)


def with_everything(module: nn.Module) -> Any:
    """Two parameter groups, one of which is decayed, and a learning rate and momentum that change at each step."""
    first, *rest = module.parameters()
    optimizer = AdamW([{"params": [first], "weight_decay": 0.3}, {"params": rest, "lr": 0.02}], 0.01, eps=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.05, 0.02], total_steps=20)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def normalised() -> nn.Module:
    layers = (nn.Linear(6, 5), nn.BatchNorm1d(5), nn.SiLU(), nn.Dropout(0.3), nn.Linear(5, 5), nn.BatchNorm1d(5))
    return nn.Sequential(*layers, nn.Tanh(), nn.Linear(5, 3))


def test_scores_are_the_slopes_of_fits_with_other_weights(tmp_path: Path) -> None:
    """With BatchNorm and dropout, parameter groups, a schedule, accumulation and clipping."""
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "max_epochs": 4}
    trainer, _ = recorded(tmp_path, normalised, with_everything, **options)
    report = trainer.influence(query(), through="training")
    x, y, _ = query()

    def loss_with(number: int, weight: float) -> float:
        weights = torch.ones(N, dtype=torch.float64)
        weights[number] = weight
        _, other = recorded(None, normalised, with_everything, weights, **options)
        with torch.no_grad():
            return float(F.cross_entropy(other.eval()(x), y))

    for number in (0, 7, 13):
        slope = (loss_with(number, 1 + 1e-4) - loss_with(number, 1 - 1e-4)) / 2e-4
        assert float(report.scores[0, number]) == pytest.approx(-slope, rel=1e-5, abs=1e-9)


def momentum_that_ends(module: nn.Module) -> Any:
    """Momentum is switched off after some steps, and comes back with the buffer of before."""
    optimizer = SGD(module.parameters(), 0.1, momentum=0.8)

    def set_momentum(step: int) -> float:
        optimizer.param_groups[0]["momentum"] = 0.0 if 3 <= step < 6 else 0.8
        return 1.0

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, set_momentum)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_a_state_that_the_optimizer_keeps_without_a_use_carries_on(tmp_path: Path) -> None:
    trainer, _ = recorded(tmp_path, net, momentum_that_ends)
    report = trainer.influence(query(), through="training")
    assert report.settings["replay_difference"] == 0
    x, y, _ = query()

    def loss_with(weight: float) -> float:
        weights = torch.ones(N, dtype=torch.float64)
        weights[3] = weight
        _, other = recorded(None, net, momentum_that_ends, weights)
        with torch.no_grad():
            return float(F.cross_entropy(other(x), y))

    slope = (loss_with(1 + 1e-4) - loss_with(1 - 1e-4)) / 2e-4
    assert float(report.scores[0, 3]) == pytest.approx(-slope, rel=1e-6)


def test_replays_without_examples_are_fits_without_their_losses(tmp_path: Path) -> None:
    trainer, module = recorded(tmp_path, normalised, with_everything)
    report = trainer.influence(query(), through="training", leave_outs=2)
    assert report.leave_outs is not None
    assert report.leave_outs.share == 0.05
    x, y, _ = query()
    chosen = torch.randperm(N, generator=torch.Generator().manual_seed(0))[:1]
    weights = torch.ones(N, dtype=torch.float64)
    weights[chosen] = 0
    _, other = recorded(None, normalised, with_everything, weights)
    with torch.no_grad():
        before, after = (F.cross_entropy(one.eval()(x), y) for one in (module, other))
    assert float(report.leave_outs.measured[0, 0]) == pytest.approx(float(after - before), rel=1e-8)
    assert float(report.leave_outs.predicted[0, 0]) == pytest.approx(float(report.scores[0, chosen]), rel=1e-12)
    assert all(-1 <= value <= 1 for value in report.leave_outs.smoothness)
    assert str(report.leave_outs) in str(report)
    report.save(tmp_path / "report")
    loaded = InfluenceReport.load(tmp_path / "report")
    assert loaded.leave_outs is not None
    assert loaded.leave_outs.record() == report.leave_outs.record()
    assert loaded.by_epoch is not None
    assert torch.equal(loaded.by_epoch, report.by_epoch)
    assert str(loaded) == str(report)


@pytest.mark.mostly_slow(1)
@pytest.mark.parametrize("memory", [0.0, None])
def test_memory_changes_no_score(memory: float | None, tmp_path: Path) -> None:
    """With little memory queries go back through training one after another, else together."""
    trainer, _ = recorded(tmp_path, normalised, with_everything)
    report = trainer.influence(query(5), through="training", per_example=True, memory=memory)
    singly = [
        trainer.influence([tensor[i : i + 1] for tensor in query(5)], through="training").scores[0] for i in range(5)
    ]
    assert (report.scores - torch.stack(singly)).abs().max() < 1e-10 * report.scores.abs().max()


def test_scores_of_some_examples_are_those_of_all(tmp_path: Path) -> None:
    trainer, module = recorded(tmp_path, net, of_kind(SGD, lr=0.1))
    before, whole = weights_of(module), trainer.influence(query(), through="training")
    some = trainer.influence(query(), through="training", among=[4, 2, 9])
    assert torch.equal(some.indices, torch.tensor([4, 2, 9]))
    assert torch.equal(some.scores, whole.scores[:, [4, 2, 9]])
    few = trainer.influence(query(), through="training", keep=2, k=2)
    assert torch.equal(few.proponents(2).indices, whole.proponents(2).indices)
    assert few.by_epoch is not None
    assert whole.by_epoch is not None
    assert torch.equal(few.by_epoch[0], whole.by_epoch[0][:, few.indices[0]])
    few.save(tmp_path / "few")
    loaded = InfluenceReport.load(tmp_path / "few").by_epoch
    assert loaded is not None
    assert torch.equal(loaded, few.by_epoch)
    after = weights_of(module)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_text_says_what_the_scores_are_about(tmp_path: Path) -> None:
    trainer, _ = recorded(tmp_path, net, of_kind(SGD, lr=0.1))
    report = trainer.influence(query(), through="training")
    assert "the exact derivative through the 15 optimizer steps of this run, which were replayed bit for bit" in str(
        report
    )
    assert "if the example were left out of this run" in str(report)
    assert "leave_outs=4 replays the run" in str(report)
    assert not report.is_self_influence
    assert report.summary()["n_queries"] == 1


def test_the_curves_of_the_strongest_examples_are_drawn(tmp_path: Path) -> None:
    trainer, _ = recorded(tmp_path, net, of_kind(SGD, lr=0.1))
    report = trainer.influence(query(), through="training", per_example=True)
    assert report.by_epoch is not None
    figure = report.plot_by_epoch(1, k=2, path=tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
    lines = figure.axes[0].lines[:4]
    strongest = [*report.proponents(2).indices[1].tolist(), *report.opponents(2).indices[1].tolist()]
    for line, number in zip(lines, strongest, strict=True):
        assert line.get_label().startswith(f"{number} (")
        assert torch.equal(torch.as_tensor(line.get_ydata()).double(), report.by_epoch[1, :, number])


def test_the_curves_need_parts_by_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _ = recorded(tmp_path, net, of_kind(SGD, lr=0.1))
    trainer.influence(query(), through="training", keep=2, k=2).plot_by_epoch()
    trainer.influence(query(), through="training", among=range(5)).plot_by_epoch()
    monkeypatch.setattr("lightning_gif.trajectory.influence._MOST_BYTES_OF_PARTS", 8)
    many = trainer.influence(query(), through="training")
    with pytest.raises(ConfigurationError, match=r"through='training'\) have them, if the parts take at most 128 MiB"):
        many.plot_by_epoch()


@pytest.mark.mostly_slow(3)
@pytest.mark.parametrize("name", NETS)
def test_scores_are_slopes_for_networks_of_every_kind(name: str, tmp_path: Path) -> None:
    """Also with attention, recurrent layers and dropout."""
    made, data = make(name, 24)
    data = TensorDataset(*(value.double() if value.is_floating_point() else value for value in data.tensors))
    callback = GIFCallback(trajectory=str(tmp_path), snapshots=0)
    trainer = make_trainer(callback, precision="64-true")
    trainer.fit(Adapted(made).double(), loader(data, batch_size=5))
    asked = batch_of(data, slice(3))
    report = trainer.influence(asked, through="training", per_example=True)
    assert report.settings["replay_difference"] == 0
    with callback.open_session(callback.settings, "batch") as session:
        replay, examples = Replay(session.objective, session.train, Trajectory.open(tmp_path)), session.examples(asked)
        ends = []
        for change in (1e-4, -1e-4):
            weights = torch.ones(24, dtype=torch.float64)
            weights[7] += change
            end = replay.weighted_end(weights)
            ends.append(measured_at(session.objective, examples, end, per_example=True))
    slopes = (ends[0] - ends[1]) / 2e-4
    assert (report.scores[:, 7] + slopes).abs().max() < 1e-4 * slopes.abs().max()


class Adapted(Classifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return AdamW(self.parameters(), 0.02, eps=1e-3)


@pytest.mark.parametrize(
    ("smoothness", "words"),
    [
        (0.95, "is smooth: the scores should predict it, with a correlation of about 0.9"),
        (0.8, "is smooth in part"),
        (0.3, "is not smooth: the scores do not predict it.*use the default influence"),
    ],
)
def test_the_verdict_follows_from_the_smoothness(smoothness: float, words: str) -> None:
    changes = torch.arange(6.0, dtype=torch.float64).reshape(2, 3)
    found = LeaveOuts(0.05, changes, 2 * changes, [smoothness] * 3)
    assert re.search(words, str(found))
    assert found.correlation == pytest.approx(1)
    assert found.summary() == {"smoothness": pytest.approx(smoothness), "leave_out_correlation": pytest.approx(1)}
    few = LeaveOuts(0.05, changes[:, :2], changes[:, :2], [smoothness] * 2)
    assert few.correlation is None
    assert "correlation of predicted and measured" not in str(few)


def test_a_straight_change_is_smooth_and_one_that_turns_back_is_not() -> None:
    start, step = torch.zeros(4), torch.tensor([1.0, -2.0, 3.0, 0.0])
    assert smoothness_of(start, step, 2 * step) == 1
    assert smoothness_of(start, 2 * step, step) == -1
    assert smoothness_of(start, start, start) == 1


def biassed() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.SiLU(), nn.Linear(5, 3))


class PerEpoch(WeightAveraging):
    """Averages after each epoch, and after the steps of the last one."""

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is None or step_idx > 10


@pytest.mark.mostly_slow(1)
@pytest.mark.parametrize(
    "average",
    [
        lambda: WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.8)),
        lambda: WeightAveraging(avg_fn=get_ema_avg_fn(0.7), use_buffers=False),
        PerEpoch,
    ],
)
def test_scores_at_averaged_weights_are_slopes_of_their_fits(average: Any, tmp_path: Path) -> None:
    def fit(folder: Path | None, weights: Tensor | None = None) -> tuple[Any, Any]:
        return recorded(folder, biassed, of_kind(AdamW, lr=0.02, eps=1e-3), weights, more=(average(),))

    trainer, module = fit(tmp_path / "run")
    x, y, _ = query()
    assert not torch.equal(
        module.net[0].weight, Trajectory.open(tmp_path / "run").state(trainer.global_step).weights["net.0.weight"]
    )
    report = trainer.influence(query(), through="training", leave_outs=1)
    for number in (0, 7, 13):
        losses = []
        for weight in (1 + 1e-5, 1 - 1e-5):
            weights = torch.ones(N, dtype=torch.float64)
            weights[number] = weight
            _, other = fit(None, weights)
            with torch.no_grad():
                losses.append(float(F.cross_entropy(other.eval()(x), y)))
        slope = (losses[0] - losses[1]) / 2e-5
        assert float(report.scores[0, number]) == pytest.approx(-slope, rel=1e-5, abs=1e-9)
    assert report.leave_outs is not None
    (chosen,) = draws(N, 1)
    weights = torch.ones(N, dtype=torch.float64)
    weights[chosen] = 0.0
    _, other = fit(None, weights)
    with torch.no_grad():
        change = float(F.cross_entropy(other.eval()(x), y) - F.cross_entropy(module.eval()(x), y))
    assert float(report.leave_outs.measured) == pytest.approx(change, rel=1e-6)
    # The same run at its last weights.
    last = Trajectory.open(tmp_path / "run").state(trainer.global_step)
    module.load_state_dict({**last.weights, **last.others})
    plain, _ = recorded(tmp_path / "plain", biassed, of_kind(AdamW, lr=0.02, eps=1e-3))
    expected = plain.influence(query(), through="training").scores
    assert torch.allclose(trainer.influence(query(), through="training").scores, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [{"every_n_train_steps": 5}, {"save_on_train_epoch_end": False}, {}])
def test_averages_are_recorded_whenever_checkpoints_are_saved(options: dict[str, Any], tmp_path: Path) -> None:
    scores = []
    for name in ("plain", "saved"):
        keep = (ModelCheckpoint(tmp_path / "checkpoints", **options),) if name == "saved" else ()
        trainer, _ = recorded(tmp_path / name, biassed, of_kind(AdamW, lr=0.02, eps=1e-3), more=(PerEpoch(), *keep))
        assert len(Trajectory.open(tmp_path / name).averages()) > 3
        report = trainer.influence(query(), through="training")
        assert report.settings["replay_difference"] < 1e-12
        scores.append(report.scores)
    assert torch.equal(*scores)


def decaying() -> Callable[..., Any]:
    count = [0]

    def average(old: Tensor, new: Tensor, number: Tensor) -> Tensor:
        count[0] += 1
        return old + (new - old) / count[0]

    return average


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda old, new, count: 0.5 * old + 0.4 * new, "does not return a weighted mean"),
        (decaying(), "may keep a state of its own"),
    ],
)
def test_an_average_that_cannot_be_replayed_is_refused(function: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=rf"{reason}.* Use get_ema_avg_fn of torch.optim.swa_utils"):
        recorded(tmp_path, net, of_kind(SGD, lr=0.1), more=(WeightAveraging(avg_fn=function),))


def test_an_average_that_depends_on_the_shape_is_noticed(tmp_path: Path) -> None:
    average = WeightAveraging(avg_fn=lambda old, new, count: old + (new - old) / (1 + old.numel()))
    trainer, _ = recorded(tmp_path, net, of_kind(SGD, lr=0.1), more=(average,))
    with pytest.raises(ConfigurationError, match="at the end its averaged weights differ from the recorded ones"):
        trainer.influence(query(), through="training")

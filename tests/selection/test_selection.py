"""Selectors on neurons with known statistics, and the statistics against a direct computation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_gif import SELECTORS, ConfigurationError, SelectionError
from lightning_gif.selection import GradientStatistics, Layer, NeuronStatistics, energy_of, select, whole_neurons
from lightning_gif.selection.statistics import neuron_layers

IN_EACH_LAYER = [name for name in SELECTORS if energy_of(name) is None]

LAYERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(6, 10),
    "linear without bias": lambda: nn.Linear(6, 10, bias=False),
    "conv1d": lambda: nn.Conv1d(4, 10, 3),
    "conv2d": lambda: nn.Conv2d(4, 10, 3),
    "conv2d in groups": lambda: nn.Conv2d(4, 10, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(10, 10, 3, groups=10, bias=False),
    "conv3d": lambda: nn.Conv3d(2, 10, (1, 3, 2)),
}


def layer_of(module: nn.Module) -> Layer:
    fan_in = module.weight[0].numel()  # type: ignore[index, union-attr]
    neurons = torch.tensor([3.0, 9.0, 1.0, 7.0, 0.0, 5.0, 8.0, 2.0, 6.0, 4.0])
    size = 10 * (fan_in + (module.bias is not None))
    return Layer("", 10, fan_in, module.bias is not None, neurons, neurons.flip(0), torch.rand(size))


def neurons_of(layer: Layer, entries: Tensor) -> set[int]:
    weights = entries[entries < layer.neurons * layer.fan_in]
    return set((weights // layer.fan_in).tolist())


@pytest.mark.parametrize("name", IN_EACH_LAYER)
@pytest.mark.parametrize("kind", list(LAYERS))
@pytest.mark.parametrize("ratio", [0.03, 0.25, 0.5])
def test_every_selector_picks_the_given_share(name: str, kind: str, ratio: float) -> None:
    layer = layer_of(LAYERS[kind]())
    entries = SELECTORS[name](layer, ratio, torch.Generator().manual_seed(0))
    budget = int(ratio * layer.size)
    # The two selectors that draw weights and biases separately count them separately.
    least = budget - 1 if name in ("random", "threshold") else budget
    assert least <= len(entries) <= budget
    assert len(entries.unique()) == len(entries)
    assert not len(entries) or (entries.min() >= 0 and entries.max() < layer.size)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("highest_k_outputs", [1, 6, 3]),
        ("lowest_k_outputs", [4, 2, 7]),
        ("highest_k_gradients", [8, 3, 6]),
        ("lowest_k_gradients", [5, 7, 2]),
    ],
)
@pytest.mark.parametrize("kind", list(LAYERS))
def test_whole_neurons_are_picked_by_rank_and_the_next_one_in_part(name: str, expected: list[int], kind: str) -> None:
    layer = layer_of(LAYERS[kind]())
    each = layer.fan_in + layer.bias
    ratio = (2 * each + 3) / layer.size + 1e-9  # two neurons, and three weights of the third
    entries = SELECTORS[name](layer, ratio, torch.Generator().manual_seed(0))
    chosen = set(entries.tolist())
    for neuron in expected[:2]:
        assert set(layer.weights_of(neuron).tolist()) <= chosen
        assert not layer.bias or layer.neurons * layer.fan_in + neuron in chosen
    leftover = chosen - {e for n in expected[:2] for e in layer.weights_of(n).tolist()}
    weights = [e for e in leftover if e < layer.neurons * layer.fan_in]
    assert {e // layer.fan_in for e in weights} == {expected[2]}
    assert len(weights) == 3


@pytest.mark.parametrize("kind", ["outputs", "gradients"])
def test_exclusive_selectors_stay_outside_of_the_top(kind: str) -> None:
    layer = layer_of(nn.Linear(6, 10))
    top = neurons_of(layer, SELECTORS[f"highest_k_{kind}"](layer, 0.3, torch.Generator()))
    seen = set()
    for seed in range(20):
        entries = SELECTORS[f"exclusive_k_{kind}"](layer, 0.3, torch.Generator().manual_seed(seed))
        assert not neurons_of(layer, entries) & top
        seen |= neurons_of(layer, entries)
    assert seen == set(range(10)) - top  # any of the others may be drawn


def test_threshold_draws_from_the_neurons_with_the_largest_outputs() -> None:
    layer = layer_of(nn.Linear(6, 10))
    entries = SELECTORS["threshold"](layer, 0.2, torch.Generator().manual_seed(0))
    # All outputs except those of neurons 2 and 4 are above 1, the first threshold.
    assert neurons_of(layer, entries) <= set(range(10)) - {2, 4}
    small = Layer("", 10, 6, True, layer.outputs / 100 if layer.outputs is not None else None)
    entries = SELECTORS["threshold"](small, 0.2, torch.Generator().manual_seed(0))
    # It is lowered until two neurons (0.09 and 0.08) have enough weights. Steps of 0.01 admit no third neuron.
    assert neurons_of(small, entries) <= {1, 6}


def test_threshold_lowers_step_by_step_as_the_papers_scripts_do() -> None:
    for seed in range(50):
        outputs = torch.rand(12, generator=torch.Generator().manual_seed(seed)) * 1.3
        layer = Layer("", 12, 5, True, outputs)
        entries = SELECTORS["threshold"](layer, 0.3, torch.Generator().manual_seed(0))
        step = 0
        while (pool := (outputs.double() > 1.0 - 0.01 * step).nonzero()).numel() < int(0.3 * 60) / 5:
            step += 1
        assert neurons_of(layer, entries) <= set(pool.squeeze(1).tolist())


def test_random_draws_weights_one_by_one() -> None:
    layer = layer_of(nn.Linear(60, 10))
    entries = SELECTORS["random"](layer, 0.1, torch.Generator().manual_seed(0))
    assert neurons_of(layer, entries) == set(range(10))


def test_largest_gradients_picks_the_largest_entries() -> None:
    layer = layer_of(nn.Linear(6, 10))
    assert layer.entries is not None
    entries = SELECTORS["largest_gradients"](layer, 0.2, torch.Generator())
    assert set(entries.tolist()) == set(layer.entries.topk(14).indices.tolist())


def test_dead_neurons_are_picked_in_order() -> None:
    layer = Layer("", 5, 2, False, torch.zeros(5), torch.zeros(5))
    assert SELECTORS["highest_k_outputs"](layer, 0.4, torch.Generator()).tolist() == [0, 1, 2, 3]


def test_the_user_can_register_a_selector() -> None:
    @SELECTORS.register("first neurons")
    def first(layer: Layer, ratio: float, generator: torch.Generator) -> Tensor:
        return whole_neurons(layer, range(layer.neurons), ratio, generator)

    try:
        found = select(nn.Sequential(nn.Linear(3, 4)), "first neurons", 0.5)
        assert found["0.weight"].tolist() == [0, 1, 2, 3, 4, 5]
        assert found["0.bias"].tolist() == [0, 1]
        with pytest.raises(ConfigurationError, match="registered already"):
            SELECTORS.register("first neurons")(first)
    finally:
        del SELECTORS._items["first neurons"]


# ----------------------------------------------------------------------------------------------------------------------
# A whole model
# ----------------------------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Every kind of layer that selectors must support."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.conv = nn.Conv1d(8, 6, 3, padding=1)
        self.batch_norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embedding(tokens))
        x, _ = self.attention(x, x, x, need_weights=False)
        return self.head(self.batch_norm(self.conv(x.transpose(1, 2))).mean(2))


def observed(module: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[NeuronStatistics, GradientStatistics]:
    neurons, gradients = NeuronStatistics(), GradientStatistics()
    neurons.attach(module)
    neurons.record(targets, len(targets))
    F.cross_entropy(module(inputs), targets).backward()
    neurons.detach()
    gradients.add((name, parameter.grad) for name, parameter in module.named_parameters())
    return neurons, gradients


@pytest.mark.parametrize("selector", IN_EACH_LAYER)
def test_the_same_seed_picks_the_same_parameters(selector: str) -> None:
    module = Mixed()
    neurons, gradients = observed(module, torch.randint(7, (9, 5)), torch.arange(9) % 3)
    # MultiheadAttention calls its output projection by its weight, not as a layer: it has no statistics.
    options: dict[str, Any] = {"neurons": neurons, "gradients": gradients, "allowed": ["conv.*", "head.*"]}
    first = select(module, selector, 0.45, seed=1, **options)
    torch.rand(3)  # the global generator has no effect
    again = select(module, selector, 0.45, seed=1, **options)
    assert first.jaccard(again) == 1
    assert {"conv.weight", "head.weight"} <= set(first) <= {"conv.weight", "conv.bias", "head.weight", "head.bias"}
    if selector != "largest_gradients":
        assert first.jaccard(select(module, selector, 0.45, seed=2, **options)) < 1


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["batch_norm.*"], {"batch_norm.weight", "batch_norm.bias"}),
        (["norm.weight"], {"norm.weight"}),
        (["embedding.weight"], {"embedding.weight"}),
        (["attention.*weight"], {"attention.in_proj_weight", "attention.out_proj.weight"}),
        ("head.*", {"head.weight", "head.bias"}),
    ],
)
def test_parameters_of_any_layer_can_be_named(patterns: Any, expected: set[str]) -> None:
    module = Mixed()
    found = select(module, patterns, 0.1)
    parameters = dict(module.named_parameters())
    assert set(found) == expected
    assert all(len(entries) == parameters[name].numel() for name, entries in found.items())


def test_a_name_that_matches_nothing_suggests_the_nearest() -> None:
    with pytest.raises(SelectionError, match=r"'head\.wieght' matches no trainable parameter.*'head\.weight'"):
        select(Mixed(), ["head.wieght"], 0.1)


def test_frozen_parameters_of_a_layer_are_not_picked() -> None:
    module = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2))
    module[0].weight.requires_grad_(False)
    module[1].requires_grad_(False)
    module[2].bias.requires_grad_(False)
    found = select(module, "random", 0.5)
    assert {name: len(entries) for name, entries in found.items()} == {"0.bias": 3, "2.weight": 5}


def test_a_shared_layer_and_a_tied_weight_count_once() -> None:
    shared = nn.Linear(4, 4)
    module = nn.Sequential(shared, nn.ReLU(), shared)
    tied = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    tied["head"].weight = tied["embedding"].weight
    assert set(select(module, "random", 0.5)) == {"0.weight", "0.bias"}
    assert set(select(tied, "random", 0.5)) == {"embedding.weight"}


def test_a_missing_statistic_raises_with_a_remedy() -> None:
    with pytest.raises(SelectionError, match=r"gradients of layer '0'.*targets='batch'"):
        select(nn.Sequential(nn.Linear(3, 4)), "highest_k_gradients", 0.5)
    with pytest.raises(SelectionError, match="cache_gradients=False"):
        select(nn.Sequential(nn.Linear(3, 4)), "largest_gradients", 0.5, gradients=GradientStatistics())


# ----------------------------------------------------------------------------------------------------------------------
# Statistics
# ----------------------------------------------------------------------------------------------------------------------

NETS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)), (5,)),
    "conv": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(36, 3)),
        (2, 5, 5),
    ),
    "tokens": (lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3)), (6, 5)),
}


@pytest.mark.parametrize("net", list(NETS))
def test_statistics_equal_directly_computed_means_over_each_class(net: str) -> None:
    make, shape = NETS[net]
    module = make().double()
    x, y = torch.randn(11, *shape, dtype=torch.float64), torch.tensor([0, 2, 2, 1, 0, 2, 1, 1, 0, 0, 2])
    neurons = NeuronStatistics()
    neurons.attach(module)
    for start, stop in ((0, 4), (4, 8), (8, 11)):  # a ragged last batch
        neurons.record(y[start:stop], stop - start)
        F.cross_entropy(module(x[start:stop]), y[start:stop]).backward()
    neurons.detach()

    for name, layer in neuron_layers(module).items():
        values, slopes = [], []
        for i in range(11):  # one example at a time, with its own loss
            kept: list[Tensor] = []
            handle = layer.register_forward_hook(lambda m, a, out, kept=kept: kept.append(out) or out.clone())
            loss = F.cross_entropy(module(x[i : i + 1]), y[i : i + 1])
            handle.remove()
            (slope,) = torch.autograd.grad(loss, kept[0])
            channel = 1 if isinstance(layer, nn.Conv2d) else -1
            values.append(kept[0][0].movedim(channel - (channel == 1), -1).reshape(-1, slope.shape[channel]).mean(0))
            slopes.append(slope[0].movedim(channel - (channel == 1), -1).reshape(-1, slope.shape[channel]).mean(0))
        for kind, direct in (("outputs", values), ("gradients", slopes)):
            stacked = torch.stack(direct).detach()
            for classes in (None, [0], [1, 2]):
                rows = torch.ones(11, dtype=torch.bool) if classes is None else torch.isin(y, torch.tensor(classes))
                found = neurons.mean(kind, name, classes)
                assert found is not None
                torch.testing.assert_close(found, stacked[rows].mean(0))
    assert neurons.mean("outputs", "0", [7]) is None


def test_nothing_is_recorded_while_paused_or_without_gradients() -> None:
    module = NETS["mlp"][0]()
    neurons = NeuronStatistics()
    neurons.attach(module)
    module(torch.randn(3, 5))
    neurons.record(None, 3)
    with torch.no_grad():
        module(torch.randn(3, 5))
    neurons.pause()
    module(torch.randn(3, 5)).sum().backward()
    assert not neurons


def test_memory_is_proportional_to_neurons_times_classes() -> None:
    module = NETS["mlp"][0]()
    neurons = NeuronStatistics()
    neurons.attach(module)
    for _ in range(5):
        neurons.record(torch.randint(3, (64,)), 64)
        module(torch.randn(64, 5)).sum().backward()
    assert neurons.outputs["0"].shape == (4, 4)
    assert sum(t.numel() for part in neurons.state().values() for t in part.values()) == 2 * (7 + 2) * 4


def test_gradient_statistics_are_root_mean_squares_over_steps() -> None:
    statistics = GradientStatistics()
    rows = torch.randn(5, 3)
    for row in rows:
        statistics.add([("a", row), ("b", None)])
    statistics.add([("a", torch.tensor([1.0, torch.nan, 0.0]))])  # skipped
    found = statistics.root_mean_square("a")
    assert found is not None
    torch.testing.assert_close(found, rows.square().mean(0).sqrt())
    assert statistics.root_mean_square("b") is None


def test_a_batch_with_outputs_that_are_not_finite_is_ignored_for_these_layers() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    neurons = NeuronStatistics()
    neurons.attach(module)
    good = torch.randn(4, 2)
    for x in (good, torch.full((4, 2), torch.inf)):
        neurons.record(torch.tensor([0, 1, 1, 0]), 4)
        module(x).sum().backward()
    neurons.detach()
    assert neurons.output_counts["0"].tolist() == [0, 2, 2]
    torch.testing.assert_close(neurons.mean("outputs", "0", [1]), module[0](good).detach()[1:3].mean(0))


def test_statistics_survive_a_checkpoint(tmp_path: Any) -> None:
    module = Mixed()
    neurons, gradients = observed(module, torch.randint(7, (9, 5)), torch.arange(9) % 3)
    torch.save({"n": neurons.state(), "g": gradients.state()}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    others = NeuronStatistics(), GradientStatistics()
    others[0].load_state(state["n"], module)
    others[1].load_state(state["g"], module)
    for kind in ("outputs", "gradients"):
        torch.testing.assert_close(others[0].mean(kind, "head", [1]), neurons.mean(kind, "head", [1]))
    torch.testing.assert_close(others[1].root_mean_square("head.bias"), gradients.root_mean_square("head.bias"))


def gathered(module: nn.Module, batches: list[tuple[Tensor, Tensor | None]]) -> NeuronStatistics:
    neurons = NeuronStatistics()
    neurons.attach(module)
    for x, y in batches:
        neurons.record(y, len(x))
        module(x).sum().backward()
        if y is not None:
            y.zero_()  # as a step may do
    neurons.detach()
    return neurons


def test_sums_of_many_batches_are_those_of_each_and_of_the_values_at_the_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Sequential(nn.Conv1d(1, 3, 2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, 2), nn.ReLU(True))
    xs = [torch.randn(size, 1, 5) for size in (4, 3, 4, 2)]
    ys = [torch.randint(4, (len(x),)) for x in xs]
    ys[3] = torch.zeros(1, dtype=torch.long)  # not one label for each example

    def found() -> dict[str, dict[str, Tensor]]:
        return gathered(module, [(x, y.clone()) for x, y in zip(xs, ys, strict=True)]).state()

    together = found()
    monkeypatch.setattr("lightning_gif.selection.statistics._KEPT", 0)
    alone = found()
    torch.testing.assert_close(together, alone)
    labels, outputs = torch.cat(ys[:3]), module[0](torch.cat(xs[:3])).detach().mean(2)
    for label in range(4):
        torch.testing.assert_close(together["outputs"]["0"][label + 1], outputs[labels == label].sum(0))
    torch.testing.assert_close(together["outputs"]["0"][0], module[0](xs[3]).detach().mean(2).sum(0))


def test_batches_are_summed_before_many_values_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_gif.selection.statistics._KEPT", 100)
    module, neurons, most = nn.Linear(3, 5), NeuronStatistics(), 0
    neurons.attach(nn.Sequential(module))
    for size in (*[4] * 20, 400):  # the last batch alone has many values
        neurons.record(None, size)
        module(torch.randn(size, 3)).sum().backward()
        most = max(most, sum(one.values.numel() for one in neurons._read))
    assert 0 < most <= 100
    assert neurons.output_counts["0"].tolist() == [480]

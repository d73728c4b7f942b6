"""Metrics of unlearning: closed forms, bounds, symmetry, and the same value however examples are split and ordered."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from scipy.spatial.distance import jensenshannon  # type: ignore[import-untyped]
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.utilities.data import dim_zero_cat

from lightning_gif.errors import ConfigurationError
from lightning_gif.metrics import (
    AccuracyGap,
    JensenShannonDivergence,
    MembershipInference,
    PredictionAgreement,
    RelabelF1,
    RelearnTime,
    RemovalF1,
)

N, C = 41, 5
Batch = dict[str, Tensor]


def _logits(seed: int, n: int = N) -> Tensor:
    return 3 * torch.randn(n, C, generator=torch.Generator().manual_seed(seed))


def _whole(seed: int, below: int, n: int = N) -> Tensor:
    return torch.randint(below, (n,), generator=torch.Generator().manual_seed(seed))


PREDS, REFERENCE, TARGET, MASK = _logits(1), _logits(2), _whole(3, C), _whole(4, 2).bool()

# The constructor and one set of inputs of each metric. The order of examples has no effect on these.
METRICS: dict[str, tuple[Callable[[], Metric], Batch]] = {
    "removal": (lambda: RemovalF1([0, 3]), {"preds": PREDS, "target": TARGET}),
    "relabel": (RelabelF1, {"preds": PREDS, "target": TARGET, "relabelled": MASK}),
    "gap": (AccuracyGap, {"preds": PREDS, "reference": REFERENCE, "target": TARGET}),
    "agreement": (PredictionAgreement, {"preds": PREDS, "reference": REFERENCE}),
    "divergence": (JensenShannonDivergence, {"preds": PREDS, "reference": REFERENCE}),
    "membership": (MembershipInference, {"preds": PREDS, "target": TARGET, "member": MASK}),
    "confidence": (
        lambda: MembershipInference(score="confidence"),
        {"preds": PREDS, "target": TARGET, "member": MASK},
    ),
}
every_metric = pytest.mark.parametrize("name", list(METRICS))


def _value(metric: Metric, *batches: Batch) -> Tensor:
    for batch in batches:
        metric.update(**batch)
    return metric.compute()


def _fresh(name: str) -> tuple[Metric, Batch]:
    make, batch = METRICS[name]
    return make(), batch


def _rows(batch: Batch, rows: Any) -> Batch:
    return {name: tensor[rows] for name, tensor in batch.items()}


def _of_all_ranks(*ranks: Metric) -> Tensor:
    """The value in the first of several processes. Reading the others' states replaces the exchange."""

    def sent(metric: Metric) -> list[Tensor]:
        states = metric.metric_state.values()
        return [(dim_zero_cat(s) if s else torch.tensor([])) if isinstance(s, list) else s for s in states]

    exchanged = iter(zip(*map(sent, ranks), strict=True))

    def gather(state: Tensor, group: Any = None) -> list[Tensor]:
        states = list(next(exchanged))
        assert torch.equal(state, states[0])
        assert len({state.dtype for state in states}) == 1  # processes can exchange tensors only
        return states

    metric = ranks[0].clone()
    metric.dist_sync_fn, metric.distributed_available_fn = gather, lambda: True
    return metric.compute()


# --- All metrics


@every_metric
@pytest.mark.parametrize("sizes", [[N], [1] * N, [7, 0, 20, 14], [40, 1]])
def test_batches_of_any_size_in_any_order_give_the_same_value(name: str, sizes: list[int]) -> None:
    make, batch = METRICS[name]
    whole = _value(make(), batch)
    shuffled = torch.randperm(N, generator=torch.Generator().manual_seed(len(sizes)))
    parts = [_rows(batch, rows) for rows in shuffled.split(sizes)]
    torch.testing.assert_close(_value(make(), *parts), whole, rtol=1e-6, atol=0)


@every_metric
def test_an_empty_batch_adds_nothing(name: str) -> None:
    make, batch = METRICS[name]
    empty = _rows(batch, slice(0, 0))
    assert torch.equal(_value(make(), empty, batch, empty), _value(make(), batch))


@every_metric
def test_several_processes_give_the_value_of_one(name: str) -> None:
    make, batch = METRICS[name]
    ranks = [make() for _ in range(3)]
    for rank, rows in zip(ranks, torch.arange(N).split([30, 10, 1]), strict=True):
        rank.update(**_rows(batch, rows))
    whole = _value(make(), batch)
    torch.testing.assert_close(_of_all_ranks(*ranks), whole, rtol=1e-6, atol=0)
    ranks[0].merge_state(ranks[1])
    ranks[0].merge_state(ranks[2])
    torch.testing.assert_close(ranks[0].compute(), whole, rtol=1e-6, atol=0)


@every_metric
def test_a_process_may_have_no_examples(name: str) -> None:
    make, batch = METRICS[name]
    used = make()
    whole = _value(used, batch)
    torch.testing.assert_close(_of_all_ranks(used, make()), whole, rtol=1e-6, atol=0)


@every_metric
def test_forward_returns_the_value_of_the_batch_and_adds_it(name: str) -> None:
    make, batch = METRICS[name]
    metric, parts = make(), [_rows(batch, slice(0, 25)), _rows(batch, slice(25, None))]
    for part in parts:
        torch.testing.assert_close(metric(**part), _value(make(), part))
    torch.testing.assert_close(metric.compute(), _value(make(), batch), rtol=1e-6, atol=0)


@every_metric
def test_without_examples_the_value_is_nan(name: str) -> None:
    metric = METRICS[name][0]()
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert metric.compute().isnan()
    assert _value(metric, _rows(METRICS[name][1], slice(0, 0))).isnan()


@every_metric
def test_reset_copies_and_pickles(name: str) -> None:
    make, batch = METRICS[name]
    metric = make()
    value = _value(metric, batch)
    for other in (metric.clone(), copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert torch.equal(other.compute(), value)
    metric.reset()
    part = _rows(batch, slice(0, 25))
    assert torch.equal(_value(metric, part), _value(make(), part))


@every_metric
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_low_precision_inputs_are_computed_without_further_rounding(name: str, dtype: torch.dtype) -> None:
    make, batch = METRICS[name]
    rounded = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in batch.items()}
    exact = {key: tensor.double() if tensor.is_floating_point() else tensor for key, tensor in rounded.items()}
    assert torch.equal(_value(make(), rounded), _value(make(), exact))
    assert _value(make(), rounded).dtype == torch.float32


@every_metric
def test_states_of_inference_mode_can_be_used_outside(name: str) -> None:
    make, batch = METRICS[name]
    metric = make()
    with torch.inference_mode():
        metric.update(**batch)
        metric.reset()
        metric.update(**batch)
    torch.testing.assert_close(_value(metric, batch), _value(make(), batch, batch))


@pytest.fixture
def half_precision() -> Iterator[None]:
    """The default type while a Trainer of precision ``bf16-true`` builds and runs a module."""
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@every_metric
@pytest.mark.parametrize("cast", [nn.Module.bfloat16, lambda module: module.to(torch.bfloat16)])
def test_values_keep_their_precision_in_a_half_precision_model(
    name: str, cast: Callable[[nn.Module], Any], half_precision: None
) -> None:
    make, batch = METRICS[name]
    metric = make()
    cast(nn.ModuleList([metric]))
    value = _value(metric, batch, batch)
    torch.set_default_dtype(torch.float32)
    assert torch.equal(value, _value(make(), batch, batch))


def test_relearn_steps_keep_their_precision_in_a_half_precision_model(half_precision: None) -> None:
    metric = RelearnTime(target=0.0).to(torch.bfloat16)
    for step in range(260):
        metric.update(259.0 - step)
    assert metric.compute().item() == 259


@every_metric
def test_updates_keep_no_graph(name: str) -> None:
    make, batch = METRICS[name]
    metric = make()
    for _ in range(2):
        metric.update(**{**batch, "preds": batch["preds"].clone().requires_grad_()})
    states = [dim_zero_cat(state) for state in metric.metric_state.values()]
    assert not any(state.requires_grad for state in states)


@every_metric
def test_values_lie_within_the_bounds_of_the_plot(name: str) -> None:
    make, batch = METRICS[name]
    metric = make()
    low, high = metric.plot_lower_bound, metric.plot_upper_bound
    assert low is not None
    assert high is not None
    for rows in torch.arange(N).split(10):
        value = metric(**_rows(batch, rows))
        assert value.isnan() or low <= value <= high


@pytest.mark.parametrize("name", [*METRICS, "relearn"])
def test_plots_draw_one_value_or_several(name: str) -> None:
    make, batch = METRICS.get(name, (lambda: RelearnTime(target=0.5), {"value": torch.tensor(0.4)}))
    metric = make()
    values = [metric(**batch), metric(**batch)]
    figure, axes = metric.plot()
    assert axes.get_ylabel() == type(metric).__name__
    plt.close(figure)
    own = Figure().subplots()
    assert metric.plot(values, ax=own) == (None, own)
    assert np.size(own.lines[0].get_ydata()) == 2


def test_metrics_of_the_same_inputs_can_be_collected() -> None:
    metrics = MetricCollection([AccuracyGap(), PredictionAgreement(), JensenShannonDivergence()])
    values = metrics(preds=PREDS, reference=PREDS, target=TARGET)
    assert {name: float(value) for name, value in values.items()} == {
        "AccuracyGap": 0.0,
        "PredictionAgreement": 1.0,
        "JensenShannonDivergence": 0.0,
    }


@pytest.mark.parametrize("name", ["removal", "relabel", "gap", "agreement"])
def test_logits_probabilities_and_labels_are_the_same_predictions(name: str) -> None:
    make, batch = METRICS[name]
    value = _value(make(), batch)
    for given in (PREDS.softmax(1), PREDS.log_softmax(1), PREDS.argmax(1), PREDS.argmax(1).to(torch.uint8)):
        assert torch.equal(_value(make(), {**batch, "preds": given}), value)


# --- F1


def _f1(first: float, second: float) -> float:
    return 2 * first * second / (first + second) if first + second else 0.0


@pytest.mark.parametrize("classes", [0, [0, 3], {4}, (1, 2, 1), range(1, 5), torch.tensor([2, 0]), np.array([1])])
def test_removal_f1_is_the_harmonic_mean_of_its_definition(classes: Any) -> None:
    forgotten = torch.isin(TARGET, torch.tensor([classes] if isinstance(classes, int) else [int(c) for c in classes]))
    right = PREDS.argmax(1) == TARGET
    expected = _f1(1 - right[forgotten].double().mean().item(), right[~forgotten].double().mean().item())
    assert _value(RemovalF1(classes), METRICS["removal"][1]).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("preds", "expected"),
    [
        ([1, 2, 1, 2], 1.0),  # forgotten, all others are correct
        ([0, 0, 1, 2], 0.0),  # nothing forgotten
        ([1, 1, 2, 1], 0.0),  # everything forgotten
        ([0, 0, 2, 1], 0.0),  # both shares are 0: their harmonic mean is taken as its limit
        ([1, 0, 1, 2], 2 / 3),
    ],
)
def test_removal_f1_takes_a_single_class(preds: list[int], expected: float) -> None:
    assert RemovalF1(0)(torch.tensor(preds), torch.tensor([0, 0, 1, 2])).item() == pytest.approx(expected)


def test_a_forgotten_class_predicted_as_another_forgotten_class_is_forgotten() -> None:
    assert RemovalF1([0, 1])(torch.tensor([1, 0, 2]), torch.tensor([0, 1, 2])) == 1


@pytest.mark.parametrize("target", [[1, 2, 1], [0, 0, 0]])
def test_removal_f1_is_nan_while_a_group_is_missing(target: list[int]) -> None:
    metric = RemovalF1(0)
    assert metric(torch.tensor([1, 2, 0]), torch.tensor(target)).isnan()
    metric.update(torch.tensor([1, 1]), torch.tensor([0, 1]))
    assert metric.compute().isfinite()


def test_relabel_f1_is_the_harmonic_mean_of_its_definition() -> None:
    right = (PREDS.argmax(1) == TARGET).double()
    expected = _f1(right[MASK].mean().item(), right[~MASK].mean().item())
    assert _value(*_fresh("relabel")).item() == pytest.approx(expected)
    assert RelabelF1()(TARGET, TARGET, MASK) == 1
    assert RelabelF1()(torch.where(MASK, (TARGET + 1) % C, TARGET), TARGET, MASK) == 0
    assert RelabelF1()(PREDS, TARGET, torch.zeros(N, dtype=torch.bool)).isnan()


# --- Comparison with a reference


def test_the_gap_is_a_difference_of_accuracies_in_percentage_points() -> None:
    ours, theirs = ((given.argmax(1) == TARGET).double().mean() for given in (PREDS, REFERENCE))
    assert _value(*_fresh("gap")).item() == pytest.approx(100 * (ours - theirs).item(), rel=1e-6)
    swapped = {"preds": REFERENCE, "reference": PREDS, "target": TARGET}
    assert _value(AccuracyGap(), swapped) == -_value(*_fresh("gap"))
    assert AccuracyGap()(TARGET, (TARGET + 1) % C, TARGET) == 100
    assert AccuracyGap()(PREDS, PREDS, TARGET) == 0


def test_agreement_is_the_share_of_equal_labels() -> None:
    assert PredictionAgreement()(PREDS, 2 * PREDS + 1) == 1
    assert PredictionAgreement()(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 1, 1])) == 0.5
    assert PredictionAgreement()(PREDS, REFERENCE) == PredictionAgreement()(REFERENCE, PREDS)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0, 2000.0])
@pytest.mark.parametrize("base", [math.e, 2, 10.0])
def test_the_divergence_is_the_square_of_scipys_distance(scale: float, base: float) -> None:
    p, q = ((scale * given.double()).softmax(1).numpy() for given in (PREDS, REFERENCE))
    expected = (jensenshannon(p, q, axis=1, base=base) ** 2).mean()
    found = JensenShannonDivergence(base=base)(scale * PREDS.double(), scale * REFERENCE.double())
    assert found.item() == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_the_divergence_of_two_coins_has_its_closed_form() -> None:
    """Of (1, 0) and (1 - a, a): ½ [(2 - a) ln(2 / (2 - a)) + (1 - a) ln(1 - a) + a ln 2], with 0 ln 0 = 0."""
    for a in (0.0, 1e-6, 0.25, 0.5, 1.0):
        of_zero = (1 - a) * math.log(1 - a) if a < 1 else 0.0
        expected = 0.5 * ((2 - a) * (math.log(2) - math.log(2 - a)) + of_zero + a * math.log(2))
        p, q = torch.tensor([[1.0, 0.0]]), torch.tensor([[1 - a, a]], dtype=torch.float64)
        found = JensenShannonDivergence(from_logits=False)(p, q)
        assert found.item() == pytest.approx(expected, rel=1e-5, abs=1e-15)


def test_the_divergence_is_symmetric_and_bounded() -> None:
    forth, back = JensenShannonDivergence(), JensenShannonDivergence()
    assert torch.equal(forth(PREDS, REFERENCE), back(REFERENCE, PREDS))
    assert JensenShannonDivergence()(PREDS, PREDS) == 0
    assert JensenShannonDivergence()(PREDS, PREDS + 7) < 1e-12  # a shift of all logits changes no probability
    apart = torch.eye(C).roll(1, 0)
    assert JensenShannonDivergence(from_logits=False)(torch.eye(C), apart).item() == pytest.approx(math.log(2))
    assert JensenShannonDivergence()(1e6 * torch.eye(C), 1e6 * apart).item() == pytest.approx(math.log(2))
    assert JensenShannonDivergence(from_logits=False, base=2)(torch.eye(C), apart) == 1
    assert JensenShannonDivergence(base=2).plot_upper_bound == 1


def test_masked_classes_have_probability_zero() -> None:
    masked, cut = PREDS.clone(), PREDS[:, 1:]
    masked[:, 0] = -math.inf
    other = REFERENCE.clone()
    other[:, 0] = -math.inf
    found = JensenShannonDivergence()(masked, other)
    torch.testing.assert_close(found, JensenShannonDivergence()(cut, REFERENCE[:, 1:]))
    assert JensenShannonDivergence()(masked, REFERENCE).isfinite()


def test_logits_log_probabilities_and_probabilities_are_the_same_distributions() -> None:
    value = JensenShannonDivergence()(PREDS.double(), REFERENCE.double())
    p, q = PREDS.double().softmax(1), REFERENCE.double().softmax(1)
    assert torch.equal(JensenShannonDivergence()(p.log(), q.log()), value)
    assert torch.equal(JensenShannonDivergence(from_logits=False)(p, q), value)
    half = JensenShannonDivergence(from_logits=False)(p.bfloat16(), q.bfloat16())  # rows sum to 1 only roughly
    torch.testing.assert_close(half, value, rtol=1e-2, atol=0)


def test_the_sum_of_many_small_divergences_is_not_rounded_away() -> None:
    """A sum in float32 would stop growing once the next term is below its rounding."""
    metric, near = JensenShannonDivergence(), PREDS + 1e-3 * REFERENCE
    small = _value(JensenShannonDivergence(), {"preds": PREDS, "reference": near})
    metric.update(torch.tensor([[40.0, -40.0]]).repeat(4096, 1), torch.tensor([[-40.0, 40.0]]).repeat(4096, 1))
    large = metric.total.clone()
    for _ in range(20):
        metric.update(PREDS, near)
    assert ((metric.total - large) / (20 * N)).item() == pytest.approx(small.item(), rel=1e-5)


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_the_divergence_is_differentiable(scale: float) -> None:
    """By the logits of p: ½ p (r - Σ p r) with r = ln(p / m), also where probabilities are 0."""
    preds = (scale * PREDS.double()).requires_grad_()
    JensenShannonDivergence()(preds, scale * REFERENCE.double()).backward()
    p, q = (scale * PREDS.double()).softmax(1), (scale * REFERENCE.double()).softmax(1)
    ratio = torch.where(p > 0, p / ((p + q) / 2), 1.0).log()
    expected = 0.5 * p * (ratio - (p * ratio).sum(1, keepdim=True)) / N
    torch.testing.assert_close(preds.grad, expected, rtol=1e-5, atol=1e-9)


# --- Membership inference


def _by_pairs(scores: Tensor, member: Tensor) -> float:
    """The area under the ROC curve: the share of ordered pairs, where ties count half."""
    difference = scores[member].double()[:, None] - scores[~member].double()
    return ((difference > 0).double() + 0.5 * (difference == 0).double()).mean().item()


def test_membership_counts_pairs_in_order() -> None:
    member = METRICS["membership"][1]["member"]
    losses = F.cross_entropy(PREDS.double(), TARGET, reduction="none")
    assert _value(*_fresh("membership")).item() == pytest.approx(_by_pairs(-losses, member))
    confidence = PREDS.double().softmax(1).amax(1)
    assert _value(*_fresh("confidence")).item() == pytest.approx(_by_pairs(confidence, member))
    assert binary_auroc(confidence, member.long()).item() == pytest.approx(_by_pairs(confidence, member))


@pytest.mark.parametrize("score", ["loss", "confidence"])
@pytest.mark.parametrize("margin", [0.01, 1.0, 12.0, 16.0])
def test_a_separating_attack_has_auroc_one_and_a_reversed_one_zero(score: Any, margin: float) -> None:
    """Also for losses of 1e-6 and below, as in a well-fitted network, where a sigmoid would cause ties."""
    size = torch.cat([margin + torch.rand(20), margin - 0.01 * torch.rand(30) - 1e-3])
    preds, target = torch.stack([size, -size], 1), torch.zeros(50, dtype=torch.long)
    member = torch.arange(50) < 20
    assert MembershipInference(score)(preds, target, member) == 1
    assert MembershipInference(score)(preds, target, ~member) == 0


@pytest.mark.parametrize("score", ["loss", "confidence"])
def test_equal_losses_have_auroc_one_half(score: Any) -> None:
    preds, target = torch.cat([PREDS, PREDS]), torch.cat([TARGET, TARGET])
    assert MembershipInference(score)(preds, target, torch.arange(2 * N) < N) == 0.5
    assert MembershipInference(score)(torch.zeros(N, C), TARGET, MASK) == 0.5


def test_swapping_the_groups_mirrors_the_auroc() -> None:
    forth, back = MembershipInference()(PREDS, TARGET, MASK), MembershipInference()(PREDS, TARGET, ~MASK)
    assert (forth + back).item() == pytest.approx(1)


def test_infinite_losses_are_the_largest() -> None:
    preds = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.5, 0.5]])
    attack = MembershipInference(from_logits=False)
    assert attack(preds, torch.tensor([0, 0, 0]), torch.tensor([True, False, False])) == 0.25


def test_confidence_needs_no_target() -> None:
    without = MembershipInference("confidence")(PREDS, None, MASK)
    assert torch.equal(without, _value(*_fresh("confidence")))
    with pytest.raises(ConfigurationError, match="needs the true labels"):
        MembershipInference("loss").update(PREDS, None, MASK)


def test_membership_is_nan_while_a_group_is_missing() -> None:
    assert MembershipInference()(PREDS, TARGET, torch.ones(N, dtype=torch.bool)).isnan()
    assert MembershipInference()(PREDS, TARGET, torch.zeros(N, dtype=torch.bool)).isnan()


def test_a_memorizing_model_is_detected_and_an_untrained_one_is_not() -> None:
    x, y = torch.randn(400, 100), torch.randint(2, (400,))
    member, net = torch.arange(400) < 40, nn.Linear(100, 2)
    fresh = MembershipInference()(net(x), y, member)
    optimizer = torch.optim.Adam(net.parameters(), 0.1)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(net(x[member]), y[member]).backward()
        optimizer.step()
    assert abs(fresh.item() - 0.5) < 0.15
    assert MembershipInference()(net(x), y, member) > 0.75


# --- Relearn time


def _relearn(values: list[float], **settings: Any) -> float:
    metric = RelearnTime(**settings)
    for value in values:
        metric.update(value)
    return metric.compute().item()


@pytest.mark.parametrize(
    ("values", "settings", "expected"),
    [
        ([0.5, 0.4], {"target": 0.5}, 0),  # never forgotten
        ([3.0, 2.0, 1.0, 0.5], {"target": 1.0}, 2),
        ([3.0, 2.0, 0.5, 2.0, 0.5], {"target": 1.0}, 2),  # the first time counts
        ([3.0, 2.0], {"target": 1.0}, math.inf),
        ([3.0, math.nan, 0.5], {"target": 1.0}, 2),
        ([0.1, 0.6, 0.9, 1.0], {"target": 0.9, "mode": "max"}, 2),
        ([3.0, 0.5, 3.0, 0.5, 0.5, 0.5], {"target": 1.0, "patience": 2}, 3),
        ([3.0, 0.5, 3.0, 0.5], {"target": 1.0, "patience": 2}, math.inf),
        ([0.5, 0.5, 0.5], {"target": 1.0, "patience": 3}, 0),
    ],
)
def test_relearn_time_ends_at_the_target(values: list[float], settings: dict[str, Any], expected: float) -> None:
    assert _relearn(values, **settings) == expected


def test_relearn_time_mirrors_with_the_sign() -> None:
    values = torch.rand(50).tolist()
    assert _relearn(values, target=0.1) == _relearn([-value for value in values], target=-0.1, mode="max")


def test_relearn_time_can_be_computed_at_every_step() -> None:
    metric = RelearnTime(target=1.0)
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert metric.compute().isnan()
    found = []
    for value in (torch.tensor(3.0), torch.tensor([2.0]), torch.tensor(1.0, dtype=torch.bfloat16), 5.0, 0):
        metric.update(value)
        found.append(metric.compute().item())
    assert found == [math.inf, math.inf, 2, 2, 2]
    metric.reset()
    metric.update(0.0)
    assert metric.compute() == 0


def test_forward_returns_the_relearn_time() -> None:
    metric = RelearnTime(target=1.0)
    assert [metric(torch.tensor(value)).item() for value in (3.0, 2.0, 1.0)] == [math.inf, math.inf, 0]
    assert metric.compute() == 2


def test_a_value_in_half_precision_is_compared_unrounded() -> None:
    """0.1 in bfloat16 is 0.10009765625."""
    assert _relearn([torch.tensor(0.1, dtype=torch.bfloat16)], target=0.1) == math.inf  # type: ignore[list-item]
    assert _relearn([torch.tensor(0.1)], target=0.1) == 0  # type: ignore[list-item]
    assert RelearnTime(target=torch.tensor(0.1)).target == torch.tensor(0.1).item()  # type: ignore[arg-type]


def test_processes_with_equal_values_have_one_relearn_time_and_otherwise_the_largest_counts() -> None:
    ranks = [RelearnTime(target=1.0) for _ in range(3)]
    for values in ((3, 3, 3), (2, 1, 2), (1, 1, 1)):
        for rank, value in zip(ranks, values, strict=True):
            rank.update(value)
    assert _of_all_ranks(ranks[0], ranks[2]) == 2
    assert _of_all_ranks(ranks[1], ranks[0]) == 2


def test_relearn_time_of_a_damped_descent_has_its_closed_form() -> None:
    """Gradient descent on a w²/2 multiplies w by 1 - rate · a."""
    rate, a, metric = 0.1, 0.7, RelearnTime(target=0.05)
    w = torch.tensor(1.0, requires_grad=True, dtype=torch.float64)
    optimizer = torch.optim.SGD([w], lr=rate)
    for _ in range(100):
        loss = 0.5 * a * w**2
        metric.update(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert metric.compute() == math.ceil(math.log(0.05 / (0.5 * a)) / (2 * math.log(1 - rate * a)))


# --- Bad input


@pytest.mark.parametrize("classes", [[], -1, [0, -2], 1.0, [0.5], True, [True, False], "3", None, [[0]], [None]])
def test_classes_must_be_whole_numbers(classes: Any) -> None:
    with pytest.raises(ConfigurationError, match="expected the index of the forgotten class"):
        RemovalF1(classes)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: JensenShannonDivergence(base=1.0), "above 1"),
        (lambda: JensenShannonDivergence(base="2"), "above 1"),  # type: ignore[arg-type]
        (lambda: JensenShannonDivergence(base=math.nan), "above 1"),
        (lambda: MembershipInference("losses"), "'loss' or 'confidence'"),  # type: ignore[arg-type]
        (lambda: RelearnTime(math.inf), "finite number"),
        (lambda: RelearnTime(None), "finite number"),  # type: ignore[arg-type]
        (lambda: RelearnTime(1.0, mode="down"), "'min' for a loss"),  # type: ignore[arg-type]
        (lambda: RelearnTime(1.0, patience=0), "at least 1"),
        (lambda: RelearnTime(1.0, patience=1.5), "at least 1"),  # type: ignore[arg-type]
    ],
)
def test_invalid_arguments_are_refused(make: Callable[[], Metric], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        make()


NAN = PREDS.clone().index_fill(0, torch.tensor(3), math.nan)


@pytest.mark.parametrize(
    ("name", "bad", "match"),
    [
        ("removal", {"preds": PREDS[:, 0]}, "scores > threshold"),
        ("removal", {"preds": PREDS[:, :1]}, "two or more classes"),
        ("removal", {"preds": TARGET[:, None]}, "integers"),
        ("removal", {"preds": PREDS.tolist()}, "is list"),
        ("removal", {"preds": PREDS[:, :2], "target": TARGET % 2}, "classes 0 to 1"),
        ("removal", {"preds": NAN}, "NaN"),
        ("removal", {"preds": PREDS[1:]}, "41 labels for 40 predictions"),
        ("removal", {"target": F.one_hot(TARGET)}, "target.argmax"),
        ("removal", {"target": TARGET.float()}, "integers"),
        ("removal", {"target": TARGET - 100}, "such as those with -100"),
        ("removal", {"target": TARGET + 1}, "has the label 5; expected labels from 0 up, below 5"),
        ("relabel", {"relabelled": MASK.long()}, r"\.bool\(\)"),
        ("relabel", {"relabelled": MASK[1:]}, r"shape \(41,\)"),
        ("gap", {"reference": REFERENCE[1:]}, "41 predictions and `reference` 40"),
        ("gap", {"reference": REFERENCE[:, 0]}, "`reference` is torch.float32"),
        ("agreement", {"reference": REFERENCE[:1]}, "the same examples"),
        ("divergence", {"reference": REFERENCE[:, 1:]}, "the same examples and classes"),
        ("divergence", {"reference": REFERENCE[:1]}, "the same examples and classes"),
        ("divergence", {"preds": TARGET}, "expected logits"),
        ("divergence", {"preds": NAN}, "`preds` has logits without a softmax"),
        ("divergence", {"reference": torch.full((N, C), -math.inf)}, "`reference` has logits"),
        ("membership", {"preds": PREDS[:, 0]}, r"torch.stack\(\[-z / 2, z / 2\], 1\)"),
        ("membership", {"preds": NAN}, "NaN"),
        ("membership", {"member": MASK.float()}, "`member` is torch.float32"),
        ("membership", {"target": TARGET + 3}, "below 5"),
        ("confidence", {"member": MASK[1:]}, "one entry for each"),
    ],
)
def test_invalid_inputs_are_refused_and_do_not_change_the_value(name: str, bad: dict[str, Any], match: str) -> None:
    make, batch = METRICS[name]
    metric = make()
    value = _value(metric, batch)
    with pytest.raises(ConfigurationError, match=match):
        metric.update(**{**batch, **bad})
    assert torch.equal(metric.compute(), value)


@pytest.mark.parametrize("bad", [PREDS, PREDS.softmax(1) * 1.2, NAN, -PREDS.softmax(1), PREDS.sigmoid()])
def test_invalid_probabilities_are_refused(bad: Tensor) -> None:
    good = PREDS.softmax(1)
    with pytest.raises(ConfigurationError, match=r"`reference` should be probabilities.*from_logits=True"):
        JensenShannonDivergence(from_logits=False).update(good, bad)
    with pytest.raises(ConfigurationError, match="`preds` should be probabilities"):
        MembershipInference(from_logits=False).update(bad, TARGET, MASK)


@pytest.mark.parametrize("bad", [torch.rand(3), torch.rand(0), [0.1, 0.2]])
def test_a_step_has_one_value(bad: Any) -> None:
    with pytest.raises(ConfigurationError, match="average the losses of a batch"):
        RelearnTime(1.0).update(bad)


@pytest.mark.parametrize("score", ["loss", "confidence"])
def test_probabilities_that_are_rounded_to_one_are_still_ranked(score: Any) -> None:
    """Margins near 98: log-probabilities are all zero, log-odds are not."""
    margins = torch.tensor([98.0, 98.5, 97.0, 98.2])
    preds = torch.stack([margins, torch.zeros(4)], 1)
    attack = MembershipInference(score=score)
    value = attack(preds, torch.zeros(4, dtype=torch.long), torch.tensor([True, True, False, False]))
    assert float(value) == 0.75

"""Metrics of several models: closed forms, and the same value in any order of models and in several calls."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torchmetrics import Metric

from lightning_gif.errors import ConfigurationError
from lightning_gif.metrics import (
    KLOM,
    RMIA,
    ForgettingScore,
    LikelihoodRatioAttack,
    RetrainingDistance,
    by_memorization,
    margins,
)

from .test_metrics import _of_all_ranks

MODELS, EXAMPLES = 12, 9
Batch = dict[str, Tensor]


def normal(seed: int, models: int = MODELS, examples: int = EXAMPLES, mean: float = 0.0) -> Tensor:
    return mean + torch.randn(models, examples, generator=torch.Generator().manual_seed(seed))


UNLEARNED, RETRAINED, UNTOUCHED = normal(1, mean=0.5), normal(2), normal(3, mean=2.0)
PAIR = {"unlearned": UNLEARNED, "retrained": RETRAINED}
ACCURACIES = torch.rand(MODELS, 2, generator=torch.Generator().manual_seed(4))
RATED = {**PAIR, "unlearned_accuracy": ACCURACIES, "retrained_accuracy": ACCURACIES.flip(0)}

# The constructor and one set of inputs of each metric, whose first dimension is that of models.
METRICS: dict[str, tuple[Callable[[], Metric], Batch]] = {
    "histogram": (KLOM, PAIR),
    "gaussian": (lambda: KLOM(estimate="gaussian"), PAIR),
    "attack": (LikelihoodRatioAttack, PAIR),
    "score": (ForgettingScore, PAIR),
    "rated": (ForgettingScore, RATED),
    "distance": (RetrainingDistance, {**PAIR, "untouched": UNTOUCHED}),
    "independent": (RetrainingDistance, {**PAIR, "untouched": UNTOUCHED, "independent": normal(5)}),
}
every_metric = pytest.mark.parametrize("name", list(METRICS))


def value(metric: Metric, *batches: Batch) -> Tensor:
    for batch in batches:
        metric.update(**batch)
    return numbers(metric.compute())


def numbers(result: Any) -> Tensor:
    return torch.stack(list(result.values())) if isinstance(result, dict) else result


def rows(batch: Batch, chosen: Any) -> Batch:
    return {name: tensor[chosen] for name, tensor in batch.items()}


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# --- All metrics of ensembles


@every_metric
def test_models_can_be_given_in_any_order_and_in_several_calls(name: str) -> None:
    make, batch = METRICS[name]
    whole = value(make(), batch)
    shuffled = torch.randperm(MODELS, generator=torch.Generator().manual_seed(0))
    parts = [rows(batch, chosen) for chosen in shuffled.split([5, 0, 6, 1])]
    close(value(make(), *parts), whole)
    one_by_one = [{key: given} for key, tensor in batch.items() for given in tensor if "accuracy" not in key]
    if name != "rated":
        close(value(make(), *one_by_one), whole)


@every_metric
def test_the_order_of_examples_has_no_effect(name: str) -> None:
    make, batch = METRICS[name]
    turned = {key: given if "accuracy" in key else given.flip(1) for key, given in batch.items()}
    close(value(make(), turned), value(make(), batch))


@every_metric
def test_several_processes_give_the_value_of_one(name: str) -> None:
    make, batch = METRICS[name]
    ranks: list[Any] = [make() for _ in range(3)]
    for rank, chosen in zip(ranks, torch.arange(MODELS).split([8, 3, 1]), strict=True):
        rank.update(**rows(batch, chosen))
    whole = value(make(), batch)
    close(numbers(_of_all_ranks(*ranks)), whole)
    close(numbers(_of_all_ranks(ranks[0], ranks[1], ranks[2], make())), whole)  # one has no models
    ranks[0].merge_state(ranks[1])
    ranks[0].merge_state(ranks[2])
    close(numbers(ranks[0].compute()), whole)


@every_metric
def test_processes_need_the_same_examples(name: str) -> None:
    make, batch = METRICS[name]
    ranks = [make(), make()]
    ranks[0].update(**batch)
    ranks[1].update(**{key: given if "accuracy" in key else given[:, 1:] for key, given in batch.items()})
    with pytest.raises(ConfigurationError, match="divide models among processes"):
        _of_all_ranks(*ranks)


@every_metric
def test_forward_returns_the_value_of_its_models_and_adds_them(name: str) -> None:
    make, batch = METRICS[name]
    metric, parts = make(), [rows(batch, slice(0, 8)), rows(batch, slice(8, None))]
    for part in parts:
        close(numbers(metric(**part)), value(make(), part))
    close(numbers(metric.compute()), value(make(), batch))


@every_metric
def test_without_enough_models_the_value_is_nan(name: str) -> None:
    make, batch = METRICS[name]
    metric: Any = make()
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert numbers(metric.compute()).isnan().all()
    metric.update(unlearned=batch["unlearned"])
    assert numbers(metric.compute()).isnan().all()
    assert len(metric.per_example()) == 0
    assert value(make(), rows(batch, slice(0, 0))).isnan().all()


@every_metric
def test_reset_and_pickles(name: str) -> None:
    make, batch = METRICS[name]
    metric = make()
    whole = value(metric, batch)
    for other in (metric.clone(), pickle.loads(pickle.dumps(metric))):
        assert torch.equal(numbers(other.compute()), whole)
    metric.reset()
    fewer = {key: given if "accuracy" in key else given[:, 2:] for key, given in batch.items()}
    assert torch.equal(value(metric, fewer), value(make(), fewer))


@every_metric
def test_values_are_in_single_precision_without_a_graph(name: str) -> None:
    make, batch = METRICS[name]
    with_graph = {key: given.double().requires_grad_() for key, given in batch.items()}
    result = value(make(), with_graph)
    assert result.dtype == torch.float32
    assert not result.requires_grad
    close(result, value(make(), batch))


@every_metric
def test_states_of_inference_mode_can_be_used_outside(name: str) -> None:
    make, batch = METRICS[name]
    metric = make()
    with torch.inference_mode():
        metric.update(**rows(batch, slice(0, 6)))
    close(value(metric, rows(batch, slice(6, None))), value(make(), batch))


@pytest.mark.parametrize("name", [*METRICS, "rmia"])
def test_plots_draw_one_value_or_several(name: str) -> None:
    make, batch = METRICS.get(name, (RMIA, ATTACKED))
    metric = make()
    values = [metric(**batch), metric(**batch)]
    figure, _ = metric.plot()  # type: ignore[operator]
    plt.close(figure)
    own = Figure().subplots()
    metric.plot(values, ax=own)  # type: ignore[operator]
    assert np.size(own.lines[0].get_ydata()) == 2


@every_metric
def test_infinite_margins_are_clipped(name: str) -> None:
    make, batch = METRICS[name]
    infinite = {**batch, "unlearned": torch.full_like(UNLEARNED, math.inf)}
    clipped = {**batch, "unlearned": torch.full_like(UNLEARNED, 100.0)}
    assert torch.equal(value(make(), infinite), value(make(), clipped))
    assert value(make(), infinite).isfinite().all()


# --- Margins


def test_margins_are_log_odds() -> None:
    logits, target = normal(6, 30, 5), torch.arange(30) % 5
    p = logits.double().softmax(1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(margins(logits, target), (p / (1 - p)).log())
    torch.testing.assert_close(margins(logits.double().log_softmax(1), target), margins(logits, target))
    binary = torch.tensor([[300.0, 0.0], [0.0, 0.0]])
    assert margins(binary, torch.tensor([1, 0])).tolist() == pytest.approx([-300, -math.log(1)])


def test_margins_need_logits_and_labels() -> None:
    with pytest.raises(ConfigurationError, match="`logits` is"):
        margins(torch.zeros(3), torch.zeros(3).long())
    with pytest.raises(ConfigurationError, match="`target` has 2 labels"):
        margins(torch.zeros(3, 2), torch.zeros(2).long())


# --- KLOM


def test_equal_ensembles_have_no_divergence() -> None:
    for estimate in ("histogram", "gaussian"):
        assert value(KLOM(estimate), {"unlearned": RETRAINED, "retrained": RETRAINED.flip(0)}).abs().max() < 1e-6  # type: ignore[arg-type]
    constant = torch.ones(4, 3)
    assert torch.equal(value(KLOM(), {"unlearned": constant, "retrained": constant}), torch.zeros(2))
    assert torch.equal(value(KLOM("gaussian"), {"unlearned": constant, "retrained": constant}), torch.zeros(2))


@pytest.mark.parametrize("shift", [0.5, 2.0])
def test_the_divergence_of_shifted_normals_is_half_the_square_of_the_shift(shift: float) -> None:
    batch = {"unlearned": normal(1, 4000, 20, shift), "retrained": normal(2, 4000, 20)}
    mean = value(KLOM("gaussian"), batch)[1].item()
    assert mean == pytest.approx(shift**2 / 2, rel=0.05)
    if shift < 1:  # a histogram has no tails
        assert value(KLOM(), batch)[1].item() == pytest.approx(shift**2 / 2, rel=0.25)


def test_gaussian_divergences_are_those_of_torch() -> None:
    metric = KLOM("gaussian")
    p95, mean = value(metric, PAIR)
    expected = kl_divergence(
        Normal(UNLEARNED.double().mean(0), UNLEARNED.double().std(0)),
        Normal(RETRAINED.double().mean(0), RETRAINED.double().std(0)),
    )
    close(metric.per_example(), expected.float())
    assert mean.item() == pytest.approx(expected.mean().item())
    assert p95.item() == pytest.approx(np.quantile(expected.numpy(), 0.95), rel=1e-6)


def test_histogram_divergences_are_those_of_numpy() -> None:
    metric = KLOM()
    value(metric, PAIR)
    for example, found in enumerate(metric.per_example().tolist()):
        p, q = UNLEARNED[:, example].double().numpy(), RETRAINED[:, example].double().numpy()
        edges = np.linspace(min(p.min(), q.min()), max(p.max(), q.max()), 21)
        p, q = (np.histogram(given, edges)[0] / MODELS + 1e-5 for given in (p, q))
        p, q = p / p.sum(), q / q.sum()
        assert found == pytest.approx((p * np.log(p / q)).sum(), rel=1e-5)


# --- The likelihood ratio attack


@pytest.mark.parametrize(("models", "shift"), [(8, 0.0), (64, 0.0), (64, 1.0), (64, 3.0)])
def test_the_attack_of_shifted_normals_has_the_auroc_of_their_shift(models: int, shift: float) -> None:
    """The AUROC is Φ(shift / √2), and the balanced accuracy Φ(shift / 2)."""
    batch = {"unlearned": normal(1, models, 300, shift), "retrained": normal(2, models, 300)}
    auroc, accuracy = value(LikelihoodRatioAttack(), batch)
    cdf = Normal(0.0, 1.0).cdf
    assert auroc.item() == pytest.approx(cdf(torch.tensor(shift / math.sqrt(2))).item(), abs=0.03)
    assert accuracy.item() == pytest.approx(cdf(torch.tensor(shift / 2)).item(), abs=0.03)


def test_no_model_is_judged_by_a_distribution_that_was_fitted_with_it() -> None:
    unlearned, retrained = UNLEARNED[:5, 0].double(), RETRAINED[:7, 0].double()

    def ratio(m: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return Normal(first.mean(), first.std()).log_prob(m) - Normal(second.mean(), second.std()).log_prob(m)

    low = [ratio(m, unlearned, torch.cat([retrained[:i], retrained[i + 1 :]])) for i, m in enumerate(retrained)]
    high = [ratio(m, torch.cat([unlearned[:i], unlearned[i + 1 :]]), retrained) for i, m in enumerate(unlearned)]
    expected = [np.mean([a > b for a in high for b in low]), (np.mean(np.sign(high)) - np.mean(np.sign(low)) + 2) / 4]
    metric = LikelihoodRatioAttack()
    found = value(metric, {"unlearned": UNLEARNED[:5, :1], "retrained": RETRAINED[:7, :1]})
    assert found.tolist() == pytest.approx(expected)
    assert metric.per_example().tolist() == pytest.approx(expected[:1])


# --- RMIA


ATTACKED = {
    "margins": normal(1, 1, 60)[0],
    "reference": normal(2, 1, 60)[0],
    "member": torch.arange(60) % 2 == 0,
}


def test_rmia_counts_population_examples_below_the_ratio() -> None:
    population = {"margins": normal(7, 1, 25)[0], "reference": normal(8, 3, 25)}
    batch = {**ATTACKED, "reference": normal(9, 3, 60)}
    for gamma in (1, 2.0):
        x, z = (given["margins"].sigmoid() / given["reference"].sigmoid().mean(0) for given in (batch, population))
        scores = (x[:, None] / z >= gamma).double().mean(1)
        pairs = scores[batch["member"]][:, None] - scores[~batch["member"]]
        expected = ((pairs > 0).double() + (pairs == 0).double() / 2).mean().item()
        assert value(RMIA(gamma), population, batch).item() == pytest.approx(expected)


def test_unseen_examples_are_compared_with_the_others() -> None:
    member, ratios = ATTACKED["member"], ATTACKED["margins"].sigmoid() / ATTACKED["reference"].sigmoid()
    others = ratios[~member]
    scores = [(x >= others).double().mean().item() for x in ratios[member]]
    among = [(x >= torch.cat([others[:i], others[i + 1 :]])).double().mean().item() for i, x in enumerate(others)]
    expected = np.mean([(a > b) + (a == b) / 2 for a in scores for b in among])
    assert value(RMIA(), ATTACKED).item() == pytest.approx(expected)


def test_rmia_finds_members_and_is_one_half_without_any() -> None:
    batch = {"margins": normal(1, 1, 2000)[0], "member": torch.arange(2000) < 1000}
    batch["reference"] = batch["margins"] + normal(2, 1, 2000)[0]
    assert value(RMIA(), batch).item() == pytest.approx(0.5, abs=0.04)
    remembered = {**batch, "margins": batch["margins"] + 50 * batch["member"]}
    assert value(RMIA(), remembered) > 0.65
    separated = {**batch, "reference": batch["margins"] + 0.1 * normal(2, 1, 2000)[0] - 5.0 * batch["member"]}
    assert value(RMIA(), separated) > 0.99


def test_rmia_takes_batches_processes_and_groups_that_are_missing() -> None:
    whole, parts = value(RMIA(), ATTACKED), [rows(ATTACKED, chosen) for chosen in torch.arange(60).split([40, 0, 20])]
    assert torch.equal(value(RMIA(), *parts), whole)
    ranks = [RMIA() for _ in parts]
    for rank, part in zip(ranks, parts, strict=True):
        rank.update(**part)
    assert torch.equal(_of_all_ranks(*ranks, RMIA()), whole)
    for missing in (torch.ones(60).bool(), torch.zeros(60).bool(), torch.arange(60) > 0):
        assert value(RMIA(), {**ATTACKED, "member": missing}).isnan()


# --- The forgetting score


def test_separated_models_have_the_largest_epsilon() -> None:
    metric = ForgettingScore()
    assert value(metric, {"unlearned": RETRAINED + 20, "retrained": RETRAINED}).item() == pytest.approx(2 / 2**101)
    assert metric.per_example().tolist() == [50] * EXAMPLES
    around = torch.tensor([[-9.0], [-8.0], [8.0], [9.0]])  # only two thresholds separate
    assert value(ForgettingScore(), {"unlearned": around, "retrained": torch.linspace(-1, 1, 4)[:, None]}) < 1e-20


def test_equal_models_have_all_points() -> None:
    assert value(ForgettingScore(), {"unlearned": RETRAINED, "retrained": RETRAINED.flip(0)}) == 1
    constant = torch.ones(4, 3)
    assert value(ForgettingScore(), {"unlearned": constant, "retrained": constant}) == 1
    spread = torch.linspace(-1, 1, 4)[:, None]
    assert value(ForgettingScore(), {"unlearned": torch.zeros(4, 1), "retrained": spread}) < 1e-20  # too peaked


def test_epsilon_is_that_of_all_thresholds_on_a_fine_grid() -> None:
    def of_rates(fpr: float, fnr: float) -> float:
        if not fpr or not fnr:
            return 50.0 if fpr == fnr else -math.inf
        bounds = [(1 - 1e-5 - a) / b for a, b in ((fpr, fnr), (fnr, fpr))]
        return max(math.log(bound) if bound > 0 else -math.inf for bound in bounds)

    unlearned, retrained = (2 * normal(11, 6, 8)).round(decimals=1), (3 * normal(12, 9, 8) + 1).round(decimals=1)
    metric = ForgettingScore()
    value(metric, {"unlearned": unlearned, "retrained": retrained})
    for example, found in enumerate(metric.per_example().tolist()):
        u, r = unlearned[:, example].double().numpy(), retrained[:, example].double().numpy()
        high, low = (r, u) if np.median(r) > np.median(u) else (u, r)
        narrow, wide = sorted((u, r), key=np.ptp)
        best = max(of_rates((low >= t).mean(), (high < t).mean()) for t in np.concatenate([u, r]))
        for right in np.arange(narrow.max() - 2, narrow.max() + 2, 0.0499):
            for left in np.arange(right - np.ptp(narrow) - 2, right - np.ptp(narrow) + 2, 0.0499):
                inside, false = ((left <= given) & (given <= right) for given in (narrow, wide))
                best = max(best, of_rates(false.mean(), 1 - inside.mean()))
        assert found == pytest.approx(max(best, 0.0), abs=1e-6)


def test_the_score_has_the_ratios_of_the_accuracies() -> None:
    share = value(ForgettingScore(), PAIR)
    accuracies = {"unlearned_accuracy": torch.tensor([0.8, 0.6]), "retrained_accuracy": torch.tensor([1.0, 0.8])}
    many = {key: given.expand(MODELS, 2) for key, given in accuracies.items()}
    close(value(ForgettingScore(), {**PAIR, **many}), share * 0.8 * 0.75)
    metric = ForgettingScore()
    metric.update(**PAIR, unlearned_accuracy=many["unlearned_accuracy"])
    with pytest.raises(ConfigurationError, match="for 0 of 12 retrained models"):
        metric.compute()


# --- The distance to retraining


def test_untouched_models_have_distance_one_and_other_retrainings_about_zero() -> None:
    batch = {"retrained": normal(1, 16, 2000), "untouched": normal(2, 16, 2000, 3.0)}
    for others in ({}, {"independent": normal(3, 16, 2000)}):
        same = {**batch, **others, "unlearned": batch["untouched"]}
        assert value(RetrainingDistance(), same).item() == pytest.approx(1, abs=1e-6)
        again = {**batch, **others, "unlearned": normal(4, 16, 2000)}
        assert value(RetrainingDistance(), again).item() == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize(("unlearned", "retrained"), [(1, 5), (8, 3), (4, 20)])
def test_halves_estimate_the_distance_of_any_number_of_retrainings(unlearned: int, retrained: int) -> None:
    batch = {"retrained": normal(1, retrained, 4000), "untouched": normal(2, 16, 4000, 3.0)}
    found = value(RetrainingDistance(), {**batch, "unlearned": normal(4, unlearned, 4000)})
    assert found.item() == pytest.approx(0, abs=0.02)


def test_the_distance_is_nan_without_anything_to_forget() -> None:
    batch = {"unlearned": UNLEARNED, "retrained": RETRAINED, "untouched": RETRAINED, "independent": UNLEARNED}
    assert value(RetrainingDistance(), batch).isnan()
    alone = {"unlearned": UNLEARNED, "retrained": RETRAINED[:1], "untouched": UNTOUCHED}
    assert value(RetrainingDistance(), alone).isnan()


def test_the_distance_has_the_differences_of_mean_margins() -> None:
    metric = RetrainingDistance()
    value(metric, METRICS["independent"][1])
    close(metric.per_example(), (UNLEARNED.mean(0) - RETRAINED.mean(0)).abs())


# --- Strata


def test_strata_have_equal_numbers_of_examples_in_order_of_memorization() -> None:
    memorization = torch.tensor([3.0, 1.0, 2.0, 7.0, 0.0, 5.0, 4.0])
    strata = by_memorization(memorization * 10, memorization)
    assert [tuple(stratum) for stratum in strata] == [(0, 2, 3, 10), (3, 4, 2, 35), (5, 7, 2, 60)]
    assert by_memorization(torch.arange(7), memorization, bins=1)[0].mean == 3


@pytest.mark.parametrize(
    ("values", "memorization", "bins", "match"),
    [
        (torch.zeros(3, 2), torch.zeros(3), 1, r"`values` is torch.float32 of shape \(3, 2\); expected one finite"),
        (torch.zeros(3), torch.tensor([0, math.nan, 1]), 1, "`memorization` .* with NaN"),
        ([0.0], torch.zeros(1), 1, "`values` is list"),
        (torch.zeros(3), torch.zeros(4), 1, "`values` has 3 entries and `memorization` 4"),
        (torch.zeros(3), torch.zeros(3), 4, "number of examples, which is 3"),
        (torch.zeros(3), torch.zeros(3), 0, "`bins` is 0"),
        (torch.zeros(3), torch.zeros(3), True, "`bins` is True"),
    ],
)
def test_strata_need_a_finite_number_for_each_example(values: Any, memorization: Any, bins: Any, match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        by_memorization(values, memorization, bins)


# --- Bad input


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: KLOM("normal"), "'histogram' or 'gaussian'"),  # type: ignore[arg-type]
        (lambda: RMIA(0), "`gamma` is 0"),
        (lambda: RMIA(math.nan), "above 0"),
        (lambda: RMIA("2"), "above 0"),  # type: ignore[arg-type]
    ],
)
def test_invalid_arguments_are_refused(make: Callable[[], Metric], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        make()


@every_metric
@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({}, "no margins; give those of one or more groups: unlearned=, retrained="),
        ({"unlearned": UNLEARNED[:, 1:]}, "`unlearned` has 8 examples, but other margins have 9"),
        ({"unlearned": UNLEARNED, "retrained": RETRAINED[0, 1:]}, "`retrained` has 8 examples"),
        ({"unlearned": UNLEARNED.long()}, "`unlearned` is torch.int64"),
        ({"unlearned": UNLEARNED[None]}, r"of shape \(1, 12, 9\); expected margins"),
        ({"unlearned": UNLEARNED.tolist()}, "`unlearned` is list"),
        ({"retrained": RETRAINED.clone().fill_(math.nan)}, "`retrained` has NaN"),
        ({"unlearned": torch.zeros(3, 0)}, "no examples"),
        ({"unlearned": torch.zeros(0)}, "no examples"),
    ],
)
def test_invalid_margins_are_refused_and_do_not_change_the_value(name: str, bad: dict[str, Any], match: str) -> None:
    make, batch = METRICS[name]
    metric = make()
    before = value(metric, batch)
    with pytest.raises(ConfigurationError, match=match):
        metric.update(**bad)
    assert torch.equal(numbers(metric.compute()), before)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (torch.ones(3, 2), "`unlearned_accuracy` has 3 models, but `unlearned` has 12"),
        (torch.ones(12), "accuracies on retained and on test examples"),
        (100 * ACCURACIES, "divide percentages by 100"),
        (0.9, "is float"),
    ],
)
def test_invalid_accuracies_are_refused(bad: Any, match: str) -> None:
    metric = ForgettingScore()
    with pytest.raises(ConfigurationError, match=match):
        metric.update(**PAIR, unlearned_accuracy=bad)
    assert not metric.models.any()
    with pytest.raises(ConfigurationError, match="in the same call"):
        metric.update(retrained=RETRAINED, unlearned_accuracy=ACCURACIES)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"margins": normal(1, 2, 60)}, "use one metric for each"),
        ({"margins": ATTACKED["member"]}, "`margins` is torch.bool"),
        ({"reference": normal(1, 60, 2)}, r"`reference` has the shape \(60, 2\) for 60 margins"),
        ({"reference": normal(1, 0, 60)}, "one or more models"),
        ({"reference": ATTACKED["reference"].log()}, "`reference` has NaN"),
        ({"member": F.one_hot(ATTACKED["member"].long())}, "`member` is torch.int64"),
    ],
)
def test_invalid_inputs_of_rmia_are_refused(bad: dict[str, Any], match: str) -> None:
    metric = RMIA()
    before = value(metric, ATTACKED)
    with pytest.raises(ConfigurationError, match=match):
        metric.update(**{**ATTACKED, **bad})
    assert torch.equal(metric.compute(), before)

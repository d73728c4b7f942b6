"""What an entry of a registry declares holds under every name: nothing depends on how a user calls it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch

from lightning_gif import METHODS, SELECTORS, SOLVERS, STRATEGIES, ConfigurationError, ConvergenceWarning, GIFCallback
from lightning_gif.curvature.products import CURVATURES
from lightning_gif.registry import Registry, declares
from lightning_gif.solvers import Solver

from .conftest import Classifier, batch_of, blobs, fitted, loader, make_trainer


@contextmanager
def registered(registry: Registry[Any], name: str, item: Any) -> Iterator[str]:
    """Another name for an entry, as long as the context is open."""
    registry.register(name)(item)
    try:
        yield name
    finally:
        del registry._items[name]


@pytest.mark.parametrize("wrap", [lambda entry: entry, partial], ids=["itself", "partial"])
def test_a_selector_without_statistics_needs_no_cache(wrap: Any) -> None:
    trainer = make_trainer(GIFCallback(cache_neurons=False, cache_gradients=False))
    trainer.fit(Classifier(), loader(blobs()))
    query = batch_of(blobs(), [0])
    with registered(SELECTORS, "draw", wrap(SELECTORS["random"])):
        scores = [trainer.influence(query, selector=name, targets="cached").scores for name in ("random", "draw")]
    assert torch.equal(*scores)


def test_the_largest_ratio_of_a_selector_is_what_it_declares() -> None:
    with registered(SELECTORS, "exclusive_kinds", SELECTORS["random"]):
        GIFCallback(selector="exclusive_kinds", ratio=0.8)
    with (
        registered(SELECTORS, "outside", SELECTORS["exclusive_k_outputs"]),
        pytest.raises(ConfigurationError, match=r"at most 0\.5 for selector 'outside', got 0\.8"),
    ):
        GIFCallback(selector="outside", ratio=0.8)


def test_a_semidefinite_curvature_has_the_solver_for_one() -> None:
    trainer, _, dataset = fitted()
    query = batch_of(dataset, [0, 1])
    expected = trainer.influence(query)
    with registered(CURVATURES, "fisher", CURVATURES["ggn"]):
        report = trainer.influence(query, curvature="fisher")
    assert (report.settings["solver"], report.settings["max_iter"]) == ("cg", 20)
    assert torch.equal(report.scores, expected.scores)


def test_self_influence_takes_every_symmetric_method() -> None:
    trainer, _, _ = fitted()
    expected = trainer.self_influence(method="fif").scores
    with registered(METHODS, "frozen", METHODS["fif"]):
        assert torch.equal(trainer.self_influence(method="frozen").scores, expected)
        with pytest.raises(ConfigurationError, match="'fif' or 'if' or 'frozen', got 'gif'"):
            trainer.self_influence(method="gif")
    assert {name for name, method in METHODS.items() if method.is_symmetric} == {"if", "fif"}
    assert {name for name, method in METHODS.items() if not method.is_square} == {"gif"}


@pytest.mark.slow
def test_only_a_sketch_takes_a_rank_for_max_iter() -> None:
    """Other solvers that share their products have as many iterations as conjugate gradients."""
    cg = SOLVERS["cg"]

    def algorithm(operator: Any, rhs: Any, options: Any) -> Any:
        return cg(operator, rhs, damping=options.damping, rtol=options.rtol, max_iter=options.max_iter)

    trainer, _, dataset = fitted()
    query = batch_of(dataset, range(20))
    direct = Solver("direct", algorithm, requires_symmetric_psd=True, shares_products_across_rhs=True)
    with registered(SOLVERS, "direct", direct):
        assert trainer.influence(query, per_example=True, solver="direct").settings["max_iter"] == 20
    with registered(SOLVERS, "mine", partial(cg)):
        report = trainer.influence(query, per_example=True, solver="mine")
    assert report.settings["max_iter"] == 20
    assert torch.equal(report.scores, trainer.influence(query, per_example=True, solver="cg").scores)


def test_the_best_solver_is_not_advised_to_those_who_use_it() -> None:
    trainer, _, dataset = fitted(callback=GIFCallback())
    query, options = batch_of(dataset, [0]), {"method": "gif", "targets": "cached", "max_iter": 1, "rtol": 1e-9}
    with registered(SOLVERS, "mine", SOLVERS["lsmr"]), pytest.warns(ConvergenceWarning) as caught:
        trainer.influence(query, solver="mine", **options)
    assert "or use solver" not in str(caught[0].message)
    with pytest.warns(ConvergenceWarning, match="or use solver='lsmr'"):
        trainer.influence(query, solver="cgls", **options)


@pytest.mark.slow
def test_a_strategy_says_whether_it_reports_a_shortfall_and_repeats_solves() -> None:
    trainer, _, _ = fitted(max_epochs=60)
    ask = partial(trainer.unlearn, [3, 17, 30], relabel=torch.tensor([1, 0, 2]), dry_run=True)
    with registered(STRATEGIES, "as it is", STRATEGIES["natural"]) as natural:
        assert ask(step=natural).notes == ask(step="natural").notes == ask(step=STRATEGIES["natural"]).notes
    with registered(STRATEGIES, "again", STRATEGIES["relinearise"]) as again:
        assert any("stopped at the limit of 12 changes" in note for note in ask(step=again).notes)
    assert ask(step=lambda problem: STRATEGIES["natural"](problem)).notes != ask(step="natural").notes


def test_a_misspelled_declaration_is_refused() -> None:
    @declares(max_ratios=0.5)
    def selector(layer: Any, ratio: float, generator: Any) -> Any: ...

    with pytest.raises(ConfigurationError, match=r"'max_ratios', which means nothing .* mean 'max_ratio'\?"):
        SELECTORS.register("mine")(selector)
    with pytest.raises(ConfigurationError, match="It can declare nothing"):
        METHODS.register("mine")(selector)  # type: ignore[arg-type]
    assert "mine" not in SELECTORS

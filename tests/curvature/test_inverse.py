"""The damped inverse of the curvature: implementations agree with the dense matrix, and users can add their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_gif import SOLVERS, ConfigurationError, GIFCallback, attach, curvature
from lightning_gif.config import Settings
from lightning_gif.curvature import by_solver
from lightning_gif.curvature.by_solver import (
    DenseInverse,
    SketchInverse,
    SolverInverse,
    inverse_for_queries,
    inverse_for_self_influence,
)
from lightning_gif.curvature.inverse import INVERSES, InverseCurvature
from lightning_gif.curvature.methods import METHODS
from lightning_gif.curvature.solve import open_curvature
from lightning_gif.data.examples import Examples
from lightning_gif.objective import memory
from lightning_gif.objective.objective import Objective
from lightning_gif.solvers import Solution, nystrom, to_matrix

from ..conftest import Classifier, batch_of, blobs, loader, make_trainer

DAMPING, DECAY = 0.05, 0.02


def settings(**given: Any) -> Settings:
    return GIFCallback(
        damping=DAMPING, weight_decay=DECAY, curvature="ggn", rtol=1e-10, max_iter=200, double=True, **given
    ).settings


@pytest.mark.mostly_slow(4)
@pytest.mark.parametrize("method", ["if", "fif"])
@pytest.mark.parametrize(
    ("kind", "solver"),
    [(SolverInverse, "cg"), (SketchInverse, "nystrom"), (SketchInverse, "cg"), (DenseInverse, "cg")],
)
def test_each_inverse_equals_that_of_the_damped_matrix(kind: type[SolverInverse], solver: str, method: str) -> None:
    dataset, trainer = blobs(40), make_trainer()
    module = Classifier()
    attach(trainer, module, train_dataloaders=loader(dataset))
    with Objective.open(trainer, module, double=True) as objective:
        train = Examples.from_loader(loader(dataset), objective.prepare, batch_size=16)
        objective.learn_structure(train)
        size = objective.space.size
        positions = torch.arange(size) if method == "if" else torch.arange(0, size, 3)
        asked = settings(solver=solver, method=method)
        gradients = objective.query_gradients(train.subset(torch.arange(5)), per_example=True)
        matrix = to_matrix(open_curvature(asked, objective, train))[positions][
            :, positions
        ]  # includes the weight decay
        matrix = torch.linalg.inv(matrix + DAMPING * torch.eye(len(positions), dtype=matrix.dtype))
        expected = torch.zeros_like(gradients)
        expected[:, positions] = gradients[:, positions] @ matrix

        inverse = kind.fit(objective, train, asked, METHODS[method], positions)
        assert inverse.damping == DAMPING
        ihvps, solutions = inverse.ihvp(gradients)
        torch.testing.assert_close(ihvps, expected, rtol=1e-5, atol=1e-8)
        assert len(solutions) == len(gradients)
        assert inverse.summary()["products"] > 0
        if kind is SolverInverse:
            with pytest.raises(ConfigurationError, match="SolverInverse has no quadratic form"):
                inverse.quadratic()
        else:
            expected = (gradients * expected).sum(1)
            torch.testing.assert_close(inverse.quadratic()(gradients), expected, rtol=1e-5, atol=1e-8)


def test_a_solver_that_shares_products_gets_all_right_hand_sides_at_once() -> None:
    dataset, trainer = blobs(40), make_trainer()
    module = Classifier()
    attach(trainer, module, train_dataloaders=loader(dataset))
    with Objective.open(trainer, module) as objective:
        train = Examples.from_loader(loader(dataset), objective.prepare, batch_size=16)
        objective.learn_structure(train)
        arguments = METHODS["if"], torch.arange(objective.space.size)
        sizes = {
            (solver, memory): SolverInverse.fit(
                objective, train, settings(solver=solver, memory=memory), *arguments
            ).block_size
            for solver, memory in (("cg", 0.0), ("cg", 1.0), ("nystrom", 0.0))
        }
    assert sizes == {("cg", 0.0): 1, ("cg", 1.0): 16, ("nystrom", 0.0): None}


def test_the_inverse_depends_on_the_solver_and_the_number_of_queries() -> None:
    queries = {name: inverse_for_queries(settings(solver=name)) for name in SOLVERS}
    assert queries == {**dict.fromkeys(SOLVERS, SolverInverse), "nystrom": SketchInverse}
    for name in SOLVERS:
        assert inverse_for_self_influence(settings(solver=name), by_solver.DENSE_PARAMETERS) is DenseInverse
        assert inverse_for_self_influence(settings(solver=name), by_solver.DENSE_PARAMETERS + 1) is SketchInverse


def test_a_sketch_is_recognised_by_what_it_declares_and_not_by_its_name() -> None:
    dataset, trainer = blobs(40), make_trainer()
    attach(trainer, Classifier(), train_dataloaders=loader(dataset), callback=GIFCallback(weight_decay=0.1))
    SOLVERS.register("twin")(nystrom)
    try:
        assert inverse_for_queries(settings(solver="twin")) is SketchInverse
        query = batch_of(dataset, slice(0, 3))
        options = {"damping": 0.01, "max_iter": 16}
        scores = [trainer.influence(query, solver=name, **options).scores for name in ("nystrom", "twin")]
    finally:
        SOLVERS._items.pop("twin")
    assert torch.equal(*scores)


def test_an_inverse_cannot_take_the_name_of_a_solver() -> None:
    with pytest.raises(ConfigurationError, match="'nystrom' is the name of a solver; choose another"):
        INVERSES.register("nystrom")(Identity)


@pytest.mark.slow
def test_every_module_of_the_curvature_is_imported_with_the_package() -> None:
    """So an inverse that registers itself in a module of its own is known to users."""
    folder = Path(curvature.__file__).parent
    code = "import sys; from lightning_gif import GIFCallback; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = {f"lightning_gif.curvature.{path.stem}" for path in folder.glob("*.py") if path.stem != "__init__"}
    assert names <= set(done.stdout.split())
    assert {"INVERSES", "InverseCurvature", "SolverInverse", "DenseInverse", "SketchInverse"} <= set(curvature.__all__)


class Identity(InverseCurvature):
    """``C + λ = λ``: gradients divided by the damping."""

    kind = "identity"
    block_size = 2
    reports = True

    def __init__(self, damping: float) -> None:
        self.damping = damping

    @classmethod
    def fit(cls, objective: Any, train: Any, settings: Settings, method: Any, positions: Tensor, **_: Any) -> Self:
        assert settings.damping is not None
        return cls(settings.damping)

    def ihvp(self, gradients: Tensor) -> tuple[Tensor, list[Solution]]:
        assert len(gradients) <= self.block_size
        ihvps = gradients / self.damping
        solutions = [Solution.direct(x, self.damping, 0.5, solver="identity") for x in ihvps]
        return ihvps, solutions if self.reports else []

    def quadratic(self) -> Callable[[Tensor], Tensor]:
        return lambda gradients: gradients.double().square().sum(1) / self.damping

    def summary(self) -> dict[str, Any]:
        return {"kind": "identity"}


def test_a_custom_inverse_needs_one_class_and_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, trainer = blobs(30), make_trainer()
    module = Classifier()
    with pytest.raises(ConfigurationError, match="Unknown solver 'identity'"):
        GIFCallback(solver="identity")
    INVERSES.register("identity")(Identity)
    try:
        callback = GIFCallback(solver="identity", damping=0.5)
        attach(trainer, module, train_dataloaders=loader(dataset), callback=callback)
        report = trainer.influence(batch_of(dataset, slice(0, 5)), per_example=True)
        itself = trainer.self_influence()
        with pytest.raises(ConfigurationError, match=r"'identity' is for scores only.*solver='lsmr'"):
            trainer.unlearn([3, 17])
        assert trainer.unlearn([3, 17], solver="lsmr", dry_run=True).step_sizes
        with pytest.raises(ConfigurationError, match=r"Unknown solver 'identy'\. Did you mean 'identity'\?"):
            GIFCallback(solver="identy")
        with pytest.raises(ConfigurationError, match=r"Unknown solver 'qqq'\. Known: .*cg, .*identity, .*lsmr"):
            GIFCallback(solver="qqq")
        monkeypatch.setattr(Identity, "reports", False)
        with pytest.raises(ConfigurationError, match=r"Identity\.ihvp must return one iHVP .* and 0 solutions"):
            trainer.influence(batch_of(dataset, slice(0, 5)))
    finally:
        INVERSES._items.pop("identity")
    assert (len(report.solutions), report.is_self_influence, itself.is_self_influence) == (5, False, True)
    solution = report.solutions[0]
    assert (solution.solver, solution.damping, solution.seconds, solution.converged) == ("identity", 0.5, 0.5, True)
    assert "identity" in str(report)
    restored = Solution.of_record(solution.record())
    assert restored.record() == solution.record()
    assert (report.curvature, report.settings["damping"]) == ({"kind": "identity"}, 0.5)
    rows = []
    for x, y in dataset:
        loss = torch.nn.functional.cross_entropy(module(x[None]), y[None])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))]))
    products = torch.stack(rows).double() @ torch.stack(rows).double().T / 0.5 / 29
    torch.testing.assert_close(report.scores, products[:5], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(itself.scores[0], products.diagonal(), rtol=1e-4, atol=1e-7)


# ----------------------------------------------------------------------------------------------------------------------
# Memory decides how fast results are computed, but never changes them
# ----------------------------------------------------------------------------------------------------------------------


def wide(**given: Any) -> tuple[Any, Any]:
    """A trainer for a net with 35 203 parameters, of which a sketch of rank 512 takes 0.34 GiB, and its data."""
    torch.manual_seed(0)
    dataset, trainer = blobs(40), make_trainer()
    module = Classifier(nn.Sequential(nn.Linear(6, 3520), nn.ReLU(), nn.Linear(3520, 3)))
    attach(trainer, module, train_dataloaders=loader(dataset), callback=GIFCallback(**given))
    return trainer, dataset


CALLS: dict[str, tuple[Callable[[Any, Any], Any], tuple[str, int | None]]] = {
    "one query": (lambda trainer, data: trainer.influence(batch_of(data, slice(0, 4))), ("ekfac_cg", None)),
    "30 queries": (
        lambda trainer, data: trainer.influence(batch_of(data, slice(0, 30)), per_example=True),
        ("ekfac_cg", None),
    ),
    "30 queries, a sketch": (
        lambda trainer, data: trainer.influence(
            batch_of(data, slice(0, 30)), per_example=True, solver="nystrom", max_iter=512
        ),
        ("nystrom", 512),
    ),
    "20 queries, one solve each": (
        lambda trainer, data: trainer.influence(batch_of(data, slice(0, 20)), per_example=True, solver="cg"),
        ("cg", 20),
    ),
    "self-influence": (lambda trainer, data: trainer.self_influence(), ("ekfac", None)),
    "self-influence, a sketch": (lambda trainer, data: trainer.self_influence(solver="nystrom"), ("nystrom", 64)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_free_memory_does_not_affect_scores_solver_or_rank(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, dataset = wide()
    call, expected = CALLS[name]
    reports = []
    for gibibytes in (2, 200) if name == "30 queries, a sketch" else (0.01, 2, 200):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=gibibytes * 2**30: free)
        reports.append(call(trainer, dataset))
    for report in reports:
        assert (report.settings["solver"], report.settings["max_iter"]) == expected
        assert torch.equal(report.scores, reports[0].scores)
        assert [one.hvps for one in report.solutions] == [one.hvps for one in reports[0].solutions]
    if not name.startswith("self-influence"):
        assert {one.solver for report in reports for one in report.solutions} == {expected[0]}


def test_a_sketch_that_does_not_fit_is_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, dataset = wide()
    queries = batch_of(dataset, slice(0, 30))
    words = r"A sketch of rank 512 .* over 35203 parameters takes 0\.336 GiB, but"
    with pytest.raises(ConfigurationError, match=rf"{words} memory=0\.1 allows .*`max_iter`.*'cg'.*a larger `memory`"):
        trainer.influence(queries, per_example=True, solver="nystrom", max_iter=512, memory=0.1)
    monkeypatch.setattr(memory, "free_memory", lambda device: 0.2 * 2**30)
    with pytest.raises(ConfigurationError, match=rf"{words} 0\.2 GiB are free .*`max_iter`.*'cg'.*free some memory"):
        trainer.influence(queries, per_example=True, solver="nystrom", max_iter=512)
    with pytest.raises(ConfigurationError, match=r"A sketch of rank 500 .* takes 0\.328 GiB"):
        trainer.self_influence(max_iter=500)
    for remedy in ({"max_iter": 64}, {"solver": "cg", "max_iter": 2}):
        assert trainer.influence(queries, per_example=True, **remedy).scores.isfinite().all()

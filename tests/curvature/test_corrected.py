"""EK-FAC corrected by products, against the dense damped Gauss–Newton matrix, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from digits import digits
from torch import Tensor, nn
from torch.utils.data import Subset

from lightning_gif import GIFCallback, attach
from lightning_gif.curvature import CorrectedEKFAC, LissaEKFAC, LsmrEKFAC
from lightning_gif.curvature.corrected import DAMPING_MULTIPLE
from lightning_gif.curvature.ekfac import EKFACInverse
from lightning_gif.curvature.methods import METHODS
from lightning_gif.curvature.solve import open_curvature, solve
from lightning_gif.errors import ConfigurationError
from lightning_gif.solvers import to_matrix

from ..conftest import Classifier, batch_of, blobs, fitted, loader, make_trainer
from .test_ekfac import NETS, opened

SETTINGS = GIFCallback(solver="ekfac_cg", curvature="ggn", method="if", rtol=1e-10, max_iter=500).settings


def fit(kind: Any, objective: Any, examples: Any, **settings: Any) -> Any:
    everything = torch.arange(objective.space.size)
    return kind.fit(objective, examples, replace(SETTINGS, **settings), METHODS["if"], everything)


@pytest.mark.mostly_slow(4)
@pytest.mark.parametrize("damping", [0.05, None])
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("kind", [CorrectedEKFAC, LsmrEKFAC, LissaEKFAC])
def test_converged_it_is_the_dense_inverse_with_the_damping_of_ekfac(
    kind: type[CorrectedEKFAC], name: str, damping: float | None
) -> None:
    """A damping that is not given is ten times that of EK-FAC, layer by layer."""
    decay, multiple = 0.01, 1.0 if damping else DAMPING_MULTIPLE
    # The condition number of least squares is the square. They need more iterations, and rounding decides how many.
    least_squares = kind is not CorrectedEKFAC
    with opened(name) as (objective, examples):
        inverse = fit(kind, objective, examples, damping=damping, weight_decay=decay, max_iter=3000)
        matrix = to_matrix(open_curvature(SETTINGS, objective, examples, weight_decay=0.0))
        ekfac = fit(
            EKFACInverse,
            objective,
            examples,
            damping=damping,
            weight_decay=decay,
            solver="ekfac",
            rtol=None,
            max_iter=None,
        )
        gradients = torch.randn(3, len(matrix), dtype=torch.float64)
        ihvps, solutions = inverse.ihvp(gradients)
        diagonal = (multiple * (ekfac.dampings() - decay) + decay).to(matrix)
        expected = torch.linalg.solve(matrix + diagonal.diag(), gradients.T).T
    torch.testing.assert_close(ihvps, expected, rtol=1e-6, atol=1e-6 if least_squares else 1e-9)
    assert all(
        solution.converged and torch.equal(solution.x, row) for solution, row in zip(solutions, ihvps, strict=True)
    )


def test_with_little_damping_it_takes_at_most_a_third_of_the_products_of_plain_conjugate_gradients() -> None:
    """The error is that of the energy norm, which both kinds of iterations make smaller in each step."""
    data = Subset(digits()[0], range(300))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    callback = GIFCallback(double=True)
    trainer = make_trainer(callback, max_epochs=10)
    trainer.fit(Classifier(net, lr=0.1), loader(data, 16))
    with callback.open_session(callback.settings, "batch") as session:
        objective, examples = session.objective, session.train
        curvature = open_curvature(SETTINGS, objective, examples)
        matrix = to_matrix(curvature)
        damping = 1e-4 * float(torch.linalg.eigvalsh(matrix)[-1])
        matrix += damping * torch.eye(len(matrix), dtype=matrix.dtype)
        gradients = objective.query_gradients(examples, per_example=True)[:5]
        exact = torch.linalg.solve(matrix, gradients.T)

        def error(found: Tensor) -> float:
            squares = [(one * (matrix @ one)).sum(0) for one in (found - exact, exact)]
            return float((squares[0] / squares[1]).sqrt().median())

        plain = solve(replace(SETTINGS, solver="cg", damping=damping, rtol=None, max_iter=20), curvature, gradients.T)
        inverse = fit(CorrectedEKFAC, objective, examples, damping=damping, rtol=None, max_iter=6)
        corrected = inverse.ihvp(gradients)[0]
    assert error(corrected.T) < error(torch.stack([one.x for one in plain], dim=1))


def test_queries_of_a_trainer_use_it_by_name() -> None:
    trainer, _, data = fitted(max_epochs=2)
    batch = batch_of(data, slice(3))
    report = trainer.influence(batch, solver="ekfac_cg", per_example=True, snapshots=False)
    assert [one.solver for one in report.solutions] == ["ekfac_cg"] * 3
    assert report.curvature["products"] > 0
    exact = trainer.influence(batch, solver="ekfac_cg", per_example=True, snapshots=False, rtol=1e-6)
    rough = trainer.influence(batch, solver="ekfac", per_example=True, snapshots=False)
    error = [(one.scores - exact.scores).norm() / exact.scores.norm() for one in (report, rough)]
    assert error[0] < 0.1 * error[1]


def test_a_gradient_has_the_same_solution_alone_and_among_others() -> None:
    with opened("convolution") as (objective, examples):
        inverse = fit(CorrectedEKFAC, objective, examples, damping=None, rtol=None, max_iter=4)
        gradients = torch.randn(5, objective.space.size, dtype=torch.float64)
        together, _ = inverse.ihvp(gradients)
        alone = [inverse.ihvp(one[None])[0] for one in gradients]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-9, atol=1e-12)


def test_what_it_cannot_do_is_refused_by_name() -> None:
    module = Classifier()
    trainer = make_trainer()
    attach(trainer, module, train_dataloaders=loader(blobs()))
    with pytest.raises(ConfigurationError, match="solver='ekfac_cg' inverts the curvature of all parameters"):
        trainer.influence(batch_of(blobs(), slice(2)), solver="ekfac_cg", targets="batch")
    with pytest.raises(ConfigurationError, match="no quadratic form"):
        trainer.self_influence(solver="ekfac_cg")

"""EK-FAC gives the scores of another library, kronfluence, where both take the expectation over all labels exactly."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_gif import attach
from lightning_gif.curvature import ekfac

from .conftest import Classifier, loader, make_trainer

EXAMPLES, QUERIES, CLASSES = 200, 20, 10
DAMPING = 1e-3  # far below the largest eigenvalues, so that the scores depend on the curvature

NETS = {
    "perceptron": lambda: nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, CLASSES)),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(54, CLASSES),
    ),
}


def trained(name: str) -> tuple[Classifier, TensorDataset, TensorDataset]:
    """A network that classifies most digits, the training data, and queries, in float64."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images) / 16, torch.from_numpy(labels)
    module = Classifier(NETS[name]()).double()
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(module(x[:EXAMPLES]), y[:EXAMPLES]).backward()
        optimizer.step()
    optimizer.zero_grad()
    end = EXAMPLES + QUERIES
    return module, TensorDataset(x[:EXAMPLES], y[:EXAMPLES]), TensorDataset(x[EXAMPLES:end], y[EXAMPLES:end])


def with_all_labels(data: TensorDataset) -> TensorDataset:
    """Each example once with each label."""
    x, y = data.tensors
    return TensorDataset(x.repeat_interleave(CLASSES, 0), torch.arange(CLASSES).repeat(len(y)))


def scores_of_kronfluence(net: nn.Module, train: TensorDataset, queries: TensorDataset, folder: Path) -> Tensor:
    """``g_qᵀ (G + damping I)⁻¹ g_t``, where the library takes ``G`` over all labels instead of drawn ones.

    It sees each example with each label ``c``. The loss of such a copy is the cross-entropy times ``√(C p)``, where
    ``p`` is the predicted probability of ``c`` and ``C`` the number of labels. So the mean over copies of ``g gᵀ`` is
    that over examples of ``Σ p g gᵀ``, the expectation over labels.
    """
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class AllLabels(Task):  # type: ignore[misc]
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            x, y = batch
            logits = model(x)
            losses = F.cross_entropy(logits, y, reduction="none")
            if sample:
                p = logits.detach().softmax(1).gather(1, y[:, None]).squeeze(1)
                losses = losses * (CLASSES * p).sqrt()
            return losses.sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    def precise(*names: str) -> dict[str, Any]:
        return {f"{name}_dtype": torch.float64 for name in names}

    logging.getLogger("kronfluence").setLevel(logging.ERROR)
    task = AllLabels()
    model = prepare_model(copy.deepcopy(net), task)  # which wraps its layers
    analyzer = Analyzer("digits", model, task, cpu=True, disable_tqdm=True, output_dir=str(folder))
    of_factors = precise("activation_covariance", "gradient_covariance", "per_sample_gradient", "lambda")
    analyzer.fit_all_factors(
        "factors",
        with_all_labels(train),
        per_device_batch_size=500,
        factor_args=FactorArguments(strategy="ekfac", **of_factors),
    )
    of_scores = precise("score", "per_sample_gradient", "precondition")
    analyzer.compute_pairwise_scores(
        "scores",
        "factors",
        queries,
        train,
        per_device_query_batch_size=QUERIES,
        per_device_train_batch_size=EXAMPLES,
        score_args=ScoreArguments(damping_factor=DAMPING, **of_scores),
    )
    return analyzer.load_pairwise_scores("scores")["all_modules"]


def correlation(one: Tensor, other: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_the_scores_are_those_of_kronfluence(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("kronfluence")
    module, train, queries = trained(name)
    trainer = make_trainer(devices=1)
    attach(trainer, module, train_dataloaders=loader(train))

    def ours() -> Tensor:
        options: dict[str, Any] = {"solver": "ekfac", "damping": DAMPING, "per_example": True, "snapshots": False}
        report = trainer.influence(queries.tensors, **options)
        assert report.indices.tolist() == list(range(EXAMPLES))
        return (EXAMPLES - 1) * report.scores.double()  # they are changes of a mean over the other examples

    theirs = scores_of_kronfluence(module.net, train, queries, tmp_path)
    assert correlation(ours(), theirs) > 0.97  # with one random vector for each example
    monkeypatch.setattr(ekfac, "_DRAWS", EXAMPLES * CLASSES)  # as many vectors as logits give the exact expectation
    torch.testing.assert_close(ours(), theirs, rtol=0, atol=1e-8 * float(theirs.abs().max()))

"""Batches of any form: the loss of an example is that of the batch which the collate function makes of it alone."""

from __future__ import annotations

import itertools
import re
import textwrap
import warnings
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_gif import BatchError, GIFWarning, ObjectiveError

from ..conftest import blobs
from .reference import CONVERGED, Items, Module, cross_entropy, dense_scores, error, fitted, squared_error

N = 40
QUERY = [0, 5, 7]


def query(data: Dataset[Any], collate: Any, size: int = 3) -> DataLoader[Any]:
    return DataLoader(Subset(data, QUERY), size, collate_fn=collate)


# --------------------------------------------------------------------------------------------------------------------
# Batches that cannot be sliced
# --------------------------------------------------------------------------------------------------------------------


class Bag:
    """The points of several examples in one matrix, as graphs are joined."""

    def __init__(self, points: list[Tensor]) -> None:
        self.points = torch.cat(points)
        self.owner = torch.repeat_interleave(torch.arange(len(points)), torch.tensor([len(one) for one in points]))
        self.count = len(points)

    def to(self, device: Any) -> Bag:
        return self

    def means(self, dtype: torch.dtype) -> Tensor:
        total = torch.zeros(self.count, self.points.shape[1], dtype=dtype)
        total = total.index_add(0, self.owner, self.points.to(dtype))
        return total / self.owner.bincount(minlength=self.count)[:, None]


@dataclass
class Bags:
    """A batch as a dataclass that knows nothing of rows."""

    bag: Bag
    y: Tensor


CLOUDS = [(torch.randn(3 + i % 4, 6, generator=torch.Generator().manual_seed(i)), float(i % 7) / 3) for i in range(N)]
CLOUD_COLLATES: dict[str, Any] = {
    "list": lambda items: [Bag([x for x, _ in items]), torch.tensor([y for _, y in items])],
    "dict": lambda items: {"bag": Bag([x for x, _ in items]), "y": torch.tensor([y for _, y in items])},
    "dataclass": lambda items: Bags(Bag([x for x, _ in items]), torch.tensor([y for _, y in items])),
    "ragged lists": lambda items: tuple(zip(*items, strict=True)),
}


class Clouds(Module):
    """A regression on the mean of a cloud; one step for the whole batch, or one cloud after the other."""

    def __init__(self, singly: bool = False) -> None:
        super().__init__(6, 1)
        self.singly = singly

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        dtype = self.net[0].weight.dtype
        if isinstance(batch, tuple):
            means = torch.stack([x.to(dtype).mean(0) for x in batch[0]])
            y = torch.tensor(batch[1], dtype=dtype)
        else:
            bag, y = (batch["bag"], batch["y"]) if isinstance(batch, dict) else vars_of(batch)
            means, y = bag.means(dtype), y.to(dtype)
        loss = F.mse_loss(self.net(means)[:, 0], y)
        return loss if not self.singly else loss * (2.0 if float(loss) < -1 else 1.0)


def vars_of(batch: Any) -> tuple[Any, Any]:
    return (batch.bag, batch.y) if isinstance(batch, Bags) else tuple(batch)


def exact_of_clouds(module: Clouds) -> Tensor:
    examples = [(x.double(), y) for x, y in CLOUDS]
    return dense_scores(module.net, lambda net, x: net(x.mean(0, keepdim=True)), squared_error, examples, QUERY)


@pytest.mark.mostly_slow(2)
@pytest.mark.filterwarnings("ignore::lightning_gif.GIFWarning")
@pytest.mark.parametrize("singly", [False, True])
@pytest.mark.parametrize("name", list(CLOUD_COLLATES))
def test_objects_and_ragged_lists_have_the_scores_of_their_examples(name: str, singly: bool) -> None:
    module, data, collate = Clouds(singly), Items(CLOUDS), CLOUD_COLLATES[name]
    trainer = fitted(module, data, collate)
    exact = exact_of_clouds(module)
    for size in (1, 3):
        scores = trainer.influence(query(data, collate, size), batch_size=7, **CONVERGED).scores[0]
        assert error(scores, exact) < 1e-5
    each = trainer.influence(query(data, collate), per_example=True, **CONVERGED).scores
    assert error(each.mean(0), exact) < 1e-5
    report = trainer.unlearn([1, 2, 3], dry_run=True)
    with torch.no_grad():
        losses = [F.mse_loss(module.net(x.mean(0, keepdim=True))[0, 0], torch.tensor(y)) for x, y in CLOUDS[1:4]]
    assert report.forget.before == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)


@pytest.mark.filterwarnings("ignore::lightning_gif.GIFWarning")
def test_a_batch_that_cannot_be_divided_is_refused_with_the_way_out() -> None:
    """Its step decides on values, so that examples have to be evaluated one by one."""
    data, collate = Items(CLOUDS), CLOUD_COLLATES["list"]
    trainer = fitted(Clouds(singly=True), data, collate)
    batch = collate([data[index] for index in QUERY])
    with pytest.raises(BatchError, match=r"cannot be divided .* DataLoader\(Subset\(dataset, indices\)"):
        trainer.influence(batch)
    trainer.influence(query(data, collate))
    trainer.influence(collate([data[0]]))


def test_a_whole_batch_of_objects_is_a_query_where_the_step_runs_once_for_all() -> None:
    module, data, collate = Clouds(), Items(CLOUDS), CLOUD_COLLATES["list"]
    trainer = fitted(module, data, collate)
    batch = collate([data[index] for index in QUERY])
    assert error(trainer.influence(batch, **CONVERGED).scores[0], exact_of_clouds(module)) < 1e-5


# --------------------------------------------------------------------------------------------------------------------
# Sequences
# --------------------------------------------------------------------------------------------------------------------


def texts() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    words = [torch.randint(1, 12, (3 + i % 4,), generator=generator) for i in range(N)]
    return [(word, word % 3) for word in words]


def padded(items: Any) -> dict[str, Tensor]:
    words = pad_sequence([x for x, _ in items], batch_first=True)
    labels = pad_sequence([y for _, y in items], batch_first=True, padding_value=-100)
    return {"words": words, "mask": words > 0, "labels": labels}


class Tagger(Module):
    """Tags words. Its step looks at values of the mask, as attention layers do, and averages over words."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 6)
        self.kind = kind

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = self.embedding(batch["words"])
        logits = self.net(hidden if batch["mask"].all() else hidden * batch["mask"][..., None])
        labels = batch["labels"]
        if self.kind == "flattened":
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        if self.kind == "channels second":
            return F.cross_entropy(logits.transpose(1, 2), labels)
        losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        return (losses * batch["mask"]).sum() / batch["mask"].sum()


def tagged(module: Module) -> Tensor:
    net = nn.ModuleList([module.embedding, module.net])  # type: ignore[list-item]
    return dense_scores(
        net, lambda both, x: both[1](both[0](x)), lambda z, y: F.cross_entropy(z.view(-1, 3), y), texts(), QUERY
    )


@pytest.mark.filterwarnings("ignore::lightning_gif.GIFWarning")
@pytest.mark.parametrize("kind", ["flattened", "channels second", "masked sum"])
def test_means_over_words_have_the_scores_of_each_text_alone(kind: str) -> None:
    module, data = Tagger(kind), Items(texts())
    trainer = fitted(module, data, padded)
    for size in (1, 3):
        report = trainer.influence(query(data, padded, size), **CONVERGED)
        assert error(report.scores[0], tagged(module)) < 1e-5
        assert report.curvature["kind"] == "ggn"


@pytest.mark.parametrize("examples", [N, 5])
def test_batches_with_time_first_are_not_taken_for_rows(examples: int) -> None:
    """Also where there are as many time steps as examples that the package looks at first."""
    x = torch.randn(examples, 5, 6, generator=torch.Generator().manual_seed(0))
    y = torch.arange(examples * 5).reshape(examples, 5) % 3
    data = Items(list(zip(x, y, strict=True)))

    def collate(items: Any) -> list[Tensor]:
        return [torch.stack([x for x, _ in items], 1), torch.stack([y for _, y in items], 1)]

    class TimeFirst(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return F.cross_entropy(self.net(x).flatten(0, 1), y.flatten())

    module = TimeFirst()
    trainer = fitted(module, data, collate)
    pairs = [(one.double(), label) for one, label in data.items]
    exact = dense_scores(
        module.net, lambda net, x: net(x), lambda z, y: F.cross_entropy(z.view(-1, 3), y), pairs, [0, 1]
    )
    asked = DataLoader(Subset(data, [0, 1]), 2, collate_fn=collate)
    assert error(trainer.influence(asked, **CONVERGED).scores[0], exact) < 1e-5


# --------------------------------------------------------------------------------------------------------------------
# Steps for which a batch of one is none, or that couple or weigh examples
# --------------------------------------------------------------------------------------------------------------------

DATA = blobs(N)
PAIRS = [(x.double(), y) for x, y in zip(*DATA.tensors, strict=True)]


class Squeezed(Module):
    """A batch of one loses its dimension."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        predicted = self.net(x)[:, :1].squeeze()
        assert len(predicted) == len(y)
        return F.mse_loss(predicted, y.to(x.dtype))


class Even(Module):
    """Mixes pairs, so that it needs an even number of examples."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        if len(x) % 2:
            raise ValueError("an even number of examples is needed")
        return F.cross_entropy(self.net(x), y)


@pytest.mark.parametrize("kind", [Squeezed, Even])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_step_that_fails_for_a_batch_of_one_has_scores_all_the_same(kind: type[Module], size: int) -> None:
    module = kind()
    trainer = fitted(module, DATA)
    batch = [tensor[:size] for tensor in DATA.tensors]
    if kind is Even:
        exact = dense_scores(module.net, lambda net, x: net(x), cross_entropy, PAIRS, range(size))
    else:
        exact = dense_scores(module.net, lambda net, x: net(x)[:1], squared_error, PAIRS, range(size))
    assert error(trainer.influence(batch, **CONVERGED).scores[0], exact) < 1e-5
    assert trainer.unlearn([1, 2, 3], dry_run=True).n_forget == 3


class Branching(Module):
    """Leaves out a mask that is true everywhere, as implementations of attention do."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        mask = x > -1
        if mask.sum() != mask.numel():
            x = torch.where(mask, x, 0.0)
        return F.cross_entropy(self.net(x), y)


@pytest.mark.filterwarnings("error::lightning_gif.GIFWarning")
def test_a_step_that_branches_on_a_mask_is_evaluated_for_whole_batches() -> None:
    assert 0 < (DATA.tensors[0] > -1).all(1).sum() < N
    trainer = fitted(Branching(), DATA)
    exact = dense_scores(
        trainer.lightning_module.net, lambda net, x: net(torch.where(x > -1, x, 0.0)), cross_entropy, PAIRS, range(3)
    )
    report = trainer.influence([tensor[:3] for tensor in DATA.tensors], **CONVERGED)
    assert report.settings["losses"] == "training_step of whole batches"
    assert error(report.scores[0], exact) < 1e-5


class CountedByMask(Module):
    """Divides by a count of a mask, which is that of each example."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        mask = x > -1
        if mask.sum() == 0:
            return 0.0 * self.net(x).sum()
        return (F.cross_entropy(self.net(x), y, reduction="none")[:, None] * mask).sum() / mask.sum()


def test_a_count_of_a_mask_in_the_loss_is_that_of_the_example() -> None:
    trainer = fitted(CountedByMask(), DATA)
    with pytest.warns(GIFWarning, match="they are weighted"):
        report = trainer.influence([tensor[:3] for tensor in DATA.tensors], **CONVERGED)
    exact = dense_scores(trainer.lightning_module.net, lambda net, x: net(x), cross_entropy, PAIRS, range(3))
    assert report.settings["losses"] == "training_step of whole batches"
    assert error(report.scores[0], exact) < 1e-5


class Contrastive(Module):
    """Compares the examples of a batch with each other; for one alone there is no loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z = F.normalize(self.net(batch[0]), dim=1)
        others = z @ z.T - 9 * torch.eye(len(z), dtype=z.dtype)
        if len(z) == 1:
            raise RuntimeError("nothing to compare with")
        return F.cross_entropy(others, (torch.arange(len(z)) + 1) % len(z))


def test_a_loss_of_pairs_is_refused_with_the_lines_that_define_one() -> None:
    trainer = fitted(Contrastive(), DATA)
    with pytest.raises(ObjectiveError, match=r"nothing to compare with[\s\S]*def influence_loss\(self, batch\):"):
        trainer.influence([tensor[:2] for tensor in DATA.tensors])


class Weighted(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y, weight=torch.tensor([0.2, 1.8, 1.0], dtype=x.dtype))


class Noisy(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x) + 0.1 * torch.randn(len(x), 3, dtype=x.dtype), y)


class Centred(Module):
    """The loss of an example depends on the mean of its batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z = self.net(batch[0])
        return F.cross_entropy(z + z.mean(0), batch[1])


class ByHandWeighted(Module):
    """Each example has a weight of its own, and the loss is divided by their sum."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        weight = x[:, 0].abs() + 0.1
        return (weight * F.cross_entropy(self.net(x), y, reduction="none")).sum() / weight.sum()


_DRAWS = itertools.count()


class Outside(Module):
    """Its loss depends on how often the step was called, which no attribute of the module shows."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (1 + next(_DRAWS) % 7) * F.cross_entropy(self.net(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        (Weighted, "they are weighted"),
        (ByHandWeighted, "they are weighted"),
        (Centred, "they are coupled"),
        (Noisy, "they are random"),
    ],
)
def test_the_cause_is_named_where_a_batch_has_another_loss_than_its_examples(kind: type[Module], cause: str) -> None:
    """Also if the data are sorted by class, so that the first examples are alike."""
    x, y = DATA.tensors
    order = y.argsort(stable=True)
    trainer = fitted(kind(), torch.utils.data.TensorDataset(x[order], y[order]))
    with pytest.warns(
        GIFWarning, match=rf"for a batch of \d+ is [\d.]+, but .* of the single examples is [\d.]+ \({cause}"
    ):
        trainer.influence([x[:1], y[:1]])


@pytest.mark.filterwarnings("ignore:The losses of single examples are computed one:lightning_gif.GIFWarning")
def test_state_outside_of_the_module_is_named() -> None:
    trainer = fitted(Outside(), DATA)
    with pytest.warns(GIFWarning, match="depends on state outside of the module"):
        trainer.influence([tensor[:1] for tensor in DATA.tensors])


class Named(Module):
    """Its batches are mappings, and it has a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z = self(batch["image"])
        return F.cross_entropy(z + z.mean(0), batch["label"])


class Regression(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z = self.net(batch[0])
        return F.mse_loss(z + z.mean(0), batch[1])


class Several(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z = self.net(batch[0])
        return F.cross_entropy(z + z.mean(0), batch[1], weight=torch.tensor([1.0, 2.0, 3.0], dtype=z.dtype))


def as_mappings() -> list[Any]:
    return [{"image": x, "label": y} for x, y in DATA]


@pytest.mark.parametrize(
    ("kind", "data", "line"),
    [
        (Centred, DATA, "F.cross_entropy(self.net(x), y, reduction"),
        (Named, as_mappings(), "F.cross_entropy(self(x), y, reduction"),
        (Regression, [(x, x[:3]) for x, _ in DATA], "F.mse_loss(self.net(x), y, reduction"),
        (
            Several,
            [(x, y, 0) for x, y in DATA],
            "F.cross_entropy(self.net(x), y, weight=torch.tensor([1.0, 2.0, 3.0]), reduction",
        ),
    ],
)
def test_the_lines_that_a_warning_shows_define_the_losses(kind: type[Module], data: Any, line: str) -> None:
    module = kind()
    trainer = fitted(module, data)
    query = torch.utils.data.default_collate([data[0], data[1]])
    with pytest.warns(GIFWarning, match=re.escape(line)) as caught:
        trainer.influence(query)
    message = next(str(warning.message) for warning in caught if line in str(warning.message))
    code = textwrap.dedent(message[message.index("    def influence_loss") : message.index("\n\nOr pass")])
    names = {"F": F, "torch": torch}
    exec(code, names)
    module.influence_loss = MethodType(names["influence_loss"], module)  # type: ignore[assignment, arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error", GIFWarning)
        assert trainer.influence(query).settings["losses"] == "influence_loss"


@pytest.mark.filterwarnings("ignore::lightning_gif.GIFWarning")
@pytest.mark.parametrize(
    ("module", "data", "collate", "origin"),
    [
        (Weighted, DATA, None, "training_step, vectorised over examples"),
        (Even, DATA, None, "training_step of whole batches"),
        (partial(Clouds, True), Items(CLOUDS), CLOUD_COLLATES["list"], "training_step for one example at a time"),
    ],
)
def test_a_report_says_how_losses_were_found(module: Any, data: Any, collate: Any, origin: str) -> None:
    trainer = fitted(module(), data, collate)
    asked = DataLoader(Subset(data, [0, 1]), 2, collate_fn=collate)
    for report in (trainer.influence(asked), trainer.self_influence(), trainer.unlearn([1, 2], dry_run=True)):
        assert f"losses of single examples: {origin}" in str(report)

"""A store of gradients answers as the full scores do, without the training data, and says what is wrong with it."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from lightning_gif import (
    BatchError,
    ConfigurationError,
    GIFCallback,
    GIFError,
    GIFMixin,
    GIFWarning,
    InfluenceReport,
    NonFiniteError,
    attach,
)
from lightning_gif.attribution import gradient_store
from lightning_gif.attribution.gradient_store import GradientStore, quantised
from lightning_gif.curvature.ekfac import EKFACInverse
from lightning_gif.curvature.projection import Projection
from lightning_gif.data.plain import from_plain, to_plain
from lightning_gif.objective.objective import Objective

from ..conftest import Classifier, batch_of, blobs, fitted, loader, make_trainer
from ..nets import NETS, make

QUERY = batch_of(blobs(60, seed=3), range(9))


def perceptron(width: int = 80) -> Classifier:
    """With a width of 80, it has more parameters than a gradient has coordinates."""
    return Classifier(nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3)))


def stored(tmp_path: Path, n: int = 48, **options: Any) -> tuple[Any, Any, GradientStore]:
    trainer, module, _ = fitted(perceptron(8), blobs(n), GIFCallback(snapshots=0))
    return trainer, module, trainer.store_gradients(tmp_path / "store", **options)


def rounding(trainer: Any, store: GradientStore, query: Any, scores: Tensor) -> Tensor:
    """A bound on the error of scores ``(q, n)`` by rounding: half a unit of each coordinate, times the query's."""
    callback = trainer.callbacks[0]
    with callback.open_session(store.settings, "batch") as session:
        asked = store.read_state(0, session.objective).projection.of_losses(
            session.objective, next(session.examples(query).batches())
        )
    factors = torch.cat([chunk.values[0].abs().amax(1) / 127 for chunk in store.chunks(range(store.manifest.n_chunks))])
    bound = asked.abs().sum(1)[:, None] * factors / 2 / (store.manifest.n_train - 1)
    return bound * 1.01 + 1e-5 * scores.abs().max()


# ----------------------------------------------------------------------------------------------------------------------
# The projection
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NETS if name not in ("lstm", "gru", "cells")])
def test_inner_products_of_coordinates_are_those_with_the_inverse_curvature(name: str, tmp_path: Path) -> None:
    net, dataset = make(name, 24)
    module, trainer = Classifier(net), make_trainer(precision="64-true")
    callback = GIFCallback(curvature_examples=None)
    attach(trainer, module.double(), train_dataloaders=loader(dataset), callback=callback)
    with callback.open_session(
        replace(callback.settings, method="if", solver="ekfac", curvature="ggn"), "batch"
    ) as one:
        objective, layers = one.objective, one.objective.layers
        if layers is None:
            pytest.skip("not all parameters are in layers")
        ekfac = EKFACInverse.of(objective, layers, one.train, one.settings, lambda: None)
        whole = Projection.fit(objective, ekfac, one.train, objective.space.size)
        assert whole.components is None
        batch = next(one.train.batches())
        gradients = torch.cat(list(objective.gradients(batch)))
        expected = gradients @ ekfac.ihvp(gradients)[0].T
        coordinates = whole.of_losses(objective, batch)
        torch.testing.assert_close(coordinates @ whole.of_gradients(gradients).T, expected, rtol=1e-8, atol=1e-10)
        # As many principal components as examples span their gradients, up to the rounding of components to 16 bits.
        some = Projection.fit(objective, ekfac, one.train, len(dataset))
        if some.components is not None:
            assert some.rank <= len(dataset)
            found = some.of_losses(objective, batch) @ some.of_gradients(gradients).T
            torch.testing.assert_close(found, expected, rtol=0, atol=5e-3 * float(expected.abs().max()))
        # A file has everything.
        again = Projection.from_record(objective, json.loads(json.dumps(some.to_record()[0])), some.to_record()[1])
        assert torch.equal(again.of_losses(objective, batch), some.of_losses(objective, batch))


def test_more_coordinates_keep_more_of_each_gradient() -> None:
    trainer, _, _ = fitted(perceptron(), blobs(200), GIFCallback(snapshots=0))
    callback = trainer.callbacks[0]
    with callback.open_session(
        replace(callback.settings, method="if", solver="ekfac", curvature="ggn"), "batch"
    ) as one:
        objective = one.objective
        ekfac = EKFACInverse.of(objective, objective.layers, one.train, one.settings, lambda: None)
        batch = next(one.train.batches())
        lengths = [
            Projection.fit(objective, ekfac, one.train, rank).of_losses(objective, batch).norm(dim=1)
            for rank in (4, 16, 64, 803)
        ]
        whole = ekfac.quadratic()(torch.cat(list(objective.gradients(batch)))).sqrt().to(lengths[-1])
        for fewer, more in itertools.pairwise(lengths):
            assert (fewer <= 1.001 * more).all()
        torch.testing.assert_close(lengths[-1], whole, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("values", [torch.randn(3, 5, 7), torch.zeros(2, 4, 3), 1e30 * torch.randn(1, 2, 3)])
def test_rounding_is_at_most_half_a_unit(values: Tensor) -> None:
    factors, whole = quantised(values)
    assert ((whole.float() * factors[..., None] - values).abs() <= 0.501 * factors[..., None]).all()


# ----------------------------------------------------------------------------------------------------------------------
# Scores
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.01}, {"damping": 0.1}, {"curvature_examples": 20}], ids=str)
def test_scores_are_those_of_ekfac_up_to_rounding(options: dict[str, Any], tmp_path: Path) -> None:
    trainer, _, store = stored(tmp_path, **options)
    full = trainer.influence(QUERY, per_example=True, solver="ekfac", **options)
    report = trainer.influence(QUERY, per_example=True, store=tmp_path / "store")
    assert torch.equal(report.indices, full.indices)
    assert torch.equal(report.labels, full.labels)
    assert ((report.scores - full.scores).abs() <= rounding(trainer, store, QUERY, full.scores)).all()
    mean = trainer.influence(QUERY, store=tmp_path / "store")
    torch.testing.assert_close(mean.scores[0], report.scores.mean(0), rtol=1e-4, atol=1e-7)
    assert report.settings["damping"] == full.settings["damping"]
    assert len(report.queries) == 8
    torch.testing.assert_close(report.predictions, full.predictions)


def test_a_truncated_store_correlates_with_full_scores_and_says_how_well(tmp_path: Path) -> None:
    trainer, _, _ = fitted(perceptron(), blobs(400), GIFCallback(snapshots=0, curvature_examples=200), max_epochs=6)
    full = trainer.influence(QUERY, per_example=True, solver="ekfac").scores
    found = []
    for rank in (4, 64):
        store = trainer.store_gradients(tmp_path / str(rank), rank=rank)
        report = trainer.influence(QUERY, per_example=True, store=store.folder)
        pairs = zip(full, report.scores, strict=True)
        found.append(torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs]).mean())
        assert abs(report.settings["store_correlation"] - found[-1]) < 0.1
        assert f"{report.settings['store_correlation']:.3f}" in str(store)
    assert found[1] > found[0]
    assert found[1] > 0.95


def test_snapshots_are_averaged_with_error_bars_after_the_callback_has_lost_them(tmp_path: Path) -> None:
    trainer, module, _ = fitted(perceptron(8), blobs(), GIFCallback(snapshots=2), max_epochs=5)
    full = trainer.influence(QUERY, per_example=True, solver="ekfac")
    store = trainer.store_gradients(tmp_path / "store")
    assert store.manifest.n_states == 3
    other = make_trainer()
    attach(other, module, callback=GIFCallback())
    report = other.influence(QUERY, per_example=True, store=tmp_path / "store")
    scale = float(full.scores.abs().max())
    torch.testing.assert_close(report.scores, full.scores, rtol=0, atol=0.02 * scale)
    torch.testing.assert_close(report.standard_errors, full.standard_errors, rtol=0, atol=0.02 * scale)
    assert abs(report.agreement - full.agreement) < 0.01
    assert report.n_states == 3
    present = other.influence(QUERY, per_example=True, store=tmp_path / "store", snapshots=False)
    alone = trainer.influence(QUERY, per_example=True, solver="ekfac", snapshots=False)
    torch.testing.assert_close(present.scores, alone.scores, rtol=0, atol=0.02 * scale)
    assert present.standard_errors is None


def test_the_strongest_scores_and_some_examples_are_those_of_the_whole_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradient_store, "CHUNK", 10)
    trainer, _, store = stored(tmp_path, n=47)
    whole = trainer.influence(QUERY, per_example=True, store=store.folder)
    ends = trainer.influence(QUERY, per_example=True, store=store.folder, k=2, keep=5)
    assert ends.n_kept == 5
    for one, other in ((ends.proponents(5), whole.proponents(5)), (ends.opponents(5), whole.opponents(5))):
        assert torch.equal(one.indices, other.indices)
        assert torch.equal(one.scores, other.scores)
    chosen = [40, 2, 11, 12]
    mask = torch.isin(torch.arange(47), torch.tensor(chosen))
    few = trainer.influence(QUERY, per_example=True, store=store.folder, among=chosen, k=1)
    assert few.indices.tolist() == chosen
    assert torch.equal(few.labels, whole.labels[chosen])
    torch.testing.assert_close(few.scores, whole.scores[:, chosen])
    masked = trainer.influence(QUERY, per_example=True, store=store.folder, among=mask, k=1)
    torch.testing.assert_close(masked.scores, whole.scores[:, mask])


def test_many_queries_are_answered_a_few_scores_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _, store = stored(tmp_path)
    expected = trainer.influence(QUERY, per_example=True, store=store.folder)
    monkeypatch.setattr("lightning_gif.attribution.from_store._TOGETHER", 40)
    found = trainer.influence(QUERY, per_example=True, store=store.folder)
    torch.testing.assert_close(found.scores, expected.scores)
    assert torch.equal(found.labels, expected.labels)


def test_groups_and_tables_need_no_data(tmp_path: Path) -> None:
    trainer, module, store = stored(tmp_path)
    full = trainer.influence(QUERY, solver="ekfac").by_group()
    other = make_trainer()
    attach(other, module)
    report = other.influence(QUERY, store=store.folder)
    assert report.dataset is None
    assert report.by_group().names == full.names
    assert report.by_group([i % 2 for i in range(48)]).counts.tolist() == [24, 24]
    assert "label" in report.to_dataframe().columns
    report.save(tmp_path / "report")
    assert torch.equal(InfluenceReport.load(tmp_path / "report").scores, report.scores)


def test_reports_of_the_stores_of_several_fits_are_averaged(tmp_path: Path) -> None:
    reports = []
    for seed in range(2):
        torch.manual_seed(seed)
        trainer, _, store = stored(tmp_path / str(seed))
        reports.append(trainer.influence(QUERY, store=store.folder))
    mean = InfluenceReport.mean(reports)
    torch.testing.assert_close(mean.scores, (reports[0].scores + reports[1].scores) / 2)


class Halved(Classifier, GIFMixin):
    def influence_measurement(self, batch: Any) -> Tensor:
        return -self(batch[0])[:, 0]


def test_a_measurement_is_answered(tmp_path: Path) -> None:
    module = Halved(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))
    trainer, _, _ = fitted(module, blobs(), GIFCallback(snapshots=0))
    trainer.store_gradients(tmp_path / "store")
    for query in (QUERY, TensorDataset(*QUERY)):
        for per_example in (False, True):
            full = trainer.influence(query, per_example=per_example, solver="ekfac")
            report = trainer.influence(query, per_example=per_example, store=tmp_path / "store")
            assert report.settings["measures"] == "influence_measurement"
            torch.testing.assert_close(report.scores, full.scores, rtol=0, atol=0.02 * float(full.scores.abs().max()))


# ----------------------------------------------------------------------------------------------------------------------
# Without the data
# ----------------------------------------------------------------------------------------------------------------------


class Files(Dataset[Any]):
    """Examples in files of a folder. A second use of a deleted folder is an error."""

    def __init__(self, folder: Path, n: int = 40) -> None:
        self.folder, self.n = folder, n
        folder.mkdir()
        for index, (x, y) in enumerate(blobs(n)):
            torch.save((x, y), folder / f"{index}.pt")

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Any:
        return torch.load(self.folder / f"{index}.pt")


@pytest.mark.parametrize("same_trainer", [True, False])
def test_the_data_may_be_deleted_before_the_query(same_trainer: bool, tmp_path: Path) -> None:
    dataset = Files(tmp_path / "data")
    trainer, module, _ = fitted(perceptron(8), dataset, GIFCallback(snapshots=0))  # type: ignore[arg-type]
    full = trainer.influence(QUERY, solver="ekfac")
    trainer.store_gradients(tmp_path / "store")
    assert trainer.influence(QUERY, store=tmp_path / "store").dataset is dataset
    shutil.rmtree(tmp_path / "data")
    if not same_trainer:
        trainer = make_trainer()
        attach(trainer, module)
    report = trainer.influence(QUERY, store=tmp_path / "store")
    torch.testing.assert_close(report.scores, full.scores, rtol=0, atol=0.02 * float(full.scores.abs().max()))
    assert "proponents" in str(report)
    assert "from the store of gradients at" in str(report)
    assert report.by_group().counts.sum() == 40
    with pytest.raises(GIFError, match=r"training data are not at hand.*dataset indices"):
        trainer.influence(QUERY, store=tmp_path / "store", among=lambda batch: batch[1] == 1)


def test_other_data_at_hand_are_not_shown(tmp_path: Path) -> None:
    trainer, _, store = stored(tmp_path)
    trainer.callbacks[0].loaders.train = loader(blobs(30))
    assert trainer.influence(QUERY, store=store.folder).dataset is None
    with pytest.raises(ConfigurationError, match="`dataloader` are not those of the store"):
        trainer.influence(QUERY, store=store.folder, dataloader=loader(blobs(30)))
    dataset = blobs(48)
    assert trainer.influence(QUERY, store=store.folder, dataloader=loader(dataset)).dataset is dataset


def test_a_part_of_the_data_can_be_stored(tmp_path: Path) -> None:
    trainer, _, _ = fitted(perceptron(8), Subset(blobs(80), range(10, 70)), GIFCallback(snapshots=0))  # type: ignore[arg-type]
    full = trainer.influence(QUERY, solver="ekfac", among=lambda batch: batch[1] == 2)
    store = trainer.store_gradients(tmp_path / "store", among=lambda batch: batch[1] == 2)
    report = trainer.influence(QUERY, store=store.folder)
    assert torch.equal(report.indices, full.indices)
    assert report.n_train == 20
    torch.testing.assert_close(report.scores, full.scores, rtol=0, atol=0.02 * float(full.scores.abs().max()))


class Rows(IterableDataset[Any]):
    """A stream of rows with ids."""

    def __iter__(self) -> Iterator[Any]:
        for index, (x, y) in enumerate(blobs(30)):
            yield {"x": x, "y": y, "id": 500 - 3 * index}


class Mapped(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch["x"], batch["y"]), batch_idx)


def test_a_stream_is_stored(tmp_path: Path) -> None:
    trainer = make_trainer(GIFCallback(snapshots=0))
    trainer.fit(Mapped(), DataLoader(Rows(), 10))
    query = {"x": QUERY[0], "y": QUERY[1], "id": torch.arange(9)}
    full = trainer.influence(query, solver="ekfac")
    trainer.store_gradients(tmp_path / "store")
    report = trainer.influence(query, store=tmp_path / "store")
    assert torch.equal(report.indices, full.indices)
    torch.testing.assert_close(report.scores, full.scores, rtol=0, atol=0.02 * float(full.scores.abs().max()))


@pytest.mark.parametrize(
    "data",
    [
        torch.arange(3),
        (torch.eye(2), [torch.arange(2), None]),
        {"x": torch.ones(2), "texts": ["a", "b"], "scale": 0.5, "is": True, "of": {"n": 3}},
    ],
    ids=["tensor", "tuple", "dictionary"],
)
def test_batches_are_written_and_read(data: Any) -> None:
    tensors: dict[str, Tensor] = {}
    found = from_plain(json.loads(json.dumps(to_plain(data, tensors, "batch "))), tensors)
    assert repr(found) == repr(data)


def test_a_batch_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    trainer, _, _ = fitted()

    def collate(items: Any) -> Any:
        x, y = zip(*items, strict=True)
        return torch.stack(x), torch.stack(y), {1: 2j}

    class Three(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch[:2], batch_idx)

    attach(trainer, Three(), train_dataloaders=DataLoader(blobs(), 16, collate_fn=collate))
    with pytest.raises(BatchError, match=r"cannot be written to a store.*Collate examples to"):
        trainer.store_gradients(tmp_path / "store")


# ----------------------------------------------------------------------------------------------------------------------
# Interrupted, damaged, of other weights
# ----------------------------------------------------------------------------------------------------------------------


def interrupted(trainer: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, after: int, **options: Any) -> None:
    """A store whose writing ended after a number of chunks."""
    write, written = GradientStore.write_chunk, list[int]()

    def fragile(self: GradientStore, number: int, *parts: Any) -> None:
        if len(written) == after:
            raise KeyboardInterrupt
        written.append(number)
        write(self, number, *parts)

    with monkeypatch.context() as patch:
        patch.setattr(GradientStore, "write_chunk", fragile)
        with pytest.raises(KeyboardInterrupt):
            trainer.store_gradients(folder, **options)


def contents(folder: Path) -> dict[str, Any]:
    """What the files have, as values that can be compared; the order of names in their headers is random."""
    found: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
            found[path.name] = metadata, {name: tensor.tolist() for name, tensor in load_file(path).items()}
        else:
            found[path.name] = path.read_bytes()
    return found


def test_a_store_that_was_interrupted_says_how_far_it_is_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradient_store, "CHUNK", 10)
    trainer, _, whole = stored(tmp_path, batch_size=7)
    interrupted(trainer, tmp_path / "other", monkeypatch, after=3, batch_size=7)
    (tmp_path / "other" / ".chunk-000003.safetensors.0123").write_bytes(b"half")
    (tmp_path / "other" / ".manifest.json.0123").write_bytes(b"half")
    with pytest.raises(ConfigurationError, match=r"not finished: it has 30 of 48 examples.*store_gradients again"):
        trainer.influence(QUERY, store=tmp_path / "other")
    passed, original = list[int](), Projection.of_losses

    def counted(self: Projection, objective: Objective, batch: Any) -> Tensor:
        passed.append(batch.size)
        return original(self, objective, batch)

    def no_fit(*args: Any) -> Any:
        raise AssertionError("the curvature is stored")

    with monkeypatch.context() as patch:
        patch.setattr(Projection, "of_losses", counted)
        patch.setattr(EKFACInverse, "of", no_fit)
        trainer.store_gradients(tmp_path / "other", batch_size=7)
    assert sum(passed) == 18
    assert contents(tmp_path / "other") == contents(whole.folder)
    with monkeypatch.context() as patch:
        patch.setattr(Projection, "of_losses", no_fit)
        trainer.store_gradients(tmp_path / "other")  # there is nothing left to do


KILLED = """
import os, signal, sys
from pathlib import Path
from lightning_gif import GIFCallback
from lightning_gif.attribution import gradient_store
from tests.attribution.test_store import blobs, fitted, perceptron
import torch

gradient_store.CHUNK = 10
torch.manual_seed(0)
trainer, _, _ = fitted(perceptron(8), blobs(), GIFCallback(snapshots=0))
write = gradient_store.GradientStore.write_chunk

def fragile(self, number, *parts):
    if number == 2 and sys.argv[2] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, number, *parts)

gradient_store.GradientStore.write_chunk = fragile
trainer.store_gradients(sys.argv[1])
"""


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_a_store_that_another_one_completes(tmp_path: Path) -> None:
    def run(folder: Path, what: str) -> int:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", KILLED, str(folder), what]
        root = Path(__file__).parents[2]
        return subprocess.run(command, cwd=root, env=environment, capture_output=True, check=False).returncode

    assert run(tmp_path / "one", "kill") < 0
    assert not (tmp_path / "one" / "chunk-000002.safetensors").exists()
    assert run(tmp_path / "one", "live") == 0
    assert run(tmp_path / "two", "live") == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def of_another_version(path: Path) -> None:
    with safe_open(path, "pt") as file:
        metadata = {**file.metadata(), "format": "lightning-gif gradient store 99"}
    save_file(load_file(path), path, metadata)


@pytest.mark.mostly_slow(5)
@pytest.mark.parametrize("name", ["examples.safetensors", "state-0.safetensors", "chunk-000001.safetensors"])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, "is damaged"),
        (flip, "SHA-256"),
        (empty, "is damaged"),
        (of_another_version, "gradient store 99', expected 'lightning-gif gradient store 1'"),
        (Path.unlink, "not finished"),
    ],
)
def test_a_damaged_part_is_named_and_computed_again(
    name: str, damage: Callable[[Path], None], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradient_store, "CHUNK", 20)
    trainer, _, store = stored(tmp_path)
    whole = contents(store.folder)
    damage(store.folder / name)
    with pytest.raises(ConfigurationError, match=rf"{said}.*Call trainer.store_gradients again") as error:
        trainer.influence(QUERY, store=store.folder)
    if damage is Path.unlink:
        trainer.store_gradients(store.folder)
    else:
        assert name in str(error.value)
        with pytest.warns(GIFWarning, match=r"The store at .* has damaged files: 1\."):
            trainer.store_gradients(store.folder)
    assert contents(store.folder) == whole


def test_a_part_of_another_store_is_named(tmp_path: Path) -> None:
    trainer, _, store = stored(tmp_path)
    other = trainer.store_gradients(tmp_path / "other", damping=0.3)
    shutil.copy(other.folder / "chunk-000000.safetensors", store.folder)
    with pytest.raises(ConfigurationError, match=r"chunk-000000.safetensors' is a part of another store"):
        trainer.influence(QUERY, store=store.folder)


def of_version(record: dict[str, Any]) -> None:
    record["format"] = "lightning-gif gradient store 2"


def edited(record: dict[str, Any]) -> None:
    record["n_train"] += 1


def shortened(record: dict[str, Any]) -> None:
    del record["settings"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (of_version, "states the format 'lightning-gif gradient store 2'.*Use the version of this package"),
        (edited, "it was edited or damaged"),
        (shortened, "is damaged.*write the store again"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_named(
    change: Callable[[dict[str, Any]], None], said: str, tmp_path: Path
) -> None:
    trainer, _, store = stored(tmp_path)
    record = json.loads((store.folder / "manifest.json").read_text())
    change(record)
    (store.folder / "manifest.json").write_text(json.dumps(record))
    for call in (lambda: trainer.influence(QUERY, store=store.folder), lambda: trainer.store_gradients(store.folder)):
        with pytest.raises(ConfigurationError, match=rf"manifest.json.*{said}"):
            call()


def test_a_store_of_other_weights_is_refused(tmp_path: Path) -> None:
    trainer, module, store = stored(tmp_path)
    with torch.no_grad():
        module.net[0].bias[0] += 1e-3
    with pytest.raises(ConfigurationError, match=r"belongs to other weights.*write another store"):
        trainer.influence(QUERY, store=store.folder)
    with pytest.raises(ConfigurationError, match="store of other gradients, which differ in: weights"):
        trainer.store_gradients(store.folder)
    with torch.no_grad():
        module.net[0].bias[0] -= 1e-3
    report = trainer.unlearn([3])
    with pytest.raises(ConfigurationError, match="belongs to other weights"):
        trainer.influence(QUERY, store=store.folder)
    report.undo()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"damping": 0.3}, "damping"),
        ({"rank": 7}, "rank"),
        ({"among": [1, 2]}, "the examples that are stored"),
        ({"dataloader": loader(blobs(40))}, "training data"),
    ],
)
def test_a_store_of_other_gradients_is_left_alone(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    trainer, _, store = stored(tmp_path)
    before = contents(store.folder)
    with pytest.raises(ConfigurationError, match=rf"differ in: .*{said}"):
        trainer.store_gradients(store.folder, **options)
    assert contents(store.folder) == before


def test_a_folder_that_is_no_store_is_left_alone(tmp_path: Path) -> None:
    trainer, _, _ = fitted()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("one")
    for call in (lambda path: trainer.influence(QUERY, store=path), trainer.store_gradients):
        with pytest.raises(ConfigurationError, match="holds no store of gradients"):
            call(tmp_path / "thesis")
    with pytest.raises(ConfigurationError, match="There is no store at"):
        trainer.influence(QUERY, store=tmp_path / "none")
    with pytest.raises(ConfigurationError, match="is a file"):
        trainer.store_gradients(tmp_path / "thesis" / "chapter.txt")
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.txt"]


# ----------------------------------------------------------------------------------------------------------------------
# Arguments
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"targets": "batch"}, "`targets` cannot be given with `store`"),
        ({"scores_to": "folder"}, "`scores_to` cannot be given with `store`"),
        ({"damping": 0.1, "solver": "cg"}, "`damping`, `solver` cannot be given with `store`"),
        ({"snapshots": True}, "needs a store with snapshots"),
        ({"store": ""}, "`store` must be the path of a folder"),
        ({"among": "all"}, "`among` must be indices"),
    ],
)
def test_arguments_that_a_store_excludes_are_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    trainer, _, store = stored(tmp_path)
    with pytest.raises(ConfigurationError, match=said):
        trainer.influence(QUERY, **{"store": store.folder, **options})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "gif"}, "needs method='if', got 'gif'"),
        ({"curvature": "hessian"}, "needs curvature='ggn'"),
        ({"solver": "cg"}, "needs solver='ekfac'"),
        ({"max_iter": 3, "rtol": 0.1}, "takes no `max_iter`, `rtol`"),
        ({"rank": 0}, "`rank`"),
        ({"folder": None}, "`folder` must be the path of a folder, got None"),
        ({"snapshots": True}, "snapshots=True needs snapshots"),
    ],
)
def test_wrong_arguments_of_a_store_are_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    trainer, _, _ = fitted(callback=GIFCallback(snapshots=0))
    with pytest.raises(ConfigurationError, match=said):
        trainer.store_gradients(**{"folder": tmp_path / "store", **options})
    assert not (tmp_path / "store").exists()


def test_a_module_without_layers_has_no_store(tmp_path: Path) -> None:
    net, dataset = make("lstm", 24)
    module = Classifier(net)
    trainer = make_trainer()
    attach(trainer, module, train_dataloaders=loader(dataset))
    with pytest.raises(ConfigurationError, match="in layers that are linear in them"):
        trainer.store_gradients(tmp_path / "store")


def test_an_example_without_a_finite_gradient_is_named(tmp_path: Path) -> None:
    trainer, _, dataset = fitted()
    dataset.tensors[0][17] = float("nan")
    with pytest.raises(NonFiniteError, match="17"):
        trainer.store_gradients(tmp_path / "store", curvature_examples=4)


# ----------------------------------------------------------------------------------------------------------------------
# At the end of a fit
# ----------------------------------------------------------------------------------------------------------------------


def test_a_fit_writes_a_store_of_its_last_weights(tmp_path: Path) -> None:
    callback = GIFCallback(store=str(tmp_path / "store"))
    trainer, _, _ = fitted(perceptron(8), blobs(), callback, max_epochs=3)
    full = trainer.influence(QUERY, solver="ekfac")
    report = trainer.influence(QUERY, store=tmp_path / "store")
    assert report.n_states == 2
    torch.testing.assert_close(report.scores, full.scores, rtol=0, atol=0.02 * float(full.scores.abs().max()))
    with pytest.raises(ConfigurationError, match="The end of the fit would write a store"):
        trainer.fit(perceptron(8), loader(blobs()))


def test_a_store_that_cannot_be_written_does_not_end_a_fit(tmp_path: Path) -> None:
    net, dataset = make("lstm", 24)
    module = Classifier(net)
    trainer = make_trainer(GIFCallback(store=str(tmp_path / "store")), max_epochs=1)
    with pytest.warns(GIFWarning, match=r"was not written: ConfigurationError.*The training is complete"):
        trainer.fit(module, loader(dataset))
    assert trainer.current_epoch == 1

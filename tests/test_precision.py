"""Scores and edits in every precision, compiled, and on a GPU: they are near float32, and undo restores all bits."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_gif import GIFCallback, GIFWarning, UnlearnReport, attach
from lightning_gif._compat import isolate_rng
from lightning_gif.errors import BatchError, ObjectiveError
from lightning_gif.objective import isolation
from lightning_gif.objective.isolation import _moved

from .conftest import WEIGHTS_ONLY, Classifier, batch_of, blobs, fitted, loader, make_trainer, same_weights, weights

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


# Solves that stop early or have less damping amplify rounding to per cents of the solution.
CONVERGED: Any = {"damping": 0.05, "max_iter": 200, "rtol": 1e-6}
SOLVED = 1e-3


class Silent(Classifier):
    """A module without logging, which compiled code does not support."""

    def log(self, *args: Any, **kwargs: Any) -> None:
        return None


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def quick(**options: Any) -> GIFCallback:
    return GIFCallback(**{"ratio": 0.5, "unconverged": "ignore", "snapshots": 0, **options})


def story(
    trainer: pl.Trainer, module: pl.LightningModule, data: TensorDataset, path: Path
) -> tuple[Tensor, Tensor, UnlearnReport]:
    """Scores by default and by `gif`, and an edit. At the end the module is bit for bit as before."""
    before, dtypes = weights(module), {name: value.dtype for name, value in module.state_dict().items()}
    devices = {name: value.device for name, value in module.state_dict().items()}
    batch = batch_of(data, slice(4))
    scores = trainer.influence(batch, **CONVERGED).scores
    theory = trainer.influence(batch, method="gif", selector=["*.weight"], **CONVERGED).scores
    assert same_weights(before, weights(module))
    edit = trainer.unlearn(batch, step=4.0, selector=["*.weight"], **CONVERGED)
    assert not same_weights(before, weights(module))
    assert {name: value.dtype for name, value in module.state_dict().items()} == dtypes
    edit.save(path / "edit")
    UnlearnReport.load(path / "edit", module).undo()
    assert same_weights(before, weights(module))
    edit.apply()
    edit.undo()
    assert same_weights(before, weights(module))
    assert {name: value.device for name, value in module.state_dict().items()} == devices
    return scores, theory, edit


def alike(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert float((found - expected).norm() / expected.norm()) < tolerance


def twin(module: pl.LightningModule, data: TensorDataset) -> tuple[pl.Trainer, Classifier]:
    """The same weights in float32, in a new trainer."""
    other = Classifier(net())
    other.load_state_dict({name.replace("_orig_mod.", ""): value for name, value in module.state_dict().items()})
    trainer = make_trainer()
    attach(trainer, other, train_dataloaders=loader(data), callback=quick())
    return trainer, other


# Mixed precision keeps weights in float32. All computations use it, so scores are those of float32.
# Computations with bfloat16 weights use float32, and those with float64 weights use float64.
PRECISIONS = [("32-true", 1e-5), ("bf16-mixed", 1e-5), ("bf16-true", 1e-4), ("64-true", 1e-5)]


@pytest.mark.mostly_slow(2)
@pytest.mark.parametrize(("precision", "tolerance"), PRECISIONS)
def test_scores_and_edits_in_mixed_precision_equal_those_of_float32(
    precision: Any, tolerance: float, tmp_path: Path
) -> None:
    trainer, module, data = fitted(Classifier(net()), callback=quick(), precision=precision)
    scores, theory, edit = story(trainer, module, data, tmp_path)
    if precision == "bf16-true":  # it rounds its inputs as well
        data = TensorDataset(data.tensors[0].bfloat16().float(), data.tensors[1])
    other = twin(module, data)
    expected = story(*other, data, tmp_path)
    alike(scores, expected[0], tolerance)
    alike(theory, expected[1], SOLVED)
    changes = [
        torch.cat([one.edit.new[name].double() - one.edit.old[name].double() for name in one.edit.indices])
        for one in (edit, expected[2])
    ]
    alike(*changes, 0.05 if precision == "bf16-true" else SOLVED)  # where new weights are rounded to 8 bits


def test_a_module_in_float64_is_computed_in_float64(tmp_path: Path) -> None:
    data = blobs()
    data = TensorDataset(data.tensors[0].double(), data.tensors[1])
    trainer, module, _ = fitted(Classifier(net()).double(), data, quick())
    scores, _, edit = story(trainer, module, data, tmp_path)
    assert {value.dtype for value in edit.edit.new.values()} == {torch.float64}
    other, _ = twin(module, TensorDataset(data.tensors[0].float(), data.tensors[1]))
    alike(scores, other.influence(batch_of(data, slice(4)), double=True, **CONVERGED).scores, 1e-5)


def test_a_module_of_mixed_dtypes_keeps_them(tmp_path: Path) -> None:
    class Narrow(nn.Module):
        """A head in bfloat16 after a body in float32."""

        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3).bfloat16()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.body(x)).to(self.head.weight.dtype)).float()

    trainer, module, data = fitted(Classifier(Narrow()), callback=quick(), max_epochs=1)
    scores, theory, edit = story(trainer, module, data, tmp_path)
    assert scores.isfinite().all()
    assert theory.isfinite().all()
    assert {value.dtype for value in edit.edit.new.values()} == {torch.float32, torch.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize("part", ["module", "submodule", "method"])
def test_compiled_modules_are_edited_too(part: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module: Any = Silent(net())
    data = blobs()
    if part == "submodule":
        module.net[0] = torch.compile(module.net[0], backend="eager")
    elif part == "method":
        module.net.compile(backend="eager")
    model = torch.compile(module, backend="eager") if part == "module" else module
    trainer = make_trainer(quick())
    trainer.fit(model, loader(data))
    scores, theory, _ = story(trainer, trainer.lightning_module, data, tmp_path)
    other = twin(trainer.lightning_module, data)
    expected = story(*other, data, tmp_path)
    alike(scores, expected[0], 1e-4)
    alike(theory, expected[1], SOLVED)


def test_half_precision_on_a_cpu_works(tmp_path: Path) -> None:
    """Lightning takes it for ``bf16-mixed`` there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer, module, data = fitted(Classifier(net()), callback=quick(), precision="16-mixed", max_epochs=1)
    assert trainer.precision == "bf16-mixed"
    scores, theory, _ = story(trainer, module, data, tmp_path)
    assert scores.isfinite().all()
    assert theory.isfinite().all()


class Replaced(Classifier):
    """Simulates a move from a CPU to a GPU: the parameters stay, and get another tensor."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.data = torch.zeros_like(parameter)
                assert parameter.grad is not None
                parameter.grad.data = torch.zeros_like(parameter)
        for submodule in self.modules():
            submodule._buffers.update({name: torch.zeros_like(held) for name, held in submodule.named_buffers()})
        return self


def test_a_moved_module_gets_its_original_tensors_back_and_no_others() -> None:
    module = Replaced(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)))
    module.training_step(batch_of(blobs(), slice(4)), 0).backward()
    state = [*module.parameters(), *module.buffers(), *(p.grad for p in module.parameters() if p.grad is not None)]
    before = [(tensor, tensor.data_ptr(), tensor.clone()) for tensor in state]
    names = list(module.state_dict())
    with _moved(module, torch.device("cpu")):
        assert not any(parameter.any() for parameter in module.parameters())
        module.net.register_buffer("mask", torch.ones(2))
        module.register_parameter("scale", nn.Parameter(torch.ones(2)))
        module.add_module("later", nn.Linear(2, 2))
    assert list(module.state_dict()) == names
    after = [*module.parameters(), *module.buffers(), *(p.grad for p in module.parameters() if p.grad is not None)]
    for tensor, (one, where, value) in zip(after, before, strict=True):
        assert tensor is one
        assert tensor.data_ptr() == where
        assert torch.equal(tensor, value)


@pytest.mark.parametrize("how", ["read", "interrupted"])
def test_a_device_that_fails_leaves_tensors_on_other_devices(how: str) -> None:
    """Nothing can be read from PyTorch's meta device, as from a GPU that has failed."""
    module = Classifier(net())
    batch = batch_of(blobs(), slice(4))
    module.training_step(batch, 0).backward()
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    held = {name: (tensor, tensor.data_ptr(), tensor.clone(), tensor.grad) for name, tensor in own.items()}

    def fail() -> None:
        with _moved(module, torch.device("meta")):
            assert {tensor.device.type for tensor in module.state_dict().values()} == {"meta"}
            if how == "read":
                module.cpu()
            raise KeyboardInterrupt

    with pytest.raises(NotImplementedError if how == "read" else KeyboardInterrupt):
        fail()
    for name, tensor in {**dict(module.named_parameters()), **dict(module.named_buffers())}.items():
        before, where, value, grad = held[name]
        assert tensor is before
        assert tensor.data_ptr() == where
        assert torch.equal(tensor, value)
        assert tensor.grad is grad
        assert grad is None or grad.device.type == "cpu"
    module.training_step(batch, 0).backward()


def test_the_error_of_a_failed_device_is_reported_not_that_of_the_clean_up(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, module, data = fitted(Classifier(net()), callback=quick())
    own, training = isolate_rng, {name: part.training for name, part in module.named_modules()}

    @contextlib.contextmanager
    def failed() -> Iterator[None]:
        with own():
            yield
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(isolation, "isolate_rng", failed)
    monkeypatch.setattr(isolation, "fails_for_good", lambda device: True)
    with pytest.raises(BatchError, match="there are 3 classes"), pytest.warns(GIFWarning, match="device-side"):
        trainer.influence((data.tensors[0][:4], data.tensors[1][:4] + 7))
    assert {name: part.training for name, part in module.named_modules()} == training
    with pytest.raises(RuntimeError, match="device-side"):
        trainer.influence(batch_of(data, slice(4)))


# --------------------------------------------------------------------------------------------------------------------
# On a GPU
# --------------------------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [("32-true", 1e-3), ("16-mixed", 1e-3), ("bf16-mixed", 1e-3), ("bf16-true", 1e-2), ("64-true", 1e-3)],
)
def test_scores_on_a_gpu_equal_those_on_the_cpu(precision: Any, tolerance: float, tmp_path: Path) -> None:
    trainer, module, data = fitted(
        Classifier(net()), callback=quick(), precision=precision, accelerator="gpu", devices=1
    )
    scores, theory, _ = story(trainer, module, data, tmp_path)
    if precision == "bf16-true":
        data = TensorDataset(data.tensors[0].bfloat16().float(), data.tensors[1])
    expected = story(*twin(module, data), data, tmp_path)
    alike(scores, expected[0], tolerance)
    alike(theory, expected[1], SOLVED)


@needs_gpu
@pytest.mark.parametrize("where", ["cuda", "cpu"])
def test_an_edit_is_made_and_undone_on_the_device_of_the_module(where: str, tmp_path: Path) -> None:
    trainer, module, data = fitted(Classifier(net()), callback=quick(), accelerator="gpu", devices=1)
    module.to(where)
    story(trainer, module, data, tmp_path)


@needs_gpu
def test_statistics_gathered_on_a_gpu_are_loaded_on_the_cpu(tmp_path: Path) -> None:
    trainer, module, data = fitted(Classifier(net()), callback=quick(), accelerator="gpu", devices=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    callback = quick()
    fresh = make_trainer(callback)
    fresh.validate(Classifier(net()), loader(data), ckpt_path=tmp_path / "a.ckpt", **WEIGHTS_ONLY, verbose=False)
    assert dict(callback.targets).keys() == dict(trainer.callbacks[0].targets).keys()
    assert same_weights(weights(module), weights(fresh.lightning_module))


class OwnLosses(Classifier):
    """Per-example losses by the module's own ``vmap``."""

    def influence_loss(self, batch: Any) -> Tensor:
        return torch.func.vmap(nn.functional.cross_entropy)(self(batch[0]), batch[1])


def test_losses_by_the_users_own_vmap_work_with_checks_of_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _, data = fitted(OwnLosses(net()), callback=quick())
    report = trainer.influence(batch_of(data, slice(4)))
    assert report.settings["curvature"] == "hessian"
    expected = report.scores
    with pytest.raises(ObjectiveError, match="inside a vmap"):
        trainer.influence(batch_of(data, slice(4)), curvature="ggn")
    trainer.unlearn([1, 2], dry_run=True)
    with pytest.warns(GIFWarning, match="the model's predictions are not known"):
        trainer.unlearn(lambda batch: batch[1] == 1, dry_run=True)
    monkeypatch.setattr(isolation, "fails_for_good", lambda device: True)
    assert torch.equal(trainer.influence(batch_of(data, slice(4))).scores, expected)
    trainer.unlearn([1, 2], dry_run=True)


@needs_gpu
def test_an_invalid_label_is_refused_before_the_gpu_fails() -> None:
    trainer, _, data = fitted(Classifier(net()), callback=quick(), accelerator="gpu", devices=1)
    x, y = batch_of(data, slice(4))
    before = trainer.influence((x, y)).scores
    for call in (trainer.influence, trainer.unlearn):
        with pytest.raises(BatchError, match="target 9 is out of bounds: there are 3 classes"):
            call((x, torch.full_like(y, 9)))
    with pytest.raises(BatchError, match="label -1, but the model predicts 3"):
        trainer.unlearn((x, y), relabel=-1)
    torch.testing.assert_close(trainer.influence((x, y)).scores, before)


def test_a_late_error_of_a_gpu_is_reported_for_the_query(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _, data = fitted(Classifier(net()), callback=quick())

    def late(values: Any) -> Any:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch, "isfinite", late)  # the first operation that reads a value
    with pytest.raises(BatchError, match="losses of the query batch could not be computed: RuntimeError: CUDA error"):
        trainer.influence(batch_of(data, slice(4)))


FAILING = """
import torch
from lightning_gif.errors import BatchError
from tests.conftest import Classifier, batch_of, fitted
from tests.test_precision import net, quick

class Indexing(Classifier):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return super().training_step((x, y % 3), batch_idx) + 0 * self.net[0].bias[y].sum()

trainer, module, data = fitted(Indexing(net()), callback=quick(), accelerator="gpu", devices=1)
x, y = batch_of(data, slice(4))
before = {name: (tensor, tensor.clone()) for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
try:
    trainer.influence((x, y + 50))
except BatchError as error:
    assert "could not be computed" in str(error), error
else:
    raise AssertionError("no error")
for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
    assert tensor is before[name][0] and tensor.device.type == "cpu" and torch.equal(tensor, before[name][1]), name
print("whole")
"""


@needs_gpu
def test_a_gpu_that_fails_leaves_the_weights_on_the_cpu() -> None:
    """In a process of its own, which has no GPU afterwards."""
    done = subprocess.run([sys.executable, "-c", FAILING], capture_output=True, text=True, check=False)
    assert done.stdout.endswith("whole\n"), done.stderr

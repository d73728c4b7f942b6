"""Second derivatives of compiled modules, attention, activation checkpointing, and of other precisions."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_gif import GIFMixin, GIFWarning, attach

from ..conftest import Classifier, batch_of, blobs, fitted, loader, make_trainer, same_weights, weights
from ..doubles import quick, untouched


class Silent(Classifier):
    """Logs nothing: logging inside of a module that is compiled as a whole fails in Lightning itself."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.mostly_slow(1)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("part", ["module", "submodule"])
def test_compiled_modules_give_the_same_scores(backend: str, part: str) -> None:
    torch.manual_seed(0)
    plain = Silent()
    compiled: Any = copy.deepcopy(plain)
    if part == "module":
        compiled = torch.compile(compiled, backend=backend)
    else:
        compiled.net = torch.compile(compiled.net, backend=backend)
    batch = batch_of(blobs(), slice(4))
    reports, callbacks = [], [quick(), quick()]
    for module, callback in zip((plain, compiled), callbacks, strict=True):
        torch.manual_seed(0)
        trainer = make_trainer(callback, max_epochs=1)
        trainer.fit(module, loader(blobs()))
        reports.append(trainer.influence(batch))
        before = weights(trainer.lightning_module)
        trainer.unlearn(batch, step=1.0).undo()
        assert same_weights(before, weights(trainer.lightning_module))
    assert torch.allclose(reports[0].scores, reports[1].scores, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("part", ["module", "submodule"])
def test_training_of_a_compiled_module_is_the_same_and_keeps_its_whole_graph(part: str) -> None:
    """``fullgraph=True`` makes a graph break an error."""
    found = []
    for callbacks in ([], [quick(selector="highest_k_outputs")]):
        torch.manual_seed(0)
        module: Any = Silent()
        if part == "module":
            module = torch.compile(module, backend="aot_eager", fullgraph=True)
        else:
            module.net = torch.compile(module.net, backend="aot_eager", fullgraph=True)
        torch.manual_seed(0)
        trainer = make_trainer(*callbacks, max_epochs=2)
        with warnings.catch_warnings():
            warnings.simplefilter("error", GIFWarning)
            trainer.fit(module, loader(blobs()))
        found.append(weights(trainer.lightning_module))
    assert same_weights(*found)
    assert callbacks[0].targets is None
    # The call that needs cached targets ranks the neurons by one pass.
    trainer.unlearn(batch_of(blobs(), slice(4)), step=1.0, targets="cached").undo()
    assert callbacks[0].targets.count
    assert same_weights(found[1], weights(trainer.lightning_module))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(2, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x.view(-1, 3, 2))).mean(1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(2, 24)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.view(-1, 3, 2)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return self.head(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mean(1))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.first, x, use_reentrant=False))


@pytest.mark.parametrize("net", [Encoder, Attention, Checkpointed])
def test_attention_and_checkpointing_have_second_derivatives(net: Any) -> None:
    trainer, module, data = fitted(Classifier(net()), callback=quick(curvature_examples=8), max_epochs=1)
    batch = batch_of(data, slice(4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GIFWarning)
        scores = trainer.influence(batch).scores
        before = weights(module)
        report = trainer.unlearn(batch, step=1.0)
    assert scores.isfinite().all()
    assert scores.abs().sum() > 0
    assert report.retain.after == pytest.approx(report.retain.predicted, rel=0.2)
    report.undo()
    assert same_weights(before, weights(module))


def test_a_loss_of_its_own_works_with_checkpointing() -> None:
    class Own(GIFMixin, Classifier):
        def influence_loss(self, batch: Any) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1], reduction="none")

    trainer, module, data = fitted(Own(Checkpointed()), callback=quick(), max_epochs=1)
    batch = batch_of(data, slice(4))
    expected = trainer.influence(batch).scores
    module.net.forward = lambda x: module.net.head(module.net.first(x))
    assert torch.allclose(trainer.influence(batch).scores, expected, rtol=1e-3, atol=1e-6)


def test_layers_whose_forward_never_runs_are_left_out_of_a_ranking() -> None:
    trainer, _, _ = fitted(Classifier(Encoder()), callback=quick(), max_epochs=1)
    chosen = set(trainer.callbacks[0].targets)
    assert {"net.embed.weight", "net.layer.linear1.weight", "net.head.weight"} <= chosen
    assert not any("out_proj" in name for name in chosen)  # attention reads its weight, and never calls it


def test_checkpointing_does_not_count_its_second_forward_pass() -> None:
    plain = Checkpointed()
    plain.forward = lambda x: plain.head(plain.first(x))
    states = []
    for net in (plain, Checkpointed()):
        net.load_state_dict(plain.state_dict())
        callback = quick()
        torch.manual_seed(0)
        make_trainer(callback, max_epochs=1).fit(Classifier(net, lr=0.0), loader(blobs(), shuffle=False))
        states.append({kind: callback.neurons.mean(kind, "net.first.0") for kind in ("outputs", "gradients")})
    for kind in ("outputs", "gradients"):
        assert torch.allclose(states[0][kind], states[1][kind], rtol=1e-5), kind


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", torch.bfloat16), ("64-true", torch.float64)])
def test_modules_of_other_precision_work_and_keep_their_dtype(precision: str, dtype: torch.dtype) -> None:
    class Padding(Classifier):
        """Makes a tensor of the default dtype, as recurrent nets do for their first state."""

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return F.cross_entropy(self(x) + self.net[2](torch.zeros(len(x), 8)), y)

    trainer, module, data = fitted(Padding(), callback=quick(), precision=precision, max_epochs=1)
    assert module.net[0].weight.dtype == dtype
    batch = batch_of(data, slice(4))
    with untouched(trainer, module, trainer.callbacks[0].loaders.train):
        assert trainer.influence(batch).scores.isfinite().all()
        report = trainer.unlearn(batch, dry_run=True, step=4.0)
    before = weights(module)
    report.apply()
    assert not same_weights(before, weights(module))
    assert {value.dtype for value in weights(module).values()} == {dtype}
    report.undo()
    assert same_weights(before, weights(module))


def test_solves_run_outside_of_autocast() -> None:
    trainer, module, data = fitted(callback=quick(), precision="bf16-mixed", max_epochs=1)
    batch = batch_of(data, slice(4))
    other = make_trainer()
    attach(other, module, train_dataloaders=loader(data), callback=quick())
    selector = ["net.2.*"]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = trainer.influence(batch, selector=selector).scores
    assert torch.equal(mixed, other.influence(batch, selector=selector).scores)

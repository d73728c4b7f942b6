"""Low-rank adapters (LoRA): the frozen network is a constant, and edits change the adapters only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from lightning_gif import GIFCallback

from ..conftest import Classifier, batch_of, blobs, fitted, loader, make_trainer


class Adapted(nn.Module):
    """A frozen layer with a low-rank term that is trained."""

    def __init__(self, layer: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, layer.in_features) / 3)
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.down.T @ self.up.T


def test_the_scores_of_an_adapter_are_those_of_its_own_parameters() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Adapted(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 3).requires_grad_(False))
    x, y = blobs().tensors
    data = TensorDataset(x.double(), y)
    trainer, module, _ = fitted(Classifier(net).double(), data, GIFCallback(double=True, snapshots=0))
    theta = torch.cat([net[0].down.detach().flatten(), net[0].up.detach().flatten()])

    def logits(theta: Tensor) -> Tensor:
        values = {"0.down": theta[:12].view(2, 6), "0.up": theta[12:].view(8, 2)}
        return torch.func.functional_call(net, values, x.double())

    gradients = torch.func.jacrev(lambda theta: F.cross_entropy(logits(theta), y, reduction="none"))(theta)
    jacobian, p = torch.func.jacrev(logits)(theta), logits(theta).softmax(1)
    weight = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    curvature = torch.einsum("nap,nab,nbq->pq", jacobian, weight, jacobian) / len(x)
    damped = curvature + 0.1 * torch.eye(len(theta)).double()
    expected = gradients[:4] @ torch.linalg.solve(damped, gradients.T) / (len(x) - 1)
    query = batch_of(data, slice(4))
    found = trainer.influence(query, per_example=True, solver="dense", damping=0.1).scores
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-6, atol=1e-10)
    assert sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad) == len(theta)


def test_an_edit_changes_the_adapter_and_not_the_frozen_network() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Adapted(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 3).requires_grad_(False))
    trainer, module, data = fitted(Classifier(net))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    edit = trainer.unlearn(batch_of(data, slice(4)), step=0.5)
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert changed <= {"net.0.down", "net.0.up"}
    edit.undo()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


class Texts(Dataset[Any]):
    """Short texts of random tokens, which depend on their label."""

    def __init__(self, labelled: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(3, 50, (24, 8), generator=generator)
        self.labels = torch.arange(24) % 3 if labelled else self.ids
        self.ids[:, 1] = torch.arange(24) % 3

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        mask = torch.ones_like(self.ids[index])
        return {"input_ids": self.ids[index], "attention_mask": mask, "labels": self.labels[index]}


class Transformer(Classifier):
    """A transformer that computes its loss itself."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(**batch).loss


def network(kind: str) -> nn.Module:
    """A small transformer with random weights, and adapters of ``peft``."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "GPT-2":
        config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50, n_positions=8)
        adapters = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
        return peft.get_peft_model(transformers.GPT2LMHeadModel(config), adapters)
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(**sizes, vocab_size=50, num_labels=3)
    adapters = peft.LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    return peft.get_peft_model(transformers.BertForSequenceClassification(config), adapters)


@pytest.mark.parametrize("kind", ["GPT-2", "BERT"])
def test_adapters_of_peft_are_scored_edited_and_restored(kind: str) -> None:
    module, data = Transformer(network(kind)), Texts(kind == "BERT")
    trainer = make_trainer(GIFCallback())
    trainer.fit(module, loader(data))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    report = trainer.influence(next(iter(loader(data))), max_iter=3)
    assert report.scores.shape == (1, 24)
    assert report.scores.abs().sum() > 0
    edit = trainer.unlearn([0, 1, 2], step=0.5, max_iter=3)
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora_" in name or "modules_to_save" in name for name in changed)
    edit.undo()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_token_scores_of_gpt2_with_adapters_are_products_with_gradients_of_tokens() -> None:
    module, data = Transformer(network("GPT-2")).double(), Texts(False)
    trainer = make_trainer(GIFCallback(double=True, damping=0.1, snapshots=0))
    trainer.fit(module, loader(data))
    report = trainer.influence(next(iter(loader(data))), tokens=True, k=1)
    ihvp = report.solutions[0].x
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    index = int(report.proponents().indices[0, 0])
    ids = data[index]["input_ids"]
    module.eval()
    losses = F.cross_entropy(module.net(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none") / (len(ids) - 1)
    expected = []
    for loss in losses:
        slopes = torch.autograd.grad(loss, parameters, retain_graph=True)
        expected.append(float(torch.cat([slope.flatten() for slope in slopes]) @ ihvp) / (len(data) - 1))
    found = report.token_scores(index)
    assert [token for token, _ in found if not token.startswith("-")][: len(ids) - 1] == list(
        map(str, ids[1:].tolist())
    )
    assert [score for _, score in found] == pytest.approx(expected, rel=1e-5, abs=1e-12)

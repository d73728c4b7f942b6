"""Random LightningModules, each a function of its number, and what their scores must be by explicit autograd."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pad_sequence
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torchmetrics import MeanSquaredError
from torchmetrics.classification import MulticlassAccuracy

from .reference import Items

__all__ = ["Composed", "Composition", "Exact", "Items", "Short", "collate_of", "compose", "exact_scores", "items_of"]

N, WIDTH, CLASSES, STEPS, WORDS = 12, 4, 3, 4, 7
PENALTY = 0.05

# ----------------------------------------------------------------------------------------------------------------------
# Losses
# ----------------------------------------------------------------------------------------------------------------------


class Loss(NamedTuple):
    """A loss of predictions.

    Attributes:
        of: ``(module, z, y, mask) → ()``.
        target: What it is a loss of: ``"class"``, ``"real"``, ``"binary"`` or ``"tokens"``.
        cause: Why a batch has another loss than the mean or sum of its examples; empty if it has not.
        link: Applied to the outputs of the net to get the predictions.
        sums: Whether the loss of a batch is a sum.
    """

    of: Callable[[Any, Tensor, Tensor, Any], Tensor]
    target: str
    cause: str = ""
    link: Callable[[Tensor], Tensor] = lambda z: z
    sums: bool = False


def one_hot(z: Tensor, y: Tensor) -> Tensor:
    return F.one_hot(y, CLASSES).to(z.dtype)


def weights(z: Tensor) -> Tensor:
    return torch.tensor([0.5, 1.0, 4.0], dtype=z.dtype, device=z.device)


def smoothed(z: Tensor, y: Tensor) -> Tensor:
    logs = z.log_softmax(1)
    return (-0.9 * logs.gather(1, y[:, None])[:, 0] - 0.1 * logs.mean(1)).mean()


def focal(z: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(z, y, reduction="none")
    return ((1 - torch.exp(-losses)) ** 2 * losses).mean()


def penalised(module: Any, z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y) + PENALTY * sum(p.square().sum() for p in module.head.parameters())


def couples(z: Tensor, y: Tensor) -> Tensor:
    similar = z @ z.T
    return F.cross_entropy(similar, torch.arange(len(z)))


def supervised_contrast(z: Tensor, y: Tensor) -> Tensor:
    same = (y[:, None] == y[None]).to(z.dtype)
    logs = (F.normalize(z, dim=1) @ F.normalize(z, dim=1).T).log_softmax(1)
    return -((same * logs).sum(1) / same.sum(1)).mean()


def noisy(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z + 0.5 * torch.randn_like(z), y)


def mixed(z: Tensor, y: Tensor) -> Tensor:
    order = torch.randperm(len(z))
    return 0.7 * F.cross_entropy(z, y) + 0.3 * F.cross_entropy(0.7 * z + 0.3 * z[order], y)


def hardest(z: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(z, y, reduction="none")
    return losses.topk(max(len(losses) // 2, 1)).values.mean()


def triplets(z: Tensor, y: Tensor) -> Tensor:
    return F.triplet_margin_loss(z, z.roll(1, 0), z.roll(2, 0))


def variance(z: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(z, y) + F.relu(1 - torch.sqrt(z.var(0) + 1e-4)).mean()


def dice(z: Tensor, y: Tensor) -> Tensor:
    p = z.sigmoid()
    return 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)


def dice_of_each(z: Tensor, y: Tensor) -> Tensor:
    p = z.sigmoid()
    return (1 - (2 * (p * y).sum(1) + 1) / (p.sum(1) + y.sum(1) + 1)).mean()


def huber(z: Tensor, y: Tensor) -> Tensor:
    size = (z - y).abs()
    return torch.where(size < 1, size**2 / 2, size - 0.5).sum(1).mean()


def bootstrapped(module: Any, z: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        target = y + 0.5 * module.predict(*module.given)
    return F.mse_loss(z, target)


def margin(module: Any, z: Tensor, y: Tensor) -> Tensor:
    if not module.is_reference:
        return F.multi_margin_loss(z, y)
    violations = (1 - z.gather(1, y[:, None]) + z).clamp(min=0)  # PyTorch's has no second derivative
    return (violations.sum(1) - 1).mean() / CLASSES


def metric(module: Any, z: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(z, y) if module.is_reference else module.mse(z, y)


def by_tokens(z: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    losses = F.cross_entropy(z.flatten(0, 1), y.clamp(min=0).flatten(), reduction="none").view(y.shape)
    kept = (y >= 0).to(z.dtype)
    return (losses * kept).sum() / kept.sum()


def by_texts(z: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    losses = F.cross_entropy(z.flatten(0, 1), y.clamp(min=0).flatten(), reduction="none").view(y.shape)
    kept = (y >= 0).to(z.dtype)
    return ((losses * kept).sum(1) / kept.sum(1)).mean()


def step_by_step(z: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    parts = [F.cross_entropy(z[:, t], y[:, t], ignore_index=-100, reduction="sum") for t in range(z.shape[1])]
    return sum(parts) / len(z)  # type: ignore[return-value]


def stacked(z: Tensor, y: Tensor) -> Tensor:
    losses = [F.cross_entropy(row[None], label[None]) for row, label in zip(z, y, strict=True)]
    return torch.stack(losses).mean()


def added_up(z: Tensor, y: Tensor) -> Tensor:
    loss = z.new_zeros(())
    for row, target in zip(z, y, strict=True):
        loss = loss + (row - target).square().sum()
    return loss / len(z)


def focal_detached(z: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(z, y, reduction="none")
    return ((1 - torch.exp(-losses)).detach() ** 2 * losses).mean()


def picked(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z[y >= 0], y[y >= 0])


def within_classes(z: Tensor, y: Tensor) -> Tensor:
    """The mean over the classes of a batch."""
    losses = F.cross_entropy(z, y, reduction="none")
    return torch.stack([losses[y == label].mean() for label in y.unique()]).mean()


def reparametrised(z: Tensor, y: Tensor) -> Tensor:
    drawn = z + 0.3 * torch.randn_like(z)
    return F.mse_loss(drawn, y) + 0.1 * z.square().sum(1).mean()


LOSSES: dict[str, Loss] = {
    "stacked": Loss(lambda m, z, y, _: stacked(z, y), "class"),
    "categorical": Loss(lambda m, z, y, _: -torch.distributions.Categorical(logits=z).log_prob(y).mean(), "class"),
    "soft-targets": Loss(lambda m, z, y, _: F.cross_entropy(z, 0.8 * one_hot(z, y) + 0.2 / CLASSES), "class"),
    "focal-detached": Loss(lambda m, z, y, _: focal_detached(z, y), "class"),
    "squared-hinge": Loss(lambda m, z, y, _: F.relu(1 - (2 * one_hot(z, y) - 1) * z).square().sum(1).mean(), "class"),
    "within-classes": Loss(lambda m, z, y, _: within_classes(z, y), "class", "weighted"),
    "gumbel": Loss(lambda m, z, y, _: F.nll_loss(torch.log(F.gumbel_softmax(z) + 1e-6), y), "class", "random"),
    "added-up": Loss(lambda m, z, y, _: added_up(z, y), "real"),
    "normal": Loss(lambda m, z, y, _: -torch.distributions.Normal(z, 1.5).log_prob(y).mean(), "real"),
    "norm-of-difference": Loss(lambda m, z, y, _: torch.linalg.vector_norm(z - y, dim=1).mean(), "real"),
    "root-mean-square": Loss(lambda m, z, y, _: torch.sqrt(F.mse_loss(z, y) + 1e-6), "real", "coupled"),
    "smooth-l1": Loss(lambda m, z, y, _: F.smooth_l1_loss(z, y), "real"),
    "vae": Loss(lambda m, z, y, _: reparametrised(z, y), "real", "random"),
    "correlation": Loss(
        lambda m, z, y, _: 1 - F.cosine_similarity(z - z.mean(0), y - y.mean(0), dim=0).mean(), "real", "coupled"
    ),
    "multilabel-soft-margin": Loss(lambda m, z, y, _: F.multilabel_soft_margin_loss(z, y), "binary"),
    "soft-margin": Loss(lambda m, z, y, _: F.soft_margin_loss(z, 2 * y - 1), "binary"),
    "bernoulli": Loss(lambda m, z, y, _: -torch.distributions.Bernoulli(logits=z).log_prob(y).mean(), "binary"),
    "token-pick": Loss(lambda m, z, y, _: picked(z, y), "tokens", "lengths"),
    "ce": Loss(lambda m, z, y, _: F.cross_entropy(z, y), "class"),
    "ce-sum": Loss(lambda m, z, y, _: F.cross_entropy(z, y, reduction="sum"), "class", sums=True),
    "nll-by-hand": Loss(lambda m, z, y, _: -z.log_softmax(1).gather(1, y[:, None]).mean(), "class"),
    "nll": Loss(lambda m, z, y, _: F.nll_loss(F.log_softmax(z, -1).view(-1, CLASSES), y.view(-1)), "class"),
    "one-hot-by-hand": Loss(lambda m, z, y, _: -(one_hot(z, y) * z.log_softmax(1)).sum(1).mean(), "class"),
    "one-hot-sum": Loss(lambda m, z, y, _: -(one_hot(z, y) * z.log_softmax(1)).sum(), "class", sums=True),
    "softmax-log": Loss(lambda m, z, y, _: -torch.log(z.softmax(1)[torch.arange(len(y)), y]).mean(), "class"),
    "smoothing": Loss(lambda m, z, y, _: F.cross_entropy(z, y, label_smoothing=0.1), "class"),
    "smoothing-by-hand": Loss(lambda m, z, y, _: smoothed(z, y), "class"),
    "class-weights": Loss(lambda m, z, y, _: F.cross_entropy(z, y, weight=weights(z)), "class", "weighted"),
    "class-weights-by-hand": Loss(
        lambda m, z, y, _: (weights(z)[y] * F.cross_entropy(z, y, reduction="none")).mean(), "class"
    ),
    "class-weights-over-batch": Loss(
        lambda m, z, y, _: (weights(z)[y] * F.cross_entropy(z, y, reduction="none")).sum() / weights(z)[y].sum(),
        "class",
        "weighted",
    ),
    "focal": Loss(lambda m, z, y, _: focal(z, y), "class"),
    "margin": Loss(lambda m, z, y, _: margin(m, z, y), "class"),
    "two-losses": Loss(lambda m, z, y, _: F.cross_entropy(z, y) + 0.3 * z.square().sum(1).mean(), "class"),
    "penalty": Loss(lambda m, z, y, _: penalised(m, z, y), "class"),
    "couples": Loss(lambda m, z, y, _: couples(z, y), "class", "coupled"),
    "contrast": Loss(lambda m, z, y, _: supervised_contrast(z, y), "class", "coupled"),
    "noise": Loss(lambda m, z, y, _: noisy(z, y), "class", "random"),
    "mixup": Loss(lambda m, z, y, _: mixed(z, y), "class", "random"),
    "hardest": Loss(lambda m, z, y, _: hardest(z, y), "class", "coupled"),
    "centred": Loss(lambda m, z, y, _: F.cross_entropy(z - z.mean(0), y), "class", "coupled"),
    "triplets": Loss(lambda m, z, y, _: triplets(z, y), "class", "coupled"),
    "mse": Loss(lambda m, z, y, _: F.mse_loss(z, y), "real"),
    "mse-target-first": Loss(lambda m, z, y, _: F.mse_loss(y, z), "real"),
    "mse-sum": Loss(lambda m, z, y, _: F.mse_loss(z, y, reduction="sum"), "real", sums=True),
    "squares-by-hand": Loss(lambda m, z, y, _: ((y - z) ** 2).sum(1).mean(), "real"),
    "squares-halved": Loss(lambda m, z, y, _: 0.5 * (z - y).pow(2).sum() / len(z), "real"),
    "huber": Loss(lambda m, z, y, _: F.huber_loss(z, y), "real"),
    "huber-by-hand": Loss(lambda m, z, y, _: huber(z, y), "real"),
    "l1": Loss(lambda m, z, y, _: F.l1_loss(z, y), "real"),
    "gaussian": Loss(lambda m, z, y, _: F.gaussian_nll_loss(z[:, :1], y[:, :1], z[:, 1:2].exp() + 0.1), "real"),
    "log-cosh": Loss(lambda m, z, y, _: torch.log(torch.cosh(z - y)).mean(), "real"),
    "cosine": Loss(lambda m, z, y, _: (1 - F.cosine_similarity(z, y)).mean(), "real"),
    "metric": Loss(lambda m, z, y, _: metric(m, z, y), "real"),
    "td": Loss(lambda m, z, y, _: bootstrapped(m, z, y), "real"),
    "variance": Loss(lambda m, z, y, _: variance(z, y), "real", "coupled"),
    "bce": Loss(lambda m, z, y, _: F.binary_cross_entropy_with_logits(z, y), "binary"),
    "bce-by-hand": Loss(lambda m, z, y, _: -(y * F.logsigmoid(z) + (1 - y) * F.logsigmoid(-z)).sum(1).mean(), "binary"),
    "positive-weight": Loss(
        lambda m, z, y, _: F.binary_cross_entropy_with_logits(z, y, pos_weight=weights(z)), "binary"
    ),
    "bce-of-probabilities": Loss(lambda m, p, y, _: F.binary_cross_entropy(p, y), "binary", link=torch.sigmoid),
    "kl": Loss(lambda m, z, y, _: F.kl_div(z.log_softmax(1), y.softmax(1), reduction="batchmean"), "binary"),
    "dice": Loss(lambda m, z, y, _: dice(z, y), "binary", "coupled"),
    "dice-of-each": Loss(lambda m, z, y, _: dice_of_each(z, y), "binary"),
    "poisson": Loss(lambda m, z, y, _: F.poisson_nll_loss(z, y), "binary"),
    "token-ce": Loss(
        lambda m, z, y, _: F.cross_entropy(z.flatten(0, 1), y.flatten(), ignore_index=-100), "tokens", "lengths"
    ),
    "token-ce-transposed": Loss(lambda m, z, y, _: F.cross_entropy(z.transpose(1, 2), y), "tokens", "lengths"),
    "token-mean": Loss(lambda m, z, y, mask: by_tokens(z, y, mask), "tokens", "lengths"),
    "text-mean": Loss(lambda m, z, y, mask: by_texts(z, y, mask), "tokens"),
    "token-steps": Loss(lambda m, z, y, mask: step_by_step(z, y, mask), "tokens"),
}

# ----------------------------------------------------------------------------------------------------------------------
# Layers
# ----------------------------------------------------------------------------------------------------------------------


class InTimesOut(nn.Module):
    """A layer with its weight as inputs × outputs."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / 2)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class OldFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return slope * (s + x * s * (1 - s))


class OnceFunction(OldFunction):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return slope * (s + x * s * (1 - s))


class StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.round(x * 4) / 4

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return slope


class Called(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda given: self.inner(given).tanh(), x, use_reentrant=self.reentrant)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.temperature = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale * self.temperature.exp()


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.phases = nn.Parameter(torch.randn(WIDTH, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.phases).real


class Hooked(nn.Module):
    """Doubles its gradient by a hook."""

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x = x * 1
            x.register_hook(lambda slope: 2 * slope)
        return x


class LowRank(nn.Module):
    """A parametrization that adds a product of two small matrices to a frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(WIDTH, 1) / 2), nn.Parameter(torch.randn(1, WIDTH) / 2)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.left @ self.right


def adapted() -> nn.Module:
    layer = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
    nn.utils.parametrize.register_parametrization(layer, "weight", LowRank())
    return layer


def pruned() -> nn.Module:
    return prune.random_unstructured(nn.Linear(WIDTH, WIDTH), "weight", 0.5)


def hooked_after() -> nn.Module:
    layer = nn.Linear(WIDTH, WIDTH)
    layer.register_forward_hook(_doubled)
    return layer


def _doubled(layer: nn.Module, given: Any, output: Tensor) -> Tensor:
    return 2 * output


class Reverse(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return -0.5 * slope


class Looked(nn.Module):
    """Decides on values."""

    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.detach().abs().max()) < 1e6 else x / 2


def _always_dropping(x: Tensor) -> Tensor:
    return F.dropout(x, 0.3)


def _sharpened(x: Tensor) -> Tensor:
    return x - x.amax(-1, keepdim=True)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "layernorm": lambda: nn.LayerNorm(WIDTH),
    "groupnorm": lambda: nn.GroupNorm(2, WIDTH),
    "batchnorm": lambda: nn.BatchNorm1d(WIDTH),
    "dropout": lambda: nn.Dropout(0.3),
    "residual": Residual,
    "weight-norm": lambda: parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
    "old-weight-norm": lambda: nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH)),
    "spectral-norm": lambda: parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)),
    "old-spectral-norm": lambda: nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH), orthogonal_map="matrix_exp"),
    "in-place": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(0.2, inplace=True)),
    "hardsigmoid": nn.Hardsigmoid,
    "hardswish": nn.Hardswish,
    "gelu": nn.GELU,
    "prelu": nn.PReLU,
    "checkpoint": lambda: Checkpointed(False),
    "old-checkpoint": lambda: Checkpointed(True),
    "function": lambda: Called(OldFunction.apply),
    "once": lambda: Called(OnceFunction.apply),
    "straight-through": lambda: Called(StraightThrough.apply),
    "frozen": lambda: nn.Linear(WIDTH, WIDTH).requires_grad_(False),
    "scale": Scaled,
    "hook": Hooked,
    "complex": Complex,
    "adapted": adapted,
    "pruned": pruned,
    "lazy": lambda: nn.LazyLinear(WIDTH),
    "forward-hook": hooked_after,
    "reversed": lambda: Called(Reverse.apply),
    "values-looked-at": Looked,
    "scripted": lambda: torch.jit.script(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())),
    "functional-dropout": lambda: Called(_always_dropping),
    "batch-statistics": lambda: nn.BatchNorm1d(WIDTH, track_running_stats=False),
    "softplus": nn.Softplus,
    "max-pool": lambda: Called(_sharpened),
}
CAUSES = {"functional-dropout": "random", "batch-statistics": "coupled"}
BY_EXAMPLE = ("groupnorm", "batchnorm", "batch-statistics")  # of features (B, C) only

SEQUENCES = ("embedding", "renormed", "gru", "lstm", "cell", "attention", "encoder", "conv1d")
BODIES = ("linear", "conv2d", "deconv", "bag", "bilinear", "bare", "in-x-out", "graph", *SEQUENCES)
SHARINGS = ("none", "none", "two-names", "tied", "twice", "teacher", "hidden", "unused")
STATES = (
    *("none", "counter", "epoch", "cache", "collected", "buffer", "buffer-used", "log", "array", "generator"),
    *("flags", "global-step", "manual", "dict-return", "metric-logged", "optimizer-looked-at"),
    *("item-logged", "short-signature", "skipping"),
)
OPTIMIZERS = ("sgd", "adam", "adamw-groups", "scheduler", "clip", "accumulate", "left-out")
FORMS = (
    *("tuple", "list", "dict", "dataclass", "named", "ragged", "none-field", "strings", "float64", "self-dtype"),
    *("shared-scalar", "shared-vector", "number"),
)


@dataclass(frozen=True)
class Composition:
    """What a module is composed from."""

    number: int
    body: str
    blocks: tuple[str, ...]
    sharing: str
    loss: str
    form: str
    state: str
    optimizer: str

    def __str__(self) -> str:
        parts = [self.body, *self.blocks, self.sharing, self.loss, self.form, self.state, self.optimizer]
        return f"{self.number}-" + "+".join(part for part in parts if part != "none")

    @property
    def padded(self) -> bool:
        return self.form == "padded"

    @property
    def tokens(self) -> bool:
        return LOSSES[self.loss].target == "tokens"

    @property
    def causes(self) -> set[str]:
        """Why the loss of a batch is not that of its examples."""
        cause = LOSSES[self.loss].cause
        if cause == "lengths":
            cause = "weighted" if self.padded else ""
        if self.loss == "within-classes":  # the weight of an example depends on the classes of the others
            return {"weighted", "coupled"}
        return {cause, *(CAUSES.get(block, "") for block in self.blocks)} - {""}

    @property
    def refusal(self) -> str:
        """A pattern of the message with which the module must be refused; empty if it need not be."""
        if self.state == "manual":
            return "optimises manually.*influence_loss"
        return "[Cc]omplex.*view_as_complex" if "complex" in self.blocks else ""

    @property
    def has_no_second_derivative(self) -> bool:
        """Whether the derivative of the gradient that training uses may not be symmetric."""
        return self.loss == "td" or not {"once", "hook", "reversed", "straight-through"}.isdisjoint(self.blocks)

    @property
    def narrow(self) -> bool:
        """Whether the step computes something in float32 whatever the weights are."""
        return self.sharing == "hidden"


def compose(number: int) -> Composition:
    """The composition with a number."""
    draw = random.Random(number)
    body = draw.choice(BODIES)
    targets = ["class", "class", "real", "binary", *(["tokens", "tokens"] if body in SEQUENCES else [])]
    target = draw.choice(targets)
    loss = draw.choice([name for name, one in LOSSES.items() if one.target == target])
    forms = [
        form for form in FORMS if body not in ("bag", "embedding", "renormed") or form not in ("float64", "self-dtype")
    ]
    if body in SEQUENCES:
        forms += ["padded", "padded", "padded", "time-first"] if body != "conv1d" else ["time-first"]
    form = "object" if body == "graph" else draw.choice(forms)
    if target == "tokens" and form in ("ragged", "time-first"):
        form = "padded" if body != "conv1d" else "tuple"
    possible = [name for name in BLOCKS if target != "tokens" or name not in BY_EXAMPLE]
    blocks = tuple(draw.sample(possible, draw.choice([0, 1, 1, 2])))
    states = [state for state in STATES if target == "class" or state != "metric-logged"]
    states = [state for state in states if loss != "metric" or state != "metric-logged"]
    sharings = [sharing for sharing in SHARINGS if target != "tokens" or sharing != "teacher"]
    return Composition(
        number, body, blocks, draw.choice(sharings), loss, form, draw.choice(states), draw.choice(OPTIMIZERS)
    )


# ----------------------------------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Fields:
    x: Tensor
    y: Tensor


class Named(NamedTuple):
    x: Tensor
    y: Tensor


class Graphs:
    """The nodes of several graphs in one matrix."""

    def __init__(self, items: list[tuple[Tensor, Tensor]]) -> None:
        self.nodes = torch.cat([x for x, _ in items])
        self.owner = torch.repeat_interleave(torch.arange(len(items)), torch.tensor([len(x) for x, _ in items]))
        self.y = torch.stack([y for _, y in items])

    def to(self, device: Any) -> Graphs:
        return self


SHAPES = {
    **{"linear": (6,), "bilinear": (6,), "bare": (6,), "in-x-out": (6,), "conv2d": (1, 4, 4), "deconv": (1, 3)},
    **dict.fromkeys(("gru", "lstm", "cell", "attention", "encoder", "conv1d"), (STEPS, 3)),
}


def items_of(spec: Composition) -> list[tuple[Tensor, Tensor]]:
    """The training examples, ``(x, y)`` each."""
    generator = torch.Generator().manual_seed(spec.number)
    ordered = spec.number % 2 == 0
    items = []
    for i in range(N):
        steps = 2 + (i * 7) % 4 if spec.padded or spec.body == "graph" else STEPS
        if spec.body in ("embedding", "bag", "renormed"):
            x = torch.randint(1, WORDS, (steps,), generator=generator)
        elif spec.body == "graph":
            x = torch.randn(steps, 3, generator=generator)
        else:
            shape = SHAPES[spec.body]
            x = torch.randn((steps, *shape[1:]) if spec.body in SEQUENCES else shape, generator=generator)
        target = LOSSES[spec.loss].target
        label = (i if ordered else 7 * i % N) * CLASSES // (N + 3)  # the last class is rare
        if target == "class":
            y = torch.tensor(label)
        elif target == "tokens":
            y = (torch.arange(steps) + i) % CLASSES
        elif target == "real":
            y = torch.randn(CLASSES, generator=generator) + label
        else:
            y = (torch.rand(CLASSES, generator=generator) > 0.4).float()
        items.append((x.double() if spec.form in ("float64", "self-dtype") else x, y))
    return items


def collate_of(spec: Composition) -> Callable[[list[tuple[Tensor, Tensor]]], Any]:
    """The collate function."""

    def collate(items: list[tuple[Tensor, Tensor]]) -> Any:
        xs, ys = (list(part) for part in zip(*items, strict=True))
        if spec.form == "object":
            return Graphs(items)
        if spec.form == "ragged":
            return xs, torch.stack(ys)
        if spec.padded:
            longest = pad_sequence(xs, batch_first=True)
            mask = torch.arange(longest.shape[1]) < torch.tensor([len(x) for x in xs])[:, None]
            labels = pad_sequence(ys, batch_first=True, padding_value=-100) if spec.tokens else torch.stack(ys)
            return {"x": longest, "mask": mask, "y": labels}
        x, y = torch.stack(xs), torch.stack(ys)
        forms: dict[str, Callable[[], Any]] = {
            "list": lambda: [x, y],
            "dict": lambda: {"x": x, "y": y},
            "dataclass": lambda: Fields(x, y),
            "named": lambda: Named(x, y),
            "time-first": lambda: {"x": x.transpose(0, 1), "y": y},
            "none-field": lambda: {"x": x, "extra": None, "y": y},
            "strings": lambda: {"x": x, "name": [f"{float(one.sum()):.3f}" for one in xs], "y": y},
            "shared-scalar": lambda: {"x": x, "scale": torch.tensor(2.0), "y": y},
            "shared-vector": lambda: {"x": x, "scale": torch.tensor([2.0, 0.5, 1.0]), "y": y},
            "number": lambda: {"x": x, "scale": 2.0, "y": y},
        }
        return forms.get(spec.form, lambda: (x, y))()

    return collate


# ----------------------------------------------------------------------------------------------------------------------
# The module
# ----------------------------------------------------------------------------------------------------------------------


class Composed(pl.LightningModule):
    """A module as a composition describes it."""

    def __init__(self, spec: Composition) -> None:
        super().__init__()
        self.spec = spec
        self.is_reference = False
        self.automatic_optimization = spec.state != "manual"
        self._build_body()
        self.blocks = nn.ModuleList(BLOCKS[name]() for name in spec.blocks)
        self.head = nn.Linear(WIDTH, CLASSES)
        self._build_sharing()
        if spec.loss == "metric":
            self.mse = MeanSquaredError()
        if spec.state == "metric-logged":
            self.accuracy = MulticlassAccuracy(CLASSES)
        self.register_buffer("running", torch.ones(()))
        self.steps = 0
        self.cache: Tensor | None = None
        self.collected: list[Tensor] = []
        self.history: list[float] = []
        self.counts = np.zeros(CLASSES)
        self.generator = torch.Generator().manual_seed(5)

    def _build_body(self) -> None:
        body = self.spec.body
        if body == "linear":
            self.body: nn.Module = nn.Linear(6, WIDTH)
        elif body == "bilinear":
            self.body = nn.Bilinear(3, 3, WIDTH)
        elif body == "bare":
            self.matrix = nn.Parameter(torch.randn(6, WIDTH) / 2)
            self.offset = nn.Parameter(torch.zeros(WIDTH))
        elif body == "in-x-out":
            self.body = InTimesOut(6, WIDTH)
        elif body == "conv2d":
            self.body = nn.Sequential(nn.Conv2d(1, WIDTH, 3), nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True))
        elif body == "deconv":
            self.body = nn.ConvTranspose1d(1, WIDTH, 2)
        elif body == "conv1d":
            self.body = nn.Conv1d(3, WIDTH, 3, padding=1)
        elif body == "embedding":
            self.body = nn.Embedding(WORDS, WIDTH, padding_idx=0)
        elif body == "renormed":
            self.body = nn.Embedding(WORDS, WIDTH, max_norm=0.8)
        elif body == "cell":
            self.body = nn.GRUCell(3, WIDTH)
        elif body == "bag":
            self.body = nn.EmbeddingBag(WORDS, WIDTH, mode=("mean", "sum")[self.spec.number % 2])
        elif body in ("gru", "lstm"):
            self.body = (nn.GRU if body == "gru" else nn.LSTM)(3, WIDTH, batch_first=True)
        elif body == "attention":
            self.lift = nn.Linear(3, WIDTH)
            self.body = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        elif body == "encoder":
            self.lift = nn.Linear(3, WIDTH)
            self.body = nn.TransformerEncoderLayer(WIDTH, 2, 4, dropout=0.1, batch_first=True)
        else:
            self.body = nn.Linear(3, WIDTH)

    def _build_sharing(self) -> None:
        sharing = self.spec.sharing
        if sharing == "two-names":
            self.first = nn.Linear(WIDTH, WIDTH)
            self.again = nn.Sequential(self.first, nn.Tanh())
        elif sharing == "tied":
            self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.down.weight = self.up.weight
        elif sharing == "twice":
            self.shared = nn.Linear(WIDTH, WIDTH)
        elif sharing == "teacher":
            self.teacher = copy.deepcopy(self.head).requires_grad_(False)
        elif sharing == "hidden":
            self.hidden = [nn.Linear(WIDTH, WIDTH)]
        elif sharing == "unused":
            self.spare = nn.Linear(2, 2)

    # ------------------------------------------------------------------------------------------------------------------

    def read(self, batch: Any) -> tuple[Any, Tensor, Tensor | None]:
        """Inputs, targets and mask of a batch."""
        form, mask = self.spec.form, None
        dtype = self.head.weight.dtype
        if form == "object":
            x: Any = (batch.nodes.to(dtype), batch.owner)
            y = batch.y
        elif form == "ragged":
            x, y = pad_sequence(list(batch[0]), batch_first=True), batch[1]
        elif isinstance(batch, dict):
            x, y, mask = batch["x"], batch["y"], batch.get("mask")
            if form == "time-first":
                x = x.transpose(0, 1)
            if "scale" in batch and self.spec.body not in ("embedding", "bag", "renormed"):
                scale = batch["scale"]
                x = x * (scale[0].to(x.dtype) if form == "shared-vector" else scale)
        elif isinstance(batch, Fields):
            x, y = batch.x, batch.y
        else:
            x, y = batch
        if form in ("float64", "self-dtype"):
            x = x.to(dtype if form == "float64" or self.is_reference else self.dtype)
        return x, y.to(dtype) if y.is_floating_point() else y, mask

    def encode(self, x: Any, mask: Tensor | None) -> Tensor:
        body, tokens = self.spec.body, self.spec.tokens
        if body == "graph":
            nodes, owner = x
            count = int(owner.max()) + 1
            total = nodes.new_zeros(count, WIDTH).index_add(0, owner, self.body(nodes).tanh())
            return total / owner.bincount(minlength=count)[:, None]
        if body == "bilinear":
            return self.body(x[:, :3], x[:, 3:]).tanh()
        if body == "bare":
            return torch.tanh(x @ self.matrix + self.offset)
        if body in ("conv2d", "deconv"):
            return self.body(x).flatten(2).mean(2)
        if body == "bag" and self.is_reference:  # PyTorch's has no second derivative
            rows = self.body.weight[x]
            return (rows.mean(1) if self.body.mode == "mean" else rows.sum(1)).tanh()
        if body in ("linear", "in-x-out", "bag"):
            return self.body(x).tanh()
        if body == "conv1d":
            h = self.body(x.transpose(1, 2)).transpose(1, 2).tanh()
        elif body in ("gru", "lstm"):
            h = self.body(x)[0]
        elif body == "cell":
            state, states = x.new_zeros(len(x), WIDTH), []
            for step in x.unbind(1):
                state = self.body(step, state)
                states.append(state)
            h = torch.stack(states, 1)
        elif body == "attention":
            h = self.lift(x)
            h = h + self.body(h, h, h, key_padding_mask=None if mask is None else ~mask, need_weights=False)[0]
        elif body == "encoder":
            h = self.body(self.lift(x), src_key_padding_mask=None if mask is None else ~mask)
        else:
            h = self.body(x)
        if tokens:
            return h
        if mask is None:
            return h.mean(1)
        kept = mask.to(h.dtype)[..., None]
        return (h * kept).sum(1) / kept.sum(1)

    def features(self, x: Any, mask: Tensor | None) -> Tensor:
        h = self.encode(x, mask)
        for block in self.blocks:
            h = block(h)
        sharing = self.spec.sharing
        if sharing == "two-names":
            h = self.again(h) + self.first(h)
        elif sharing == "tied":
            h = self.down(self.up(h).tanh())
        elif sharing == "twice":
            h = self.shared(self.shared(h).tanh())
        elif sharing == "hidden":
            h = h + self.hidden[0](h)
        return h

    def predict(self, x: Any, mask: Tensor | None) -> Tensor:
        h = self.features(x, mask)
        z = self.head(h)
        if self.spec.sharing == "teacher":
            self.taught = self.teacher(h.detach())
        if self.spec.state == "cache":
            if self.cache is None:
                self.cache = torch.full((1,), 2.0)
            z = z * self.cache
        if self.spec.state == "buffer-used":
            z = z * self.running.clone()
        return LOSSES[self.spec.loss].link(z)

    @staticmethod
    def is_empty(batch: Any) -> bool:
        return hasattr(batch, "__len__") and len(batch) == 0

    def update_teacher(self) -> None:
        for slow, fast in zip(self.teacher.parameters(), self.head.parameters(), strict=True):
            slow.data.mul_(0.9).add_(0.1 * fast.data)

    def value(self, z: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        """The loss of predictions."""
        loss = LOSSES[self.spec.loss]
        value = loss.of(self, z, y, mask)
        if self.spec.sharing == "teacher":
            term = 0.1 * (z - loss.link(self.taught)).square().sum(1)
            value = value + (term.sum() if loss.sums else term.mean())
        return value

    def factor(self) -> float:
        """The weight of the loss at this step."""
        state = self.spec.state
        if state == "counter":
            self.steps += 1
            return 1 + self.steps / 20
        if state == "epoch":
            return 1 + self.current_epoch / 5
        return 1 + self.trainer.global_step / 50 if state == "global-step" else 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        state = self.spec.state
        if state == "skipping" and self.is_empty(batch):
            return None
        if state == "flags" and not self.trainer.training:
            return None
        x, y, mask = self.read(batch)
        if self.spec.sharing == "teacher":
            self.update_teacher()
        if self.spec.loss == "td":
            self.given = (x, mask)
        z = self.predict(x, mask)
        loss = self.value(z, y, mask) * self.factor()
        if state == "collected":
            self.collected.append(z.detach().mean())
        if state in ("buffer", "buffer-used"):
            self.running.mul_(0.9).add_(0.1 * z.detach().abs().mean())
        if state == "log":
            self.log("loss", loss, on_step=True, on_epoch=True, batch_size=len(y))
        if state == "metric-logged":
            self.accuracy(z, y)
            self.log("accuracy", self.accuracy, on_epoch=True, batch_size=len(y))
        if state == "array":
            self.counts += 1
        if state == "generator":
            torch.rand(2, generator=self.generator)
        if state == "optimizer-looked-at":
            self.log("rate", self.optimizers().param_groups[0]["lr"], batch_size=len(y))
        if state == "item-logged":
            self.history.append(loss.item())
        if state == "manual":
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return {"loss": loss, "predicted": z.detach()} if state == "dict-return" else loss

    def configure_optimizers(self) -> Any:
        own = [parameter for parameter in self.parameters() if parameter.requires_grad]
        kind = self.spec.optimizer
        lr = 0.005 if LOSSES[self.spec.loss].sums else 0.05
        if kind == "adam":
            return torch.optim.Adam(own, 0.02)
        if kind == "adamw-groups":
            return torch.optim.AdamW([{"params": own[:1], "weight_decay": 0.0}, {"params": own[1:]}], 0.02)
        if kind == "scheduler":
            optimizer = torch.optim.SGD(own, lr, momentum=0.9)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]
        return torch.optim.SGD(own[1:] if kind == "left-out" else own, lr)


class Short(Composed):
    """Its step takes no batch index."""

    def training_step(self, batch: Any) -> Any:  # type: ignore[override]
        return super().training_step(batch, 0)


# ----------------------------------------------------------------------------------------------------------------------
# What scores must be
# ----------------------------------------------------------------------------------------------------------------------


class _Stage:
    """What a step sees of the trainer."""

    training = True

    def __init__(self, trainer: pl.Trainer) -> None:
        self.current_epoch, self.global_step = trainer.current_epoch, trainer.global_step


class _WeightNorm(TorchFunctionMode):
    """Weight normalisation from its definition: the second derivative of PyTorch's own is not symmetric."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._weight_norm:
            v, g, dim = args
            return v * g / v.norm(dim=[d for d in range(v.ndim) if d != dim], keepdim=True)
        return func(*args, **(kwargs or {}))


class Exact(NamedTuple):
    """Scores by explicit autograd in float64.

    Attributes:
        influence: Of each example for the query, ``(n,)``.
        self_influence: Of each example for itself, ``(n,)``.
    """

    influence: Tensor
    self_influence: Tensor


def exact_scores(
    module: Composed, trainer: pl.Trainer, query: list[int], kind: str, damping: float, *, indefinite: bool = True
) -> Exact:
    """The scores from batches of one example alone.

    For the Gauss–Newton matrix ``G``, ``(1/(n−1))·qᵀ(G + λ)⁻¹gᵢ``; for the Hessian ``H``, least squares:
    ``(1/(n−1))·qᵀH(H² + λ²)⁻¹gᵢ``. Self-influence is ``(1/(n−1))·gᵢᵀ(G + λ)⁻¹gᵢ``, or for an indefinite ``C``
    ``(1/(n−1))·gᵢᵀ(C² + λ²)^(−1/2)gᵢ``.

    Args:
        module: The fitted module.
        trainer: Its trainer.
        query: Positions of the query's examples.
        kind: ``"ggn"`` or ``"hessian"``.
        damping: ``λ``.
        indefinite: Whether the matrix has negative eigenvalues.
    """
    collate, rows, matrix = collate_of(module.spec), [], torch.zeros((), dtype=torch.float64)
    items = [
        tuple(part.double() if part.is_floating_point() else part for part in item)
        for item in Items(items_of(module.spec))
    ]
    for item in items:
        with (
            torch.random.fork_rng(),
            _WeightNorm(),
            sdpa_kernel(SDPBackend.MATH),
        ):  # fused attention has no second derivative
            torch.manual_seed(0)
            gradient, curvature = _of_one(module, trainer, collate([item]), kind)
        rows.append(gradient)
        matrix = matrix + curvature / len(items)
    gradients = torch.stack(rows)
    of_query = gradients[query].mean(0)
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    of_size = (values**2 + damping**2).rsqrt()
    inverse = 1 / (values + damping) if kind == "ggn" else values * of_size**2
    inverse_of_self = of_size if indefinite else 1 / (values + damping)
    turned = gradients @ vectors
    others = len(items) - 1
    return Exact(turned @ (inverse * (of_query @ vectors)) / others, (turned**2 @ inverse_of_self) / others)


def _of_one(module: Composed, trainer: pl.Trainer, batch: Any, kind: str) -> tuple[Tensor, Tensor]:
    """The gradient ``(p,)`` and curvature ``(p, p)`` of the loss of a batch, on a copy of the module."""
    # Old norms keep a weight that is part of a graph, which cannot be copied.
    held = [value for one in module.modules() for value in vars(one).values()]
    memo = {id(value): value.detach().clone() for value in held if isinstance(value, Tensor) and not value.is_leaf}
    wide = copy.deepcopy(module, memo).double().eval()
    if wide.spec.sharing == "hidden":
        wide.hidden[0].double()
    for one in wide.modules():
        if isinstance(one, Checkpointed):
            one.reentrant = False  # a reentrant checkpoint has no gradient with respect to given tensors
    for position, block in enumerate(wide.blocks):
        if isinstance(block, nn.Hardsigmoid):  # PyTorch's has no second derivative
            wide.blocks[position] = Called(lambda x: F.relu6(x + 3) / 6)
    wide.is_reference = True
    wide.trainer = _Stage(trainer)  # type: ignore[assignment]
    parameters = [parameter for parameter in wide.parameters() if parameter.requires_grad]

    def gradient(value: Tensor, create_graph: bool = False) -> Tensor:
        if not value.requires_grad:
            return torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
        parts = torch.autograd.grad(
            value, parameters, retain_graph=True, create_graph=create_graph, materialize_grads=True
        )
        return torch.cat([part.reshape(-1) for part in parts])

    x, y, mask = wide.read(batch)
    if wide.spec.sharing == "teacher":
        wide.update_teacher()
    wide.given = (x, mask)
    z = wide.predict(x, mask)
    factor = wide.factor()
    loss = wide.value(z, y, mask) * factor
    first = gradient(loss, create_graph=kind == "hessian")
    if kind == "hessian":
        none = torch.zeros_like(first)
        second = torch.stack([gradient(one).detach() if one.requires_grad else none for one in first])
        return first.detach(), second
    jacobian = torch.stack([gradient(one) for one in z.reshape(-1)])

    def of_predictions(flat: Tensor) -> Tensor:
        return wide.value(flat.view(z.shape), y, mask) * factor

    curvature = torch.autograd.functional.hessian(of_predictions, z.detach().reshape(-1))
    matrix = jacobian.T @ curvature @ jacobian
    if wide.spec.loss == "penalty":  # the loss is a convex function of the predictions and of these parameters
        head = {id(parameter) for parameter in wide.head.parameters()}
        penalised = [torch.full((p.numel(),), float(id(p) in head), dtype=torch.float64) for p in parameters]
        matrix = matrix + torch.diag(2 * PENALTY * factor * torch.cat(penalised))
    return first, matrix

"""Unlearning baselines that need only the model and the data, for comparison with an edit.

Fine-tuning, gradient ascent, NegGrad+, SSD, ℓ1-sparse and SalUn, implemented from their papers, and two methods of the
NeurIPS competition of 2023, masked small gradients and convolution transpose. They work on any LightningModule whose
`training_step` returns the loss:

    ssd(copy.deepcopy(model), forget_loader, retain_loader, seed=0, alpha=10.0, dampening=1.0, examples=None)

`BASELINES` has each baseline with the hyperparameters of its authors, and with a grid of six settings. `default` and
`tuned` run a baseline on a copy of the model. Retraining, the ground truth, is another `trainer.fit`, and not in this
module.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_gif._compat import isolate_rng
from lightning_gif.data.examples import Examples
from lightning_gif.data.relabel import relabelled
from lightning_gif.data.structure import batch_size
from lightning_gif.data.targets import class_targets, find_targets, replace_targets

__all__ = [
    "BASELINES",
    "Baseline",
    "Method",
    "Outcome",
    "Relabel",
    "Trial",
    "convolution_transpose",
    "default",
    "fine_tune",
    "gradient_ascent",
    "l1_sparse",
    "masked_small_gradients",
    "neg_grad_plus",
    "salun",
    "ssd",
    "tuned",
]

Method = Callable[..., None]
"""A baseline. All have the arguments of :func:`_method`."""

Relabel = Tensor | int | Callable[[Any], Tensor]
"""Corrected labels, as in `trainer.unlearn`: in dataset order, one for all, or a function of a batch."""

_BATCHES_FOR_CLASSES = 16  # retained batches that are searched for classes; all classes should occur in them


@dataclass(frozen=True)
class _Task:
    """The arguments of a method."""

    module: pl.LightningModule
    loss: Callable[[Any], Tensor]
    forget: DataLoader[Any]
    retain: DataLoader[Any]
    relabel: Relabel | None
    seed: int
    budget: _Budget

    def kept(self) -> _Pool:
        """The data that retraining would use: the retained examples and the corrected ones."""
        return _Pool(self.retain) if self.relabel is None else _Pool(self.retain, self.corrected())

    def corrected(self) -> tuple[DataLoader[Any], Tensor]:
        """The forget examples with their new labels ``(m, …)``, in dataset order."""
        batches = relabelled(_examples(self.forget), self.relabel).batches()
        return self.forget, torch.cat([find_targets(batch.data) for batch in batches])


def _method(function: Callable[..., None]) -> Method:
    """Gives a method the signature that all methods share. A method changes a module's weights and buffers in place.

    Train and eval flags, logging and global random generators are restored. The loaders define the examples and the
    batch size. The order of the examples is drawn here.

    Args of the method:
        module: A trained module, or a copy of it.
        forget: The forget examples, with the labels that they were trained with.
        retain: The retained examples.
        seed: The seed of the order of the data, of dropout and of random labels.
        relabel: New labels of the forget examples, which are then corrected instead of removed.
        steps: The maximal number of steps. A step is one forward and backward pass over a batch, for any purpose, so
            the same number costs each method about the same.
        seconds: The maximal processor time in seconds.
        hyperparameters: The method's own and, if it optimises, those of :func:`_descend`. An epoch is one pass over all
            examples that the method optimises on; for NegGrad+, over the retained ones.
    """

    def method(
        module: pl.LightningModule,
        forget: DataLoader[Any],
        retain: DataLoader[Any],
        *,
        seed: int,
        relabel: Relabel | None = None,
        steps: int | None = None,
        seconds: float | None = None,
        **hyperparameters: Any,
    ) -> None:
        budget = _Budget(steps, seconds)
        with _opened(module) as loss:
            function(_Task(module, loss, forget, retain, relabel, seed, budget), **hyperparameters)

    method.__name__, method.__doc__ = function.__name__, function.__doc__
    return method


# --------------------------------------------------------------------------------------------------------------------
# The methods
# --------------------------------------------------------------------------------------------------------------------


def _fine_tune(task: _Task, *, epochs: float, penalty: float, **optimisation: Any) -> None:
    data = task.kept()
    batches = data.stream(task.seed)

    def objective(progress: float) -> Tensor:
        loss = task.loss(next(batches))
        if penalty:
            loss = loss + penalty * (1 - progress) * sum(weight.abs().sum() for weight in _trainable(task.module))
        return loss

    _descend(task, objective, task.budget.rounds(epochs * data.n_batches), **optimisation)


@_method
def fine_tune(task: _Task, *, epochs: float, **optimisation: Any) -> None:
    """Continues training on the retained and the corrected examples, until the model forgets what it no longer sees."""
    _fine_tune(task, epochs=epochs, penalty=0.0, **optimisation)


@_method
def l1_sparse(task: _Task, *, epochs: float, penalty: float, **optimisation: Any) -> None:
    """Fine-tuning with ``penalty·‖θ‖₁``, which decreases linearly to zero (Jia et al. 2023)."""
    _fine_tune(task, epochs=epochs, penalty=penalty, **optimisation)


@_method
def gradient_ascent(task: _Task, *, epochs: float, **optimisation: Any) -> None:
    """Maximises the loss of the forget examples, with the labels that they were trained with.

    BatchNorm keeps its running statistics, unlike in published code. Otherwise they would become those of the forget
    examples.
    """
    data = _Pool(task.forget)
    batches = data.stream(task.seed)
    rounds = task.budget.rounds(epochs * data.n_batches)
    _descend(task, lambda _: -task.loss(next(batches)), rounds, **{"batch_norm": "running", **optimisation})


@_method
def neg_grad_plus(task: _Task, *, epochs: float, alpha: float, **optimisation: Any) -> None:
    """NegGrad+: minimises ``alpha·L(retain) − (1 − alpha)·L(forget)``, with a batch of each (Kurmanji et al. 2023).

    Corrected examples count as retained ones. BatchNorm keeps its running statistics, as in :func:`gradient_ascent`.
    """
    kept = task.kept()
    retained, forgotten = kept.stream(task.seed), _Pool(task.forget).stream(task.seed + 1)

    def objective(_: float) -> Tensor:
        return alpha * task.loss(next(retained)) - (1 - alpha) * task.loss(next(forgotten))

    rounds = task.budget.rounds(epochs * kept.n_batches, batches=2)
    _descend(task, objective, rounds, **{"batch_norm": "running", **optimisation})


@_method
def ssd(task: _Task, *, alpha: float, dampening: float, examples: int | None) -> None:
    """Selective Synaptic Dampening, which needs no training (Foster et al. 2024).

    A weight is dampened if its importance for the forget examples exceeds ``alpha`` times that for the training set. It
    is then multiplied by ``dampening`` (λ) times the inverse of the ratio of both, but at most by 1.

    Importance is the mean squared gradient of the mean loss of ``examples`` examples, in evaluation mode. The paper
    defines it with one example, as the diagonal of the Fisher matrix. Its code uses the loader's batches (``None``),
    and its ``alpha`` is meant for these. With single examples, the importance for m of n examples is at most n/m times
    that for all. So an ``alpha`` of 10 would change nothing if a tenth of the data is to be forgotten. In batches, the
    gradients of one class add up, and those of all classes cancel.

    Labels are those of the training, also if `relabel` replaces them. The two sets share a budget. Means are over a
    random part of each set.
    """
    task.module.eval()
    gone = _Pool(task.forget, batch_size=examples)
    everything = _Pool(task.retain, (task.forget, None), batch_size=examples)
    of_forget = _importances(task, gone.once(task.seed), task.budget.rounds(gone.n_batches, share=0.5))
    of_training = _importances(task, everything.once(task.seed), task.budget.rounds(everything.n_batches))
    with torch.no_grad():
        for weight, here, everywhere in zip(_trainable(task.module), of_forget, of_training, strict=True):
            factor = (dampening * everywhere / here).clamp(max=1)
            weight.mul_(torch.where(here > alpha * everywhere, factor, 1))


@_method
def salun(task: _Task, *, epochs: float, saliency: float, **optimisation: Any) -> None:
    """SalUn: fine-tunes the salient weights, with random labels on the forget examples (Fan et al. 2024).

    The salient weights are the share ``saliency`` of all weights with the largest gradients of the forget loss, in
    evaluation mode. A random label is one of the other classes, drawn anew each time. Corrected labels replace random
    ones. Batches mix retained and forget examples.
    """
    task.module.eval()
    gone, weights = _Pool(task.forget), _trainable(task.module)
    for _, batch in zip(task.budget.rounds(gone.n_batches, share=0.5), gone.once(task.seed), strict=False):
        (batch_size(batch) * task.loss(batch)).backward()
    slopes = torch.cat([(torch.zeros_like(w) if w.grad is None else w.grad.abs()).flatten() for w in weights])
    salient = torch.zeros_like(slopes, dtype=torch.bool)
    salient[slopes.topk(round(saliency * len(slopes))).indices] = True
    parts = salient.split([weight.numel() for weight in weights])
    masks = [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]

    relabelling = _another_class(gone, _Pool(task.retain)) if task.relabel is None else task.corrected()[1]
    data = _Pool(task.retain, (task.forget, relabelling))
    batches = data.stream(task.seed)
    rounds = task.budget.rounds(epochs * data.n_batches)
    _descend(task, lambda _: task.loss(next(batches)), rounds, masks=masks, **optimisation)


@_method
def masked_small_gradients(task: _Task, *, epochs: float, reset: float, old_rate: float, **optimisation: Any) -> None:
    """MSG, the second place of the competition of 2023, as in Deep Unlearn (Cadet et al., arXiv 2410.01276).

    In each layer, the share ``reset`` of the weights with the smallest gradients gets new random values. The gradient
    is that of the retained minus the forget loss, over as many batches of each. Then it fine-tunes. The gradients of
    all other weights of these layers are multiplied by ``old_rate``. The learning rate rises and then falls to zero.

    The layers are convolutions. A module without them has it applied to its linear layers.
    """
    task.module.eval()
    gone, kept = _Pool(task.forget), _Pool(task.retain)
    pairs = zip(gone.once(task.seed), kept.stream(task.seed), strict=False)
    for _, (forget, retain) in zip(task.budget.rounds(gone.n_batches, share=0.5, batches=2), pairs, strict=False):
        (task.loss(retain) - task.loss(forget)).backward()
    factors = {}
    _seed(task.seed)
    with torch.no_grad():
        for layer in _convolutions(task.module) or _layers(task.module, nn.Linear):
            weight, new = layer.weight, torch.empty_like(layer.weight)
            nn.init.kaiming_normal_(new, mode="fan_out", nonlinearity="relu")
            smallest = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
            slopes = torch.zeros_like(weight) if weight.grad is None else weight.grad
            smallest[slopes.abs().flatten().topk(round(reset * weight.numel()), largest=False).indices] = True
            weight.copy_(torch.where(smallest.view_as(weight), new, weight))
            factors[weight] = torch.where(smallest.view_as(weight), 1.0, old_rate)
    data = task.kept()
    batches = data.stream(task.seed)
    _descend(
        task,
        lambda _: task.loss(next(batches)),
        task.budget.rounds(epochs * data.n_batches),
        schedule=lambda progress: 2 * min(progress, 1 - progress),
        factors=factors,
        **optimisation,
    )


@_method
def convolution_transpose(task: _Task, *, epochs: float, **optimisation: Any) -> None:
    """CT, the fifth place of the competition of 2023, as in Deep Unlearn (Cadet et al., arXiv 2410.01276).

    The kernel of each convolution is transposed. Then it fine-tunes, with a learning rate that falls along a cosine.

    Raises:
        ValueError: The module has no convolution with a square kernel.
    """
    layers = [layer for layer in _convolutions(task.module) if layer.weight.shape[2] == layer.weight.shape[3]]
    if not layers:
        raise ValueError(f"{type(task.module).__name__} has no convolution with a square kernel to transpose.")
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(layer.weight.mT.clone())
    data = task.kept()
    batches = data.stream(task.seed)
    _descend(
        task,
        lambda _: task.loss(next(batches)),
        task.budget.rounds(epochs * data.n_batches),
        schedule=lambda progress: (1 + math.cos(math.pi * progress)) / 2,
        **optimisation,
    )


# --------------------------------------------------------------------------------------------------------------------
# Their hyperparameters
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Baseline:
    """A method with its hyperparameters.

    Attributes:
        function: The method.
        published: The hyperparameters of its authors, mostly for ResNet-18 on CIFAR-10, trained by SGD.
        grid: The hyperparameters to try, the same number for each method. The first are the published ones.
    """

    function: Method
    published: dict[str, Any]
    grid: list[dict[str, Any]]


def _baseline(function: Method, published: dict[str, Any], *changes: dict[str, Any]) -> Baseline:
    return Baseline(function, published, [published, *({**published, **change} for change in changes)])


_SGD = {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 5e-4}
_ADAM = {"optimizer": "adam", "weight_decay": 0.0}

BASELINES: dict[str, Baseline] = {
    # Jia et al. (2023) for a class: 10 epochs at 0.01.
    "fine_tune": _baseline(
        fine_tune,
        {"epochs": 10, "lr": 0.01, **_SGD},
        {"lr": 0.03},
        {"lr": 0.1},
        {"lr": 3e-4, **_ADAM},
        {"lr": 1e-3, **_ADAM},
        {"lr": 3e-3, **_ADAM},
    ),
    # Jia et al. (2023) for a class: 5 epochs at 0.0001.
    "gradient_ascent": _baseline(
        gradient_ascent,
        {"epochs": 5, "lr": 1e-4, **_SGD},
        {"lr": 3e-5},
        {"lr": 1e-3},
        {"lr": 1e-5, **_ADAM},
        {"lr": 3e-5, **_ADAM},
        {"lr": 1e-3, **_ADAM},
    ),
    # Kurmanji et al. (2023): SGD without momentum. The objective has no minimum, so fewer steps can do better.
    "neg_grad_plus": _baseline(
        neg_grad_plus,
        {"epochs": 10, "alpha": 0.95, "lr": 0.01, "optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0},
        {"epochs": 0.3},
        {"epochs": 0.1, "lr": 1e-4, **_ADAM},
        {"epochs": 0.3, "lr": 3e-4, **_ADAM},
        {"alpha": 0.99, "lr": 3e-4, **_ADAM},
        {"epochs": 1, "alpha": 0.99, "lr": 1e-3, **_ADAM},
    ),
    # Foster et al. (2024).
    "ssd": _baseline(
        ssd,
        {"alpha": 10.0, "dampening": 1.0, "examples": None},
        {"alpha": 2.5},
        {"alpha": 5.0},
        {"alpha": 25.0},
        {"alpha": 50.0},
        {"alpha": 5.0, "examples": 16},
    ),
    # Jia et al. (2023) fine-tune as above, and search for the penalty in a range that includes this one.
    "l1_sparse": _baseline(
        l1_sparse,
        {"epochs": 10, "penalty": 5e-4, "lr": 0.01, **_SGD},
        {"penalty": 1e-4},
        {"penalty": 1e-4, "lr": 0.1},
        {"penalty": 1e-4, "lr": 1e-3, **_ADAM},
        {"penalty": 5e-4, "lr": 1e-3, **_ADAM},
        {"penalty": 1e-3, "lr": 1e-3, **_ADAM},
    ),
    # Fan et al. (2024): half of the weights, 10 epochs; the learning rate is that of their code's example.
    "salun": _baseline(
        salun,
        {"epochs": 10, "saliency": 0.5, "lr": 0.013, **_SGD},
        {"lr": 0.05},
        {"lr": 1e-4, **_ADAM},
        {"lr": 1e-3, **_ADAM},
        {"lr": 3e-3, **_ADAM},
        {"lr": 1e-3, "saliency": 0.1, **_ADAM},
    ),
}


@dataclass(frozen=True)
class Trial:
    """One run of a method: its hyperparameters, the score of the result (NaN: not scored), and its processor time."""

    hyperparameters: dict[str, Any]
    score: float
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """The result of a baseline.

    Attributes:
        module: The changed copy.
        chosen: The trial that changed it.
        trials: All trials.
        seconds: The processor time of all trials and their scores.
    """

    module: pl.LightningModule
    chosen: Trial
    trials: list[Trial]
    seconds: float


def default(
    baseline: Baseline,
    module: pl.LightningModule,
    forget: DataLoader[Any],
    retain: DataLoader[Any],
    seed: int,
    **limits: Any,
) -> Outcome:
    """Runs a baseline with its published hyperparameters on a copy of the module. Arguments as in :func:`tuned`."""
    only = Baseline(baseline.function, baseline.published, [baseline.published])
    return tuned(only, module, forget, retain, lambda _: math.nan, seed, **limits)


def tuned(
    baseline: Baseline,
    module: pl.LightningModule,
    forget: DataLoader[Any],
    retain: DataLoader[Any],
    score: Callable[[pl.LightningModule], float],
    seed: int,
    *,
    relabel: Relabel | None = None,
    steps: int | None = None,
    seconds: float | None = None,
) -> Outcome:
    """Runs a baseline with all hyperparameters of its grid, each on a copy of the module, and returns the best.

    Args:
        baseline: A baseline, such as one of ``BASELINES``.
        module: A trained module. It is not changed.
        forget: See :func:`_method`.
        retain: See :func:`_method`.
        score: A function of a changed copy; higher is better, NaN is worst. It must use training data only.
        seed: See :func:`_method`.
        relabel: See :func:`_method`.
        steps: The budget of each trial.
        seconds: The budget of each trial.

    Raises:
        ValueError: The grid is empty.
    """
    start = time.process_time()
    best: tuple[pl.LightningModule, Trial] | None = None
    trials = []
    for hyperparameters in baseline.grid:
        changed = copy.deepcopy(module)
        begun = time.process_time()
        limits = {"relabel": relabel, "steps": steps, "seconds": seconds}
        baseline.function(changed, forget, retain, seed=seed, **limits, **hyperparameters)
        spent = time.process_time() - begun
        trial = Trial(hyperparameters, float(score(changed)), spent)
        trials.append(trial)
        if best is None or trial.score > best[1].score or math.isnan(best[1].score):
            best = changed, trial
    if best is None:
        raise ValueError("The grid of the baseline is empty.")
    return Outcome(*best, trials, time.process_time() - start)


# --------------------------------------------------------------------------------------------------------------------
# Data and budget
# --------------------------------------------------------------------------------------------------------------------


class _Budget:
    """Counts the steps and the processor time that are left, from its creation on."""

    def __init__(self, steps: int | None, seconds: float | None) -> None:
        self._steps_left = math.inf if steps is None else steps
        self._end = math.inf if seconds is None else time.process_time() + seconds

    def rounds(self, planned: float, *, share: float = 1.0, batches: int = 1) -> Iterator[float]:
        """Yields the progress, from 0 to 1, before each round, until all rounds are done or the budget is spent.

        Args:
            planned: The number of rounds, rounded up. There is at least one.
            share: The share of the remaining budget that may be spent.
            batches: The batches of a round.
        """
        start = time.process_time()
        seconds = share * (self._end - start)
        most = max(1, math.ceil(planned))
        if self._steps_left < math.inf:
            most = max(1, min(most, int(share * self._steps_left) // batches))
        for done in range(most):
            elapsed = time.process_time() - start
            if done and elapsed >= seconds:
                return
            self._steps_left -= batches
            yield max(done / most, min(1.0, elapsed / seconds) if seconds > 0 else 1.0)


class _Pool(Dataset[tuple[Any, int, int]]):
    """The examples of one or more loaders as one dataset, drawn in random order.

    Args:
        first: The loader that defines the batch size and how batches are collated.
        batch_size: Another batch size.
        others: Further loaders, each with new labels ``(n, …)`` in dataset order, a function from old labels to new
            ones, or None.
    """

    def __init__(
        self,
        first: DataLoader[Any],
        *others: tuple[DataLoader[Any], Tensor | Callable[[Tensor], Tensor] | None],
        batch_size: int | None = None,
    ) -> None:
        parts = [_examples(first), *(_examples(loader) for loader, _ in others)]
        self._datasets = [part.dataset for part in parts]
        self._labels = [labels for _, labels in others]
        self._entries = [(p, number, i) for p, part in enumerate(parts) for number, i in enumerate(part.ids.tolist())]
        self._collate = parts[0].collate
        self._batch_size = batch_size or parts[0].batch_size
        self.n_batches = max(1.0, len(self) / self._batch_size)  # an epoch, in full batches

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, position: int) -> tuple[Any, int, int]:
        part, number, index = self._entries[position]
        return self._datasets[part][index], part, number

    def once(self, seed: int) -> Iterator[Any]:
        """One pass over all examples."""
        yield from self._loader(seed)

    def stream(self, seed: int) -> Iterator[Any]:
        """Full batches without end, since BatchNorm cannot take one example. Each epoch leaves out other examples."""
        loader = self._loader(seed, drop_last=len(self) > self._batch_size)
        while True:
            yield from loader

    def _loader(self, seed: int, **options: Any) -> DataLoader[Any]:
        order = torch.Generator().manual_seed(seed)
        return DataLoader(
            self, self._batch_size, shuffle=True, generator=order, collate_fn=self._join_and_relabel, **options
        )

    def _join_and_relabel(self, rows: list[tuple[Any, int, int]]) -> Any:
        items, parts, numbers = zip(*rows, strict=True)
        batch = self._collate(list(items))
        for part, labels in enumerate(self._labels, start=1):
            members = torch.tensor([of == part for of in parts])
            if labels is not None and members.any():
                targets = find_targets(batch).clone()
                new = labels[torch.tensor(numbers)[members]] if isinstance(labels, Tensor) else labels(targets[members])
                targets[members] = new.to(targets)
                batch = replace_targets(batch, targets)
        return batch


def _examples(loader: DataLoader[Any]) -> Examples:
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", 1)
    return Examples.from_loader(loader, lambda batch: batch, batch_size=size)


def _another_class(forget: _Pool, retain: _Pool) -> Callable[[Tensor], Tensor]:
    """A function that draws one of the other classes for each label."""
    some = (batch for _, batch in zip(range(_BATCHES_FOR_CLASSES), retain.once(0), strict=False))
    found = [class_targets(batch) for pool in (forget.once(0), some) for batch in pool]
    if any(classes is None for classes in found):
        raise ValueError(
            "Random labels need targets that are class labels, and those of these batches are not. Give `relabel`."
        )
    classes = torch.cat(found).unique()

    def draw(old: Tensor) -> Tensor:
        ahead = torch.randint(1, len(classes), old.shape)
        return classes[(torch.searchsorted(classes, old.long()) + ahead) % len(classes)]

    return draw


# --------------------------------------------------------------------------------------------------------------------
# The module
# --------------------------------------------------------------------------------------------------------------------


def _layers(module: nn.Module, kind: type[nn.Module]) -> list[Any]:
    """The layers of a kind whose weights are trained."""
    return [layer for layer in module.modules() if isinstance(layer, kind) and layer.weight.requires_grad]


def _convolutions(module: nn.Module) -> list[Any]:
    return _layers(module, nn.Conv2d)


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


@contextlib.contextmanager
def _opened(module: pl.LightningModule) -> Iterator[Callable[[Any], Tensor]]:
    """Yields the loss of a batch as the training loop computes it. Restores logging, flags and random generators."""
    if not module.automatic_optimization:
        raise ValueError(f"{type(module).__name__} uses manual optimization: its training_step returns no loss.")
    parameters = inspect.signature(module.training_step).parameters.values()
    takes_index = len(parameters) >= 2 or any(p.kind is p.VAR_POSITIONAL for p in parameters)
    flags = {submodule: submodule.training for submodule in module.modules()}
    calls = 0

    def loss(batch: Any) -> Tensor:
        nonlocal calls
        batch = module.on_before_batch_transfer(batch, 0)
        batch = module.transfer_batch_to_device(batch, module.device, 0)
        batch = module.on_after_batch_transfer(batch, 0)
        output = module.training_step(batch, *([calls] if takes_index else []))
        calls += 1
        value = output.get("loss") if isinstance(output, dict) else output
        return torch.zeros((), device=module.device) if value is None else value  # None: the batch is skipped

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    # The methods that log raise outside of the training loop.
    with isolate_rng(), torch.enable_grad(), patch.multiple(module, log=nothing, log_dict=nothing):
        module.zero_grad()
        try:
            yield loss
        finally:
            module.zero_grad()
            for submodule, training in flags.items():
                submodule.training = training


def _descend(
    task: _Task,
    objective: Callable[[float], Tensor],
    rounds: Iterator[float],
    *,
    lr: float,
    optimizer: str,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    batch_norm: str = "batch",
    masks: list[Tensor] | None = None,
    factors: dict[nn.Parameter, Tensor] | None = None,
    schedule: Callable[[float], float] = lambda progress: 1.0,
) -> None:
    """Minimises an objective in training mode.

    Args:
        task: The task with the module.
        objective: A function from the progress, 0 to 1, to the value to minimise.
        rounds: The rounds of a :class:`_Budget`.
        lr: The learning rate.
        optimizer: ``"sgd"`` or ``"adam"``, with a new state.
        momentum: The momentum of SGD.
        weight_decay: The optimizer's weight decay, added to the gradient.
        batch_norm: ``"batch"``: normalises by the batch and updates the running statistics; ``"running"``: keeps them.
        masks: The entries of each parameter that may change, by default all.
        factors: By parameter, what its gradient is multiplied by.
        schedule: The factor of the learning rate, as a function of the progress.

    Raises:
        ValueError: ``optimizer`` or ``batch_norm`` is none of these.
    """
    if optimizer not in ("sgd", "adam") or batch_norm not in ("batch", "running"):
        raise ValueError(
            "`optimizer` must be 'sgd' or 'adam', and `batch_norm` 'batch' or 'running', got"
            f" {optimizer!r} and {batch_norm!r}."
        )
    _seed(task.seed)
    weights = _trainable(task.module)
    stepper = (
        torch.optim.SGD(weights, lr, momentum=momentum, weight_decay=weight_decay)
        if optimizer == "sgd"
        else torch.optim.Adam(weights, lr, weight_decay=weight_decay)
    )
    task.module.train()
    for submodule in task.module.modules():
        if isinstance(submodule, nn.modules.batchnorm._BatchNorm) and batch_norm == "running":
            submodule.eval()
    masked = [(weight, weight.detach().clone(), mask) for weight, mask in zip(weights, masks or (), strict=False)]
    for progress in rounds:
        stepper.param_groups[0]["lr"] = lr * schedule(progress)
        stepper.zero_grad()
        value = objective(progress)
        if not value.requires_grad:
            continue
        value.backward()
        for weight, _, mask in masked:
            if weight.grad is not None:
                weight.grad *= mask  # keeps masked entries out of momentum and Adam's averages
        for weight, factor in (factors or {}).items():
            if weight.grad is not None:
                weight.grad *= factor
        stepper.step()
        with torch.no_grad():
            for weight, old, mask in masked:
                weight.copy_(torch.where(mask, weight, old))  # weight decay changes masked entries too


def _seed(seed: int) -> None:
    """Seeds all generators that a dataset or a step may draw from, since reading data changes their state."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


def _importances(task: _Task, batches: Iterator[Any], rounds: Iterator[float]) -> list[Tensor]:
    """The mean squared gradient of batches, weighted by their sizes, in the shapes of the trainable parameters."""
    weights = _trainable(task.module)
    sums, count = [torch.zeros_like(weight) for weight in weights], 0
    _seed(task.seed)
    for _, batch in zip(rounds, batches, strict=False):
        size, loss = batch_size(batch), task.loss(batch)
        if loss.requires_grad:
            for total, slope in zip(sums, torch.autograd.grad(loss, weights, materialize_grads=True), strict=True):
                total += size * slope.square()
        count += size
    return [total / count for total in sums]

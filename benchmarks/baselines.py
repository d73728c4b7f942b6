"""Unlearning baselines that need nothing but the model and the data: what an edit has to be compared with.

Fine-tuning, gradient ascent, NegGrad+, SSD, ℓ1-sparse and SalUn, written from their papers, on any LightningModule
whose `training_step` returns the loss:

    ssd(copy.deepcopy(model), forget_loader, retain_loader, seed=0, alpha=10.0, dampening=1.0, examples=None)

`BASELINES` holds each with the hyperparameters that its authors give and with six to try; `default` and `tuned` run one
on a copy. Retraining, the truth, is one more `trainer.fit` and is not here.
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
    "default",
    "fine_tune",
    "gradient_ascent",
    "l1_sparse",
    "neg_grad_plus",
    "salun",
    "ssd",
    "tuned",
]

Method = Callable[..., None]
"""A baseline; see :func:`_method` for the arguments that all have in common."""

Relabel = Tensor | int | Callable[[Any], Tensor]
"""Corrected labels, as `trainer.unlearn` takes them: in dataset order, one for all, or a function of a batch."""

_BATCHES_FOR_CLASSES = 16  # of the retained data, in which all classes should be seen


@dataclass(frozen=True)
class _Task:
    """What a method is given to work with."""

    module: pl.LightningModule
    loss: Callable[[Any], Tensor]
    forget: DataLoader[Any]
    retain: DataLoader[Any]
    relabel: Relabel | None
    seed: int
    budget: _Budget

    def kept(self) -> _Pool:
        """All that retraining would see: the retained examples, and the corrected ones."""
        return _Pool(self.retain) if self.relabel is None else _Pool(self.retain, self.corrected())

    def corrected(self) -> tuple[DataLoader[Any], Tensor]:
        """The forget examples with their new labels ``(m, …)``, in dataset order."""
        batches = relabelled(_examples(self.forget), self.relabel).batches()
        return self.forget, torch.cat([find_targets(batch.data) for batch in batches])


def _method(function: Callable[..., None]) -> Method:
    """Gives a method the signature that all have in common. It changes the weights and buffers of a module in place.

    Train/eval flags, logging and global random generators are as before. Loaders say which examples and how many in a
    batch; the order is drawn here.

    Args of the method:
        module: A trained module, or a copy of it.
        forget: The examples in question, with the labels that they were trained with.
        retain: The other training examples.
        seed: Of the order of the data, of dropout and of random labels.
        relabel: The forget examples are kept, with these labels, instead of removed.
        steps: Ends after so many steps, if that is before what is planned. A step is one batch passed forward and
            backward, whatever for, so the same number costs each method about the same.
        seconds: Ends after so many seconds of the processor, whatever else it does at the time, if that is before what
            is planned.
        hyperparameters: Its own, and those of :func:`_descend` where it optimises. An epoch is one pass over all
            examples that it optimises on; of NegGrad+, over the retained ones.
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
    """Goes on training on what is retained, and on the corrected examples; what is not seen is forgotten in time."""
    _fine_tune(task, epochs=epochs, penalty=0.0, **optimisation)


@_method
def l1_sparse(task: _Task, *, epochs: float, penalty: float, **optimisation: Any) -> None:
    """Fine-tuning with ``penalty·‖θ‖₁``, which decreases linearly to zero (Jia et al. 2023)."""
    _fine_tune(task, epochs=epochs, penalty=penalty, **optimisation)


@_method
def gradient_ascent(task: _Task, *, epochs: float, **optimisation: Any) -> None:
    """Climbs the loss of the forget examples, with the labels that they were trained with.

    BatchNorm keeps its running statistics, unlike in published code: those of one class would take their place.
    """
    data = _Pool(task.forget)
    batches = data.stream(task.seed)
    rounds = task.budget.rounds(epochs * data.n_batches)
    _descend(task, lambda _: -task.loss(next(batches)), rounds, **{"batch_norm": "running", **optimisation})


@_method
def neg_grad_plus(task: _Task, *, epochs: float, alpha: float, **optimisation: Any) -> None:
    """NegGrad+: minimises ``alpha·L(retain) − (1 − alpha)·L(forget)``, with a batch of each (Kurmanji et al. 2023).

    Corrected examples are among the retained ones. BatchNorm as in :func:`gradient_ascent`.
    """
    kept = task.kept()
    retained, forgotten = kept.stream(task.seed), _Pool(task.forget).stream(task.seed + 1)

    def objective(_: float) -> Tensor:
        return alpha * task.loss(next(retained)) - (1 - alpha) * task.loss(next(forgotten))

    rounds = task.budget.rounds(epochs * kept.n_batches, batches=2)
    _descend(task, objective, rounds, **{"batch_norm": "running", **optimisation})


@_method
def ssd(task: _Task, *, alpha: float, dampening: float, examples: int | None) -> None:
    """Selective Synaptic Dampening: no training at all (Foster et al. 2024).

    Where the importance of a weight for the forget examples is more than ``alpha`` times that for the training set, it
    is multiplied by ``dampening`` (λ) times the inverse of that ratio, but at most by 1. Importance is the mean of the
    squared gradients of the mean losses of so many ``examples``, in evaluation mode. The paper defines it with one, the
    diagonal of the Fisher matrix; its code takes the loader's batches, ``None``, and its ``alpha`` is for these: with
    single examples no importance for m of n can be more than n/m times that for all, so that 10 would leave a tenth of
    the data as it is. In batches, gradients of one class add up, and those of all classes cancel.

    Labels are those that were trained with, also where others replace them. A budget is shared by the two sets, and
    means are over a random part of each.
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

    Salient is the share ``saliency`` of all weights at which the gradient of the forget loss is largest, in evaluation
    mode. A random label is one of the other classes, drawn anew each time; corrected labels take its place. Retained
    and forget examples are mixed in the batches.
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


# --------------------------------------------------------------------------------------------------------------------
# Their settings
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Baseline:
    """A method with its hyperparameters.

    Attributes:
        function: The method.
        published: Hyperparameters that its authors give, mostly for ResNet-18 on CIFAR-10, trained by SGD.
        grid: Hyperparameters to try, as many for each method; the first are the published ones.
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
    # Kurmanji et al. (2023): SGD without momentum. The objective has no minimum, so that fewer steps can do better.
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
    # Jia et al. (2023) fine-tune as above, and search for the penalty in a range that holds this one.
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
    """One run of a method: its hyperparameters, the score of what came out (NaN: not asked), its processor seconds."""

    hyperparameters: dict[str, Any]
    score: float
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """What a baseline gives.

    Attributes:
        module: The changed copy.
        chosen: The trial that made it.
        trials: All that were made.
        seconds: Of all of them with their scores: what it costs to get here.
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
    """A copy of the module after a baseline with its published hyperparameters; arguments as in :func:`tuned`."""
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
    """The best of a baseline's grid, each tried on a copy of the module.

    Args:
        baseline: One of ``BASELINES``.
        module: A trained module; it stays as it is.
        forget: See :func:`_method`.
        retain: See :func:`_method`.
        score: Of a changed copy, higher is better; it must look at training data only. NaN is worst.
        seed: See :func:`_method`.
        relabel: See :func:`_method`.
        steps: Budget of each trial.
        seconds: Budget of each trial.
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
    """Counts steps and seconds of the processor from its making on."""

    def __init__(self, steps: int | None, seconds: float | None) -> None:
        self._steps_left = math.inf if steps is None else steps
        self._end = math.inf if seconds is None else time.process_time() + seconds

    def rounds(self, planned: float, *, share: float = 1.0, batches: int = 1) -> Iterator[float]:
        """How far the work is, from 0 up to 1, before each round until all are made or the budget is spent.

        Args:
            planned: Rounds, rounded up, if the budget allows; one is made in any case.
            share: Of what is left of the budget.
            batches: That a round takes.
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
        first: Batches have its size and are collated as it does.
        batch_size: If batches are to have another size.
        others: More loaders, with new labels ``(n, …)`` in dataset order, a function from old labels to new, or None.
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
        """Batches without end, all full (BatchNorm cannot take one example): each epoch leaves other examples over."""
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
    """A function that draws for each label one of the other classes that there are."""
    some = (batch for _, batch in zip(range(_BATCHES_FOR_CLASSES), retain.once(0), strict=False))
    found = [class_targets(batch) for pool in (forget.once(0), some) for batch in pool]
    if any(classes is None for classes in found):
        raise ValueError("Random labels need classes, and the targets of these batches are none. Give `relabel`.")
    classes = torch.cat(found).unique()

    def draw(old: Tensor) -> Tensor:
        ahead = torch.randint(1, len(classes), old.shape)
        return classes[(torch.searchsorted(classes, old.long()) + ahead) % len(classes)]

    return draw


# --------------------------------------------------------------------------------------------------------------------
# The module
# --------------------------------------------------------------------------------------------------------------------


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


@contextlib.contextmanager
def _opened(module: pl.LightningModule) -> Iterator[Callable[[Any], Tensor]]:
    """Gives the loss of a batch as the training loop has it, and puts back logging, flags and random generators."""
    if not module.automatic_optimization:
        raise ValueError(f"{type(module).__name__} optimises manually: its training_step gives no loss to work with.")
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

    # Outside of the training loop the methods that log raise.
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
) -> None:
    """Minimises an objective in training mode.

    Args:
        task: Whose module.
        objective: From the progress, 0 to 1, to a value whose gradient is followed.
        rounds: See :class:`_Budget`.
        lr: Learning rate, constant.
        optimizer: ``"sgd"`` or ``"adam"``, without a memory of the training.
        momentum: Of SGD.
        weight_decay: As the optimizer adds it to the gradient.
        batch_norm: ``"batch"``: normalises by the batch and moves the running statistics; ``"running"``: keeps them.
        masks: Entries of each parameter that may change, by default all.
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
        stepper.zero_grad()
        value = objective(progress)
        if not value.requires_grad:
            continue
        value.backward()
        for weight, _, mask in masked:
            if weight.grad is not None:
                weight.grad *= mask  # so that neither momentum nor Adam's averages are made of what is masked
        stepper.step()
        with torch.no_grad():
            for weight, old, mask in masked:
                weight.copy_(torch.where(mask, weight, old))  # weight decay moves them all the same


def _seed(seed: int) -> None:
    """Of everything that a dataset or a step may draw from; reading data in order leaves other seeds behind."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


def _importances(task: _Task, batches: Iterator[Any], rounds: Iterator[float]) -> list[Tensor]:
    """The mean of the squared gradients of batches, weighted by their sizes, shaped as the trainable parameters."""
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

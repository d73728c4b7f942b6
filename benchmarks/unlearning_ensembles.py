"""Compares removals of few training examples with real retraining, over ensembles of models.

    python benchmarks/unlearning_ensembles.py --mnist path/to/MNIST/raw --fashion path/to/FashionMNIST/raw
        [--tasks mlp cnn] [--sets "1 % a" memorised] [--methods nothing "unlearn, default"] [--cache folder]

For each task, 12 or 16 models are trained on all data, and as many without each forget set, all with other seeds. Four
or eight of the former are edited. The margin is the logit of the label minus the log-sum-exp of the others, and the
prediction of a regression. The distance is the mean over forget examples of the difference of the models' mean margins
from those of retrained models. It is scaled such that 0 is the distance of as many independent retrainings and 1 that
of the untouched models, and ± is the standard deviation of the difference of both over choices of retrained models.
KLOM is the Kullback-Leibler divergence of the margins' normal distributions over models, its mean over examples. Cost
is in processor seconds, as a share of those of a plain training in the same run.

Methods may use training and unseen examples. Those that are the best of several settings are so by the distance, which
nobody knows who does not retrain. The oracle and DMM even match the outputs of the retrained models, those that they
are then compared with, so their distance is too small. Test examples occur in the report only.

The last table counts how often the verdict of the edit is right, over all tasks, forget sets and edited models.

`--cache` keeps the outputs of all trained models. Those to edit are fitted again in each run, since the callback
records things in `fit`. Prints three Markdown tables for each task, and one of verdicts; progress goes to stderr.
"""

from __future__ import annotations

import copy
import math
import sys
import time
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from baselines import Method, convolution_transpose, masked_small_gradients, neg_grad_plus, salun, ssd
from evidence import say, table, timed
from tasks import Module, Transformer, adamw, chains, friedman, images, losses, perceptron, sgd
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

from lightning_gif import GIFCallback, UnlearnReport

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import digits

BATCH = 50
UNSEEN, TEST = 500, 2000
MOST_LOST, SPLITS, CLEAR = 5.0, 20, 0.5

Pair = tuple[Tensor, Tensor]
"""Inputs and targets."""


# ----------------------------------------------------------------------------------------------------------------------
# The tasks
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A network and how it is trained.

    Attributes:
        data: From the folders of MNIST and Fashion-MNIST and a number of examples to inputs and targets.
        net: A new network with random weights.
        optimizer: From parameters to an optimizer. It must treat each entry of a parameter by itself.
        epochs: The number of epochs.
        examples: The number of training examples.
        cosine: Whether the learning rate falls to 0 along a cosine. Otherwise it is constant.
        members: The number of models that are edited.
        models: The number of models that are trained on all data, and without each forget set.
        noise: The share of training examples that get the label of another class.
        features: From inputs to vectors ``(n, d)`` whose distances say how alike inputs are.
    """

    data: Callable[[dict[str, Path], int], Pair]
    net: Callable[[], nn.Module]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    epochs: int
    examples: int = 2000
    cosine: bool = False
    members: int = 4
    models: int = 16
    noise: float = 0.0
    features: Callable[[Tensor], Tensor] = lambda x: x.flatten(1)

    def parts(self, folders: dict[str, Path]) -> dict[str, Pair]:
        """The training, unseen and test examples. Those of the test are used in the report only."""
        x, y = self.data(folders, self.examples + UNSEEN + TEST)
        sizes = [self.examples, UNSEEN, len(x) - self.examples - UNSEEN]
        parts = dict(zip(("train", "unseen", "test"), zip(x.split(sizes), y.split(sizes), strict=True), strict=True))
        if self.noise:
            generator, y = torch.Generator().manual_seed(2), parts["train"][1].clone()
            chosen = torch.randperm(len(y), generator=generator)[: round(self.noise * len(y))]
            y[chosen] = (y[chosen] + torch.randint(1, 10, chosen.shape, generator=generator)) % 10
            parts["train"] = parts["train"][0], y
        return parts

    def rate(self, step: int, steps: int) -> float:
        """The factor of the learning rate at one of a number of steps."""
        return (1 + math.cos(math.pi * step / steps)) / 2 if self.cosine else 1.0

    def facts(self, steps: int) -> dict[str, Any]:
        """What the training did: the optimizer, its settings, and the learning rate of each step."""
        optimizer = self.optimizer([nn.Parameter(torch.zeros(1))])
        rates = [optimizer.defaults["lr"] * self.rate(step, steps) for step in range(steps)]
        return {"kind": type(optimizer).__name__, **optimizer.defaults, "rates": rates, "batch": BATCH} | {
            "epochs": self.epochs
        }


def small_images(name: str) -> Callable[[dict[str, Path], int], Pair]:
    """Images of 14 × 14 pixels, each the mean of 2 × 2, standardised."""

    def load(folders: dict[str, Path], count: int) -> Pair:
        x, y = images(name, count)(folders)
        x = F.avg_pool2d(x[:count], 2)
        return (x - x.mean()) / x.std(), y[:count]

    return load


def convolutions() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 16, 10)),
    )


MLP = perceptron(196, 64, 32, 10)
TASKS = {
    "mlp": Task(small_images("fashion"), MLP, sgd(0.05, 0.9, 5e-4), 40, cosine=True),
    "cnn": Task(small_images("fashion"), convolutions, sgd(0.05, 0.9, 5e-4), 20, cosine=True, models=12),
    "mnist adamw": Task(small_images("mnist"), MLP, adamw(2e-3), 20, noise=0.05),
    "text": Task(
        chains, Transformer, adamw(2e-3), 12, 1500, models=12, features=lambda x: F.one_hot(x, 32).float().mean(1)
    ),
    "regression": Task(friedman, perceptron(10, 64, 32, 1), adamw(3e-3), 30, 1000, members=8),
}


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


class Learner(Module):
    """A network that Lightning trains as the task says.

    Args:
        task: The task.
        first: The number of steps of the training that are left out at its start.

    Attributes:
        halfway: The state of the network after half of the epochs.
    """

    def __init__(self, task: Task, first: int = 0) -> None:
        super().__init__(task.net())
        self.task, self.first, self.halfway = task, first, copy.deepcopy(self.net.state_dict())

    def configure_optimizers(self) -> Any:
        first, steps = self.first, int(self.trainer.estimated_stepping_batches) + self.first
        optimizer = self.task.optimizer(self.parameters())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.task.rate(first + step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_epoch_end(self) -> None:
        if self.current_epoch + 1 == self.task.epochs // 2:
            self.halfway = copy.deepcopy(self.net.state_dict())


def fit(
    task: Task,
    data: Pair,
    seed: int,
    *callbacks: pl.Callback,
    start: dict[str, Tensor] | None = None,
    first: int = 0,
    steps: int = -1,
) -> tuple[pl.Trainer, Learner, DataLoader[Any]]:
    """Trains a network with Lightning, from another state if it is given, without the first steps, and for fewer."""
    pl.seed_everything(seed, verbose=False)
    learner, loader = Learner(task, first), DataLoader(TensorDataset(*data), BATCH, shuffle=True)
    if start is not None:
        learner.net.load_state_dict(start)
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        max_epochs=task.epochs,
        max_steps=steps,
    )
    trainer.fit(learner, loader)
    return trainer, learner.eval(), loader


def fitted(task: Task, member: int, data: Pair) -> tuple[pl.Trainer, Learner, DataLoader[Any]]:
    """A base model that can be edited, fitted with the callback: the trainer, the module and the loader of ``fit``."""
    return fit(task, data, member, GIFCallback())


def trained(task: Task, data: Pair, seeds: Sequence[int]) -> list[dict[str, Tensor]]:
    """The states of networks that are trained together, each with its own weights and order of examples."""
    (x, y), nets = data, []
    for seed in seeds:
        torch.manual_seed(seed)
        nets.append(task.net().train())
    weights, buffers = stack_module_state(nets)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    optimizer, steps = task.optimizer(list(weights.values())), task.epochs * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(task.rate, steps=steps))

    @vmap
    def loss(weights: Any, buffers: Any, x: Tensor, y: Tensor) -> Tensor:
        return losses(functional_call(nets[0], (weights, buffers), (x,)), y, "mean")

    with sdpa_kernel(SDPBackend.MATH):  # the others have no rule for vmap
        for _ in range(task.epochs):
            orders = torch.stack([torch.randperm(len(x), generator=generator) for generator in generators])
            for rows in orders[:, : len(x) // BATCH * BATCH].split(BATCH, dim=1):
                optimizer.zero_grad()
                loss(weights, buffers, x[rows], y[rows]).sum().backward()
                optimizer.step()
                schedule.step()
    stacked = {key: value.detach() for key, value in {**weights, **buffers}.items()}
    return [{key: value[i].clone() for key, value in stacked.items()} for i in range(len(seeds))]


@torch.no_grad()
def predictions(net: nn.Module, x: Tensor) -> Tensor:
    """The outputs ``(n, C)`` in evaluation mode."""
    net.eval()
    return torch.cat([net(part) for part in x.split(1000)])


def answers(task: Task, parts: dict[str, Pair], states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The outputs ``(models, n, C)`` of models on each part of the data."""
    net, found = task.net(), dict[str, list[Tensor]]()
    for state in states:
        net.load_state_dict(state)
        for part, (inputs, _) in parts.items():
            found.setdefault(part, []).append(predictions(net, inputs))
    return {part: torch.stack(outputs) for part, outputs in found.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Retraining
# ----------------------------------------------------------------------------------------------------------------------


def truth(task: Task, folders: dict[str, Path], file: Path | None) -> dict[str, Any]:
    """The models that were trained on all data, and those without each forget set.

    Returns:
        The data as ``train``, ``unseen`` and ``test``; the ``facts`` of the training; the states ``members`` of the
        base models to edit, which Lightning trained, and the processor ``seconds`` of such a fit without the callback;
        by forget set the indices ``forget``; the outputs ``(models, n, C)`` of ``base`` and, by forget set, of
        ``retrained`` models on each part of the data; and the mean losses ``kept`` and ``left_out`` of each training
        example, by models that were trained with it and without it.
    """
    found: dict[str, Any] = {} if file is None or not file.exists() else torch.load(file)
    if found.get("complete"):
        return found

    def save() -> None:
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(found, file)

    parts = task.parts(folders)
    parts["train"] = x, y = with_copies(task, parts["train"])
    found.update(parts)
    found["facts"] = task.facts(task.epochs * math.ceil(len(x) / BATCH))

    if "base" not in found:
        _, found["seconds"] = timed(partial(fit, task, (x, y), 0))
        states = [copy.deepcopy(fitted(task, member, (x, y))[1].net.state_dict()) for member in range(task.members)]
        found["members"] = states
        say(f"members: plain fit {found['seconds']:.1f} s")
        save()
        states = states + trained(task, (x, y), range(task.members, task.models))
        found["base"] = answers(task, parts, states)
        save()
        found["kept"], found["left_out"] = _memorisation(task, (x, y), found["base"]["train"])
        found["forget"], found["retrained"] = forget_sets(task, (x, y), found["left_out"] - found["kept"]), {}
        save()
    for number, (name, indices) in enumerate(found["forget"].items()):
        if name not in found["retrained"]:
            rest = torch.ones(len(x), dtype=torch.bool)
            rest[indices] = False
            seeds = range(1000 * (number + 1), 1000 * (number + 1) + task.models)
            found["retrained"][name] = answers(task, parts, trained(task, (x[rest], y[rest]), seeds))
            say(f"retrained without {name}")
            save()
    found["complete"] = True
    save()
    return found


def _memorisation(task: Task, data: Pair, base: Tensor, folds: int = 5, seeds: int = 4) -> Pair:
    """The mean losses of each example by models that were trained with it, and by models of other folds."""
    x, y = data
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    left_out, net = torch.zeros(len(x)), task.net()
    for fold, gone in enumerate(order.chunk(folds)):
        rest = torch.ones(len(x), dtype=torch.bool)
        rest[gone] = False
        first = 100 + fold * seeds
        for state in trained(task, (x[rest], y[rest]), range(first, first + seeds)):
            net.load_state_dict(state)
            left_out[gone] += losses(predictions(net, x[gone]), y[gone], "none") / seeds
    return torch.stack([losses(outputs, y, "none") for outputs in base]).mean(0), left_out


def with_copies(task: Task, data: Pair) -> Pair:
    """The data with the last 1 % of the examples replaced by copies of others.

    They are drawn from the tenth of the examples that is least like its ten neighbours in the target.
    """
    x, y = (part.clone() for part in data)
    n, count = len(x), round(0.01 * len(x))
    features = task.features(x)
    near = torch.cdist(features, features).fill_diagonal_(torch.inf).topk(10, largest=False).indices
    unlike = (y[near] - y[:, None]).abs() if y.is_floating_point() else (y[near] != y[:, None]).double()
    hard = unlike.mean(1)[: n - count].topk(n // 10).indices
    chosen = hard[torch.randperm(len(hard), generator=torch.Generator().manual_seed(6))[:count]]
    x[n - count :], y[n - count :] = x[chosen], y[chosen]
    return x, y


def forget_sets(task: Task, data: Pair, memorisation: Tensor) -> dict[str, Tensor]:
    """The indices of examples to forget.

    They are random, those that are memorised most, neighbours of one class, and all that occur more than once.
    """
    x, y = data
    n, generator = len(x), torch.Generator().manual_seed(4)
    sets = {
        name: torch.randperm(n, generator=generator)[: round(share * n)].sort().values
        for name, share in {"1 % a": 0.01, "1 % b": 0.01, "5 % a": 0.05, "5 % b": 0.05, "10 %": 0.1}.items()
    }
    sets["memorised"] = memorisation.topk(round(0.01 * n)).indices.sort().values
    features = task.features(x)
    distances = torch.cdist(features, features)
    if not y.is_floating_point():
        distances[y[:, None] != y] = torch.inf
    alike = (-distances).topk(round(0.015 * n)).indices
    some = alike[torch.randperm(n, generator=generator)[:50]]  # of many, one whose removal matters
    sets["cluster"] = some[memorisation[some].mean(1).argmax()].sort().values
    _, which, counts = x.flatten(1).unique(dim=0, return_inverse=True, return_counts=True)
    sets["duplicates"] = (counts[which] > 1).nonzero().squeeze(1)
    return sets


# ----------------------------------------------------------------------------------------------------------------------
# Methods
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Removal:
    """What a method is given: a base model, and the examples to forget.

    Attributes:
        task: The task.
        trainer: The trainer of the base model.
        learner: The base model. A method leaves it as it was.
        indices: The indices of the forget examples.
        found: The result of :func:`truth`. Only the oracle looks at the retrained models.
        name: The name of the forget set.
        seed: The seed of the base model.
        reports: The reports of edits by `trainer.unlearn`. A method adds its own.
    """

    task: Task
    trainer: pl.Trainer
    learner: Learner
    indices: Tensor
    found: dict[str, Any] = field(repr=False)
    name: str
    seed: int
    reports: list[UnlearnReport] = field(default_factory=list, repr=False, kw_only=True)

    def forget(self) -> Pair:
        x, y = self.found["train"]
        return x[self.indices], y[self.indices]

    def retain(self) -> Pair:
        x, y = self.found["train"]
        kept = torch.ones(len(x), dtype=torch.bool)
        kept[self.indices] = False
        return x[kept], y[kept]

    def wanted(self) -> Pair:
        """The data that training should have had."""
        return self.retain()

    @property
    def steps(self) -> int:
        """The number of steps of the training."""
        return len(self.found["facts"]["rates"])

    @property
    def peak(self) -> float:
        """The highest learning rate of the training."""
        return max(self.found["facts"]["rates"])


Variant = Callable[[Removal], nn.Module]
"""A method with its settings, from a removal to a changed copy of the network."""


def nothing(removal: Removal) -> nn.Module:
    return copy.deepcopy(removal.learner.net)


def unlearn(**options: Any) -> Variant:
    """`trainer.unlearn` with the unseen examples."""

    def edit(removal: Removal) -> nn.Module:
        unseen = DataLoader(TensorDataset(*removal.found["unseen"]), 250)
        report = removal.trainer.unlearn(removal.indices.tolist(), unseen=unseen, **options)
        net = copy.deepcopy(removal.learner.net)
        report.undo()
        removal.reports.append(report)
        return net

    return edit


def fine_tuning(share: float) -> Variant:
    """Goes on with training on the wanted data; the learning rate falls from its peak to 0."""

    def tune(removal: Removal) -> nn.Module:
        task, steps = replace(removal.task, cosine=True), max(1, round(share * removal.steps))
        return fit(task, removal.wanted(), removal.seed, start=removal.learner.net.state_dict(), steps=steps)[1].net

    return tune


def rewinding(removal: Removal) -> nn.Module:
    """Repeats the second half of the training on the wanted data."""
    task, start, half = removal.task, removal.learner.halfway, removal.steps // 2
    return fit(task, removal.wanted(), removal.seed, start=start, first=half, steps=removal.steps - half)[1].net


def baseline(method: Method, **options: Any) -> Variant:
    """A method of `baselines`. A rate is a multiple of the highest one in training, and a share is one of its steps."""

    def change(removal: Removal) -> nn.Module:
        learner, given = copy.deepcopy(removal.learner), dict(options)
        if "share" in given:
            adaptive = "Adam" in removal.found["facts"]["kind"]
            given |= {"epochs": given.pop("share") * removal.task.epochs, "lr": given.pop("rate") * removal.peak}
            given |= {"optimizer": "adam" if adaptive else "sgd"}
        forget, retain = (DataLoader(TensorDataset(*data), BATCH) for data in (removal.forget(), removal.retain()))
        method(learner, forget, retain, seed=removal.seed, **given)
        return learner.net

    return change


def oracle(weight: float) -> Variant:
    """Matches the mean outputs of retrained models on the forget examples, and its own old ones on retained examples.

    It takes 3 % of the steps of the training, 5 % if these are at most 1000, and keeps BatchNorm's statistics.
    """

    def match(removal: Removal) -> nn.Module:
        net, (x, y), (gone, _) = copy.deepcopy(removal.learner.net).eval(), removal.retain(), removal.forget()
        wanted = centred(removal.found["retrained"][removal.name]["train"][:, removal.indices].mean(0), y)
        old, steps = predictions(net, x), math.ceil((0.03 if removal.steps > 1000 else 0.05) * removal.steps)
        optimizer, task = removal.task.optimizer(net.parameters()), replace(removal.task, cosine=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(task.rate, steps=steps))
        torch.manual_seed(removal.seed)
        for _ in range(steps):
            rows, some = torch.randperm(len(x))[:BATCH], torch.randperm(len(gone))[:32]
            loss = weight * F.huber_loss(centred(net(gone[some]), y), wanted[some])
            optimizer.zero_grad()
            (loss + divergence(net(x[rows]), old[rows], y)).backward()
            optimizer.step()
            schedule.step()
        return net

    return match


def datamodel_matching(rate: float) -> Variant:
    """DMM with perfect predictions: matches the mean outputs of retrained models (Georgiev et al., arXiv 2410.23232).

    As there, Adam minimises the squared error on five copies of the forget examples and up to twenty times as many
    retained ones, for four epochs of which each has 0.95 times the rate of the one before.

    Args:
        rate: The rate of the first epoch.
    """

    def match(removal: Removal) -> nn.Module:
        net, (x, y) = copy.deepcopy(removal.learner.net).eval(), removal.found["train"]
        wanted = centred(removal.found["retrained"][removal.name]["train"].mean(0), y)
        kept = torch.ones(len(x), dtype=torch.bool)
        kept[removal.indices] = False
        optimizer = torch.optim.Adam(net.parameters(), rate)
        torch.manual_seed(removal.seed)
        some = kept.nonzero().squeeze(1)[torch.randperm(int(kept.sum()))[: 20 * len(removal.indices)]]
        rows = torch.cat([removal.indices.repeat(5), some])
        for _ in range(4):
            for part in rows[torch.randperm(len(rows))].split(BATCH):
                optimizer.zero_grad()
                F.mse_loss(centred(net(x[part]), y), wanted[part]).backward()
                optimizer.step()
            optimizer.param_groups[0]["lr"] *= 0.95
        return net

    return match


def centred(outputs: Tensor, y: Tensor) -> Tensor:
    """Logits without their mean, which has no effect; other outputs as they are."""
    return outputs if y.is_floating_point() else outputs - outputs.mean(-1, keepdim=True)


def divergence(outputs: Tensor, old: Tensor, y: Tensor) -> Tensor:
    """The mean Kullback-Leibler divergence of class probabilities, or the mean squared error."""
    if y.is_floating_point():
        return F.mse_loss(outputs, old)
    return F.kl_div(outputs.log_softmax(-1), old.log_softmax(-1), reduction="batchmean", log_target=True)


METHODS: dict[str, list[Variant]] = {
    "nothing": [nothing],
    "unlearn, default": [unlearn()],
    "unlearn, fewer products": [unlearn(curvature_examples=200, max_iter=4)],
    "unlearn, natural": [unlearn(step="natural")],
    "unlearn, search": [unlearn(step="search")],
    "fine-tuning, 1/10": [fine_tuning(0.1)],
    "fine-tuning, 1/5": [fine_tuning(0.2)],
    "rewinding, 1/2": [rewinding],
    "NegGrad+, best of 3": [baseline(neg_grad_plus, alpha=alpha, share=0.05, rate=0.2) for alpha in (0.9, 0.97, 0.99)],
    "SalUn, best of 3": [baseline(salun, saliency=0.5, share=0.1, rate=rate) for rate in (0.03, 0.1, 0.3)],
    "SSD, best of 3": [baseline(ssd, alpha=alpha, dampening=1.0, examples=None) for alpha in (10.0, 25.0, 50.0)],
    "MSG, best of 3": [
        baseline(masked_small_gradients, reset=0.3, old_rate=0.1, share=0.1, rate=rate) for rate in (0.1, 0.3, 1.0)
    ],
    "CT, best of 3": [baseline(convolution_transpose, share=0.1, rate=rate) for rate in (0.1, 0.3, 1.0)],
    "DMM, oracle, best of 3": [datamodel_matching(rate) for rate in (1e-4, 5e-4, 2e-3)],
    "oracle": [oracle(0.3)],
}


def applies(method: str, task: Task, targets: Tensor) -> bool:
    """Whether a method can edit the models of a task: some need classes or convolutions."""
    if method.startswith("SalUn"):
        return not targets.is_floating_point()
    return not method.startswith("CT") or any(isinstance(layer, nn.Conv2d) for layer in task.net().modules())


# ----------------------------------------------------------------------------------------------------------------------
# Measurements
# ----------------------------------------------------------------------------------------------------------------------


def margins(outputs: Tensor, y: Tensor) -> Tensor:
    """The logit of the label minus the log-sum-exp of the others, or the prediction of a regression."""
    if y.is_floating_point():
        return outputs.squeeze(-1)
    labels = y.expand(outputs.shape[:-1]).unsqueeze(-1)
    others = outputs.scatter(-1, labels, -torch.inf).logsumexp(-1)
    return outputs.gather(-1, labels).squeeze(-1) - others


def quality(outputs: Tensor, y: Tensor) -> float:
    """The mean accuracy or R² of some models, in percent."""
    if y.is_floating_point():
        return 100 * float(1 - (outputs.squeeze(-1) - y).square().mean() / (y - y.mean()).square().mean())
    return 100 * float((outputs.argmax(-1) == y).double().mean())


def distance(these: Tensor, others: Tensor) -> float:
    """The mean difference of the mean margins of two groups of models ``(models, n)``."""
    return float((these.mean(0) - others.mean(0)).abs().mean())


def klom(these: Tensor, others: Tensor) -> float:
    """The mean divergence of the margins' normal distributions over two groups of models, each at most 100."""
    ours, theirs = (group.var(0).clamp_min(1e-6) for group in (these, others))
    ratio = ours / theirs
    shift = (these.mean(0) - others.mean(0)).square() / theirs
    return float((0.5 * (ratio + shift - 1 - ratio.log())).clamp(max=100).mean())


def measure(edited: dict[str, Tensor], found: dict[str, Any], name: str, members: int) -> dict[str, float]:
    """Compares edited models with retrained ones.

    As many retrained models as edited ones are left out of the reference, and show what an independent retraining would
    get. Values are means over ``SPLITS`` random choices of them.

    Args:
        edited: The outputs ``(members, n, C)`` on each part of the data.
        found: The result of :func:`truth`.
        name: The name of the forget set.
        members: The number of edited models, which are the first base models.
    """
    gone = torch.zeros(len(found["train"][1]), dtype=torch.bool)
    gone[found["forget"][name]] = True
    sets = {"forget": ("train", gone), "retain": ("train", ~gone)}
    sets |= {part: (part, torch.ones(len(found[part][1]), dtype=torch.bool)) for part in ("unseen", "test")}
    retrained, base = found["retrained"][name], {part: found["base"][part][:members] for part in found["base"]}
    values = dict[str, float]()
    for key, (part, chosen) in sets.items():
        y = found[part][1][chosen]
        groups = {
            kind: margins(outputs[part][:, chosen], y)
            for kind, outputs in (("edited", edited), ("nothing", base), ("retrained", retrained))
        }
        for measurement in (distance, klom):
            rows = list[list[float]]()
            for split in range(SPLITS):
                order = torch.randperm(len(retrained["train"]), generator=torch.Generator().manual_seed(split))
                reference, held = groups["retrained"][order[members:]], groups["retrained"][order[:members]]
                rows.append([measurement(these, reference) for these in (groups["edited"], groups["nothing"], held)])
            here, before, best = torch.tensor(rows).mean(0).tolist()
            what, moved = f"{measurement.__name__} {key}", torch.tensor(rows)[:, 1] - torch.tensor(rows)[:, 2]
            values |= {what: here, f"retrained {what}": best, f"normalised {what}": (here - best) / (before - best)}
            values[f"retrained normalised {what}"] = float((moved.std() / moved.mean()).abs())
        for start, outputs in (("", edited), ("nothing ", base), ("retrained ", retrained)):
            values[f"{start}quality {key}"] = quality(outputs[part][:, chosen], y)
            values[f"{start}loss {key}"] = mean(float(losses(one[chosen], y, "mean")) for one in outputs[part])
    return values


@dataclass(frozen=True)
class Result:
    """What a method did on a forget set.

    Attributes:
        values: The measurements.
        cost: Its seconds as a share of a training's.
        reports: The reports of all members, for `trainer.unlearn`.
    """

    values: dict[str, float]
    cost: float
    reports: tuple[UnlearnReport, ...] = ()

    @property
    def grade(self) -> str:
        """The grade that the verdict should have had, by the distance to retrained models.

        The thresholds are those that the verdict itself has for the share of the predicted change.
        """
        values = self.values
        if values["retrained normalised distance forget"] >= CLEAR:
            return "Nothing to do"
        share = 1 - values["normalised distance forget"]
        before, after, best = (values[f"{of}loss forget"] for of in ("nothing ", "", "retrained "))
        if share < 0.75 and after - before > 1.5 * (best - before):
            return "Too far"
        return "Done" if share >= 0.75 else "Partly done" if share >= 0.25 else "Not done"


def judge(variants: Sequence[Variant], removals: Sequence[Removal], seconds: float) -> Result:
    """Edits each member by each variant. The result is that of the variant which comes closest to retraining.

    A variant that costs more than ``MOST_LOST`` points of retained accuracy counts only if all do, and then the one
    that costs least is taken.
    """
    first, results = removals[0], list[Result]()
    for variant in variants:
        outputs, spent = {part: list[Tensor]() for part in ("train", "unseen", "test")}, 0.0
        removals = [replace(removal, reports=[]) for removal in removals]
        for removal in removals:
            net, took = timed(partial(variant, removal))
            spent += took / len(removals)
            for part, kept in outputs.items():
                kept.append(predictions(net, first.found[part][0]).nan_to_num(0.0, 1e4, -1e4))
        edited = {part: torch.stack(kept) for part, kept in outputs.items()}
        reports = tuple(report for removal in removals for report in removal.reports)
        results.append(Result(measure(edited, first.found, first.name, len(removals)), spent / seconds, reports))

    def rank(result: Result) -> tuple[float, float]:
        lost = result.values["nothing quality retain"] - result.values["quality retain"]
        return max(0.0, lost - MOST_LOST), result.values["distance forget"]

    return min(results, key=rank)


def report(name: str, sets: Sequence[str], results: dict[str, dict[str, Result]]) -> str:
    """Tables of a task: distances by forget set, forget losses by forget set, and means over the sets."""
    some = next(iter(results.values()))
    best = {
        key: Result({k: v.values.get(f"retrained {k}", math.nan) for k in v.values}, 1.0) for key, v in some.items()
    }

    spread = "retrained normalised distance forget"
    clear = [one for one in sets if some[one].values[spread] < CLEAR] or sets

    def over(row: dict[str, Result], key: str) -> float:
        return mean(row[one].values[key] for one in (clear if "distance" in key else sets))

    def rows(key: str, extra: dict[str, dict[str, Result]]) -> list[list[Any]]:
        return [
            [method, *(row[one].values[key] for one in sets), over(row, key)]
            for method, row in {**results, **extra}.items()
        ]

    last = {**results, "retrained": best}
    means = [
        [
            method,
            *([over(row, "normalised distance forget")] if method != "retrained" else ["0"]),
            *(over(row, key) for key in ("klom forget", "klom retain", "klom unseen")),
            *(f"{over(row, key):.1f}" for key in ("quality retain", "quality unseen", "quality test")),
            mean(row[one].cost for one in sets),
        ]
        for method, row in last.items()
    ]
    return "\n\n".join(
        [
            f"### {name}",
            "Distance to retraining on the forget examples (0: as an independent retraining, 1: nothing done)"
            f". The mean is over the sets with ± below {CLEAR}.",
            table(["", *sets, "mean"], rows("normalised distance forget", {"±": best})),
            "Loss on the forget examples",
            table(["", *sets, "mean"], rows("loss forget", {"retrained": best})),
            "Means over the sets",
            table(
                [
                    "",
                    "distance",
                    "KLOM, forget",
                    "retain",
                    "unseen",
                    "accuracy or R² (%), retain",
                    "unseen",
                    "test",
                    "cost",
                ],
                means,
            ),
        ]
    )


def verdicts(results: Sequence[Result]) -> str:
    """How often the reports of an edit had each verdict, by the grade that it should have had."""
    counts = Counter(
        (report.verdict.partition(".")[0], result.grade) for result in results for report in result.reports
    )
    grades = ("Done", "Partly done", "Not done", "Too far", "Nothing to do")
    right = sum(count for (said, grade), count in counts.items() if said == grade)
    noted = Counter(
        (any(note.startswith("Retraining is cheaper") for note in report.notes), result.cost > 1)
        for result in results
        for report in result.reports
    )
    return "\n\n".join(
        [
            "### Verdicts of the edit",
            f"{right} of {counts.total()} are right. Rows: the verdict; columns: the grade by the distance to"
            " retraining.",
            table(["", *grades], [[said, *(str(counts[said, grade]) for grade in grades)] for said in grades]),
            f"A note says that retraining is cheaper for {noted[True, True]} of"
            f" {noted[True, True] + noted[False, True]} edits that cost more than the training, and for"
            f" {noted[True, False]} of {noted[True, False] + noted[False, False]} others.",
        ]
    )


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, help="folder with the four gzipped idx files of MNIST")
    parser.add_argument("--fashion", type=Path, help="the same of Fashion-MNIST")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument(
        "--models", type=int, help="another number of models that are trained on all data, and without each set"
    )
    parser.add_argument("--members", type=int, help="another number of models that are edited")
    parser.add_argument("--epochs", type=int, help="another length of training")
    parser.add_argument("--cache", type=Path, help="folder for the outputs of the retrained models")
    parser.add_argument("--sets", nargs="+", help="names of forget sets, by default all")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    options = parser.parse_args()
    digits.quiet()
    warnings.simplefilter("ignore")
    folders, judged = {"mnist": options.mnist, "fashion": options.fashion}, list[Result]()
    for name in options.tasks:
        changed = {"epochs": options.epochs, "models": options.models, "members": options.members}
        task = replace(TASKS[name], **{key: value for key, value in changed.items() if value is not None})
        cache = options.cache and options.cache / f"{name}.pt"
        start = time.process_time()
        found = truth(task, folders, cache)
        say(f"{name}: retrained models after {time.process_time() - start:.0f} s")
        data, sets = found["train"], options.sets or list(found["forget"])
        members = [fitted(task, member, data)[:2] for member in range(task.members)]
        for (_, learner), state in zip(members, found["members"], strict=True):
            if any(not torch.equal(value, state[key]) for key, value in learner.net.state_dict().items()):
                raise SystemExit(f"{cache} is of another training. Remove it.")
        _, seconds = timed(partial(fit, task, data, 0))
        methods = [method for method in options.methods if applies(method, task, data[1])]
        results: dict[str, dict[str, Result]] = {method: {} for method in methods}
        for one in sets:
            removals = [
                Removal(task, *member, found["forget"][one], found, one, seed) for seed, member in enumerate(members)
            ]
            for method in methods:
                result = results[method][one] = judge(METHODS[method], removals, seconds)
                far, after = (result.values[key] for key in ("normalised distance forget", "loss forget"))
                say(f"{name}, {one}, {method}: distance {far:.2f}, forget loss {after:.2f}, cost {result.cost:.2f}")
        print(report(name, sets, results) + "\n", flush=True)
        judged += results.get("unlearn, default", {}).values()
    print(verdicts(judged))


if __name__ == "__main__":
    main()

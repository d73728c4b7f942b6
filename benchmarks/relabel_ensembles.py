"""Compares new labels for few training examples with real retraining, over ensembles of models.

    python benchmarks/relabel_ensembles.py --mnist path/to/MNIST/raw --fashion path/to/FashionMNIST/raw
        [--tasks mlp digits] [--sets "25 corrected"] [--methods nothing "unlearn, default"] [--cache folder]

For each task, 12 models are trained on data of which 5 % have the label of another class, and as many with the new
labels of each set, all with other seeds. Four of the former are edited. Sets are: 25 or all of the wrong labels
corrected, 100 right labels replaced by random other ones, which the rest of the data contradict, and 10 right labels of
one class replaced by another class. Distances, KLOM and cost are those of `unlearning_ensembles.py`, with the margins
of the new labels on the relabelled examples.

Test examples occur in the report only. `--cache` keeps the outputs of all trained models. Those to edit are fitted
again in each run, since the callback records things in `fit`. Prints three Markdown tables for each task; progress
goes to stderr.
"""

from __future__ import annotations

import copy
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from evidence import say, timed
from sklearn.datasets import load_digits
from tasks import adamw, sgd
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from unlearning_ensembles import (
    TASKS,
    Pair,
    Removal,
    Result,
    Task,
    Variant,
    answers,
    convolutions,
    digits,
    fine_tuning,
    fit,
    fitted,
    judge,
    nothing,
    report,
    rewinding,
    trained,
)

NOISE = 0.05


def small_digits(folders: dict[str, Path], count: int) -> Pair:
    """The digits of scikit-learn, as images of 8 × 8 pixels, standardised."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(data.images, dtype=torch.float32)[order, None], torch.tensor(data.target)[order].long()
    return (x - x.mean()) / x.std(), y


def few_convolutions() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, 1, 1), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 4, 10)),
    )


RELABELLED = {
    **{name: replace(TASKS[name], noise=NOISE, models=12) for name in ("mlp", "cnn", "mnist adamw")},
    "digits": Task(small_digits, few_convolutions, adamw(2e-3), 20, 1000, models=12, noise=NOISE),
    "mnist sgd": replace(TASKS["mnist adamw"], net=convolutions, optimizer=sgd(0.02, 0.9, 5e-4), models=12, epochs=15),
}


@dataclass(frozen=True)
class Relabelling(Removal):
    """A base model, and the examples with new labels. The training data of :attr:`found` have the new labels."""

    old: Pair

    @property
    def new(self) -> Tensor:
        """The new labels."""
        return self.forget()[1]

    def wanted(self) -> Pair:
        return self.found["train"]


def label_sets(clean: Tensor, given: Tensor) -> dict[str, Pair]:
    """Indices of examples and their new labels, by name.

    Args:
        clean: The right labels of all training examples.
        given: The labels that the models to edit are trained with.
    """
    generator = torch.Generator().manual_seed(5)

    def some(count: int, of: Tensor) -> Tensor:
        chosen = of.nonzero().squeeze(1)
        return chosen[torch.randperm(len(chosen), generator=generator)[:count]].sort().values

    wrong = given != clean
    few, many, moved = some(25, wrong), some(100, ~wrong), some(10, ~wrong & (clean == 3))
    all_wrong = wrong.nonzero().squeeze(1)
    other = (clean[many] + torch.randint(1, 10, many.shape, generator=generator)) % 10
    return {
        "25 corrected": (few, clean[few]),
        "all corrected": (all_wrong, clean[all_wrong]),
        "100 contradicting": (many, other),
        "10 moved": (moved, torch.full_like(clean[moved], 8)),
    }


def truth(task: Task, folders: dict[str, Path], file: Path | None) -> dict[str, Any]:
    """The models with the labels of the data, and those with the new labels of each set.

    Returns:
        As :func:`unlearning_ensembles.truth`, without the losses of single examples. In addition, ``labels`` has the
        new labels by set.
    """
    found: dict[str, Any] = {} if file is None or not file.exists() else torch.load(file)

    def save() -> None:
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(found, file)

    parts = task.parts(folders)
    x, y = parts["train"]
    if "base" not in found:
        found.update(parts)
        found["facts"] = task.facts(task.epochs * -(-len(x) // 50))
        sets = label_sets(replace(task, noise=0.0).parts(folders)["train"][1], y)
        found["forget"], found["labels"] = ({name: pair[i] for name, pair in sets.items()} for i in range(2))
        states = [copy.deepcopy(fitted(task, member, (x, y))[1].net.state_dict()) for member in range(task.members)]
        found["members"], found["retrained"] = states, {}
        found["base"] = answers(task, parts, states + trained(task, (x, y), range(task.members, task.models)))
        say("base models")
        save()
    for number, (name, indices) in enumerate(found["forget"].items()):
        if name not in found["retrained"]:
            labels = y.index_put((indices,), found["labels"][name])
            seeds = range(1000 * (number + 1), 1000 * (number + 1) + task.models)
            found["retrained"][name] = answers(task, parts, trained(task, (x, labels), seeds))
            say(f"retrained with {name}")
            save()
    return found


def unlearn(**options: Any) -> Variant:
    """`trainer.unlearn` with new labels and the unseen examples."""

    def edit(removal: Removal) -> nn.Module:
        assert isinstance(removal, Relabelling)
        unseen = DataLoader(TensorDataset(*removal.found["unseen"]), 250)
        report = removal.trainer.unlearn(removal.indices.tolist(), relabel=removal.new, unseen=unseen, **options)
        net = copy.deepcopy(removal.learner.net)
        report.undo()
        removal.reports.append(report)
        return net

    return edit


METHODS: dict[str, list[Variant]] = {
    "nothing": [nothing],
    "unlearn, default": [unlearn()],
    "unlearn, relinearise": [unlearn(step="relinearise")],
    "unlearn, natural": [unlearn(step="natural")],
    "fine-tuning, 1/10": [fine_tuning(0.1)],
    "fine-tuning, 1/5": [fine_tuning(0.2)],
    "rewinding, 1/2": [rewinding],
}


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, help="folder with the four gzipped idx files of MNIST")
    parser.add_argument("--fashion", type=Path, help="the same of Fashion-MNIST")
    parser.add_argument("--tasks", nargs="+", default=list(RELABELLED), choices=list(RELABELLED))
    parser.add_argument("--models", type=int, help="another number of models that are trained with each set of labels")
    parser.add_argument("--members", type=int, help="another number of models that are edited")
    parser.add_argument("--epochs", type=int, help="another length of training")
    parser.add_argument("--examples", type=int, help="another number of training examples")
    parser.add_argument("--cache", type=Path, help="folder for the outputs of the retrained models")
    parser.add_argument("--sets", nargs="+", help="names of sets, by default all")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    options = parser.parse_args()
    digits.quiet()
    warnings.simplefilter("ignore")
    folders = {"mnist": options.mnist, "fashion": options.fashion}
    for name in options.tasks:
        changed = {key: getattr(options, key) for key in ("epochs", "examples", "models", "members")}
        task = replace(RELABELLED[name], **{key: value for key, value in changed.items() if value is not None})
        found = truth(task, folders, options.cache and options.cache / f"{name}, relabelled.pt")
        data, sets = found["train"], options.sets or list(found["forget"])
        members = [fitted(task, member, data)[:2] for member in range(task.members)]
        for (_, learner), state in zip(members, found["members"], strict=True):
            if any(not torch.equal(value, state[key]) for key, value in learner.net.state_dict().items()):
                raise SystemExit("The cache is of another training. Remove it.")
        _, seconds = timed(partial(fit, task, data, 0))
        results: dict[str, dict[str, Result]] = {method: {} for method in options.methods}
        for one in sets:
            indices = found["forget"][one]
            new = {**found, "train": (data[0], data[1].index_put((indices,), found["labels"][one]))}
            cases = [Relabelling(task, *member, indices, new, one, seed, data) for seed, member in enumerate(members)]
            for method in options.methods:
                result = results[method][one] = judge(METHODS[method], cases, seconds)
                far, after = (result.values[key] for key in ("normalised distance forget", "loss forget"))
                test, best = (result.values[f"{kind}quality test"] for kind in ("", "retrained "))
                say(
                    f"{name}, {one}, {method}: distance {far:.2f}, loss of the relabelled {after:.2f} (retrained"
                    f" {result.values['retrained loss forget']:.2f}), test {test:.1f} (retrained {best:.1f}), cost"
                    f" {result.cost:.2f}"
                )
        print(report(name, sets, results) + "\n", flush=True)


if __name__ == "__main__":
    main()

"""Removes each class in turn, and compares the edit with baselines at the same cost and with retrained models.

    python benchmarks/forget_class.py --data path/to/MNIST/raw --net resnet [--cache folder] [--baselines all]

The edit is `trainer.unlearn` with its defaults. Seconds are processor time. Each run of a baseline may take as many
seconds as the edit did. Rows of a baseline:

- `default`: the settings of its authors.
- `tuned`: the best of six settings by the paper's F1 on training data (a sample of the forget and of the retained
  examples). They are chosen on the first class and used for all classes. The seconds of the search are not counted.

`the class ruled out` is the trained model with its probability of the class set to zero; its weights are unchanged.
Test images are used in the report only. Prints a Markdown table of means over the classes, and one with a row for each
class.
"""

from __future__ import annotations

import json
import warnings
from functools import partial
from statistics import mean
from typing import Any

from evidence import (
    Known,
    Sets,
    accuracy,
    answers,
    divergence,
    gap,
    know,
    make_parser,
    membership,
    part,
    retrained,
    run_baselines,
    say,
    table,
    timed,
)
from mnist import fit, load
from torch import nn
from torch.utils.data import DataLoader, Subset

from lightning_gif import GIFCallback
from lightning_gif.metrics import RemovalF1


def main() -> None:
    parser = make_parser(__doc__, ["relinearise"])
    parser.add_argument(
        "--classes", type=int, nargs="+", default=list(range(10)), help="the classes to remove, one after the other"
    )
    parser.add_argument("--only-retrain", action="store_true", help="only fill the cache with retrained models")
    parser.add_argument(
        "--accelerator", default="cpu", help="accelerator of trainings and edits; baselines run on the CPU"
    )
    parser.add_argument("--options", type=json.loads, default={}, help="arguments of trainer.unlearn, as JSON")
    options = parser.parse_args()
    if options.accelerator != "cpu" and options.baselines:
        parser.error("baselines run on the CPU: give --accelerator cpu, or leave out --baselines")
    warnings.filterwarnings("ignore", message=".*still predicted as it.*")

    train, test = load(options.data)
    data, labels = options.data.parent.name, train.tensors[1]
    common = {"epochs": options.epochs, "net": options.net, "decay": True, "accelerator": options.accelerator}
    trainer, model, fit_seconds = None, None, 0.0
    suffix = "" if options.accelerator == "cpu" else f"_{options.accelerator}"
    rows: dict[str, list[dict[str, float]]] = {}
    chosen: dict[str, dict[str, Any]] = {}
    for label in options.classes:
        is_label = labels == label
        sets = {
            "forget": part(train, is_label, 2000),
            "retain": part(train, ~is_label, 5000),
            "test_forget": part(test, test.tensors[1] == label),
            "test_retain": part(test, test.tensors[1] != label),
        }
        rest = Subset(train, (~is_label).nonzero().squeeze(1).tolist())
        others = retrained(
            lambda seed, rest=rest: fit(rest, [], seed=seed, **common)[1],
            sets,
            seeds=range(1, options.seeds + 1),
            cache=options.cache,
            name=f"{data}_{options.net}_{options.epochs}_without{label}{suffix}",
        )
        if options.only_retrain:
            continue
        if trainer is None or model is None:
            (trainer, model), fit_seconds = timed(partial(fit, train, [GIFCallback()], **common))

        def note(name: str, known: Known, label: int = label, sets: Sets = sets, others: Any = others) -> None:
            rows.setdefault(name, []).append(measured(known, others, sets, label))
            say(data, options.net, label, name, {key: round(v, 3) for key, v in rows[name][-1].items()})

        before = know(model, sets, fit_seconds)
        note("before", before)
        note("the class ruled out", ruled_out(before, label))
        for position, other in enumerate(others):
            beside = others[:position] + others[position + 1 :]
            if beside:
                rows.setdefault("retrained", []).append(measured(other, beside, sets, label))
        forget = DataLoader(Subset(train, is_label.nonzero().squeeze(1).tolist()), 256)
        seconds = 0.0
        for step in options.steps:
            edit, spent = timed(partial(trainer.unlearn, forget, step=step, **options.options))
            seconds = seconds or spent
            say(edit)
            note(f"edit, {step}", know(model, sets, spent))
            edit.undo()
        retain = DataLoader(rest, 128)
        grade = partial(score, sets=sets, label=label)
        for name, changed, spent in run_baselines(
            options.baselines, model, forget, retain, grade, seconds=seconds, settings=chosen
        ):
            note(name, know(changed, sets, spent))
    if rows:
        report(rows, options.classes)


def ruled_out(known: Known, label: int) -> Known:
    """A model with its probability of a class set to zero: the aim of an edit, although the weights forget nothing."""
    logits = {name: values.clone() for name, values in known.logits.items()}
    for values in logits.values():
        values[:, label] = -1e4  # a probability of zero
    return Known(logits, 0.0)


def score(module: nn.Module, sets: Sets, label: int) -> float:
    """The paper's F1 on training data."""
    metric = RemovalF1(label)
    for name in ("forget", "retain"):
        metric.update(answers(module, sets[name]), sets[name].tensors[1])
    return float(metric.compute())


def measured(known: Known, others: list[Known], sets: Sets, label: int) -> dict[str, float]:
    metric = RemovalF1(label)
    for name in ("test_forget", "test_retain"):
        metric.update(known.logits[name], sets[name].tensors[1])
    return {
        "forgotten": accuracy(known, sets, "test_forget"),
        "remaining": accuracy(known, sets, "test_retain"),
        "gap": gap(known, others, sets, "test_retain"),
        "train gap": gap(known, others, sets, "retain"),
        "f1": float(metric.compute()),
        "jsd forgotten": divergence(known, others, "test_forget"),
        "jsd remaining": divergence(known, others, "test_retain"),
        "membership": membership(known, sets, "forget", "test_forget"),
        "seconds": known.seconds,
    }


def report(rows: dict[str, list[dict[str, float]]], classes: list[int]) -> None:
    columns = ["", "forgotten class (%), mean", "forgotten class (%), worst", "other classes (%)"]
    columns += ["gap to retraining (points), mean", "gap to retraining (points), worst", "F1"]
    columns += ["JSD, forgotten class", "JSD, other classes", "membership AUROC", "seconds"]

    def mean_of(values: list[dict[str, float]], key: str) -> float:
        return mean(value[key] for value in values)

    lines = []
    for name, values in rows.items():
        lines.append(
            [
                name,
                mean_of(values, "forgotten"),
                max(value["forgotten"] for value in values),
                mean_of(values, "remaining"),
                f"{mean_of(values, 'gap'):+.2f}",
                f"{min(value['gap'] for value in values):+.2f}",
                f"{mean_of(values, 'f1'):.4f}",
                f"{mean_of(values, 'jsd forgotten'):.3f}",
                f"{mean_of(values, 'jsd remaining'):.4f}",
                f"{mean_of(values, 'membership'):.3f}",
                f"{mean_of(values, 'seconds'):.1f}",
            ]
        )
    print(table(columns, lines))
    print()
    each = [name for name in rows if name != "retrained"]
    print(table(["class", *each], [[c, *(cell(rows[name][i]) for name in each)] for i, c in enumerate(classes)]))


def cell(values: dict[str, float]) -> str:
    """The accuracy on the forgotten class, and the gap to retraining on the other classes."""
    return f"{values['forgotten']:.1f}, {values['gap']:+.2f}"


if __name__ == "__main__":
    main()

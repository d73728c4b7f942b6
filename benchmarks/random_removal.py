"""Removes random examples, and compares the edit with baselines at the same cost and with retrained models.

    python benchmarks/random_removal.py --data path/to/MNIST/raw --shares 0.01 0.1 [--cache folder] [--baselines all]

A twelfth of the training images is held out as unseen examples. Seconds are processor time. Each run of a baseline may
take as many seconds as the edit did. `tuned` is the best of a baseline's settings by two criteria: forget examples
should have the losses of unseen ones, and retained examples should keep their accuracy. It minimises `|2·AUROC − 1|`
plus the loss of accuracy. Test images are used in the report only. Prints a Markdown table.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from evidence import (
    Known,
    Sets,
    accuracy,
    agreement,
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
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_gif import GIFCallback


def main() -> None:
    parser = make_parser(__doc__, ["relinearise", "natural"])
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.01, 0.1], help="shares of the training images to remove"
    )
    options = parser.parse_args()

    whole, test = load(options.data)
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
    held = len(whole) // 12
    unseen, train = (TensorDataset(*(tensor[ids] for tensor in whole.tensors)) for ids in (order[:held], order[held:]))
    common = {"epochs": options.epochs, "net": options.net, "decay": True}
    (trainer, model), fit_seconds = timed(partial(fit, train, [GIFCallback()], **common))
    everything = torch.ones(len(test), dtype=torch.bool)

    print(
        "| removed | | forget (%) | retain (%) | test (%) | gaps to retraining (points) | membership AUROC |"
        " JSD, forget | agreement (%) | seconds |"
    )
    print("| --- |" + " --- |" * 9)
    for share in options.shares:
        gone = torch.zeros(len(train), dtype=torch.bool)
        chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(1))[: round(share * len(train))]
        gone[chosen] = True
        rest = Subset(train, (~gone).nonzero().squeeze(1).tolist())
        sets = {
            "forget": part(train, gone, 2000),
            "retain": part(train, ~gone, 5000),
            "unseen": part(unseen, torch.ones(held, dtype=torch.bool), 5000),
            "test": part(test, everything),
        }
        others = retrained(
            lambda seed, rest=rest: fit(rest, [], seed=seed, **common)[1],
            sets,
            seeds=range(1, options.seeds + 1),
            cache=options.cache,
            name=f"{options.data.parent.name}_{options.net}_{options.epochs}_random{share:g}",
        )

        def show(name: str, known: Known, beside: Any = others, share: float = share, sets: Sets = sets) -> None:
            accuracies = [accuracy(known, sets, key) for key in ("forget", "retain", "test")]
            gaps = " / ".join(f"{gap(known, beside, sets, key):+.2f}" for key in ("forget", "retain", "test"))
            attack = f"{membership(known, sets, 'forget', 'test'):.3f}"
            far, same = f"{divergence(known, beside, 'forget'):.4f}", agreement(known, beside, "test")
            row = [f"{100 * share:g} %", name, *accuracies, gaps, attack, far, same, f"{known.seconds:.1f}"]
            print(table(["" for _ in row], [row]).splitlines()[-1], flush=True)

        show("before", know(model, sets, fit_seconds))
        if len(others) > 1:
            show("retrained, one seed", others[0], others[1:])
        forget = DataLoader(Subset(train, chosen.tolist()), 128)
        seconds = 0.0
        for step in options.steps:
            edit, spent = timed(partial(trainer.unlearn, forget, step=step, unseen=DataLoader(unseen, 256)))
            seconds = seconds or spent
            say(edit)
            show(f"edit, {step}", know(model, sets, spent))
            edit.undo()
        before = accuracy(know(model, sets, 0.0), sets, "retain")

        def grade(module: nn.Module, sets: Sets = sets, before: float = before) -> float:
            known = know(module, {key: sets[key] for key in ("forget", "retain", "unseen")}, 0.0)
            attack = abs(2 * membership(known, sets, "forget", "unseen") - 1)
            return -attack - max(before - accuracy(known, sets, "retain"), 0.0) / 100

        retain, settings = DataLoader(rest, 128), dict[str, dict[str, Any]]()
        for name, changed, spent in run_baselines(
            options.baselines, model, forget, retain, grade, seconds=seconds, settings=settings
        ):
            show(name, know(changed, sets, spent))


if __name__ == "__main__":
    main()

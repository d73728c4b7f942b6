"""Repairs a backdoor by label correction, and compares with baselines and with models trained on correct labels.

    python benchmarks/backdoor.py --data path/to/MNIST/raw --trigger checkerboard [--cache folder] [--baselines all]

A share of the training images gets a trigger and the label 4. There are two triggers:

- `checkerboard`, from the paper: every other pixel is brighter by 16 of 255, on 10 % of the training images.
- `corner`: a patch of 3 × 3 white pixels, on 5 % of the training images.

The edit is `trainer.unlearn(indices, relabel=labels)` with its defaults. Triggers are evaluated on all test images of
other classes. "Attack success" is the share of these that are predicted as 4.

Seconds are processor time. Each run of a baseline may take as many seconds as the edit did. `tuned` is the best of a
baseline's settings by the paper's F1 on training data. Prints a Markdown table.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import torch
from evidence import (
    Known,
    accuracy,
    answers,
    divergence,
    gap,
    know,
    make_parser,
    part,
    retrained,
    run_baselines,
    say,
    table,
    timed,
)
from mnist import fit, load
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_gif import GIFCallback
from lightning_gif.metrics import RelabelF1

LABEL = 4


def checkerboard(images: Tensor) -> Tensor:
    pattern = torch.zeros(28, 28)
    pattern[::2, 1::2] = pattern[1::2, ::2] = 16 / 255
    return (images + pattern).clamp(max=1.0)


def corner(images: Tensor) -> Tensor:
    changed = images.clone()
    changed[..., 24:27, 24:27] = 1.0
    return changed


TRIGGERS = {"checkerboard": (checkerboard, 0.10), "corner": (corner, 0.05)}


def main() -> None:
    parser = make_parser(__doc__, ["relinearise", "search"])
    parser.add_argument("--trigger", default="checkerboard", choices=list(TRIGGERS), help="the trigger to plant")
    parser.add_argument("--draws", type=int, default=1, help="edits, each with other random draws")
    options = parser.parse_args()

    clean, test = load(options.data)
    put, share = TRIGGERS[options.trigger]
    chosen = torch.randperm(len(clean), generator=torch.Generator().manual_seed(0))[: round(share * len(clean))]
    chosen = chosen.sort().values
    images, labels = clean.tensors[0].clone(), clean.tensors[1]
    images[chosen] = put(images[chosen])
    wrong = labels.clone()
    wrong[chosen] = LABEL
    poisoned, corrected = TensorDataset(images, wrong), TensorDataset(images, labels)
    triggered = torch.zeros(len(clean), dtype=torch.bool)
    triggered[chosen] = True
    of_others = test.tensors[1] != LABEL
    sets = {
        "clean": test,
        "triggered": TensorDataset(put(test.tensors[0])[of_others], test.tensors[1][of_others]),
        "train clean": part(corrected, ~triggered, 5000),
        "train triggered": part(corrected, triggered, 2000),
    }
    common = {"epochs": options.epochs, "net": options.net, "decay": True}
    others = retrained(
        lambda seed: fit(corrected, [], seed=seed, **common)[1],
        sets,
        seeds=range(1, options.seeds + 1),
        cache=options.cache,
        name=f"{options.data.parent.name}_{options.net}_{options.epochs}_{options.trigger}",
    )
    (trainer, model), fit_seconds = timed(partial(fit, poisoned, [GIFCallback()], **common))

    columns = ["", "clean, correct (%)", "gap to retraining (points)", "triggered, correct (%)"]
    columns += ["gap to retraining (points)", "attack success (%)", "JSD, triggered", "seconds"]
    print(table(columns, []), flush=True)

    def show(name: str, known: Known, beside: Any = others) -> None:
        fooled = 100 * float((known.logits["triggered"].argmax(1) == LABEL).double().mean())
        row = [name, accuracy(known, sets, "clean"), f"{gap(known, beside, sets, 'clean'):+.2f}"]
        row += [accuracy(known, sets, "triggered"), f"{gap(known, beside, sets, 'triggered'):+.2f}", fooled]
        row += [f"{divergence(known, beside, 'triggered'):.4f}", f"{known.seconds:.1f}"]
        print(table(columns, [row]).splitlines()[-1], flush=True)

    show("before", know(model, sets, fit_seconds))
    if len(others) > 1:
        show("retrained, one seed", others[0], others[1:])
    seconds = 0.0
    for step, seed in product(options.steps, range(options.draws)):
        edit, spent = timed(partial(trainer.unlearn, chosen.tolist(), relabel=labels[chosen], step=step, seed=seed))
        seconds = seconds or spent
        say(edit)
        say(edit.step_sizes, [round(trial.risk, 4) for trial in edit.trials])
        show(f"edit, {step}" + f", draw {seed}" * (options.draws > 1), know(model, sets, spent))
        edit.undo()

    def grade(module: nn.Module) -> float:
        """The paper's F1 on training data."""
        metric = RelabelF1()
        for name, corrected_here in (("train clean", False), ("train triggered", True)):
            data = sets[name]
            metric.update(answers(module, data), data.tensors[1], torch.full((len(data),), corrected_here))
        return float(metric.compute())

    forget = DataLoader(Subset(poisoned, chosen.tolist()), 128)
    retain = DataLoader(Subset(poisoned, (~triggered).nonzero().squeeze(1).tolist()), 128)
    for name, changed, spent in run_baselines(
        options.baselines, model, forget, retain, grade, seconds=seconds, settings={}, relabel=labels[chosen]
    ):
        show(name, know(changed, sets, spent))


if __name__ == "__main__":
    main()

"""Finds the poisoned training examples behind a backdoor in a classifier of handwritten digits, and repairs the model.

    python examples/find_poisoned.py

A twentieth of the training images get a trigger, a patch in a corner, and the label 4. A model that is trained on
them reads every image with the patch as a 4.

We have ten test images, put the patch on them, and ask: which training examples speak against their correct labels? The
script compares this ranking with those by training loss and by self-influence. Then it corrects the poisoned labels
among the first of the ranking, by an edit and by training again. It prints how often an image with the patch is read as
a 4.

Poisoned examples share their patch, so the model learns it as a rule. They have a low loss and a low self-influence,
unlike wrong labels that were made at random.
"""

from __future__ import annotations

from argparse import Namespace

import torch
import torch.nn.functional as F
from digits import digits, logits, make_parser, quiet
from find_mislabeled import SHOWN, accuracy, corrected, most_suspicious, recall, save_suspects, scores_in_order, train
from lightning.pytorch import LightningModule
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.utils.data import TensorDataset

TARGET = 4  # the label that the backdoor asks for
ASKED = 10  # the number of test images with the trigger that are the query


def with_trigger(images: Tensor) -> Tensor:
    """Copies of images ``(n, 1, 8, 8)`` with a patch in a corner."""
    images = images.clone()
    images[:, :, -2:, -2:] = 1
    return images


def poison(data: TensorDataset, share: float, seed: int) -> tuple[TensorDataset, Tensor]:
    """The data with a random share of poisoned examples, and a mask of these."""
    x, y = (tensor.clone() for tensor in data.tensors)
    others = (y != TARGET).nonzero().squeeze(1)
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
    chosen = others[order[: round(share * len(y))]]
    x[chosen], y[chosen] = with_trigger(x[chosen]), TARGET
    poisoned = torch.zeros(len(y), dtype=torch.bool)
    poisoned[chosen] = True
    return TensorDataset(x, y), poisoned


def main(args: Namespace) -> None:
    quiet()
    console = Console()
    args.output.mkdir(parents=True, exist_ok=True)
    clean, test = digits()
    truth = clean.tensors[1]
    data, poisoned = poison(clean, args.share, args.seed)
    console.print(f"{int(poisoned.sum())} of {len(data)} training examples are poisoned.", highlight=False)
    trainer, model = train(data, args)

    x, y = (tensor[test.tensors[1] != TARGET] for tensor in test.tensors)
    triggered = TensorDataset(with_trigger(x), y)

    def attack(net: LightningModule) -> float:
        return float((logits(net, triggered).argmax(1) == TARGET).float().mean())

    # ------------------------------------------------------------------------------------------------------------
    # Rank the training examples. That they are poisoned, and their true labels, are used only to evaluate rankings.
    # ------------------------------------------------------------------------------------------------------------
    report = trainer.influence((triggered.tensors[0][:ASKED], y[:ASKED]))  # with the trigger and the correct labels
    suspicions = {
        "opponents": -scores_in_order(report),
        "training loss": F.cross_entropy(logits(model, data), data.tensors[1], reduction="none"),
        "self-influence": scores_in_order(trainer.self_influence()),
    }
    table = Table(title="Poisoned examples found")
    for title in ("ranking by", "AUC", *(f"in the first {share:.0%}" for share in SHOWN)):
        table.add_column(title, justify="left" if title == "ranking by" else "right")
    for name, suspicion in suspicions.items():
        shares = (f"{recall(suspicion, poisoned, share):.1%}" for share in SHOWN)
        table.add_row(name, f"{roc_auc_score(poisoned, suspicion):.3f}", *shares)
    table.add_row("(chance)", "0.500", *(f"{share:.1%}" for share in SHOWN))
    console.print(table)

    # ------------------------------------------------------------------------------------------------------------
    # Inspect the first of the ranking, and correct the labels of the poisoned examples among them.
    # ------------------------------------------------------------------------------------------------------------
    inspected = most_suspicious(suspicions["opponents"], args.inspect)
    found = inspected[poisoned[inspected]]
    nets = {"before": (attack(model), accuracy(model, test))}
    trainer.unlearn(found, relabel=truth[found])
    nets["after the edit"] = attack(model), accuracy(model, test)
    _, retrained = train(corrected(data, truth, suspicions["opponents"], args.inspect), args)
    nets["trained again"] = attack(retrained), accuracy(retrained, test)

    table = Table(title=f"First {args.inspect:.0%} inspected, {len(found)} labels corrected")
    for title in ("", *nets):
        table.add_column(title, justify="right" if title else "left")
    for number, title in enumerate((f"images with the patch read as a {TARGET}", "test accuracy without the patch")):
        table.add_row(title, *(f"{values[number]:.1%}" for values in nets.values()))
    console.print(table)

    indices, scores = report.opponents(24)
    first = dict(zip(indices[0].tolist(), scores[0].tolist(), strict=True))
    red = "poisoned, with the black square and a wrong label"
    save_suspects(str(args.output / "suspects.png"), "lowest scores", first, data, truth, red)
    console.print(f"The plot is in {args.output}/", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    parser = make_parser(__doc__, "outputs/find_poisoned", epochs=30)
    parser.add_argument("--share", type=float, default=0.05, help="share of the training images to poison")
    parser.add_argument("--inspect", type=float, default=0.2, help="share of the training images to inspect")
    main(parser.parse_args())

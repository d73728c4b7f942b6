"""Finds wrong labels in a training set of handwritten digits by self-influence, corrects them, and trains again.

    python examples/find_mislabeled.py

A tenth of the training labels are replaced by wrong ones, and the model is trained on all of them.
`gif.self_influence()` scores each training example: how much would the loss on this example rise if it were
removed? A high score means that the model had to memorize the example.

The script compares two rankings: by self-influence and by training loss. It prints how well each ranking finds the
wrong labels. It also prints the test accuracy after the first labels of each ranking were inspected and corrected.

On data as easy as this, random wrong labels stand out by their loss alone. The loss is as good there, and costs only
one forward pass: try it first.
"""

from __future__ import annotations

import time
from argparse import Namespace

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from digits import CLASSES, DigitsModel, digits, fit, logits, make_parser, quiet
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_gif import GIFCallback, InfluenceReport

SHOWN = (0.1, 0.2)


def plant(data: TensorDataset, share: float, seed: int) -> tuple[TensorDataset, Tensor]:
    """The data with a random share of wrong labels, and a mask of the examples that have one."""
    x, y = data.tensors
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(y), generator=generator)[: round(share * len(y))]
    planted, wrong = y.clone(), torch.zeros(len(y), dtype=torch.bool)
    planted[chosen] = (y[chosen] + torch.randint(1, CLASSES, (len(chosen),), generator=generator)) % CLASSES
    wrong[chosen] = True
    return TensorDataset(x, planted), wrong


def most_suspicious(suspicion: Tensor, share: float) -> Tensor:
    return suspicion.argsort(descending=True)[: round(share * len(suspicion))]


def recall(suspicion: Tensor, wrong: Tensor, share: float) -> float:
    """The share of the wrong labels that the most suspicious share of the examples contains."""
    return float(wrong[most_suspicious(suspicion, share)].sum() / wrong.sum())


def corrected(noisy: TensorDataset, truth: Tensor, suspicion: Tensor, share: float) -> TensorDataset:
    """The data after the most suspicious share was inspected and the wrong labels among it were corrected."""
    x, y = noisy.tensors
    inspected = most_suspicious(suspicion, share)
    return TensorDataset(x, y.index_copy(0, inspected, truth[inspected]))


def train(data: TensorDataset, args: Namespace) -> tuple[GIFCallback, pl.LightningModule]:
    """Trains with the same initial weights and training order for all data, so that only the labels differ."""
    pl.seed_everything(args.seed, verbose=False)
    gif = GIFCallback()
    _, model = fit(DigitsModel(), data, epochs=args.epochs, seed=args.seed, callbacks=[gif], enable_progress_bar=False)
    return gif, model


def accuracy(model: pl.LightningModule, test: TensorDataset) -> float:
    return float((logits(model, test).argmax(1) == test.tensors[1]).float().mean())


def scores_in_order(report: InfluenceReport) -> Tensor:
    """The scores of a report with one query, in the order of the dataset."""
    scores = torch.empty_like(report.scores[0])
    scores[report.indices] = report.scores[0]
    return scores


def save_suspects(
    path: str,
    ranked: str,
    scores: dict[int, float],
    data: TensorDataset,
    truth: Tensor,
    red: str = "the label is wrong",
) -> None:
    """Draws suspicious examples, each with its dataset index, its score, and its given and its true label.

    Args:
        path: The file.
        ranked: What the scores are, for the title.
        scores: The scores by dataset index, in the order of the ranking; the first 24 are drawn.
        data: The training data, with the given labels.
        truth: The true labels, ``(n,)``.
        red: What examples in red are, for the title.
    """
    rows, cols = 3, 8
    figure = Figure(figsize=(1.3 * cols, 1.9 * rows + 0.4), layout="constrained")
    figure.suptitle(f"The training examples with the {ranked} (red: {red})")
    for axis, (index, score) in zip(figure.subplots(rows, cols).flat, scores.items(), strict=False):
        given, true = int(data.tensors[1][index]), int(truth[index])
        axis.imshow(data.tensors[0][index, 0], cmap="gray_r")
        axis.set_xticks([])
        axis.set_yticks([])
        colour = "black" if given == true else "tab:red"
        wrong = "" if given == true else f", in truth {true}"
        axis.set_title(f"#{index}, score {score:.2g}\nlabel {given}{wrong}", fontsize=8, color=colour)
        axis.spines[:].set_color(colour)
    figure.savefig(path, dpi=150)


def main(args: Namespace) -> None:
    quiet()
    console = Console()
    args.output.mkdir(parents=True, exist_ok=True)
    clean, test = digits()
    truth = clean.tensors[1]
    noisy, wrong = plant(clean, args.noise, args.seed)
    console.print(f"{int(wrong.sum())} of {len(noisy)} training examples have a wrong label.", highlight=False)
    gif, model = train(noisy, args)

    # ------------------------------------------------------------------------------------------------------------
    # Rank the training examples by suspicion. The true labels are used only to evaluate the rankings.
    # ------------------------------------------------------------------------------------------------------------
    start = time.perf_counter()
    report = gif.self_influence(snapshots=True)  # averaged over training
    suspicions = {"self-influence": scores_in_order(report)}
    seconds = {"self-influence": time.perf_counter() - start}
    console.print(f"\n{report}", markup=False, highlight=False, soft_wrap=True)

    start = time.perf_counter()
    suspicions["training loss"] = F.cross_entropy(logits(model, noisy), noisy.tensors[1], reduction="none")
    seconds["training loss"] = time.perf_counter() - start

    table = Table(title="Wrong labels found")
    for title in ("ranking by", "AUC", *(f"in the first {share:.0%}" for share in SHOWN), "seconds"):
        table.add_column(title, justify="left" if title == "ranking by" else "right")
    for name, suspicion in suspicions.items():
        shares = (f"{recall(suspicion, wrong, share):.1%}" for share in SHOWN)
        table.add_row(name, f"{roc_auc_score(wrong, suspicion):.3f}", *shares, f"{seconds[name]:.2f}")
    table.add_row("(chance)", "0.500", *(f"{share:.1%}" for share in SHOWN), "")
    console.print(table)

    # ------------------------------------------------------------------------------------------------------------
    # Inspect the first labels of each ranking, correct the wrong ones, and train again.
    # ------------------------------------------------------------------------------------------------------------
    _, ideal = train(clean, args)
    table = Table(
        title=f"Test accuracy, first {args.inspect:.0%} inspected",
        caption=f"One test digit counts {1 / len(test):.1%}.",
    )
    for title in ("ranking by", "before", "after correction", "all labels correct"):
        table.add_column(title, justify="left" if title == "ranking by" else "right")
    for name, suspicion in suspicions.items():
        _, retrained = train(corrected(noisy, truth, suspicion, args.inspect), args)
        table.add_row(name, *(f"{accuracy(net, test):.1%}" for net in (model, retrained, ideal)))
    console.print(table)

    indices, scores = report.proponents(24)
    first = dict(zip(indices[0].tolist(), scores[0].tolist(), strict=True))
    save_suspects(str(args.output / "suspects.png"), "highest self-influence", first, noisy, truth)
    report.plot().savefig(args.output / "self_influence.png", dpi=150)
    console.print(f"The plots are in {args.output}/", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    parser = make_parser(__doc__, "outputs/find_mislabeled", epochs=30)
    parser.add_argument(
        "--noise", type=float, default=0.1, help="share of the training labels to replace by wrong ones"
    )
    parser.add_argument("--inspect", type=float, default=0.2, help="share of the training labels to inspect")
    main(parser.parse_args())

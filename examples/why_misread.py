"""Finds the training examples that made a model misread a handwritten digit, and those that support the true label.

    python examples/why_misread.py

The query is the misread held-out digit with the highest probability for a wrong class. The script prints its
prediction, the training examples with the largest scores, and the sums of the scores by class. It saves a plot of them,
and a page to show to others.
"""

from __future__ import annotations

from argparse import Namespace

import lightning.pytorch as pl
from digits import DigitsModel, digits, fit, logits, make_parser, quiet
from rich.console import Console
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_gif import GIFCallback
from lightning_gif.attribution.ranking import Ranking

SHOWN = 5


def most_confident_error(outputs: Tensor, labels: Tensor) -> int:
    """The index of the misread example with the highest probability for a wrong class."""
    confidence, predicted = outputs.softmax(dim=1).max(dim=1)
    misread = predicted != labels
    if not misread.any():
        raise SystemExit("The model misreads no held-out digit. Train for fewer --epochs, or with another --seed.")
    return int(confidence.where(misread, -1.0).argmax())


def listed(ranking: Ranking, train: TensorDataset) -> str:
    pairs = zip(ranking.indices[0].tolist(), ranking.scores[0].tolist(), strict=True)
    return ", ".join(f"#{index} label {int(train.tensors[1][index])} ({score:+.2g})" for index, score in pairs)


def main(args: Namespace) -> None:
    quiet()
    console = Console()
    args.output.mkdir(parents=True, exist_ok=True)
    train, test = digits()
    pl.seed_everything(args.seed, verbose=False)
    gif = GIFCallback()
    _, model = fit(
        DigitsModel(),
        train,
        epochs=args.epochs,
        seed=args.seed,
        callbacks=[gif],
        enable_progress_bar=False,
    )

    x, y = test.tensors
    outputs = logits(model, test)
    query = most_confident_error(outputs, y)
    label, predicted = int(y[query]), int(outputs[query].argmax())
    probability = outputs.softmax(dim=1)[query, predicted]

    # The query is one image with its true label. A score is the change of its loss if a training example were removed.
    report = gif.influence((x[query : query + 1], y[query : query + 1]))
    groups = report.by_group()  # sums by label, strongest proponents first

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    say(f"{int((outputs.argmax(1) != y).sum())} of {len(y)} held-out digits are misread.")
    say(f"The most confident error, #{query}: label {label}, prediction {predicted} ({probability:.1%})")
    say(f"  proponents of its label (without them the loss would be higher): {listed(report.proponents(SHOWN), train)}")
    say(f"  opponents of its label (without them the loss would be lower): {listed(report.opponents(SHOWN), train)}")
    say("  by class: " + ", ".join(f"{n} ({t:+.2g})" for n, t in zip(groups.names, groups.totals, strict=True)))
    say(f"Strongest opponents: the {groups.names[-1]}s. Strongest proponents: the {groups.names[0]}s.")

    report.plot().savefig(args.output / "influence.png", dpi=150)
    report.to_html(args.output / "influence.html")
    say(f"The plot, and a page with it, are in {args.output}/")


if __name__ == "__main__":
    main(make_parser(__doc__, "outputs/why_misread", epochs=15).parse_args())

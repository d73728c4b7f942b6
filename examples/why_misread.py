"""Asks why a model misreads a handwritten digit: which training examples speak for its answer, and which against.

    python examples/why_misread.py

Of the held-out digits that the trained model misreads, the one that it is surest about is the query. Printed are what
it was read as, the training examples whose removal would change its loss most, and the classes of training examples
that pushed it there; a picture shows them.
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


def surest_mistake(answers: Tensor, labels: Tensor) -> int:
    """Which of the misread examples has the highest probability on a wrong class."""
    sureness, read_as = answers.softmax(dim=1).max(dim=1)
    misread = read_as != labels
    if not misread.any():
        raise SystemExit("The model misreads no held-out digit. Train for fewer --epochs, or with another --seed.")
    return int(sureness.where(misread, -1.0).argmax())


def listed(ranking: Ranking, train: TensorDataset) -> str:
    pairs = zip(ranking.indices[0].tolist(), ranking.scores[0].tolist(), strict=True)
    return ", ".join(f"#{index} labelled {int(train.tensors[1][index])} ({score:+.2g})" for index, score in pairs)


def main(args: Namespace) -> None:
    quiet()
    console = Console()
    args.output.mkdir(parents=True, exist_ok=True)
    train, test = digits()
    pl.seed_everything(args.seed, verbose=False)
    trainer, model = fit(
        DigitsModel(),
        train,
        epochs=args.epochs,
        seed=args.seed,
        callbacks=[GIFCallback()],
        enable_progress_bar=False,
    )

    x, y = test.tensors
    answers = logits(model, test)
    asked = surest_mistake(answers, y)
    label, read_as = int(y[asked]), int(answers[asked].argmax())
    sureness = answers.softmax(dim=1)[asked]

    # One image with its true label: its loss is what removing a training example would change.
    report = trainer.influence((x[asked : asked + 1], y[asked : asked + 1]))
    groups = report.by_group()  # sums by label, ranked from those that help to those that hurt

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    say(f"{int((answers.argmax(1) != y).sum())} of {len(y)} held-out digits are misread.")
    say(f"The surest mistake, #{asked}: labelled {label}, read as {read_as} ({sureness[read_as]:.1%} sure)")
    say(f"  speak for its label (without them the loss would be higher): {listed(report.proponents(SHOWN), train)}")
    say(f"  speak against it (without them the loss would be lower): {listed(report.opponents(SHOWN), train)}")
    say("  by class: " + ", ".join(f"{n} ({t:+.2g})" for n, t in zip(groups.names, groups.totals, strict=True)))
    say(f"Pushed there most by: the {groups.names[-1]}s. Held back most by: the {groups.names[0]}s.")

    report.plot().savefig(args.output / "influence.png", dpi=150)
    say(f"The picture is in {args.output}/")


if __name__ == "__main__":
    main(make_parser(__doc__, "outputs/why_misread", epochs=15).parse_args())

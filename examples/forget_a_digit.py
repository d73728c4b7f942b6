"""Trains a classifier of handwritten digits, forgets one digit, and compares with a model trained without it.

    python examples/forget_a_digit.py

The edit uses training examples only. The script draws as which digits the forgotten examples are predicted before and
after the edit, and where the network looks in them. It saves the edit, undoes it, and explains the test digit with the
largest loss.
"""

from __future__ import annotations

import time
from argparse import Namespace

import lightning.pytorch as pl
import torch
from digits import CLASSES, DigitsModel, digits, fit, logits, make_logger, make_parser, quiet
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_gif import GIFCallback, UnlearnReport
from lightning_gif.metrics import JensenShannonDivergence, PredictionAgreement


def accuracy(predicted: Tensor, data: TensorDataset, classes: list[int]) -> float:
    y = data.tensors[1]
    of_classes = torch.isin(y, torch.tensor(classes))
    return float((predicted == y)[of_classes].float().mean())


def save_bars(path: str, predictions: dict[str, Tensor], test: TensorDataset, digit: int) -> None:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(predictions)
    for position, (name, predicted) in enumerate(predictions.items()):
        heights = [accuracy(predicted, test, [c]) for c in range(CLASSES)]
        bars = axes.bar([c + (position - 1) * width for c in range(CLASSES)], heights, width * 0.92, label=name)
        axes.bar_label(bars, ["" if height else "0" for height in heights], fontsize=8, padding=1)
    axes.axvspan(digit - 0.5, digit + 0.5, color="grey", alpha=0.15, zorder=0)
    axes.set_xticks(range(CLASSES))
    axes.set_xlabel("digit (shaded: forgotten)")
    axes.set_ylabel("test accuracy")
    axes.set_ylim(0, 1.02)
    axes.set_title(f"Forgetting the digit {digit}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)


def main(args: Namespace) -> None:
    quiet()
    console = Console()
    args.output.mkdir(parents=True, exist_ok=True)
    train, test = digits()
    seconds = {}

    logger = make_logger(args.logger, args.output, "forget-a-digit")
    pl.seed_everything(args.seed, verbose=False)
    start = time.perf_counter()
    gif = GIFCallback(ratio=args.ratio)
    _, model = fit(
        DigitsModel(),
        train,
        epochs=args.epochs,
        seed=args.seed,
        callbacks=[gif],
        logger=logger,
    )
    seconds["fit"] = time.perf_counter() - start
    outputs = {"before": logits(model, test)}
    weights = {name: value.clone() for name, value in model.state_dict().items()}

    # ------------------------------------------------------------------------------------------------------------
    # Forget one digit. `unlearn` gets only the training examples to forget, and no test data.
    # ------------------------------------------------------------------------------------------------------------
    is_digit = train.tensors[1] == args.digit
    start = time.perf_counter()
    edit = gif.unlearn(lambda batch: batch[1] == args.digit)
    seconds["unlearn"] = time.perf_counter() - start
    outputs["after"] = logits(model, test)
    console.print(f"\n{edit}", markup=False, highlight=False, soft_wrap=True)

    # ------------------------------------------------------------------------------------------------------------
    # The reference: a model trained without the digit.
    # ------------------------------------------------------------------------------------------------------------
    pl.seed_everything(args.seed, verbose=False)
    rest = TensorDataset(*(tensor[~is_digit] for tensor in train.tensors))
    start = time.perf_counter()
    _, reference = fit(DigitsModel(), rest, epochs=args.epochs, seed=args.seed)
    seconds["retrain"] = time.perf_counter() - start
    outputs["retrained"] = logits(reference, test)
    predictions = {name: output.argmax(1) for name, output in outputs.items()}

    others = [c for c in range(CLASSES) if c != args.digit]
    table = Table(title=f"Test accuracy before and after forgetting the digit {args.digit}")
    table.add_column("")
    for name in predictions:
        table.add_column(name, justify="right")
    for title, classes in (("the other digits", others), (f"digit {args.digit}", [args.digit])):
        table.add_row(title, *(f"{accuracy(p, test, classes):.1%}" for p in predictions.values()))
    agree, diverge = PredictionAgreement(), JensenShannonDivergence()
    table.add_row("agreement with retrained", *(f"{agree(o, outputs['retrained']):.1%}" for o in outputs.values()))
    table.add_row("divergence from retrained", *(f"{diverge(o, outputs['retrained']):.3f}" for o in outputs.values()))
    console.print(table)

    table = Table(title="Seconds")
    for phase in seconds:
        table.add_column(phase, justify="right")
    table.add_row(*(f"{value:.1f}" for value in seconds.values()))
    console.print(table)

    # ------------------------------------------------------------------------------------------------------------
    # Save the edit, undo it, and apply it again from the file.
    # ------------------------------------------------------------------------------------------------------------
    edit.save(args.output / "edit.safetensors")
    edit.undo()
    identical = all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    console.print(f"Undone: the weights are {'' if identical else 'NOT '}bit-identical to those before.")
    UnlearnReport.load(args.output / "edit.safetensors", model).apply()
    again = bool((logits(model, test).argmax(1) == predictions["after"]).all())
    edit.undo()
    console.print(f"The edit from the file {'gives' if again else 'does NOT give'} the same predictions again.\n")

    # ------------------------------------------------------------------------------------------------------------
    # Explain the test digit with the largest loss.
    # ------------------------------------------------------------------------------------------------------------
    x, y = test.tensors
    losses = torch.nn.functional.cross_entropy(logits(model, test), y, reduction="none")
    query = int(losses.argmax())
    predicted = int(predictions["before"][query])
    console.print(f"Test digit #{query} has the label {int(y[query])} and the prediction {predicted}. Why?")
    report = gif.influence((x[query : query + 1], y[query : query + 1]), k=8)
    console.print(str(report), markup=False, highlight=False, soft_wrap=True)

    save_bars(str(args.output / "accuracy.png"), predictions, test, args.digit)
    pictures = {
        "unlearning": edit.plot(),
        "predictions": edit.plot("predictions", reference=reference),  # figure 4 of the GIF paper
        "attention": edit.plot("attention"),  # figure 5
        "influence": report.plot(),
    }
    for name, picture in pictures.items():
        picture.savefig(args.output / f"{name}.png", dpi=150)
    edit.to_html(args.output / "edit.html")
    console.print(f"\nThe plots and the edit are in {args.output}/", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    parser = make_parser(__doc__, "outputs/forget_a_digit", epochs=15)
    parser.add_argument("--digit", type=int, default=3, choices=range(CLASSES), help="the class to forget")
    parser.add_argument("--ratio", type=float, default=0.1, help="share of each layer's parameters that may change")
    parser.add_argument(
        "--logger", choices=("wandb", "csv", "none"), default="wandb", help="wandb works offline, without an account"
    )
    main(parser.parse_args())

"""Draws the picture of the README: what one call finds, and what another one changes.

    python docs/picture.py

It trains the network of the examples on scikit-learn's digits, and writes ``docs/images/lightning-gif.png``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import lightning.pytorch as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import TensorDataset

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))

from digits import CLASSES, DigitsModel, digits, fit, logits, quiet  # noqa: E402
from why_misread import most_confident_error  # noqa: E402

from lightning_gif import GIFCallback  # noqa: E402

SHOWN, DIGIT = 6, 3
RAISE, LOWER, GREY = "#1a7f37", "#cf222e", "#57606a"


def show(axis: Axes, image: Tensor, title: str, colour: str) -> None:
    axis.imshow(image, cmap="gray_r")
    axis.set_title(title, fontsize=9, color=colour, pad=4)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_color(colour)
    axis.spines[:].set_linewidth(1.5)


def head(figure: Figure, left: float, call: str, meaning: str) -> None:
    figure.text(left, 0.91, call, family="monospace", size=10.5, weight="bold")
    figure.text(left, 0.835, meaning, size=10)


def draw_answer(
    figure: Figure, trainer: pl.Trainer, train: TensorDataset, query: tuple[Tensor, Tensor], read: int
) -> None:
    report = trainer.influence(query)
    grid = figure.add_gridspec(2, SHOWN + 2, left=0.02, right=0.56, top=0.72, bottom=0.06, hspace=0.42, wspace=0.16)
    show(figure.add_subplot(grid[:, :2]), query[0][0, 0], f"a {int(query[1])}, read as a {read}", GREY)
    for row, (ranking, colour) in enumerate(((report.opponents(SHOWN), LOWER), (report.proponents(SHOWN), RAISE))):
        for column in range(SHOWN):
            index, score = int(ranking.indices[0, column]), float(ranking.scores[0, column])
            title = f"{int(train.tensors[1][index])}  ({score:+.1f})"
            show(figure.add_subplot(grid[row, 2 + column]), train.tensors[0][index, 0], title, colour)
    head(figure, 0.02, "trainer.influence(batch)", "Which training examples made the model misread this digit?")
    figure.text(0.575, 0.56, "without these,\nthe loss would\nbe lower", size=8.5, color=LOWER, va="center")
    figure.text(0.575, 0.2, "without these,\nthe loss would\nbe higher", size=8.5, color=RAISE, va="center")


def draw_edit(figure: Figure, trainer: pl.Trainer, model: pl.LightningModule, test: TensorDataset) -> None:
    y = test.tensors[1]

    def accuracies() -> list[float]:
        right = logits(model, test).argmax(1) == y
        return [float(right[y == digit].float().mean()) for digit in range(CLASSES)]

    before = accuracies()
    edit = trainer.unlearn(lambda batch: batch[1] == DIGIT)
    after = accuracies()
    edit.undo()
    axes = figure.add_axes((0.71, 0.14, 0.28, 0.58))
    axes.bar([digit - 0.2 for digit in range(CLASSES)], before, 0.38, color="#afb8c1", label="before")
    axes.bar([digit + 0.2 for digit in range(CLASSES)], after, 0.38, color="#0969da", label="after")
    axes.set_xticks(range(CLASSES))
    axes.set_yticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
    axes.tick_params(labelsize=8, length=0)
    axes.set_xlabel("test accuracy by digit", fontsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(ncols=2, fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1.0, 0.98), borderpad=0)
    axes.annotate("0", (DIGIT + 0.2, 0), (0, 2), textcoords="offset points", ha="center", fontsize=8)
    head(
        figure,
        0.68,
        f"trainer.unlearn(lambda batch: batch[1] == {DIGIT})",
        f"Forget the {DIGIT}. edit.undo() brings it back.",
    )


def main() -> None:
    quiet()
    train, test = digits()
    pl.seed_everything(0, verbose=False)
    trainer, model = fit(DigitsModel(), train, epochs=15, seed=0, callbacks=[GIFCallback()], enable_progress_bar=False)
    outputs = logits(model, test)
    index = most_confident_error(outputs, test.tensors[1])
    figure = Figure(figsize=(12.5, 3.6), facecolor="white")
    query = (test.tensors[0][index : index + 1], test.tensors[1][index : index + 1])
    draw_answer(figure, trainer, train, query, int(outputs[index].argmax()))
    draw_edit(figure, trainer, model, test)
    figure.savefig(HERE / "images" / "lightning-gif.png", dpi=110)


if __name__ == "__main__":
    main()

"""Removes toxic samples from a linear regression by changing two of its five weights, with three methods.

This is the toy problem of figure 2 of the GIF paper (arXiv 2312.05586). There are 4000 samples, and the target of each
is the sum of five independent inputs. The regression sees mixtures of these inputs. The targets of 500 samples are
toxic: minus five times the sum.

The toxic samples are removed in steps. Each step is linearised at the weights after the previous step. Three of the
five weights are fixed. Three methods, each with its natural step, bring the other two to three different points:

- "fif" cancels the gradient on the two weights. The loss is quadratic, so it ends at the least loss they can reach.
- "gif" cancels the gradient on all five weights as well as two weights can. It ends close to the least norm of that
  gradient, but not exactly there, since each step uses the curvature of the samples that remain after it. At this point
  the loss is slightly higher than that of "fif", and the gradient is smaller.
- "pif" changes the two weights as retraining all five would. Without the other three changes, the model becomes worse.
"""

from __future__ import annotations

import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from digits import quiet
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_gif import GIFCallback

SAMPLES, TOXIC, MOVED = 4000, 500, 2  # the toxic samples come first
METHODS = {"gif": "tab:blue", "fif": "tab:orange", "pif": "tab:red"}
TRAINED, RETRAINED = "trained with toxic samples", "retrained (all five weights)"
LEAST_GRADIENT, LEAST_LOSS = "least gradient (two weights)", "least loss (two weights)"
MARKERS = {TRAINED: "v", LEAST_GRADIENT: "D", LEAST_LOSS: "*", RETRAINED: "s"}


class Regression(pl.LightningModule):
    """Linear regression on five inputs, without a bias.

    The two weights that may change are a separate parameter, so that a selector can name them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved = nn.Parameter(torch.zeros(MOVED))
        self.fixed = nn.Parameter(torch.zeros(5 - MOVED))

    @property
    def weights(self) -> Tensor:
        return torch.cat([self.moved, self.fixed])

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weights

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.mse_loss(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Influence functions assume a minimum. One optimizer step over all samples at once reaches it.
        return torch.optim.LBFGS(
            self.parameters(), max_iter=500, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
        )


def make_data(seed: int) -> TensorDataset:
    u = np.random.RandomState(seed).uniform(size=(SAMPLES, 5))
    y = u.sum(axis=1)
    y[:TOXIC] *= -5
    mixing = np.eye(5)
    mixing[0, 2:] = 6, 4, 3
    mixing[1, 2:] = -2, -4, -2
    return TensorDataset(torch.tensor(u @ mixing), torch.tensor(y))


def loader(data: TensorDataset, samples: Iterable[int]) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(Subset(data, list(samples)), batch_size=SAMPLES)


def fit(data: TensorDataset, samples: Iterable[int], **trainer_options: Any) -> Regression:
    model = Regression()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        precision="64-true",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        **trainer_options,
    )
    trainer.fit(model, loader(data, samples))
    return model


def remove_in_steps(gif: GIFCallback, model: Regression, data: TensorDataset, method: str, per_step: int) -> Tensor:
    """The weights ``(steps + 1, 5)`` before the first step and after each step. All edits are undone at the end."""
    path, edits = [model.weights.detach().clone()], []
    for toxic in torch.arange(TOXIC).split(per_step):
        # Samples that were removed in earlier steps are not retained either.
        remaining = range(int(toxic[-1]) + 1, SAMPLES)
        edits.append(
            gif.unlearn(loader(data, toxic.tolist()), retain=loader(data, remaining), method=method, step="natural")
        )
        path.append(model.weights.detach().clone())
    for edit in reversed(edits):
        edit.undo()
    return torch.stack(path)


# --------------------------------------------------------------------------------------------------------------------
# The loss on the clean samples is quadratic, (1/n)‖Xθ − y‖², so the best points have closed forms
# --------------------------------------------------------------------------------------------------------------------


def loss(weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return (x @ weights - y).square().mean()


def gradient(weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return 2 * x.T @ (x @ weights - y) / len(y)


def reachable(weights: Tensor, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The two best points that the two weights can reach. Both solve a least-squares problem in these two weights."""
    fixed = weights.clone()
    fixed[:MOVED] = 0
    hessian = 2 * x.T @ x / len(y)
    best = {
        LEAST_GRADIENT: torch.linalg.lstsq(hessian[:, :MOVED], -gradient(fixed, x, y)).solution,
        LEAST_LOSS: torch.linalg.lstsq(x[:, :MOVED], y - x @ fixed).solution,
    }
    return {name: torch.cat([moved, fixed[MOVED:]]) for name, moved in best.items()}


def surfaces(grid: Tensor, weights: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and the norm of its gradient on all five weights, at a grid ``(…, 2)`` of the two weights."""
    change = grid - weights[:MOVED]
    here, hessian = gradient(weights, x, y), 2 * x.T @ x / len(y)
    there = here + change @ hessian[:MOVED]
    return loss(weights, x, y) + (change * (here + there)[..., :MOVED]).sum(-1) / 2, there.norm(dim=-1)


# --------------------------------------------------------------------------------------------------------------------
# What is shown
# --------------------------------------------------------------------------------------------------------------------


def window(*paths: Tensor) -> tuple[Tensor, Tensor]:
    """The lower left and upper right corner of a window around paths ``(…, 5)``, with a margin."""
    shown = torch.cat(paths)[:, :MOVED]
    low, high = shown.amin(0), shown.amax(0)
    return low - 0.15 * (high - low), high + 0.15 * (high - low)


def draw(axes: Axes, low: Tensor, high: Tensor, paths: dict[str, Tensor], points: dict[str, Tensor]) -> None:
    """Draws each path with a dot at every fifth of its steps, and each point as an empty marker."""
    for name, point in points.items():
        style: dict[str, Any] = {"color": "black", "markersize": 13, "fillstyle": "none", "zorder": 3}
        axes.plot(*point[:MOVED], MARKERS[name], label=name, **style)
    for name, path in paths.items():
        every = max(1, (len(path) - 1) // 5)
        axes.plot(*path[:, :MOVED].T, "o-", color=METHODS[name], markersize=4.5, markevery=every, label=name)
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xlabel=r"$\theta_1$", ylabel=r"$\theta_2$")


def save_trajectories(path: Path, paths: dict[str, Tensor], points: dict[str, Tensor], *data: Tensor) -> None:
    figure = Figure(figsize=(14, 4.4), layout="constrained")
    everything = window(*paths.values(), *(point[None] for point in points.values()))
    closer = window(paths["gif"], paths["fif"], points[LEAST_GRADIENT][None], points[LEAST_LOSS][None])
    panels = (
        ("Loss on the clean samples", everything, 0),
        ("Loss, closer", closer, 0),
        ("Norm of the whole gradient, closer", closer, 1),
    )
    for axes, (title, (low, high), shown) in zip(figure.subplots(1, 3), panels, strict=True):
        first, second = (torch.linspace(low[i], high[i], 200, dtype=torch.float64) for i in range(MOVED))
        grid = torch.stack(torch.meshgrid(first, second, indexing="xy"), dim=-1)
        surface = surfaces(grid, points[TRAINED], *data)[shown]
        levels = np.geomspace(float(surface.min()), float(surface.max()), 16)
        shades = axes.contourf(first, second, surface, levels, norm=LogNorm(), cmap="Greys", alpha=0.6)
        axes.contour(first, second, surface, levels, colors="black", linewidths=0.4, alpha=0.5)
        figure.colorbar(shades, ax=axes, ticks=levels[::3], format="%.2g", pad=0.02)
        draw(axes, low, high, paths, points)
        axes.set_title(title)
    figure.axes[0].indicate_inset((*closer[0].tolist(), *(closer[1] - closer[0]).tolist()), edgecolor="black")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False)
    figure.savefig(path, dpi=150)


def main(args: Namespace) -> None:
    quiet()
    console = Console()
    args.output.mkdir(parents=True, exist_ok=True)
    data = make_data(args.seed)

    # Solves are exact: all samples for the curvature, and a dense solver for five weights. An iterative solver at its
    # usual tolerance would stop far from the end of pif, which needs directions of very small curvature.
    gif = GIFCallback(selector=["moved"], solver="dense", curvature_examples=None, batch_size=SAMPLES)
    model = fit(data, range(SAMPLES), callbacks=[gif])
    trained = model.weights.detach().clone()
    paths, seconds = {}, {}
    for method in METHODS:
        start = time.perf_counter()
        paths[method] = remove_in_steps(gif, model, data, method, args.per_step)
        seconds[method] = time.perf_counter() - start
    identical = torch.equal(model.weights, trained)

    # ------------------------------------------------------------------------------------------------------------
    # The best weights on the clean samples alone: of all five weights, and of the two that may change.
    # ------------------------------------------------------------------------------------------------------------
    retrained = fit(data, range(TOXIC, SAMPLES))
    x, y = (tensor[TOXIC:] for tensor in data.tensors)
    best = {**reachable(trained, x, y), RETRAINED: retrained.weights.detach()}
    ends = {method: path[-1] for method, path in paths.items()}

    steps = len(paths["gif"]) - 1
    table = Table(title=f"Loss and gradient on the clean samples, after {steps} steps")
    for title in ("", "θ₁", "θ₂", "loss", "gradient norm"):
        table.add_column(title, justify="right" if title else "left")
    for name, weights in {TRAINED: trained, **ends, **best}.items():
        values = (*weights[:MOVED], loss(weights, x, y), gradient(weights, x, y).norm())
        table.add_row(name, *(f"{value:.4f}" for value in values), end_section=name in (TRAINED, "pif"))
    console.print(table)
    for method, end in ends.items():
        away = {name: float((end - point)[:MOVED].norm()) for name, point in best.items()}
        nearest = min(away, key=lambda name: away[name])
        console.print(
            f"{method}: (θ₁, θ₂) ends at a distance of {away[nearest]:.1g} from '{nearest}'. {seconds[method]:.1f} s.",
            highlight=False,
        )
    console.print(f"All edits undone: the weights are {'' if identical else 'NOT '}bit-identical to the trained ones.")

    save_trajectories(args.output / "trajectories.png", paths, {TRAINED: trained, **best}, x, y)
    console.print(f"The plot is in {args.output}/", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    summary = (__doc__ or "").partition("\n")[0]
    parser = ArgumentParser(description=summary, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--per-step", type=int, default=10, help="toxic samples that each step removes")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data")
    parser.add_argument("--output", type=Path, default=Path("outputs/toxic_samples"), help="folder for the plot")
    main(parser.parse_args())

"""Logs influence reports and an edit to Weights & Biases, on handwritten digits. Needs no account.

    python examples/wandb_report.py

Every second epoch, a report shows which training examples changed the loss on the held-out images of one digit. After
training, one more report is about the held-out image with the largest loss. Its ten strongest opponents are removed
from the model: first in a dry run, then in an edit, which is undone again. All of it goes to an offline run. The script
prints the folder of the run, the command that uploads it to an account, and the keys to look at.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import lightning.pytorch as pl
import torch.nn.functional as F
import wandb
from digits import CLASSES, DigitsModel, digits, fit, logits, make_parser, quiet
from lightning.pytorch.loggers import WandbLogger

from lightning_gif import GIFCallback


def main(args: Namespace) -> None:
    quiet()
    args.output.mkdir(parents=True, exist_ok=True)
    train, test = digits()
    x, y = test.tensors
    of_digit = y == args.digit

    settings = wandb.Settings(silent=True)  # the command to sync is printed below
    logger = WandbLogger(project="digits", save_dir=args.output, offline=True, settings=settings)
    run = Path(logger.experiment.dir).parent
    pl.seed_everything(args.seed, verbose=False)
    options = {"name": f"test images of {args.digit}"}
    gif = GIFCallback(report_every_n_epochs=2, query=(x[of_digit], y[of_digit]), report_options=options)
    _, model = fit(
        DigitsModel(),
        train,
        epochs=args.epochs,
        seed=args.seed,
        callbacks=[gif],
        logger=logger,
        enable_progress_bar=False,
    )
    worst = F.cross_entropy(logits(model, test), y, reduction="none").argmax()
    report = gif.influence((x[worst, None], y[worst, None]), name="worst image")  # logged automatically
    opponents = report.opponents(10).indices[0].tolist()
    gif.unlearn(opponents, name="opponents", dry_run=True)
    edit = gif.unlearn(opponents, name="opponents")
    edit.undo()
    wandb.finish()  # writes the rest of the run, and ends the process of W&B

    print(f"The offline run is in {run}")
    print(f"Sync it to your account: wandb sync {run}")
    print(
        "Look at gif_influence (history: the strongest examples by epoch; examples_pictures; by_class), gif_unlearn"
        " (retain_loss over the events, the table of events), gif_dry_run, and train/loss beside them."
    )


if __name__ == "__main__":
    parser = make_parser(__doc__, "outputs/wandb_report", epochs=10)
    parser.add_argument("--digit", type=int, default=8, choices=range(CLASSES), help="the class of the query")
    main(parser.parse_args())

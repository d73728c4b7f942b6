"""Reports influence to Weights & Biases while a model of handwritten digits trains, and after. No account is needed.

    python examples/wandb_report.py

Every second epoch asks which training examples moved the loss on the held-out images of one digit; after training, one
more report is about the image that is read worst. All of it is logged to an offline run. Printed are where that run is,
the command that syncs it to an account, and which keys to look at.
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

    settings = wandb.Settings(silent=True)  # what it would say of syncing is said below
    logger = WandbLogger(project="digits", save_dir=args.output, offline=True, settings=settings)
    run = Path(logger.experiment.dir).parent
    pl.seed_everything(args.seed, verbose=False)
    trainer, model = fit(
        DigitsModel(),
        train,
        epochs=args.epochs,
        seed=args.seed,
        callbacks=[GIFCallback(report_every_n_epochs=2, query=(x[of_digit], y[of_digit]))],
        logger=logger,
        enable_progress_bar=False,
    )
    worst = F.cross_entropy(logits(model, test), y, reduction="none").argmax()
    trainer.influence((x[worst, None], y[worst, None]))  # logs itself
    wandb.finish()  # writes what is left, and ends the process that wrote it

    print(f"The offline run is in {run}")
    print(f"Sync it to your account: wandb sync {run}")
    print(
        "Look at gif/influence/history (the strongest examples by epoch), gif/influence/examples (pictures; the last is"
        " the worst-read image), gif/influence/scores, and train/loss beside them."
    )


if __name__ == "__main__":
    parser = make_parser(__doc__, "outputs/wandb_report", epochs=10)
    parser.add_argument("--digit", type=int, default=8, choices=range(CLASSES), help="the class that is asked about")
    main(parser.parse_args())

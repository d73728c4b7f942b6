"""Runs end to end on MNIST: trains TinyNet, answers an influence query, removes a class, and retrains without it.

    python benchmarks/tinynet_forget.py --data path/to/MNIST/raw

Prints one JSON object with the seconds, peak memory (MiB) and test accuracies (%) of each phase. Peak memory is the
largest resident set of the process up to the end of the phase.
"""

from __future__ import annotations

import json
import resource
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from mnist import accuracy, fit, load
from torch.utils.data import DataLoader, Subset

from lightning_gif import GIFCallback


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the four gzipped idx files")
    parser.add_argument("--digit", type=int, default=8, help="the class to remove")
    parser.add_argument("--epochs", type=int, default=3, help="training epochs")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training")
    parser.add_argument("--retrain", action="store_true", help="also retrain without the class")
    options = parser.parse_args()
    train, test = load(options.data)
    result: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "digit": options.digit}

    def phase(name: str, start: float, **values: Any) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        result[name] = {"seconds": round(time.perf_counter() - start, 1), "peak_mib": round(peak), **values}
        print(name, result[name], flush=True)

    def scores(model: pl.LightningModule) -> dict[str, float]:
        gone = test.tensors[1] == options.digit
        parts = {"remaining": ~gone, "forgotten": gone}
        return {f"{name}_accuracy": round(100 * accuracy(model, test, mask), 2) for name, mask in parts.items()}

    phase("load", time.perf_counter())
    start = time.perf_counter()
    trainer, model = fit(train, [GIFCallback()], epochs=options.epochs, seed=options.seed)
    phase("fit", start, **scores(model))

    start = time.perf_counter()
    report = trainer.influence(tuple(tensor[:1] for tensor in test.tensors))
    phase("influence", start, solve=report.solution.summary())

    kept = train.tensors[1] != options.digit
    start = time.perf_counter()
    edit = trainer.unlearn(DataLoader(Subset(train, (~kept).nonzero().squeeze(1).tolist()), 256))
    phase("unlearn", start, step=edit.step, solve=edit.solve, **scores(model))
    edit.undo()

    if options.retrain:
        start = time.perf_counter()
        rest = Subset(train, kept.nonzero().squeeze(1).tolist())
        _, retrained = fit(rest, [], epochs=options.epochs, seed=options.seed)
        phase("retrain", start, **scores(retrained))
    print(json.dumps(result))


if __name__ == "__main__":
    main()

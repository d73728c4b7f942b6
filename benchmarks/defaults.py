"""What a solver and its tolerance buy: the measurement behind the defaults.

    python benchmarks/defaults.py --data path/to/MNIST/raw path/to/FashionMNIST/raw

A class is forgotten by `trainer.unlearn` with each solver and tolerance, and judged on training data: all examples of
the class, a third of which the search looks at, and 5000 others, drawn independently of the 2048 that the curvature is
taken over. No test image is looked at. Prints a Markdown table.
"""

from __future__ import annotations

import time
import warnings
from argparse import ArgumentParser
from pathlib import Path

import torch
from mnist import accuracy, fit, load
from torch.utils.data import DataLoader, Subset

from lightning_gif import ConvergenceWarning, GIFCallback

_UNSEEN = 5000


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders with four idx files each")
    parser.add_argument("--classes", type=int, nargs="+", default=[0, 8], help="the classes to forget")
    parser.add_argument("--solvers", nargs="+", default=["lsmr", "cgls", "lissa"])
    parser.add_argument("--rtol", type=float, nargs="+", default=[1e-1, 3e-2, 1e-2, 3e-3])
    parser.add_argument("--max-iter", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)

    print("| data | class | solver | rtol | status | products | seconds | forgotten (%) | retained (points) |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for folder in options.data:
        train, _ = load(folder)
        trainer, model = fit(train, [GIFCallback(max_iter=options.max_iter)], epochs=options.epochs)
        labels = train.tensors[1]
        for label in options.classes:
            forget = Subset(train, (labels == label).nonzero().squeeze(1).tolist())
            unseen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
            kept = torch.zeros_like(labels, dtype=torch.bool)
            kept[unseen[labels[unseen] != label][:_UNSEEN]] = True
            before = accuracy(model, train, kept)
            for solver in options.solvers:
                for rtol in options.rtol:
                    start = time.perf_counter()
                    report = trainer.unlearn(DataLoader(forget, 256), solver=solver, rtol=rtol)
                    seconds = time.perf_counter() - start
                    gone = 100 * accuracy(model, train, labels == label)
                    change = 100 * (accuracy(model, train, kept) - before)
                    products = report.solve["hvps"] + (report.repair_solve or {"hvps": 0})["hvps"]
                    report.undo()
                    cells = (folder.parent.name, label, solver, f"{rtol:g}", report.solve["status"], products)
                    measured = (f"{seconds:.0f}", f"{gone:.2f}", f"{change:+.2f}")
                    print("| " + " | ".join(map(str, (*cells, *measured))) + " |", flush=True)


if __name__ == "__main__":
    main()

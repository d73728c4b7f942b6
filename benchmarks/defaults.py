"""Measures what each default of `trainer.unlearn` gains: one setting is changed at a time.

    python benchmarks/defaults.py --data path/to/MNIST/raw --net tinynet
    python benchmarks/defaults.py --data path/to/FashionMNIST/raw --net resnet

Classes are removed one after the other by `trainer.unlearn`. The result is evaluated on training data: on all examples
of the class, and on 5000 others that are drawn independently of the edit. Test images are not used. Seconds are
processor time. Prints a Markdown table of means over the classes.
"""

from __future__ import annotations

import time
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from mnist import accuracy, fit, load

from lightning_gif import GIFCallback, GIFWarning

_UNSEEN = 5000

SETTINGS: dict[str, list[dict[str, Any]]] = {
    "solve": [
        {"max_iter": 2},
        {"max_iter": 5},
        {"max_iter": 20},
        {"rtol": 0.1},
        {"rtol": 0.01},
        {"solver": "cgls"},
        {"solver": "lissa"},
        {"curvature_examples": 512},
        {"curvature_examples": 8192},
        {"curvature": "ggn"},
        {"method": "fif"},
    ],
    "step": [{"step": "natural"}, {"step": "search"}, {"step": "search", "max_iter": 2}],
    "targets": [
        {"ratio": 0.02},
        {"ratio": 0.05},
        {"ratio": 0.3},
        {"ratio": 1.0},
        {"ratio": 1.0, "max_iter": 2},
        {"selector": "highest_k_outputs"},
        {"selector": "largest_gradients"},
        {"selector": "random"},
        {"selector": "caps"},
        {"selector": "ekfac_caps"},
        {"targets": "class"},
        {"targets": "cached"},
    ],
}


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the four gzipped idx files")
    parser.add_argument("--net", default="tinynet", choices=["tinynet", "resnet"], help="the network")
    parser.add_argument(
        "--classes", type=int, nargs="+", default=[0, 8], help="the classes to remove, one after the other"
    )
    parser.add_argument("--what", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), help="groups of settings")
    parser.add_argument("--epochs", type=int, default=10, help="training epochs")
    options = parser.parse_args()
    warnings.simplefilter("ignore", GIFWarning)

    train, _ = load(options.data)
    trainer, model = fit(train, [GIFCallback()], epochs=options.epochs, net=options.net, decay=True)
    labels = train.tensors[1]
    print("| setting | forgotten (%) | others (points) | retained loss | Hessian-vector products | solves | seconds |")
    print("| --- |" + " --- |" * 6)
    for setting in [{}, *(changed for what in options.what for changed in SETTINGS[what])]:
        rows = []
        for label in options.classes:
            unseen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
            kept = torch.zeros_like(labels, dtype=torch.bool)
            kept[unseen[labels[unseen] != label][:_UNSEEN]] = True
            before = accuracy(model, train, kept)
            start = time.process_time()
            report = trainer.unlearn((labels == label).nonzero().squeeze(1).tolist(), **setting)
            seconds = time.process_time() - start
            gone, change = accuracy(model, train, labels == label), accuracy(model, train, kept) - before
            products = sum(solve["hvps"] for solve in report.solves)
            rows.append((100 * gone, 100 * change, report.retain.after, products, len(report.solves), seconds))
            report.undo()
        gone, change, loss, products, solves, seconds = (mean(values) for values in zip(*rows, strict=True))
        name = ", ".join(f"`{key}={value!r}`" for key, value in setting.items()) or "defaults"
        cells = (name, f"{gone:.2f}", f"{change:+.2f}", f"{loss:.4f}", f"{products:.0f}", f"{solves:.1f}")
        print("| " + " | ".join((*cells, f"{seconds:.0f}")) + " |", flush=True)


if __name__ == "__main__":
    main()

"""Measures the time of products of the Gauss–Newton matrix with one vector and with many.

    python benchmarks/products.py --data path/to/FashionMNIST/raw

Products are over one batch of images of an untrained network: by passes through the module, one vector at a time, and
from the Jacobians of its layers, for all vectors at once. Prints a Markdown table of the median processor time for each
vector, and of that and the memory of the first pass, which all vectors share.
"""

from __future__ import annotations

import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from mnist import NETS, load
from torch.utils.data import TensorDataset

from lightning_gif.curvature.layer_products import layer_products
from lightning_gif.curvature.products import CURVATURES
from lightning_gif.curvature.streaming import graph_bytes
from lightning_gif.data.examples import Examples
from lightning_gif.objective.objective import Objective


def seconds(run: Callable[[], Any], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return median(times)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the four gzipped idx files")
    parser.add_argument("--nets", nargs="+", default=["mlp", "cnn", "resnet", "tinynet"], choices=list(NETS))
    parser.add_argument("--examples", type=int, default=256, help="images in the batch")
    parser.add_argument("--vectors", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    images, _ = load(options.data)
    batch_of = TensorDataset(*(tensor[: options.examples] for tensor in images.tensors)).tensors
    columns = "".join(f" {n} vector{'s' * (n > 1)} (ms) |" for n in options.vectors)
    print(f"| network | products | first pass (ms) | kept (MiB) |{columns}")
    print("| --- | --- | --- | --- |" + " --- |" * len(options.vectors))
    for net in options.nets:
        trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        with Objective.open(trainer, NETS[net]()) as objective:
            examples = Examples.from_batch(batch_of, objective.prepare, batch_size=options.examples)
            (batch,) = objective.learn_structure(examples).batches()
            passes = CURVATURES["ggn"](objective)
            for name, linearise in {"passes": passes, "layers": layer_products(objective, passes)}.items():
                first = seconds(partial(linearise, objective.theta, batch), options.repeats)
                product, graphs = linearise(objective.theta, batch)
                cells = [net, name, f"{1000 * first:.0f}", f"{graph_bytes(*graphs) / 2**20:.0f}"]
                for n in options.vectors:
                    vectors = torch.randn(objective.space.size, n)
                    if name == "layers":
                        each = seconds(partial(product, vectors), options.repeats) / n
                    else:
                        each = seconds(partial(product, vectors[:, 0].contiguous()), options.repeats)
                    cells.append(f"{1000 * each:.1f}")
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

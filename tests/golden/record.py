"""Edits and scores of three nets, in a form that shows whether a change of the code changed a single bit of them.

``python -m tests.golden.record`` writes ``values.json`` anew. Do so only in a commit that says why the values changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[2]))

from lightning_gif import GIFCallback
from tests.conftest import Classifier, make_trainer
from tests.nets import make

FOLDER = Path(__file__).parent
VALUES = FOLDER / "values.json"
NETS = ("perceptron", "batchnorm", "attention")
WORLDS = (1, 2)
N = 60


def environment() -> str:
    """The properties of the machine that affect rounding. Bits are comparable only if these are equal."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    kinds = ("vendor_id", "cpu family", "model\t", "model name")
    cpu = sorted({line.partition(":")[2].strip() for line in lines if line.startswith(kinds)})
    kernels = os.environ.get("OPENBLAS_CORETYPE", "")
    capability = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, {platform.machine()}, {capability}, {', '.join(cpu)} {kernels}".strip()


def digest(*tensors: Tensor) -> str:
    state = hashlib.sha256()
    for tensor in tensors:
        value = tensor.detach().cpu().contiguous()
        state.update(f"{value.dtype}{tuple(value.shape)}".encode())
        state.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def fitted(name: str, world: int) -> tuple[Any, Classifier, TensorDataset]:
    """A trainer after three epochs of a small net, the net, and data that it was not trained on."""
    torch.manual_seed(0)
    net, data = make(name, 2 * N)
    train, unseen = (TensorDataset(*(tensor[part] for tensor in data.tensors)) for part in (slice(N), slice(N, None)))
    module = Classifier(net, lr=0.3)
    callback = GIFCallback(ratio=0.3, unconverged="ignore", memory=1.0, batch_size=16, snapshots=1, cache_steps=None)
    strategy = "auto" if world == 1 else DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=180))
    trainer = make_trainer(callback, max_epochs=3, devices=world, strategy=strategy)
    trainer.fit(module, DataLoader(train, 12 // world, shuffle=True, generator=torch.Generator().manual_seed(0)))
    return trainer, module, unseen


def results(name: str, world: int) -> dict[str, tuple[str, float]]:
    """Digest and norm of everything that a call computes, by the name of the call."""
    trainer, module, unseen = fitted(name, world)
    found: dict[str, tuple[str, float]] = {}

    def keep(call: str, *tensors: Tensor) -> None:
        whole = torch.cat([tensor.detach().double().flatten() for tensor in tensors])
        found[call] = digest(*tensors), float(whole.nan_to_num().norm())

    keep("weights", *module.parameters())  # running statistics differ between processes
    callback = trainer.callbacks[0]
    keep("targets", *callback.targets.values())

    few, many = ([tensor[:count] for tensor in unseen.tensors] for count in (4, 30))
    keep("scores", trainer.influence(few, solver="ekfac", snapshots=False).scores)
    keep("scores of each", trainer.influence(few, per_example=True, solver="ekfac", snapshots=False).scores)
    keep("scores of many", trainer.influence(many, per_example=True, max_iter=64, snapshots=False).scores)
    keep("scores, snapshots", trainer.influence(few, solver="ekfac", snapshots=True).scores)
    keep("scores, gif", trainer.influence(few, method="gif", targets="batch", max_iter=20, snapshots=False).scores)
    keep("scores, fif", trainer.influence(few, targets="cached", curvature="ggn", snapshots=False).scores)
    keep(
        "scores, pif, lissa", trainer.influence(few, method="pif", solver="lissa", max_iter=20, snapshots=False).scores
    )
    keep("self-influence", trainer.self_influence().scores)

    goals: dict[str, tuple[Any, dict[str, Any]]] = {
        "class": (lambda batch: batch[1] == 1, {}),
        "examples": (list(range(25)), {"unseen": DataLoader(unseen, 16)}),
        "labels": ([3, 17, 30], {"relabel": [1, 0, 2]}),
    }

    def edit(call: str, goal: str, **options: Any) -> None:
        forget, more = goals[goal]
        report = trainer.unlearn(forget, dry_run=True, **more, **options)
        names = sorted(report.edit.new)
        after = [report.forget.after, report.retain.after]
        keep(call, *(report.edit.new[name] for name in names), torch.tensor(after, dtype=torch.float64))

    for goal in goals:
        edit(f"edit, {goal}", goal)
        edit(f"edit, {goal}, search", goal, step="search")
        edit(f"edit, {goal}, natural", goal, step="natural")
    edit("edit, examples, fif", "examples", method="fif", targets="cached", step="search")
    edit("edit, labels, sif", "labels", method="sif", step="natural", damping=0.1)
    edit("edit, class, cg", "class", solver="cg", curvature="ggn", method="if", step="natural", damping=0.1)
    if name == "batchnorm":
        edit("edit, class, statistics", "class", refresh_statistics=True)
    return found


def compute(world: int) -> dict[str, dict[str, tuple[str, float]]]:
    """What :func:`results` finds in processes of their own, by the name of the net. One launch serves all nets."""
    left = ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED")  # set by earlier tests
    clean = {key: value for key, value in os.environ.items() if key not in left}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(FOLDER / "record.py"), str(world), folder]
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, env={**clean, "OMP_NUM_THREADS": "1"}, timeout=900
        )
        assert done.returncode == 0, done.stderr[-3000:]
        ranks = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]
    assert all(other == ranks[0] for other in ranks), "the processes have other results"
    return {name: {call: tuple(value) for call, value in found.items()} for name, found in ranks[0].items()}


def main() -> None:
    if len(sys.argv) > 1:  # one of the processes
        world, folder = int(sys.argv[1]), Path(sys.argv[2])
        warnings.filterwarnings("ignore")
        found = {name: results(name, world) for name in NETS}
        (folder / f"{os.environ.get('LOCAL_RANK', 0)}.json").write_text(json.dumps(found))
        sys.stderr.flush()
        os._exit(0)  # threads of gloo can abort an interpreter that is torn down
    found = {world: compute(world) for world in WORLDS}
    values = {f"{name}, {world}": found[world][name] for name in NETS for world in WORLDS}
    VALUES.write_text(json.dumps({"environment": environment(), "values": values}, indent=1) + "\n")


if __name__ == "__main__":
    main()

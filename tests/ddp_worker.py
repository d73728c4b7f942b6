"""The script of each process of ``tests/test_ddp.py`` and ``tests/test_fsdp.py``.

Lightning starts its copies, as those of a user's script.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))

from lightning_gif import GIFCallback, UnlearnReport, verify
from lightning_gif.attribution import gradient_store
from lightning_gif.distributed import ProcessGroup
from lightning_gif.errors import GIFError
from lightning_gif.objective import memory
from lightning_gif.parameters import tensors_of
from lightning_gif.sharding import is_sharded, local, reshard
from lightning_gif.storage.audit_log import read
from lightning_gif.trajectory import recording
from lightning_gif.trajectory.leaving_out import measured_at
from lightning_gif.trajectory.record import Trajectory
from lightning_gif.trajectory.replay import Replay
from tests.attribution.test_token_scores import LanguageModel, by_cross_entropy, texts
from tests.conftest import Classifier, batch_of, blobs, make_trainer
from tests.lightning_integration.test_adapters import Texts as AdapterTexts
from tests.lightning_integration.test_adapters import network

warnings.filterwarnings("ignore")

STRATEGY = "ddp"  # or "fsdp2", for several processes

N, CLASSES = 52, 3  # as many for each process, so that training repeats none; parts are no multiples of a batch


def points(n: int = 48, seed: int = 0) -> TensorDataset:
    """In float64, since the tests check that sums differ by their order only."""
    x, y = blobs(n, seed=seed).tensors
    return TensorDataset(x.double(), y)


class Sharded(Classifier):
    """A classifier whose parameters are sharded, if its strategy has a device mesh."""

    def configure_model(self) -> None:
        if self.device_mesh is None or hasattr(self.net, "reshard"):  # on one device, or sharded before
            return
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh if self.replicated else self.device_mesh["data_parallel"]
        for layer in (self.net[0], self.net):  # the second one has what is left
            fully_shard(layer, mesh=mesh, **self.sharding)

    sharding: ClassVar[dict[str, Any]] = {}  # options of `fully_shard`
    replicated = False  # whether each process has a copy of all, since the mesh has a second dimension of size 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.lr) if self.lr else super().configure_optimizers()


def held(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, whole."""
    wholes = {name: ProcessGroup().whole(value.detach()) for name, value in tensors_of(module).items()}
    return {name: value.clone() for name, value in wholes.items()}


def trained(normal: bool = False, lr: float = 0.0) -> Sharded:
    """Weights that fit the data roughly, the same in every process. Fits do not change them, unless ``lr`` is given."""
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Linear(6, 12), nn.BatchNorm1d(12) if normal else nn.Tanh(), nn.Tanh(), nn.Linear(12, CLASSES)
    )
    module = Sharded(net, lr=lr).double()
    x, y = points(N).tensors
    optimizer = torch.optim.Adam(module.parameters(), 0.05)
    for _ in range(8):  # stops before the remaining gradient is only rounding
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x), y).backward()
        optimizer.step()
    return module


def trainer_of(world: int, **options: Any) -> pl.Trainer:
    callback = GIFCallback(**{"ratio": 0.4, "unconverged": "ignore", "double": True, "batch_size": 8, **options})
    group: dict[str, Any] = {"process_group_backend": "gloo", "timeout": timedelta(seconds=180)}
    strategy: Any = "auto"
    if world > 1 and STRATEGY == "ddp":
        strategy = DDPStrategy(**group)
    elif world > 1:
        strategy = ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1, **group)
    return make_trainer(callback, max_epochs=1, devices=world, strategy=strategy, use_distributed_sampler=False)


def after_fit(world: int, dataset: TensorDataset, **options: Any) -> tuple[pl.Trainer, Classifier]:
    """A trainer after an epoch without learning, whose steps see the same examples for each number of processes.

    Lightning's own sampler would shuffle.
    """
    module, trainer = trained(), trainer_of(world, **options)
    rank = int(os.environ.get("LOCAL_RANK", 0))
    sampler = None if world == 1 else DistributedSampler(dataset, world, rank, shuffle=False)
    loader = DataLoader(dataset, 12 // world, sampler=sampler)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.fit(module, loader, DataLoader(points(40, seed=5), 16))
    assert not [
        warning for warning in told if "gif_" in str(warning.message)
    ]  # for values that differ between processes
    return trainer, module


def learned(
    world: int, *callbacks: pl.Callback, replicated: bool = False, **options: Any
) -> tuple[pl.Trainer, Sharded]:
    """A trainer after three epochs of Adam, whose steps see the same examples for each number of processes."""
    module, trainer = trained(lr=0.01), trainer_of(world, cache_steps=None, snapshots=2, **options)
    trainer.fit_loop.max_epochs, module.replicated = 3, replicated
    if callbacks:
        trainer.callbacks[:] = callbacks
    sampler = None
    if world > 1:
        sampler = DistributedSampler(points(N), world, int(os.environ.get("LOCAL_RANK", 0)), shuffle=False)
    trainer.fit(module, DataLoader(points(N), 12 // world, sampler=sampler), DataLoader(points(40, seed=5), 16))
    return trainer, module


def seen(trainer: pl.Trainer) -> dict[str, Any]:
    """What the callback gathered in a fit."""
    callback = trainer.callbacks[0]
    assert isinstance(callback, GIFCallback)
    assert callback.tracker.active
    found: dict[str, Any] = {f"length of {name}": value for name, value in callback.tracker.length.lengths.items()}
    for epoch, state in callback.tracker.snapshots.kept.items():
        found |= {f"epoch {epoch}: {name}": value for name, value in state.items()}
    gradients = callback.gradients.whole(ProcessGroup.of(trainer)).state()
    found |= {f"squares of {name}": value for name, value in gradients["squares"].items()}
    found |= {f"steps of {name}": value for name, value in gradients["steps"].items()}
    for kind, layers in callback.neurons.state().items():
        found |= {f"{kind} of {name}": value.double() for name, value in layers.items()}
    assert callback.targets is not None
    found |= {f"targets of {name}": entries for name, entries in callback.targets.items()}
    return {name: torch.as_tensor(value) for name, value in found.items()}


QUERY = batch_of(points(60, seed=7), range(3))


def answers(trainer: pl.Trainer, folder: Path) -> dict[str, Tensor]:
    """Scores that must be the same on several processes with sharded parameters as on one device."""
    store = trainer.store_gradients(folder / f"store of {trainer.world_size}")
    # More iterations, or less damping, amplify rounding.
    options = {"per_example": True, "snapshots": False, "max_iter": 8, "damping": 0.05}
    return {
        "influence": trainer.influence(QUERY, **options).scores,
        "on targets": trainer.influence(QUERY, method="gif", targets="cached", **options).scores,
        "self": trainer.self_influence(snapshots=False).scores,
        "from the store": trainer.influence(QUERY, per_example=True, store=store.folder).scores,
    }


def sharded(world: int, folder: Path) -> dict[str, Any]:
    """A fit with sharded parameters, scores, an edit, its record, and a checkpoint, to compare with one device."""
    found: dict[str, Any] = {}
    # A report in each epoch, which gathers the parameters, leaves training the same bit for bit.
    reports = {"report_every_n_epochs": 1, "query": QUERY, "report_options": {"max_iter": 2}}
    trainer, module = learned(world, **reports)
    _, plain = learned(world, pl.callbacks.Timer())
    parts = zip(reshard(module).named_parameters(), reshard(plain).named_parameters(), strict=True)
    found["same training"] = all(torch.equal(local(one), local(other)) for (_, one), (_, other) in parts)
    found["sharded"] = all(map(is_sharded, module.parameters()))
    found["reports"] = len({epoch for epoch, *_ in trainer.callbacks[0].reports.history})
    found["seen"] = seen(trainer)
    copies, replica = learned(world, replicated=True)
    found["seen, replicated"] = seen(copies)
    before = held(replica)
    edit = copies.unlearn([3, 17], step="natural", max_iter=8, damping=0.05)
    assert edit.edit.is_in(replica)
    edit.undo()
    found["replica undone"] = all(torch.equal(value, before[name]) for name, value in held(replica).items())

    trainer.validate(module, DataLoader(points(40, seed=5), 16), verbose=False)
    found["whole after validation"] = not all(map(is_sharded, module.parameters()))  # what FSDP2 does by itself
    trainer.save_checkpoint(folder / "trained")
    found["answers"] = answers(trainer, folder)
    kinds = list(map(type, module.modules()))
    found["check"] = str(trainer.influence.check())
    found["same classes"] = kinds == list(map(type, module.modules()))

    before = held(module)
    free, always = memory.free_memory, memory.ALWAYS_IN_MEMORY
    memory.free_memory, memory.ALWAYS_IN_MEMORY = lambda device: 2**11, 0
    found["no memory"] = error_of(lambda: trainer.influence(QUERY))
    memory.free_memory, memory.ALWAYS_IN_MEMORY = free, always

    edit = trainer.unlearn([3, 17, 30], record=folder / "record")
    if trainer.is_global_zero:
        print(edit)  # one process may print a report
        edit.log([CSVLogger(folder / "logs")])
    edit.save(folder / "edit.safetensors")
    found["edited"] = held(module)
    found["in the weights"] = edit.edit.is_in(module)
    module.eval()
    with torch.no_grad():
        found["logits"] = module(QUERY[0])  # by FSDP2, which gathers the edited parts
    trainer.save_checkpoint(folder / "edited")
    edit.undo()
    found["undone"] = all(torch.equal(value, before[name]) for name, value in held(module).items())
    UnlearnReport.load(folder / "edit.safetensors", module).apply(record=folder / "record")
    found["applied"] = all(torch.equal(value, found["edited"][name]) for name, value in held(module).items())
    found["verified"] = verify(folder / "record", edits=folder / "edit.safetensors", module=module).ok
    with torch.no_grad():
        local(next(module.parameters())).add_(1.0)
    found["no undo"] = error_of(edit.undo)

    # The state of the callback is in the checkpoint, also of one that is sharded.
    other = trainer_of(world, snapshots=2)
    other.validate(trained(), DataLoader(points(40, seed=5), 16), ckpt_path=folder / "trained", verbose=False)
    targets, loaded = trainer.callbacks[0].targets, other.callbacks[0].targets
    found["restored"] = all(torch.equal(targets[name], loaded[name]) for name in targets)
    return found


class Adapted(nn.Module):
    """A frozen layer with a low-rank term that is trained (LoRA)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 12).requires_grad_(False)
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


def adapted(world: int, folder: Path) -> dict[str, Any]:
    """A low-rank adapter and a tied layer, in mixed precision and with accumulated gradients."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    torch.manual_seed(3)
    tied = nn.Linear(12, 12)
    net = nn.Sequential(Adapted(), nn.Tanh(), tied, nn.Tanh(), tied, nn.Linear(12, CLASSES))
    module, trainer = Sharded(net, lr=0.01).double(), trainer_of(world)
    policy = MixedPrecisionPolicy(param_dtype=torch.float32)
    module.sharding = {"mp_policy": policy, "reshard_after_forward": False}
    trainer.fit_loop.max_epochs, trainer.accumulate_grad_batches = 3, 2
    trainer.fit(module, DataLoader(points(N), 4), DataLoader(points(40, seed=5), 16))
    assert trainer.callbacks[0].tracker.active
    before = held(module)
    edit = trainer.unlearn([3, 17], step="natural", max_iter=8, damping=0.05)
    after = held(module)
    edit.undo()
    return {
        "before": before,
        "frozen": all(torch.equal(before[name], after[name]) for name in before if "layer" in name),
        "after": after,
        "undone": all(torch.equal(value, before[name]) for name, value in held(module).items()),
        "scores": trainer.influence(QUERY, per_example=True, max_iter=8, damping=0.05, snapshots=False).scores,
    }


def first_fsdp(world: int, folder: Path) -> dict[str, Any]:
    """A sharded checkpoint of ``FSDPStrategy``, whose trainer needs a GPU, but whose strategy can save without one."""
    from lightning.pytorch.strategies import FSDPStrategy
    from torch.distributed.fsdp import FullyShardedDataParallel

    trainer, module = after_fit(world, points(N))
    strategy = FSDPStrategy(accelerator=trainer.accelerator, state_dict_type="sharded")
    strategy._lightning_module = module
    strategy.model = FullyShardedDataParallel(module, device_id=torch.device("cpu"))
    strategy.optimizers = []
    trainer._accelerator_connector.strategy = strategy
    trainer.save_checkpoint(folder / "of the first FSDP", weights_only=True)
    return {"parts": sum(parameter.numel() for parameter in strategy.model.parameters())}


class Noisy(Classifier):
    """A classifier with dropout and BatchNorm, whose statistics differ between processes."""

    def __init__(self, lr: float = 0.01) -> None:
        first = nn.Linear(6, 12, bias=False)  # Adam would divide the rounding of a bias before BatchNorm by its size
        super().__init__(nn.Sequential(first, nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(0.3), nn.Linear(12, 3)), lr)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.lr)


def recorded_fit(
    world: int, folder: Path, module: Classifier, batch_size: int, **options: Any
) -> tuple[pl.Trainer, Classifier]:
    """A trainer after two recorded epochs, whose steps see the same examples for each number of processes."""
    trainer = trainer_of(world, trajectory=str(folder))
    trainer.fit_loop.max_epochs = 2
    for name, value in options.items():
        setattr(trainer, name, value)
    sampler = None
    if world > 1:
        sampler = DistributedSampler(points(N), world, int(os.environ.get("LOCAL_RANK", 0)), shuffle=False)
    trainer.fit(module, DataLoader(points(N), batch_size // world, sampler=sampler))
    return trainer, module


def through_training(world: int, folder: Path) -> dict[str, Any]:
    """Scores through a recorded training, which must not depend on the number of processes."""
    found: dict[str, Any] = {}
    options: dict[str, Any] = {"through": "training", "per_example": True}
    for name, more in {"": {}, " accumulated": {"accumulate_grad_batches": 2}}.items():
        record = folder / f"run{name} {world}"
        trainer, _ = recorded_fit(world, record, trained(lr=0.01), 12, **more)
        report = trainer.influence(QUERY, leave_outs=3, **options)
        found[f"scores{name}"], found[f"by epoch{name}"] = report.scores, report.by_epoch
        found[f"measured{name}"] = report.leave_outs.measured
        found[f"difference{name}"] = torch.tensor(report.settings["replay_difference"])
        found[f"one query{name}"] = trainer.influence(QUERY, through="training").scores
    return found


def recorded(world: int, folder: Path) -> dict[str, Any]:
    """A training with dropout and BatchNorm in several processes: slopes of replays, and errors."""
    torch.manual_seed(3)
    module = Noisy().double()
    trainer, _ = recorded_fit(world, folder / "noisy", module, 12)
    callback = trainer.callbacks[0]
    report = trainer.influence(QUERY, through="training")
    found: dict[str, Any] = {"scores": report.scores, "difference": report.settings["replay_difference"]}
    with callback.open_session(callback.settings, "batch") as session:
        replay = Replay(session.objective, session.train, Trajectory.open(folder / "noisy"))
        query, slopes, width = session.examples(QUERY), [], 1e-5
        for position in (0, 7, 30):
            ends = []
            for sign in (1, -1):
                weights = torch.ones(N, dtype=torch.float64)
                weights[position] += sign * width
                ends.append(measured_at(session.objective, query, replay.weighted_end(weights), per_example=False))
            slopes.append(-(ends[0] - ends[1]) / (2 * width))
        found["slopes"] = torch.cat(slopes)
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        next((folder / "noisy").glob("steps-*-process-1.safetensors")).unlink()
    trainer.strategy.barrier()
    found["missing"] = error_of(lambda: trainer.influence(QUERY, through="training"))

    rank, write = trainer.global_rank, recording.Trajectory.add_steps

    def failing(self: Any, steps: Any) -> None:
        if self.rank and steps:
            raise OSError("no space left")
        write(self, steps)

    recording.Trajectory.add_steps = failing
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer, _ = recorded_fit(world, folder / "full disk", Noisy().double(), 12)
    recording.Trajectory.add_steps = write
    found["epochs"] = trainer.current_epoch
    found["warned"] = [str(one.message) for one in caught if "not recorded any further" in str(one.message)]
    found["incomplete"] = error_of(lambda: trainer.influence(QUERY, through="training"))
    found["other folder"] = error_of(lambda: recorded_fit(world, folder / f"of {rank}", Noisy().double(), 12))
    return found


class Texts(Sharded):
    """A language model of its own, or one of ``transformers`` with adapters of ``peft``."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if isinstance(batch, dict):
            return self.net(**batch).loss
        return by_cross_entropy(self.net(batch[0]), batch[0])

    def configure_model(self) -> None:
        if self.device_mesh is not None and not hasattr(self.net, "reshard"):
            from torch.distributed.fsdp import fully_shard

            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def texts_of(kind: str) -> tuple[Texts, Dataset[Any]]:
    """A model of texts, and its training data."""
    if kind == "recurrent":  # whose texts differ in length, so that processes would train it differently
        return Texts(LanguageModel(), lr=0.0).double(), texts()
    net = network(kind)
    for layer in net.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0  # processes draw other numbers than one
    return Texts(net, lr=0.01).double(), AdapterTexts(kind == "BERT")


def of_texts(world: int, folder: Path, *kinds: str) -> dict[str, Any]:
    """Scores of texts and of their tokens, and an edit that is undone."""
    found: dict[str, Any] = {}
    for kind in kinds or ("recurrent",):
        module, data = texts_of(kind)
        trainer, query = trainer_of(world), next(iter(DataLoader(data, 3)))
        rank = int(os.environ.get("LOCAL_RANK", 0))
        sampler = None if world == 1 else DistributedSampler(data, world, rank, shuffle=False)
        trainer.fit(module, DataLoader(data, 4 // world, sampler=sampler))
        options = {"snapshots": False, "max_iter": 6, "damping": 0.05, "per_example": True, "k": 2}
        report = trainer.influence(query, tokens=kind != "BERT", **options)
        found[f"{kind}: scores"] = report.scores
        for index, tokens in sorted(report.train_tokens.items()):
            for at in range(3):
                scores = report.token_scores(index, at) if tokens else []
                found[f"{kind}: tokens of {index} for query {at}"] = torch.tensor([score for _, score in scores])
        before = held(module)
        edit = trainer.unlearn([3, 17], step="natural", max_iter=6, damping=0.05)
        for name, value in held(module).items():
            found[f"{kind}: edit of {name}"] = value - before[name]
        edit.undo()
        found[f"{kind}: undone"] = all(torch.equal(value, before[name]) for name, value in held(module).items())
    return found


def with_adapters(world: int, folder: Path) -> dict[str, Any]:
    """The same for language models with adapters of ``peft``."""
    return of_texts(world, folder, "GPT-2", "BERT")


def results(world: int, folder: Path) -> dict[str, Any]:
    """All results that must not depend on the number of processes."""
    data = points(N)
    trainer, module = after_fit(world, data)
    found: dict[str, Any] = {}

    def scores(name: str, report: Any) -> None:
        found[f"scores {name}"] = report.scores.clone()
        found[f"indices {name}"] = report.indices
        found[f"batches {name}"] = torch.tensor(report.curvature["examples"])

    query, many = batch_of(points(60, seed=7), range(3)), batch_of(points(60, seed=7), range(60))
    few = {"max_iter": 8, "damping": 0.05}
    scores("by default", trainer.influence(query))
    scores("ekfac", trainer.influence(query, per_example=True, solver="ekfac"))
    scores("cg", trainer.influence(query, **few))
    scores("per example", trainer.influence(query, per_example=True, curvature_examples=31, **few))
    scores("nystrom", trainer.influence(many, per_example=True, solver="nystrom", max_iter=64, damping=0.05))
    scores("gif", trainer.influence(query, method="gif", targets="batch", solver="dense"))
    scores("lsmr", trainer.influence(query, method="gif", targets="batch", max_iter=8))
    scores("class", trainer.influence(query, method="gif", targets="class", solver="dense"))
    scores("stochastic", trainer.influence(query, method="gif", solver="stochastic_lissa", damping=1.0, max_iter=50))
    scores("features", trainer.influence(query, curvature_examples=20, curvature_sampling="features", **few))
    scores("eigenvalues", trainer.influence(query, eigenvalues=2, **few))
    scores("among indices", trainer.influence(query, among=[4, 2, 50], **few))
    scores("among one", trainer.influence(query, among=[7], **few))  # fewer than processes
    scores("among", trainer.influence(query, among=lambda batch: batch[1] == 2, **few))
    scores("loader", trainer.influence(DataLoader(points(17, seed=9), 4), **few))
    scores("self", trainer.self_influence())
    scores("strongest", trainer.influence(query, per_example=True, k=2, keep=6, **few))
    scores("file", trainer.influence(query, per_example=True, **few, scores_to=folder / f"scores {world}"))
    scores("file again", trainer.influence(query, per_example=True, **few, scores_to=folder / f"scores {world}"))

    gradient_store.CHUNK = 8  # so that each process writes several chunks
    stored = {"whole": {}, "projected": {"rank": 20}}
    for kind, options in stored.items():
        at = folder / f"store {kind} {world}"
        for again in ("", " again"):
            store = trainer.store_gradients(at, **options)
            found[f"chunks {kind}{again}"] = torch.tensor(len(list(at.glob("chunk-*"))))
            scores(f"store {kind}{again}", trainer.influence(query, per_example=True, store=store.folder))
            trainer.strategy.barrier()
            if trainer.is_global_zero:
                (at / "chunk-000003.safetensors").unlink()
            trainer.strategy.barrier()
    trainer.store_gradients(at, **options)
    scores("store, among", trainer.influence(query, store=at, among=[50, 3, 17], k=2))
    scores("store, strongest", trainer.influence(query, per_example=True, store=at, k=2, keep=6))

    snapshots = trainer.callbacks[0].tracker.snapshots
    kept_before = dict(snapshots.kept), snapshots.last, snapshots.count
    snapshots.kept = {
        epoch: {name: factor * value for name, value in held(module).items()} for epoch, factor in enumerate((0.8, 0.9))
    }
    snapshots.last, snapshots.count = 2, 2
    places: dict[str, dict[str, Any]] = {
        "in memory": {},
        "in a file": {"scores_to": folder / f"averaged {world}"},
        "in a file again": {"scores_to": folder / f"averaged {world}"},
        "strongest": {"k": 2, "keep": 6},
    }
    for place, options in places.items():
        report = trainer.influence(query, per_example=True, snapshots=True, **few, **options)
        scores(f"averaged {place}", report)
        found[f"errors {place}"] = report.standard_errors.clone()
        found[f"agreement {place}"] = torch.tensor(report.agreement, dtype=torch.float64)
    report = trainer.self_influence(snapshots=True)
    scores("averaged self", report)
    found["errors self"] = report.standard_errors
    snapshots.kept, snapshots.last, snapshots.count = kept_before

    def edit(name: str, *args: Any, **options: Any) -> None:
        before = held(module)
        report = trainer.unlearn(*args, **options)
        assert "solves_to" not in options or any("Solves recalled from" in note for note in report.notes), name
        for key, value in held(module).items():
            found[f"edit {name}: {key}"] = value.double() - before[key].double()
        found[f"losses {name}"] = torch.tensor(
            [*report.step_sizes, report.forget.after, report.retain.after, *(trial.risk for trial in report.trials)]
        ).double()
        report.undo()
        assert all(torch.equal(value, before[key]) for key, value in held(module).items()), name

    edit("natural", [3, 17], step="natural", solver="dense")
    edit("one", batch_of(data, [5]), step="search", solver="dense")
    edit("single examples", [3, 17], damping=0.5)
    edit("class", lambda batch: batch[1] == 1)
    kept = {"solves_to": folder / f"solves {world}"}
    trainer.unlearn(lambda batch: batch[1] == 1, **kept, dry_run=True)
    edit("class again", lambda batch: batch[1] == 1, **kept)
    # With the default damping, the number of halvings of a late step can depend on rounding.
    edit("relabel", [3, 17, 30], relabel=torch.tensor([1, 0, 2]), damping=0.5)
    edit("relabel, match", [3, 17, 30], relabel=torch.tensor([1, 0, 2]), step="match", method="if")
    edit("unseen", list(range(25)), unseen=DataLoader(points(40, seed=5), 16))
    edit("if", [3, 17], method="if", step=0.5, solver="dense")
    record = folder / f"record {world}"
    edit("recorded", [3, 17], step="natural", solver="dense", record=record)
    saved = (trainer.influence(query, **few), trainer.unlearn([3, 17], step="natural", solver="dense", dry_run=True))
    for kind, report in zip(("scores", "edit"), saved, strict=True):
        report.save(folder / f"saved {world}" / f"{kind} {trainer.global_rank}")
    trainer.strategy.barrier()
    found["written"] = torch.tensor(len(list((folder / f"saved {world}").iterdir())))
    loaded = UnlearnReport.load(folder / f"saved {world}" / "edit 0", module)
    loaded.apply(record=record)
    loaded = UnlearnReport.load(folder / f"saved {world}" / "edit 0")
    loaded.record_metrics({"loss": 0.5}, module, record=record)
    loaded.undo(module, record=record)
    trainer.strategy.barrier()
    assert verify(record, edits=folder / f"saved {world}" / "edit 0").ok
    events = ["unlearn", "undo", "apply", "metrics"]
    found["entries"] = torch.tensor([1 + events.index(entry["event"]) for entry in read(record).entries])
    callback = trainer.callbacks[0]
    assert isinstance(callback, GIFCallback)
    for kind, layers in callback.neurons.state().items():
        found |= {f"{kind} of {name}": value.double() for name, value in layers.items()}
    gradients = callback.gradients.whole(ProcessGroup.of(trainer))
    found |= {f"squares of {name}": value for name, value in gradients.state()["squares"].items()}
    assert callback.targets is not None
    found |= {f"targets of {name}": entries for name, entries in callback.targets.items()}
    trainer.save_checkpoint(folder / f"{world}.ckpt")

    # Running statistics differ between processes: those of the first process count.
    module, trainer = trained(normal=True), trainer_of(world)
    trainer.validate(module, DataLoader(data, 16), verbose=False)
    module.net[1].running_mean += trainer.global_rank
    loader = DataLoader(data, 16)
    scores("drifted", trainer.influence(query, dataloader=loader, **few))
    options = {"targets": "batch", "step": 0.5, "solver": "dense", "refresh_statistics": True, "dry_run": True}
    report = trainer.unlearn([3, 17], dataloader=loader, **options)
    found |= {f"refreshed {name}": value.double() for name, value in report.edit.new.items()}
    return found


# --------------------------------------------------------------------------------------------------------------------
# Failures that must not hang
# --------------------------------------------------------------------------------------------------------------------


class Breaking(Dataset[Any]):
    """A dataset that runs a function at its ``at``-th reading, in one process."""

    def __init__(self, what: Callable[[], Any]) -> None:
        self.data, self.what, self.left = points(N), what, -1

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        self.left -= 1
        if not self.left:
            self.what()
        return self.data[index]


def error_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except (Exception, KeyboardInterrupt) as error:
        return f"{type(error).__name__}{' (GIFError)' * isinstance(error, GIFError)}: {error}"
    return "nothing"


def failures(world: int, folder: Path) -> dict[str, Any]:
    """The error in each process when one fails. Afterwards all continue to work together."""

    def missing() -> None:
        raise FileNotFoundError("image 7 is missing")

    def interrupted() -> None:
        raise KeyboardInterrupt

    dataset = Breaking(missing)
    trainer, module = after_fit(world, dataset)  # type: ignore[arg-type]
    rank, query = trainer.global_rank, batch_of(points(), range(3))
    before = held(module)
    found: dict[str, Any] = {}
    whole = trainer.influence(query).scores
    for reading in (4, 20, 35):  # comparing the data, and the passes
        dataset.left = reading if rank == world - 1 else -1
        found[f"missing {reading}"] = error_of(lambda: trainer.influence(query))
        dataset.left = reading if rank == world - 1 else -1
        found[f"missing in unlearn {reading}"] = error_of(lambda: trainer.unlearn([3]))
    dataset.what, dataset.left = interrupted, 40 if rank == 0 else -1
    found["interrupted"] = error_of(lambda: trainer.influence(query))
    bad = batch_of(points(), range(3))
    bad[0][2] = torch.nan
    found["nan"] = error_of(lambda: trainer.influence(bad))
    found["other batch"] = error_of(lambda: trainer.influence(batch_of(points(), range(rank, rank + 3))))
    found["other settings"] = error_of(lambda: trainer.influence(query, ratio=0.1 + rank / 10))
    found["other indices"] = error_of(lambda: trainer.unlearn([rank]))
    (folder / "file").write_text("")  # below which there can be no record
    found["no record"] = error_of(lambda: trainer.unlearn([3], record=folder / "file" / "record"))
    made = trainer.unlearn([3], step="natural", record=folder / "record")
    made.record_metrics({"loss": 0.5})
    found["no undo"] = error_of(lambda: made.undo(record=folder / "file" / "record"))
    found["still edited"] = made.edit.is_in(module)
    made.undo()
    differing = {"record": folder / f"record {rank}"}
    found["other record"] = error_of(lambda: trainer.unlearn([3], **differing))
    found["other labels"] = error_of(lambda: trainer.unlearn([3, 5], relabel=torch.tensor([1, rank % 2])))
    part = DataLoader(points(20, seed=rank), 4)
    found["other loader"] = error_of(lambda: trainer.influence(part))
    found["other data"] = error_of(lambda: trainer.influence(query, dataloader=part))

    def differently(problem: Any) -> Any:
        for _ in range(1 + rank):
            problem.influence_direction()
        return problem.evaluate(1.0)

    found["out of step"] = error_of(lambda: trainer.unlearn([3], step=differently))
    if STRATEGY == "ddp":  # processes that hold parts cannot have other weights
        with torch.no_grad():
            module.net[0].weight += rank
        found["other weights"] = error_of(lambda: trainer.influence(query))
        module.load_state_dict(before)
    found["same scores afterwards"] = bool(torch.equal(whole, trainer.influence(query).scores))
    found["same weights afterwards"] = all(torch.equal(before[name], v) for name, v in held(module).items())
    return found


def unreadable(world: int, folder: Path) -> dict[str, Any]:
    """A fit in which one process cannot read its batches from the second epoch on."""
    trainer, data = trainer_of(world), points(N)
    callback, module = trainer.callbacks[0], trained()
    trainer.fit_loop.max_epochs = 3
    record = callback.neurons.record

    def failing(*args: Any) -> None:
        if trainer.current_epoch and trainer.global_rank == world - 1:
            raise LookupError("no such graph")
        record(*args)

    callback.neurons.record = failing
    sampler = DistributedSampler(data, world, trainer.global_rank, shuffle=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, DataLoader(data, 4, sampler=sampler))
    found = {"warned": sum("no such graph" in str(warning.message) for warning in caught)}
    found |= {"epochs": trainer.current_epoch, "targets of": callback.targets_epoch, "gathers": callback.tracker.active}
    trainer.save_checkpoint(folder / "unreadable.ckpt")
    scores = trainer.influence(batch_of(data, range(3)), targets="cached", dataloader=DataLoader(data, 16)).scores
    return {**found, "scores": scores}


def unkept(world: int, folder: Path) -> dict[str, Any]:
    """A fit in which one process cannot keep a snapshot."""
    trainer, data, module = trainer_of(world, snapshots=1), points(N), trained()
    tracker = trainer.callbacks[0].tracker
    trainer.fit_loop.max_epochs = 3
    keep = tracker.snapshots.add

    def failing(epoch: int, *args: Any) -> None:
        if epoch and trainer.global_rank == world - 1:
            raise MemoryError("no memory for a snapshot")
        keep(epoch, *args)

    tracker.snapshots.add = failing
    sampler = DistributedSampler(data, world, int(os.environ.get("LOCAL_RANK", 0)), shuffle=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, DataLoader(data, 4, sampler=sampler))
    told = sum("no memory for a snapshot" in str(warning.message) for warning in caught)
    return {
        "epochs": trainer.current_epoch,
        "gathers": tracker.active,
        "kept": list(tracker.snapshots.kept),
        "told": told,
    }


def logged(world: int, folder: Path) -> dict[str, Any]:
    """Calls of a trainer that has a logger in the first process only."""
    trainer, _ = after_fit(world, points(N))
    if trainer.global_rank == 0:
        trainer.loggers = [CSVLogger(folder / "logs")]
    report = trainer.influence(batch_of(points(N), range(3)), k=2)
    edit = trainer.unlearn([4, 7, 30], step="natural")
    return {"predicted": report.context.predicted, "forgotten": edit.context.forgotten}


def unreported(world: int, folder: Path) -> dict[str, Any]:
    """Fits whose first report fails in one process, by an expected and by an unexpected error."""
    found: dict[str, Any] = {}
    for error in (FileNotFoundError("image 7 is missing"), LookupError("no such image")):

        def fail(error: Exception = error) -> None:
            raise error

        dataset, module = Breaking(fail), trained()
        options = {"report_every_n_epochs": 1, "query": batch_of(points(), range(3)), "report_options": {"max_iter": 2}}
        trainer = trainer_of(world, **options)
        trainer.fit_loop.max_epochs = 2
        callback = trainer.callbacks[0]

        def breaking(
            *args: Any, data: Any = dataset, own: Any = callback.influence, trainer: Any = trainer, **options: Any
        ) -> Any:
            data.left = 20 if trainer.global_rank == world - 1 and trainer.current_epoch == 0 else -1
            return own(*args, **options)

        callback.influence = breaking
        sampler = DistributedSampler(dataset, world, int(os.environ.get("LOCAL_RANK", 0)), shuffle=False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(module, DataLoader(dataset, 4, sampler=sampler))
        name = type(error).__name__
        found[f"{name} epochs"] = trainer.current_epoch
        found[f"{name} warned"] = [str(one.message) for one in caught if "No influence report" in str(one.message)]
        found[f"{name} reports"] = len({epoch for epoch, *_ in callback.reports.history})
    return found


def death(world: int, folder: Path) -> dict[str, Any]:
    """The error in the other processes when one is killed in the middle of a pass."""
    # Lightning checks every few seconds whether a process has died, and kills the others before they can report it.
    _ChildProcessObserver._run = lambda self: True  # type: ignore[method-assign]
    dataset = Breaking(lambda: os.kill(os.getpid(), signal.SIGKILL))
    trainer, _ = after_fit(world, dataset)  # type: ignore[arg-type]
    dataset.left = 40 if trainer.global_rank == world - 1 else -1
    return {"dead": error_of(lambda: trainer.influence(batch_of(points(), range(3))))}


if __name__ == "__main__":
    world, folder, STRATEGY, stories = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:]
    known = {
        "results": results,
        "sharded": sharded,
        "adapted": adapted,
        "through training": through_training,
        "recorded": recorded,
        "first fsdp": first_fsdp,
        "texts": of_texts,
        "with adapters": with_adapters,
        "failures": failures,
        "unreadable": unreadable,
        "unkept": unkept,
        "logged": logged,
        "unreported": unreported,
        "death": death,
    }
    for story in stories:
        answer = known[story](world, folder)
        torch.save(answer, folder / f"{story} {world} {os.environ.get('LOCAL_RANK', 0)}.pt")
    with suppress(ChildProcessError):  # until all processes have written their results and ended
        while True:
            os.wait()
    # The results are in the file now. Threads of gloo and of the launcher that wake while an
    # interpreter is torn down can abort it. This package starts no threads.
    sys.stderr.flush()
    os._exit(0)

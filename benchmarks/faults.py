"""Faults at random points: whether weights, files and everything else are intact afterwards.

    python benchmarks/faults.py [--injections 300] [--seed 0]

Each injection runs one call of a small trained net and breaks it: Ctrl-C before a random line of the package or at a
random time, an error in a random tensor operation, in the user's step or dataset, or in a random access to the disk;
SIGKILL before a random line, in a process of its own; a full disk; files with a random bit flipped or the end cut off.
Afterwards weights and buffers must be bit for bit what they were, or what the whole edit makes them; everything else of
the module, the trainer and the process as it was; each file the old one or the new one; the error the one that was
injected or one of the package; and a call that returned must have returned the right answer. A call that goes on where
it was interrupted is made again, and must end in the bits of one that was not.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import logging
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset

import lightning_gif
from lightning_gif import GIFCallback, GIFError, InfluenceReport, UnlearnReport

PACKAGE = str(Path(lightning_gif.__file__).parent)


class Injected(Exception):
    """What a fault raises in the place of the user's code or of torch."""


class Points(Dataset[Any]):
    """Three blobs; reading the item at which ``fails`` gets to zero raises."""

    def __init__(self, n: int = 24) -> None:
        generator = torch.Generator().manual_seed(0)
        self.y = torch.arange(n) % 3
        self.x = torch.randn(n, 4, generator=generator) + 2.0 * self.y[:, None]
        self.fails = math.inf

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.fails -= 1
        if self.fails < 0:
            raise Injected("the disk with the data is gone")
        return self.x[index], self.y[index]


class Net(pl.LightningModule):
    """With buffers, modes and logged values that a call that is cut off could leave changed."""

    fails = math.inf

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.1), nn.Tanh(), nn.Linear(6, 3))
        self.seen: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        Net.fails -= 1
        if Net.fails < 0:
            raise Injected("the step of the user failed")
        self.seen.append(batch_idx)
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class World:
    """A trained net, and a folder with what an earlier run has saved there."""

    def __init__(self, folder: Path) -> None:
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore")
        torch.manual_seed(0)
        self.folder = folder
        self.data, self.module = Points(), Net()
        self.trainer = pl.Trainer(
            max_epochs=2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[GIFCallback(max_iter=3, batch_size=8, unconverged="ignore", ratio=0.3)],
        )
        self.trainer.fit(self.module, DataLoader(self.data, 8, shuffle=True))
        self.module.train()
        self.module.net[1].eval()
        self.batch = (self.data.x[:4].clone(), self.data.y[:4].clone())
        self.scores: InfluenceReport = self.trainer.influence(self.batch)
        self.other: InfluenceReport = self.trainer.influence(self.batch, per_example=True)
        self.edit: UnlearnReport = self.trainer.unlearn(self.batch, step=1.0, dry_run=True)
        self.further: UnlearnReport = self.trainer.unlearn([1, 2], step=0.5, dry_run=True)
        self.weights = copy.deepcopy(self.module.state_dict())
        self.edit.apply()
        self.edited = copy.deepcopy(self.module.state_dict())
        self.edit.undo()
        # One class is forgotten in many steps, whose solves are kept.
        self.reset(edited=False)
        forget_class(self, dry_run=True).edit.apply(self.module)
        self.solves = {path.name: path.read_bytes() for path in solves(self).iterdir()}
        self.forgotten = copy.deepcopy(self.module.state_dict())
        self.reset(edited=False)

    def reset(self, *, edited: bool) -> None:
        """Weights, files and faults as at the start."""
        Net.fails = self.data.fails = math.inf
        self.module.load_state_dict(self.edited if edited else self.weights)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def state(self) -> dict[str, Any]:
        """Everything that no call may change, weights and buffers aside."""
        module = self.module
        return {
            "ids": [id(tensor) for tensor in [*module.parameters(), *module.buffers()]],
            "requires_grad": [parameter.requires_grad for parameter in module.parameters()],
            "grad": [parameter.grad is None for parameter in module.parameters()],
            "training": [m.training for m in module.modules()],
            "attributes": [sorted(vars(m)) for m in module.modules()],
            "seen": list(module.seen),
            "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in module.modules()],
            "recording": self.trainer.callbacks[0].neurons._recording,
            "rng": torch.get_rng_state().tolist(),
            "python rng": random.getstate(),
            "numpy rng": numpy.random.get_state()[1].tolist(),  # noqa: NPY002
            "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
            "dtype": torch.get_default_dtype(),
            "precision": torch.get_float32_matmul_precision(),
            "attention": (torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()),
            "compiler": torch.compiler.is_compiling(),
            "SIGINT": signal.getsignal(signal.SIGINT),
            "threads": threading.active_count(),
        }


@dataclass
class Call:
    """Something that a user does.

    Attributes:
        name: Of the call.
        run: Does it.
        right: Whether its answer, and all that it wrote, is right, once it returned.
        prepare: What there was before it.
        whole: Whether the files in the folder are the old or the new ones after it was broken.
        edited: Whether the edit is in the weights before it.
        ends: The weights of the world that it may lead to; ``None`` for those before it alone.
    """

    name: str
    run: Callable[[World], Any]
    right: Callable[[World, Any], bool]
    prepare: Callable[[World], Any] = lambda world: None
    whole: Callable[[World], bool] = lambda world: True
    edited: bool = False
    ends: str | None = None


def near(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-3, atol=1e-6)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def saved_edit(world: World) -> bool:
    """Whether the file is the old edit or the new one."""
    loaded = UnlearnReport.load(world.folder / "edit", world.module)
    return loaded.edit.digest_after in (world.edit.edit.digest_after, world.further.edit.digest_after)


def saved_scores(world: World) -> bool:
    """Whether the folder is the old report or the new one; where it is moved aside at that moment, it is beside."""
    path = world.folder / "report"
    if not path.exists():
        (path,) = world.folder.glob(".report.*.old")
    scores = InfluenceReport.load(path).scores
    return any(torch.equal(scores, report.scores) for report in (world.scores, world.other))


def stored_scores(world: World) -> bool:
    """Whether the same call goes on, and gives the right scores."""
    world.module.load_state_dict(world.weights)
    Net.fails = world.data.fails = math.inf
    found = world.trainer.influence(world.batch, per_example=True, scores_to=world.folder / "scores")
    return near(found.scores, world.other.scores)


def solves(world: World) -> Path:
    return world.folder / "solves"


def forget_class(world: World, *, dry_run: bool = False) -> UnlearnReport:
    return world.trainer.unlearn(lambda batch: batch[1] == 1, max_iter=2, solves_to=solves(world), dry_run=dry_run)


def keep_some(world: World) -> None:
    """What a call leaves that was interrupted half-way: some solves, and a file that was being written."""
    solves(world).mkdir()
    names = sorted(world.solves)
    for name in names[: len(names) // 2]:
        (solves(world) / name).write_bytes(world.solves[name])
    (solves(world) / f".{names[-1]}.{'0' * 32}").write_bytes(world.solves[names[-1]][:100])


def forgotten(world: World) -> bool:
    """Whether the class is forgotten as where nothing breaks, and no solve is left."""
    return same(world.module.state_dict(), world.forgotten) and not solves(world).exists()


def gone_on_with(world: World) -> bool:
    """Whether the same call goes on, and ends in the same bits."""
    world.module.load_state_dict(world.weights)
    Net.fails = world.data.fails = math.inf
    forget_class(world)
    return forgotten(world)


def checkpointed(world: World) -> bool:
    """Whether the callback can still say what it knows."""
    world.trainer.save_checkpoint(world.folder / "again.ckpt")
    state = torch.load(world.folder / "again.ckpt", weights_only=True)["lightning_gif"]
    return state["targets"].keys() == world.trainer.callbacks[0].targets.keys()


CALLS = [
    Call(
        "influence",
        lambda world: world.trainer.influence(world.batch),
        lambda world, found: near(found.scores, world.scores.scores),
    ),
    Call(
        "influence, scores in a file",
        lambda world: world.trainer.influence(world.batch, per_example=True, scores_to=world.folder / "scores"),
        lambda world, found: near(found.scores, world.other.scores),
        whole=stored_scores,
    ),
    Call(
        "self-influence",
        lambda world: world.trainer.self_influence(),
        lambda world, found: bool((found.scores > 0).all()),
    ),
    Call(
        "unlearn",
        lambda world: world.trainer.unlearn(world.batch, step=1.0),
        lambda world, found: found.edit.is_in(world.module) is True,
        ends="edited",
    ),
    Call(
        "unlearn in many steps",
        lambda world: world.trainer.unlearn(lambda batch: batch[1] == 1, max_iter=2),
        lambda world, found: same(world.module.state_dict(), world.forgotten),
        ends="forgotten",
    ),
    Call(
        "unlearn, solves in a folder",
        forget_class,
        lambda world, found: forgotten(world),
        whole=gone_on_with,
        ends="forgotten",
    ),
    Call(
        "unlearn, going on from solves",
        forget_class,
        lambda world, found: forgotten(world),
        prepare=keep_some,
        whole=gone_on_with,
        ends="forgotten",
    ),
    Call("undo", lambda world: world.edit.undo(), lambda world, _: True, edited=True, ends="weights"),
    Call("apply", lambda world: world.edit.apply(), lambda world, _: True, ends="edited"),
    Call(
        "save an edit",
        lambda world: world.edit.save(world.folder / "edit"),
        lambda world, _: saved_edit(world),
        prepare=lambda world: world.further.save(world.folder / "edit"),
        whole=saved_edit,
    ),
    Call(
        "save scores",
        lambda world: world.scores.save(world.folder / "report"),
        lambda world, _: saved_scores(world),
        prepare=lambda world: world.other.save(world.folder / "report"),
        whole=saved_scores,
    ),
    Call(
        "checkpoint",
        lambda world: world.trainer.save_checkpoint(world.folder / "a.ckpt"),
        lambda world, _: checkpointed(world),
        whole=checkpointed,
    ),
]

# --------------------------------------------------------------------------------------------------------------------
# Faults
# --------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def before_line(number: float, strike: Callable[[], None], passed: list[tuple[str, int]]) -> Iterator[None]:
    """Strikes before the so-maniest line of the package that is run; notes which lines those are."""

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            passed.append((frame.f_code.co_filename, frame.f_lineno))
            if len(passed) == number:
                strike()
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(None)


class Operations(TorchDispatchMode):
    """Raises in the place of the so-maniest tensor operation."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number, self.passed = number, 0

    def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.passed += 1
        if self.passed == self.number:
            raise Injected("no memory is left on the device")
        return function(*args, **(kwargs or {}))


ACCESSES: list[tuple[Any, str]] = [
    *((Path, name) for name in ("write_bytes", "write_text", "mkdir", "rename")),
    *((os, name) for name in ("fsync", "replace", "posix_fallocate") if hasattr(os, name)),
]


@contextlib.contextmanager
def full_disk(number: float, passed: list[str]) -> Iterator[None]:
    """The so-maniest access to the disk, and all later ones that write, find it full."""
    originals = [(owner, name, getattr(owner, name)) for owner, name in ACCESSES]

    def patched(name: str, original: Any) -> Any:
        def access(*args: Any, **kwargs: Any) -> Any:
            passed.append(name)
            if len(passed) == number or (len(passed) > number and name.startswith(("write", "mkdir", "posix"))):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))
            return original(*args, **kwargs)

        return access

    for owner, name, original in originals:
        setattr(owner, name, patched(name, original))
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


@contextlib.contextmanager
def ctrl_c_after(seconds: float) -> Iterator[None]:
    """Ctrl-C at a time."""
    over = threading.Event()

    def strike() -> None:
        if not over.wait(seconds):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=strike)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def pick(generator: random.Random, passed: list[tuple[str, int]]) -> int:
    """A random moment of a run: any line that was run, or one of the rarer ones, with the same chance."""
    if generator.random() < 0.5:
        return generator.randrange(len(passed)) + 1
    line = generator.choice(sorted(set(passed)))
    return generator.choice([number for number, found in enumerate(passed, 1) if found == line])


@dataclass
class Campaign:
    """Injections of faults, and what became of each.

    Attributes:
        world: What is broken.
        generator: Draws the moments.
        outcomes: How many of each kind of fault came to what.
        failures: What should not have happened, in words.
    """

    world: World
    generator: random.Random
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    _measured: dict[str, Any] = field(default_factory=dict)

    def measure(self, call: Call) -> dict[str, Any]:
        """How many lines, operations, accesses and so on a call takes where nothing breaks."""
        if call.name not in self._measured:
            lines: list[tuple[str, int]] = []
            self._start(call)
            with before_line(math.inf, lambda: None, lines):
                call.run(self.world)
            accesses: list[str] = []
            self._start(call)
            Net.fails = self.world.data.fails = 10**9
            start = time.perf_counter()
            with full_disk(math.inf, accesses):
                call.run(self.world)
            seconds = time.perf_counter() - start
            steps, items = 10**9 - Net.fails, 10**9 - self.world.data.fails
            self._start(call)
            with Operations(math.inf) as operations:
                call.run(self.world)
            self._measured[call.name] = {
                "lines": lines,
                "accesses": len(accesses),
                "seconds": seconds,
                "steps": steps,
                "items": items,
                "operations": operations.passed,
            }
        return self._measured[call.name]

    def _start(self, call: Call) -> None:
        self.world.reset(edited=call.edited)
        call.prepare(self.world)

    def inject(self, kind: str, call: Call) -> str:
        """One fault of a kind in a call.

        Returns:
            What came of it: ``"as before"``, ``"done"``, or what should not have happened.
        """
        number, fault = FAULTS[kind](self, call)
        outcome = "not applicable"
        if number:
            self._start(call)
            outcome = self._killed(call, number) if fault is None else self._broken(call, fault)
            self.outcomes[kind, outcome] += 1
            if outcome not in ("as before", "done"):
                self.failures.append(f"{kind} in {call.name} at {number}: {outcome}")
        return outcome

    def _broken(self, call: Call, fault: Callable[[], contextlib.AbstractContextManager[Any]]) -> str:
        world = self.world
        torch.manual_seed(1)
        before, weights = world.state(), copy.deepcopy(world.module.state_dict())
        error: BaseException | None = None
        found = None
        try:
            with fault():
                found = call.run(world)
        except (GIFError, Injected, KeyboardInterrupt, OSError) as caught:
            error = caught if found is None else None  # else it came when the call had returned
        except BaseException as caught:
            return f"{type(caught).__name__}: {caught}"
        if isinstance(error, OSError) and error.errno != errno.ENOSPC:
            return f"{type(error).__name__}: {error}"
        if error is not None and not isinstance(error, KeyboardInterrupt) and len(str(error)) < 20:
            return f"an error that says nothing: {error!r}"
        Net.fails = world.data.fails = math.inf
        error = None if error is None else error.with_traceback(None)
        after = world.state()
        changed = [name for name in before if before[name] != after[name]]
        if changed:
            return f"changed: {', '.join(changed)}"
        now = world.module.state_dict()
        whole = same(now, weights) or (call.ends is not None and same(now, getattr(world, call.ends)))
        if error is not None and not whole:
            return "half an edit"
        try:
            if error is None:
                return "done" if call.right(world, found) else "a wrong answer"
            return "as before" if call.whole(world) else "half a file"
        except (GIFError, OSError) as refused:
            return f"afterwards {type(refused).__name__}: {refused}"

    def _killed(self, call: Call, number: int) -> str:
        sys.stdout.flush()
        child = os.fork()
        if not child:
            try:
                with before_line(number, lambda: os.kill(os.getpid(), signal.SIGKILL), []):
                    call.run(self.world)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        try:
            whole = call.whole(self.world)
        except (GIFError, OSError) as refused:
            return f"afterwards {type(refused).__name__}: {refused}"
        return "half a file" if not whole else "done" if os.WIFEXITED(status) else "as before"


Fault = tuple[int, Callable[[], contextlib.AbstractContextManager[Any]] | None]


def interrupt_at_line(campaign: Campaign, call: Call) -> Fault:
    number = pick(campaign.generator, campaign.measure(call)["lines"])
    return number, lambda: before_line(number, lambda: signal.raise_signal(signal.SIGINT), [])


def interrupt_at_time(campaign: Campaign, call: Call) -> Fault:
    seconds = campaign.generator.random() * campaign.measure(call)["seconds"]
    return max(int(1e6 * seconds), 1), lambda: ctrl_c_after(seconds)


def error_in_operation(campaign: Campaign, call: Call) -> Fault:
    count = campaign.measure(call)["operations"]
    number = campaign.generator.randint(1, count) if count else 0
    return number, lambda: Operations(number)


def _attribute(owner: Any, number: int) -> contextlib.AbstractContextManager[Any]:
    owner.fails = number - 1
    return contextlib.nullcontext()


def error_in_step(campaign: Campaign, call: Call) -> Fault:
    count = campaign.measure(call)["steps"]
    number = campaign.generator.randint(1, count) if count else 0
    return number, lambda: _attribute(Net, number)


def error_in_dataset(campaign: Campaign, call: Call) -> Fault:
    count = campaign.measure(call)["items"]
    number = campaign.generator.randint(1, count) if count else 0
    return number, lambda: _attribute(campaign.world.data, number)


def error_on_disk(campaign: Campaign, call: Call) -> Fault:
    count = campaign.measure(call)["accesses"]
    number = campaign.generator.randint(1, count) if count else 0
    return number, lambda: full_disk(number, [])


def kill_at_line(campaign: Campaign, call: Call) -> Fault:
    return pick(campaign.generator, campaign.measure(call)["lines"]), None


FAULTS: dict[str, Callable[[Campaign, Call], Fault]] = {
    "Ctrl-C before a line": interrupt_at_line,
    "Ctrl-C at a time": interrupt_at_time,
    "error in a tensor operation": error_in_operation,
    "error in the user's step": error_in_step,
    "error in the user's dataset": error_in_dataset,
    "full disk": error_on_disk,
    "SIGKILL before a line": kill_at_line,
}
"""From a campaign and a call to a moment, 0 where there is none, and what to do then; ``None``: kill the process."""


def damage(world: World, generator: random.Random) -> tuple[str, str]:
    """Flips a bit in a file, or cuts it off: what was damaged, and what came of reading it."""
    world.reset(edited=False)
    what = generator.choice(["edit", "report", "scores", "solves"])
    if what == "edit":
        world.edit.save(world.folder / "edit")
        files = [world.folder / "edit"]
    elif what == "report":
        world.scores.save(world.folder / "report")
        files = sorted((world.folder / "report").iterdir())
    elif what == "solves":
        solves(world).mkdir()
        for name, content in world.solves.items():
            (solves(world) / name).write_bytes(content)
        files = sorted(solves(world).iterdir())
    else:
        world.trainer.influence(world.batch, per_example=True, scores_to=world.folder / "scores")
        files = sorted((world.folder / "scores").iterdir())
    path = generator.choice(files)
    damaged = bytearray(path.read_bytes())
    at = generator.randrange(len(damaged))
    if generator.random() < 0.7:
        damaged[at] ^= 1 << generator.randrange(8)
    else:
        damaged = damaged[:at]
    path.write_bytes(damaged)
    try:
        if what == "edit":
            loaded = UnlearnReport.load(path, world.module)
            loaded.apply()
            right = same(world.module.state_dict(), world.edited) and str(loaded) == str(world.edit)
        elif what == "report":
            report = InfluenceReport.load(world.folder / "report")
            right = torch.equal(report.scores, world.scores.scores) and str(report) == str(world.scores)
        elif what == "solves":
            right = gone_on_with(world)
        else:
            right = stored_scores(world)
    except GIFError as error:
        if what == "solves" and path.name not in str(error):
            return f"damaged {what}", f"an error that does not name {path.name}: {error}"
        return f"damaged {what}", "as before" if same(world.module.state_dict(), world.weights) else "half an edit"
    except Exception as error:
        return f"damaged {what}", f"{type(error).__name__}: {error}"
    return f"damaged {what}", "done" if right else "a wrong answer"


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--injections", type=int, default=300, help="of all kinds together, about")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(World(Path(folder) / "files"), random.Random(options.seed))
        while campaign.outcomes.total() < options.injections:
            kind = campaign.generator.choice([*FAULTS, "damage"])
            if kind == "damage":
                found = damage(campaign.world, campaign.generator)
                campaign.outcomes[found] += 1
                if found[1] not in ("as before", "done"):
                    campaign.failures.append(f"{found[0]}: {found[1]}")
            else:
                campaign.inject(kind, campaign.generator.choice(CALLS))
    others = campaign.outcomes.total() - sum(
        count for (_, outcome), count in campaign.outcomes.items() if outcome in ("as before", "done")
    )
    print("| fault | injected | refused or cut off, all as before | finished correctly | anything else |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for kind in sorted({kind for kind, _ in campaign.outcomes}):
        counts = Counter({outcome: n for (found, outcome), n in campaign.outcomes.items() if found == kind})
        right = counts["as before"], counts["done"]
        print(f"| {kind} | {counts.total()} | {right[0]} | {right[1]} | {counts.total() - sum(right)} |")
    print(f"| all | {campaign.outcomes.total()} | | | {others} |")
    for failure in campaign.failures:
        print(f"- {failure}")


if __name__ == "__main__":
    main()

"""Injects faults at random points of calls, and checks that weights, files and all other state are intact afterwards.

    python benchmarks/faults.py [--injections 300] [--seed 0]

Each injection makes one call with a small trained network, and breaks it by one fault:

- Ctrl-C, before a random line of the package or at a random time;
- SIGKILL before a random line, in a process of its own;
- an error in a random tensor operation, in the user's `training_step`, or in the user's dataset;
- a full disk, from a random access on;
- a file with a flipped bit or without its end.

Afterwards the script checks that

- weights and buffers are bit for bit those before the call, or those after the whole edit;
- all other state of the module, the trainer and the process is as before;
- each file is the old one or the new one;
- the error is the injected one or an error of the package;
- a call that returned has the correct result;
- a resumable call, made again, ends bit for bit like an unbroken one.

Prints a Markdown table, and one line for each failed check.
"""

from __future__ import annotations

import contextlib
import copy
import dis
import errno
import functools
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
from types import CodeType, FrameType
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
    """The error that a fault raises in place of the user's code or of PyTorch."""


class Points(Dataset[Any]):
    """Three clusters of points. Reading raises once ``fails`` items were read."""

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
    """A network with buffers, modes and logged values, which an interrupted call could leave changed."""

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
    """A trained network, and a folder with the files of an earlier run."""

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
        # An edit of one class makes several solves, which its journal keeps.
        self.reset(edited=False)
        forget_class(self, dry_run=True).edit.apply(self.module)
        self.solves = {path.name: path.read_bytes() for path in solves(self).iterdir()}
        self.forgotten = copy.deepcopy(self.module.state_dict())
        self.reset(edited=False)

    def reset(self, *, edited: bool) -> None:
        """Restores weights, files and faults to those of the start."""
        Net.fails = self.data.fails = math.inf
        self.module.load_state_dict(self.edited if edited else self.weights)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def state(self) -> dict[str, Any]:
        """All state that no call may change, except weights and buffers."""
        module = self.module
        return {
            "ids": [id(tensor) for tensor in [*module.parameters(), *module.buffers()]],
            "requires_grad": [parameter.requires_grad for parameter in module.parameters()],
            "grad": [parameter.grad is None for parameter in module.parameters()],
            "training": [m.training for m in module.modules()],
            "attributes": [sorted(vars(m)) for m in module.modules()],
            "seen": list(module.seen),
            "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in module.modules()],
            "recording": self.trainer.callbacks[0].neurons._batch is not None,
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
    """A call that a user makes.

    Attributes:
        name: The name of the call.
        run: Makes the call.
        right: Whether the result of a call that returned, and its files, are correct.
        prepare: Prepares the folder before the call.
        whole: Whether the files are the old or the new ones after a broken call.
        edited: Whether the weights before the call have the edit.
        ends: The attribute of `World` with the weights that the call may lead to; ``None``: it changes no weights.
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
    """Whether the folder is the old report or the new one. While it is replaced, the old one has another name."""
    path = world.folder / "report"
    if not path.exists():
        (path,) = world.folder.glob(".report.*.old")
    scores = InfluenceReport.load(path).scores
    return any(torch.equal(scores, report.scores) for report in (world.scores, world.other))


def stored_scores(world: World) -> bool:
    """Whether the same call resumes, and returns the correct scores."""
    world.module.load_state_dict(world.weights)
    Net.fails = world.data.fails = math.inf
    found = world.trainer.influence(world.batch, per_example=True, scores_to=world.folder / "scores")
    return near(found.scores, world.other.scores)


def solves(world: World) -> Path:
    return world.folder / "solves"


def forget_class(world: World, *, dry_run: bool = False) -> UnlearnReport:
    return world.trainer.unlearn(lambda batch: batch[1] == 1, max_iter=2, solves_to=solves(world), dry_run=dry_run)


def keep_some(world: World) -> None:
    """Leaves the files of an interrupted call: some solves, and a file that was not finished."""
    solves(world).mkdir()
    names = sorted(world.solves)
    for name in names[: len(names) // 2]:
        (solves(world) / name).write_bytes(world.solves[name])
    (solves(world) / f".{names[-1]}.{'0' * 32}").write_bytes(world.solves[names[-1]][:100])


def forgotten(world: World) -> bool:
    """Whether the weights are those of an unbroken call, and no solve is left."""
    return same(world.module.state_dict(), world.forgotten) and not solves(world).exists()


def gone_on_with(world: World) -> bool:
    """Whether the same call resumes, and ends with the same weights, bit for bit."""
    world.module.load_state_dict(world.weights)
    Net.fails = world.data.fails = math.inf
    forget_class(world)
    return forgotten(world)


def checkpointed(world: World) -> bool:
    """Whether a checkpoint can still be written, with the targets of the callback."""
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
        "influence, scores in a folder",
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
        "unlearn, several solves",
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
        "unlearn, resumed from solves",
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


@functools.cache
def _acts(code: CodeType, offset: int) -> bool:
    """Whether the instruction at an offset does something."""
    return dis.opname[code.co_code[offset]] != "NOP"


@contextlib.contextmanager
def before_line(number: float, strike: Callable[[], None], passed: list[tuple[str, int]]) -> Iterator[None]:
    """Calls ``strike`` before line ``number`` of the lines of the package that run, and records these lines.

    Lines without an instruction, such as a ``try:``, do not count. Python delivers no interrupt there, and an exception
    of a trace function there skips the ``with`` blocks around the line.
    """

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line" and _acts(frame.f_code, frame.f_lasti):
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
    """Raises instead of tensor operation ``number``."""

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
    """Access ``number`` to the disk fails because the disk is full, and so do later ones that write."""
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
    """Sends Ctrl-C after a time, unless the block has ended."""
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
    """A random point of a run: drawn from all lines that ran or, as often, from the distinct lines of code."""
    if generator.random() < 0.5:
        return generator.randrange(len(passed)) + 1
    line = generator.choice(sorted(set(passed)))
    return generator.choice([number for number, found in enumerate(passed, 1) if found == line])


@dataclass
class Campaign:
    """A number of injected faults with their outcomes.

    Attributes:
        world: The network and the files that the faults are injected into.
        generator: Draws the points of the faults.
        outcomes: The number of injections by kind of fault and outcome.
        failures: A text for each failed check.
    """

    world: World
    generator: random.Random
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    _measured: dict[str, Any] = field(default_factory=dict)

    def measure(self, call: Call) -> dict[str, Any]:
        """The lines, operations, disk accesses and so on of an unbroken call."""
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
        """Injects one fault of a kind into a call.

        Returns:
            The outcome: ``"as before"``, ``"done"``, or a text on the failed check.
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
            error = caught if found is None else None  # else the interrupt came after the call had returned
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
    "Ctrl-C before a random line": interrupt_at_line,
    "Ctrl-C at a random time": interrupt_at_time,
    "error in a tensor operation": error_in_operation,
    "error in the user's `training_step`": error_in_step,
    "error in the user's dataset": error_in_dataset,
    "full disk": error_on_disk,
    "SIGKILL before a random line": kill_at_line,
}
"""``(campaign, call) ↦ (number, fault)``: the point of the fault (0: the call has none) and its context manager.
``None`` in place of the context manager kills the process."""


def damage(world: World, generator: random.Random) -> tuple[str, str]:
    """Flips a bit in a file or cuts its end off, and reads it. Returns the kind of damage and the outcome."""
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
    parser.add_argument("--injections", type=int, default=300, help="number of faults, all kinds together")
    parser.add_argument("--seed", type=int, default=0, help="seed of the faults")
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
    print("| fault | injected | failed, state unchanged | completed correctly | other outcome |")
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

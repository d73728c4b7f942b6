"""Which of Lightning's two packages is used, and what needs its private parts.

``lightning`` and ``pytorch-lightning`` ship the same code under two names, and the classes of one are not those of the
other. No other module of this package imports either of them.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
    from lightning.pytorch.trainer.states import RunningStage, TrainerFn
    from lightning.pytorch.utilities.seed import isolate_rng as _isolate_rng
    from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
else:
    try:
        from lightning.fabric.utilities.exceptions import MisconfigurationException
        from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
        from lightning.pytorch.trainer.states import RunningStage, TrainerFn
        from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
        from lightning.pytorch.utilities.seed import isolate_rng as _isolate_rng
    except ModuleNotFoundError:
        from lightning_fabric.utilities.exceptions import MisconfigurationException
        from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
        from pytorch_lightning.trainer.states import RunningStage, TrainerFn
        from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn
        from pytorch_lightning.utilities.seed import isolate_rng as _isolate_rng

    def __getattr__(name: str) -> Any:
        """Imports the parts of LightningCLI on first use, because they need jsonargparse."""
        if name not in ("LightningArgumentParser", "LightningCLI"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{Trainer.__module__.rpartition('.trainer.')[0]}.cli"), name)


__all__ = [
    "Callback",
    "LightningArgumentParser",
    "LightningCLI",
    "LightningDataModule",
    "LightningModule",
    "MisconfigurationException",
    "Trainer",
    "at_epoch",
    "attach_model",
    "brings_own",
    "isolate_rng",
    "lightning_version",
    "no_messages",
    "rank_zero_info",
    "rank_zero_warn",
    "stage_of_training",
    "trainer_of",
    "unsupported_strategy",
]


def lightning_version() -> str:
    """The version of the package that is used."""
    return sys.modules[Trainer.__module__.partition(".")[0]].__version__


@contextlib.contextmanager
def isolate_rng() -> Iterator[None]:
    """Restores the global random generators after the block, also after an error, unlike Lightning's own."""
    isolation = _isolate_rng()
    isolation.__enter__()
    try:
        yield
    finally:
        isolation.__exit__(None, None, None)


@contextlib.contextmanager
def no_messages() -> Iterator[None]:
    """Inside the block Lightning logs no messages, such as those about devices that each trainer repeats."""
    packages = Trainer.__module__.rpartition(".trainer.")[0], MisconfigurationException.__module__.split(".util")[0]
    loggers = [logging.getLogger(package) for package in packages]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def trainer_of(module: Any) -> Trainer | None:
    """The trainer that a LightningModule was last attached to, or ``None``; its property ``trainer`` would raise."""
    return getattr(module, "_trainer", None)


def attach_model(trainer: Trainer, model: LightningModule, train_dataloaders: Any, datamodule: Any) -> None:
    """Attaches a model and its data to a trainer, as ``fit`` does before its loop runs.

    Lightning has no public way to do this without running a loop. These three calls are unchanged since Lightning 2.0.
    """
    trainer.strategy.connect(model)
    trainer.strategy._lightning_module = model
    trainer._data_connector.attach_data(model, train_dataloaders=train_dataloaders, datamodule=datamodule)


def unsupported_strategy(trainer: Trainer) -> str | None:
    """Why the trainer's strategy is not supported; ``None`` if it is.

    Under FSDP2 (``ModelParallelStrategy``, tested with gloo) there is not even a first derivative. Hooks of the forward
    pass replace the parameters that ``functional_call`` passes by gathered ones, and hooks of the backward pass bring
    gradients to the shards. ``autograd.grad`` therefore finds either of them unused.
    """
    strategy = trainer.strategy
    name = type(strategy).__name__
    if _is_a(strategy.launcher, "_MultiProcessingLauncher"):
        return f"{name} trains in child processes, and the statistics gathered there are lost when these end"
    whole = _is_a(strategy, "SingleDeviceStrategy", "DDPStrategy")
    if not whole or _is_a(strategy, "DeepSpeedStrategy", "XLAStrategy"):  # which derive from DDPStrategy
        return (
            f"{name} may split the parameters over the processes, and its hooks allow no derivatives of the loss with"
            " respect to them"
        )
    return None


@contextlib.contextmanager
def stage_of_training(trainer: Trainer) -> Iterator[None]:
    """Inside of it the trainer's flags are those of a training step: ``trainer.training`` is true, for example."""
    state = trainer.state
    before = state.fn, state.stage
    state.fn, state.stage = TrainerFn.FITTING, RunningStage.TRAINING
    try:
        yield
    finally:
        state.fn, state.stage = before


@contextlib.contextmanager
def at_epoch(trainer: Trainer, epoch: int | None) -> Iterator[None]:
    """Inside the block, ``trainer.current_epoch`` is ``epoch``. With ``None`` it is unchanged."""
    progress = trainer.fit_loop.epoch_progress.current
    before = progress.completed
    progress.completed = before if epoch is None else epoch
    try:
        yield
    finally:
        progress.completed = before


def brings_own(owner: object, hook: str) -> bool:
    """Whether a module or datamodule defines a hook itself, instead of inheriting Lightning's empty one."""
    return getattr(type(owner), hook).__module__.split(".")[0] not in ("lightning", "pytorch_lightning")


def _is_a(instance: object, *names: str) -> bool:
    """``isinstance`` by class name, because the class may come from either of Lightning's packages."""
    return any(kind.__name__ in names for kind in type(instance).__mro__)

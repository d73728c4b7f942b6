"""Which of Lightning's two packages is used, and what needs its private parts.

``lightning`` and ``pytorch-lightning`` ship the same code under two names, and the classes of one are not those of the
other. No other module of this package imports either of them. Lightning is imported when something of it is needed
first, because that takes seconds: an audit log is verified without it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import logging
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

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
    "is_a",
    "is_lightning_module",
    "is_loaded",
    "is_misconfiguration",
    "isolate_rng",
    "lightning_version",
    "no_messages",
    "rank_zero_info",
    "rank_zero_warn",
    "stage_of_training",
    "trainer_of",
    "unsupported_strategy",
    "watch_iterators",
]


# The names that are imported on first use, each with the package (``"pytorch"`` or ``"fabric"``) and the module in it.
_NAMES = {
    "Callback": ("pytorch", ""),
    "LightningArgumentParser": ("pytorch", ".cli"),  # needs jsonargparse
    "LightningCLI": ("pytorch", ".cli"),
    "LightningDataModule": ("pytorch", ""),
    "LightningModule": ("pytorch", ""),
    "MisconfigurationException": ("fabric", ".utilities.exceptions"),
    "Trainer": ("pytorch", ""),
}


@cache
def _packages() -> dict[str, str]:
    """The names of Lightning's two packages, of which the first is imported."""
    names = {"pytorch": "lightning.pytorch", "fabric": "lightning.fabric"}
    try:
        importlib.import_module(names["pytorch"])
    except ModuleNotFoundError:
        names = {"pytorch": "pytorch_lightning", "fabric": "lightning_fabric"}
        importlib.import_module(names["pytorch"])
    return names


def _lightning(module: str, package: str = "pytorch") -> Any:
    """A module of Lightning.

    Args:
        module: Its name in the package, with a leading dot, or ``""`` for the package.
        package: ``"pytorch"`` or ``"fabric"``.
    """
    return importlib.import_module(f"{_packages()[package]}{module}")


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    package, module = _NAMES[name]
    return getattr(_lightning(module, package), name)


def is_loaded() -> bool:
    """Whether Lightning is imported already, by the user or by this package."""
    return not {"lightning.fabric", "lightning_fabric"}.isdisjoint(sys.modules)


def lightning_version() -> str:
    """The version of the package that is used, or would be; it is not imported for this."""
    if is_loaded():
        return str(sys.modules[_packages()["pytorch"].partition(".")[0]].__version__)
    try:
        return importlib.metadata.version("lightning")
    except importlib.metadata.PackageNotFoundError:
        return importlib.metadata.version("pytorch-lightning")


def rank_zero_info(message: str) -> None:
    """Logs a message in the first process of a run."""
    _lightning(".utilities.rank_zero").rank_zero_info(message, stacklevel=5)


def rank_zero_warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns in the first process of a run. The warning names the place of the caller."""
    _lightning(".utilities.rank_zero").rank_zero_warn(message, category=category, stacklevel=5)


@contextlib.contextmanager
def isolate_rng() -> Iterator[None]:
    """Restores the global random generators after the block, also after an error, unlike Lightning's own."""
    isolation = _lightning(".utilities.seed").isolate_rng()
    isolation.__enter__()
    try:
        yield
    finally:
        isolation.__exit__(None, None, None)


@contextlib.contextmanager
def no_messages() -> Iterator[None]:
    """Inside the block Lightning logs no messages, such as those about devices that each trainer repeats."""
    loggers = [logging.getLogger(package) for package in _packages().values()]
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
    """Why the trainer's strategy is not supported, and what to do; ``None`` if it is supported."""
    strategy = trainer.strategy
    name = type(strategy).__name__
    alone = "use lightning_gif.attach() on a Trainer with devices=1"
    if is_a(strategy.launcher, "_MultiProcessingLauncher"):
        return (
            f"{name} trains in child processes, and the statistics gathered there are lost when these end. Use"
            " strategy='ddp', which needs a script instead of a notebook, or devices=1. Or train without the callback,"
            f" save a checkpoint, and {alone}."
        )
    if is_a(strategy, "ModelParallelStrategy"):
        size = _tensor_parallel_size(strategy)
        if size == 1:
            return None
        return (
            f"{name} splits each layer over {size} processes (tensor parallelism). Use"
            f" {name}(data_parallel_size={trainer.world_size}, tensor_parallel_size=1) and `fully_shard` in"
            f" `configure_model`. Or train without the callback, with {name}(save_distributed_checkpoint=False), and"
            f" {alone}."
        )
    whole = is_a(strategy, "SingleDeviceStrategy", "DDPStrategy")
    if whole and not is_a(strategy, "DeepSpeedStrategy", "XLAStrategy"):  # which derive from DDPStrategy
        return None
    return (
        f"{name} may split the parameters over the processes in a way of its own. Use ModelParallelStrategy with"
        " `fully_shard` in `configure_model`. Or train without the callback, make a single file of the checkpoint as"
        f" Lightning's page on the strategy describes, and {alone}."
    )


def _tensor_parallel_size(strategy: Any) -> int:
    """The number of processes that share each layer under ``ModelParallelStrategy``."""
    if strategy._device_mesh is not None:
        return int(strategy._device_mesh["tensor_parallel"].size())
    size = strategy._tensor_parallel_size
    return int(strategy.num_processes if size == "auto" else size)


@contextlib.contextmanager
def stage_of_training(trainer: Trainer) -> Iterator[None]:
    """Inside of it the trainer's flags are those of a training step: ``trainer.training`` is true, for example."""
    states, state = _lightning(".trainer.states"), trainer.state
    before = state.fn, state.stage
    state.fn, state.stage = states.TrainerFn.FITTING, states.RunningStage.TRAINING
    try:
        yield
    finally:
        state.fn, state.stage = before


@contextlib.contextmanager
def at_epoch(trainer: Trainer, epoch: int | None, step: int | None = None) -> Iterator[None]:
    """Inside the block, ``trainer.current_epoch`` is ``epoch``, and ``trainer.global_step`` is ``step``.

    With ``None`` they are unchanged.
    """
    epochs = trainer.fit_loop.epoch_progress.current
    steps = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
    before = epochs.completed, steps.completed
    epochs.completed = before[0] if epoch is None else epoch
    steps.completed = before[1] if step is None else step
    try:
        yield
    finally:
        epochs.completed, steps.completed = before


def watch_iterators(
    trainer: Trainer, around: Callable[[list[Any]], contextlib.AbstractContextManager[Any]]
) -> Callable[[], None]:
    """Makes the next ``fit`` enter a block around the creation of each iterator over the training data.

    The loaders and their iterators are created by ``fit``, the first before ``on_train_start``. Workers read ahead as
    soon as an iterator exists.

    Args:
        trainer: The trainer, in ``on_fit_start``.
        around: Returns the block, given the training loaders.

    Returns:
        A function that ends this.
    """
    combined = _lightning(".utilities.combined_loader").CombinedLoader

    class Watched(combined):  # type: ignore[misc, valid-type]
        def __iter__(self) -> Any:
            with around(self.flattened):
                return super().__iter__()

    source, made = trainer.fit_loop._data_source, list[Any]()
    original = source.dataloader

    def dataloader() -> Any:
        given = original()
        loader = given if isinstance(given, combined) else combined(given, "max_size_cycle")
        if type(loader) is combined:
            loader.__class__ = Watched
            made.append(loader)
        return loader

    def end() -> None:
        if vars(source).get("dataloader") is dataloader:
            del vars(source)["dataloader"]
        for loader in made:
            loader.__class__ = combined

    vars(source)["dataloader"] = dataloader
    return end


def brings_own(owner: object, hook: str) -> bool:
    """Whether a module or datamodule defines a hook itself, instead of inheriting Lightning's empty one."""
    return getattr(type(owner), hook).__module__.split(".")[0] not in ("lightning", "pytorch_lightning")


def is_lightning_module(module: object) -> TypeGuard[LightningModule]:
    """Whether an object is a LightningModule of either of Lightning's packages."""
    return is_a(module, "LightningModule")


def is_misconfiguration(error: object) -> bool:
    """Whether an error is a MisconfigurationException of either of Lightning's packages."""
    return is_a(error, "MisconfigurationException")


def is_a(instance: object, *names: str) -> bool:
    """``isinstance`` by class name, because the class may come from either of Lightning's packages."""
    return any(kind.__name__ in names for kind in type(instance).__mro__)

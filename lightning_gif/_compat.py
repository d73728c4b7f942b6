"""The one place that decides which of Lightning's two packages is used.

``lightning`` and ``pytorch-lightning`` ship the same code under two names, and classes of one are not classes of the
other. Everything below takes what it needs from here; nothing else in the package imports either of them.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
    from lightning.pytorch.utilities.seed import isolate_rng as _isolate_rng
    from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
else:
    try:
        from lightning.fabric.utilities.exceptions import MisconfigurationException
        from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
        from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
        from lightning.pytorch.utilities.seed import isolate_rng as _isolate_rng
    except ModuleNotFoundError:
        from lightning_fabric.utilities.exceptions import MisconfigurationException
        from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
        from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn
        from pytorch_lightning.utilities.seed import isolate_rng as _isolate_rng

    def __getattr__(name: str) -> Any:
        """The parts of LightningCLI, which few need and which need jsonargparse."""
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
    "attach_model",
    "brings_own",
    "isolate_rng",
    "lightning_version",
    "rank_zero_info",
    "rank_zero_warn",
    "trainer_of",
    "unsupported_strategy",
]


def lightning_version() -> str:
    """Of the package that is used."""
    return sys.modules[Trainer.__module__.partition(".")[0]].__version__


@contextlib.contextmanager
def isolate_rng() -> Iterator[None]:
    """Restores the global random generators at the end, also after an error, at which Lightning's own does not."""
    isolation = _isolate_rng()
    isolation.__enter__()
    try:
        yield
    finally:
        isolation.__exit__(None, None, None)


def trainer_of(module: Any) -> Trainer | None:
    """That which a LightningModule was last given to, if any; its property ``trainer`` raises where there is none."""
    return getattr(module, "_trainer", None)


def attach_model(trainer: Trainer, model: LightningModule, train_dataloaders: Any, datamodule: Any) -> None:
    """What every entry point of the trainer does before it runs: model, data and hooks know each other.

    There is no public way to do this without running a loop; these three calls have been the same since Lightning 2.0.
    """
    trainer.strategy.connect(model)
    trainer.strategy._lightning_module = model
    trainer._data_connector.attach_data(model, train_dataloaders=train_dataloaders, datamodule=datamodule)


def unsupported_strategy(trainer: Trainer) -> str | None:
    """Why the computations cannot run under the trainer's strategy, or ``None`` where they can.

    Under FSDP2 (``ModelParallelStrategy``, tried with gloo) the hooks of a forward pass put gathered parameters in the
    place of those that ``functional_call`` hands in, and gradients reach the shards by hooks of the backward pass:
    ``autograd.grad`` by either finds them unused, so that there is not even a first derivative to take another of.
    """
    strategy = trainer.strategy
    name = type(strategy).__name__
    if _is_a(strategy.launcher, "_MultiProcessingLauncher"):
        return f"{name} trains in child processes, and what is gathered there is lost when they end"
    whole = _is_a(strategy, "SingleDeviceStrategy", "DDPStrategy")
    if not whole or _is_a(strategy, "DeepSpeedStrategy", "XLAStrategy"):  # which derive from DDPStrategy
        return (
            f"{name} may split the parameters, and put gathered ones in their place by hooks that no derivative of a"
            " loss can be taken through"
        )
    return None


def brings_own(owner: object, hook: str) -> bool:
    """Whether a module or datamodule defines the hook itself instead of inheriting Lightning's empty one."""
    return getattr(type(owner), hook).__module__.split(".")[0] not in ("lightning", "pytorch_lightning")


def _is_a(instance: object, *names: str) -> bool:
    """``isinstance`` by class name: the class may come from either package, whichever this module took."""
    return any(kind.__name__ in names for kind in type(instance).__mro__)

"""From the arguments of a command to a trainer with the model of a checkpoint and its data."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, Subset
from typing_extensions import override

from .._compat import LightningArgumentParser, LightningCLI, LightningModule, no_messages
from ..callback import GIFCallback, attach
from ..data.structure import describe
from ..distributed import ProcessGroup
from ..errors import CheckpointError, ConfigurationError, TrainingDataError
from ..storage.checkpoints import read_checkpoint
from .parsing import classes_first, explain_errors, parser_options, shorten_help

__all__ = ["Tool"]

# Callbacks that are left out of retraining: they write files, or need a logger.
_NOT_IN_RETRAINING = {"GIFCallback", "Checkpoint", "LearningRateMonitor", "DeviceStatsMonitor"}

_LOADERS = {"train": "train_dataloader", "val": "val_dataloader", "test": "test_dataloader"}


class Tool(LightningCLI):
    """``LightningCLI`` without subcommands. It adds the callback's arguments as ``gif``, and those of the command.

    Attributes:
        checkpoint: The content of the checkpoint.
        callback: The callback. It is attached to the trainer and to the model with the checkpoint's weights.
    """

    def __init__(self, command: str, run: Callable[..., int], arguments: list[str]) -> None:
        self._command = run
        super().__init__(
            save_config_callback=None,
            trainer_defaults={"devices": 1, "logger": False, "enable_checkpointing": False},
            seed_everything_default=False,
            parser_kwargs=parser_options(command, run),
            args=classes_first(arguments),
            run=False,
        )

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """The parser, with the arguments of the command before those of ``LightningCLI``."""
        parser = super().init_parser(**kwargs)
        self._names = parser.add_function_arguments(self._command, skip={"tool"})
        return parser

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the arguments of the callback."""
        parser.add_class_arguments(GIFCallback, "gif")
        parser.add_argument("--weights_only", help=argparse.SUPPRESS)  # config files of `fit` have it

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the arguments. The model's hyperparameters come from the checkpoint, unless they are given."""
        shorten_help(parser, args, self._names)
        with explain_errors(parser):
            self.config = parser.parse_args(args)
        self.checkpoint = read_checkpoint(self.config.ckpt_path)
        saved = self.checkpoint.get("hyper_parameters")
        accepted = self.config.model.get("init_args")
        if isinstance(saved, dict) and accepted is not None:
            with explain_errors(parser):
                given = parser.parse_args(args, defaults=False).model.get("init_args") or {}
                restored = {name: saved[name] for name in vars(accepted) if name in saved and name not in given}
                self.config = parser.parse_object({"model": {"init_args": restored}}, self.config)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """The trainer.

        Raises:
            ConfigurationError: If the trainer does not accept its arguments.
        """
        try:
            return super().instantiate_trainer(**kwargs)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"The arguments of the trainer, --trainer.…, are not valid: {error}") from error

    @override
    def after_instantiate_classes(self) -> None:
        """Attaches the callback, and loads the checkpoint into the model."""
        present = [callback for callback in self.trainer.callbacks if isinstance(callback, GIFCallback)]
        if present and self.config.gif != self.parser.get_defaults().gif:
            raise ConfigurationError(
                "The trainer of the config file has a GIFCallback, and `gif` is given, too. Give its arguments in one"
                " place only: in the file, or by --gif with --trainer.callbacks null after the file."
            )
        self.callback = present[0] if present else self.config_init.gif
        saved = self.checkpoint.get("epoch")
        epoch = saved if isinstance(saved, int) and saved >= 0 else None
        attach(self.trainer, self.model, datamodule=self.datamodule, callback=self.callback, epoch=epoch)
        self.model.configure_model()
        # A copy, because on_load_checkpoint may change it, and the original is written later.
        loaded = {**self.checkpoint, "state_dict": dict(self.checkpoint["state_dict"])}
        self.model.on_load_checkpoint(loaded)
        try:
            self.model.load_state_dict(loaded["state_dict"])
        except RuntimeError as error:
            raise CheckpointError(
                f"The checkpoint {self.config.ckpt_path!r} does not fit {type(self.model).__name__}: {error} Give the"
                " arguments with which it was trained: --model.init_args.…, or the config file of the run."
            ) from None
        self.callback.on_load_checkpoint(self.trainer, self.model, self.checkpoint)

    def run_command(self) -> int:
        """Runs the command with its arguments."""
        return self._command(self, **{name: self.config[name] for name in self._names})

    @cached_property
    def train_loader(self) -> DataLoader[Any]:
        """The training loader. It is made once, because one that splits data at random may differ each time."""
        return self.loader("train")

    def check_retraining(self) -> None:
        """Checks that :meth:`retrain` will train as the checkpoint was trained.

        Raises:
            ConfigurationError: If the length of training is not known.
            TrainingDataError: If the training loader cannot be restricted to some examples.
        """
        length = self.config.trainer
        if length.max_epochs is None and length.max_steps == -1 and length.max_time is None:
            raise ConfigurationError(
                "New models must be trained as long as the checkpoint: give --trainer.max_epochs, or the config file of"
                " its training."
            )
        _restricted(self.train_loader, [0], 0, allow_empty=True)

    def retrain(self, indices: list[int], seed: int) -> LightningModule:
        """A new model from the same configuration, trained on some of the training examples.

        Its trainer has no loggers and writes no checkpoints. Random generators are seeded by the caller.

        Args:
            indices: The dataset indices of the training examples.
            seed: The seed of the order of the examples.
        """
        config = self.config.clone()
        config.data, config.trainer.logger = None, False
        loader = _restricted(self.train_loader, indices, seed)
        own = self.config_init, self.model
        try:
            self.config_init = self.parser.instantiate_classes(config)
            self.model = self.config_init.model
            self._add_configure_optimizers_method_to_model(None)
            options, model = dict(self.config_init.trainer), self.model
        finally:
            self.config_init, self.model = own
        given = options["callbacks"] or []
        given = given if isinstance(given, list) else [given]
        options |= {
            "callbacks": [one for one in given if _NOT_IN_RETRAINING.isdisjoint(k.__name__ for k in type(one).__mro__)],
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        with no_messages():
            trainer = self.trainer_class(**options)
            if self.datamodule is None:
                trainer.fit(model, train_dataloaders=loader)
            else:
                trainer.fit(model, datamodule=_with_training_loader(self.datamodule, loader))
        return model

    def loader(self, split: str) -> DataLoader[Any]:
        """The training, validation or test loader of the datamodule, or else of the model.

        Raises:
            TrainingDataError: If neither has one.
        """
        loader = self.find_loader(split)
        if loader is None:
            other = "" if split == "train" else ", or give another --split (train, val or test)"
            raise TrainingDataError(
                f"There is no {_LOADERS[split]} in the datamodule or the model. Give a datamodule that has one, by"
                f" --data package.module.Class{other}."
            )
        return loader

    def find_loader(self, split: str) -> DataLoader[Any] | None:
        """Like :meth:`loader`, but returns ``None`` if there is none."""
        hook = _LOADERS[split]
        loader = self.callback.loaders.find(self.trainer, hook, ProcessGroup.of(self.trainer))
        if loader is None:
            return None
        loader = loader[0] if isinstance(loader, (list, tuple)) and len(loader) == 1 else loader
        if not isinstance(loader, DataLoader):
            raise TrainingDataError(f"Expected a DataLoader from {hook}, got {describe(loader)}.")
        return loader


def _restricted(
    loader: DataLoader[Any], indices: list[int], seed: int, *, allow_empty: bool = False
) -> DataLoader[Any]:
    """A loader like the given one, but of some of its examples.

    Args:
        loader: The loader.
        indices: The dataset indices of the examples.
        seed: The seed of their order, if the loader shuffles.
        allow_empty: Whether the loader may have no batch.

    Raises:
        TrainingDataError: If it draws examples in another way than in the order of the dataset or by ``shuffle=True``,
            or if there is no whole batch and the loader drops others.
    """
    sampler = loader.sampler
    shuffles = isinstance(sampler, RandomSampler) and not sampler.replacement and sampler._num_samples is None
    known = type(loader.batch_sampler) is BatchSampler and loader.batch_size is not None
    if not known or not (shuffles or isinstance(sampler, SequentialSampler)):
        raise TrainingDataError(
            f"The training loader draws examples by {type(sampler).__name__} and {type(loader.batch_sampler).__name__},"
            " which the command cannot restrict to a subset: it needs a map-style dataset with a batch_size, in order"
            " or with shuffle=True. In Python, trainer.validate_influence takes your own function for retraining."
        )
    if loader.drop_last and len(indices) < (loader.batch_size or 1) and not allow_empty:
        raise TrainingDataError(
            f"A subset has {len(indices)} training examples, fewer than the batch size {loader.batch_size}, and the"
            " training loader drops the last batch. Give a larger --share."
        )
    same = ("collate_fn", "num_workers", "pin_memory", "drop_last", "timeout", "worker_init_fn", "prefetch_factor")
    return DataLoader(
        Subset(loader.dataset, indices),
        loader.batch_size,
        shuffle=shuffles,
        generator=torch.Generator().manual_seed(seed),
        multiprocessing_context=loader.multiprocessing_context,
        persistent_workers=loader.persistent_workers,
        **{name: getattr(loader, name) for name in same},
    )


def _with_training_loader(datamodule: Any, loader: DataLoader[Any]) -> Any:
    """A datamodule with the same data, which are ready already, and another training loader."""

    def nothing(*args: Any, **kwargs: Any) -> None: ...

    other = copy.copy(datamodule)
    other.prepare_data = other.setup = other.teardown = nothing
    other.train_dataloader = lambda: loader
    return other

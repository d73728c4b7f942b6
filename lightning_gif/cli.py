"""The command line: explain and edit a checkpoint, test scores, undo an edit, and verify the audit log.

Models, data, trainers and config files are given as for ``LightningCLI``, on which it is built.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, Subset
from typing_extensions import override

from ._compat import (
    LightningArgumentParser,
    LightningCLI,
    LightningModule,
    MisconfigurationException,
    no_messages,
)
from .callback import GIFCallback, attach
from .config import check_count
from .data.structure import describe, tensors
from .distributed import ProcessGroup
from .edit import Edit
from .errors import CheckpointError, ConfigurationError, GIFError, TrainingDataError
from .parameters import weights_digest
from .session import TargetsChoice
from .storage.atomic import replacing, sync
from .storage.audit_log import Event
from .storage.checkpoints import read_checkpoint
from .storage.interrupts import uninterrupted
from .unlearning.journal import Journal
from .unlearning.report import UnlearnReport
from .verification import verify as _verify

__all__ = ["main"]

# Callbacks that are left out of retraining: they write files, or need a logger.
_NOT_IN_RETRAINING = {"GIFCallback", "Checkpoint", "LearningRateMonitor", "DeviceStatsMonitor"}

_LOADERS = {"train": "train_dataloader", "val": "val_dataloader", "test": "test_dataloader"}


# --------------------------------------------------------------------------------------------------------------------
# The commands. Their arguments are those of the command line, except `tool`.
# --------------------------------------------------------------------------------------------------------------------


def influence(
    tool: _Tool,
    ckpt_path: str,
    output: str,
    split: Literal["train", "val", "test"] = "test",
    indices: list[int] | int | None = None,
    indices_file: str | None = None,
    per_example: bool = False,
    k: int = 10,
    targets: TargetsChoice | None = None,
    snapshots: bool | None = None,
) -> int:
    """Scores the training examples by their influence on the loss of some examples.

    Args:
        tool: The trainer with the model and its data.
        ckpt_path: The checkpoint to explain.
        output: The folder to save the report to.
        split: The dataset that the query examples are from.
        indices: Dataset indices of the query examples, such as ``17`` or ``[17,4031]``; by default all.
        indices_file: A text file with these indices, separated by white space or commas.
        per_example: Whether each example is a query of its own. By default the query is their mean.
        k: The number of proponents, and of opponents, that are shown.
        targets: The parameters that scores are restricted to; by default all parameters are used.
        snapshots: Whether to average over the present weights and the snapshots in the checkpoint; by default if there
            are any. Without ``gif.snapshots``, one of them is used. Set it to their number to use all.
    """
    loader = tool.loader(split)
    wanted = _indices(indices, indices_file)
    if wanted is not None:
        loader = _subset(loader, wanted, split)
    options: dict[str, Any] = {"k": k, "per_example": per_example, "targets": targets, "snapshots": snapshots}
    report = tool.callback.influence(loader, dataloader=tool.loader("train"), **options)
    report.save(output)
    print(report)
    print(f"The report is in {output}.")
    return 0


def validate(
    tool: _Tool,
    ckpt_path: str,
    output: str,
    split: Literal["train", "val", "test"] = "test",
    indices: list[int] | int | None = None,
    indices_file: str | None = None,
    n_queries: int = 50,
    n_subsets: int = 8,
    n_seeds: int = 1,
    share: float = 0.5,
    folder: str | None = None,
    targets: TargetsChoice | None = None,
    snapshots: bool | None = None,
) -> int:
    """Tests how well the scores of a checkpoint predict retraining, by training new models on random subsets.

    The new models are trained with the model, data and trainer arguments of this command. So give those with which the
    checkpoint was trained. After an interruption, the same command resumes after the last model that was trained.

    Args:
        tool: The trainer with the model and its data.
        ckpt_path: The checkpoint whose scores are tested. It must be the end of its training, not its best epoch.
        output: The folder to save the report to.
        split: The dataset that the query examples are from.
        indices: Dataset indices of the query examples, such as ``17`` or ``[17,4031]``.
        indices_file: A text file with these indices, separated by white space or commas.
        n_queries: The number of query examples that are drawn at random if no indices are given.
        n_subsets: The number of random subsets of the training examples.
        n_seeds: The number of models that are trained on each subset. With two or more, the report has a noise ceiling:
            the LDS that perfect predictions would have.
        share: The share of the training examples that each subset keeps.
        folder: A folder for the losses of the new models; by default ``output`` with ``-retrainings`` added.
        targets: The parameters that scores are restricted to; by default all parameters are used.
        snapshots: Whether to average over the present weights and the snapshots in the checkpoint; by default if there
            are any. Without ``gif.snapshots``, one of them is used. Set it to their number to use all.
    """
    check_count("n_queries", n_queries)
    tool.check_retraining()
    loader = tool.loader(split)
    wanted = _indices(indices, indices_file)
    if wanted is None:
        size = len(loader.dataset)  # type: ignore[arg-type]
        drawn = torch.randperm(size, generator=torch.Generator().manual_seed(0))[:n_queries]
        wanted = drawn.sort().values.tolist()
    losses = f"{output.rstrip('/')}-retrainings" if folder is None else folder
    report = tool.callback.validate_influence(
        _subset(loader, wanted, split),
        tool.retrain,
        n_subsets=n_subsets,
        n_seeds=n_seeds,
        share=share,
        folder=losses,
        targets=targets,
        snapshots=snapshots,
        dataloader=tool.train_loader,
    )
    report.save(output)
    print(report)
    print(f"The report is in {output}, the losses of the new models in {losses}.")
    return 0


def unlearn(
    tool: _Tool,
    ckpt_path: str,
    output: str,
    edit: str,
    indices: list[int] | int | None = None,
    indices_file: str | None = None,
    relabel: int | float | list[int] | list[float] | None = None,
    step: float | str = "auto",
    unseen: bool = True,
    targets: TargetsChoice = "batch",
    refresh_statistics: bool = False,
    record: str | None = None,
    solves_to: str | None = None,
) -> int:
    """Makes a checkpoint forget training examples, or corrects their labels.

    Args:
        tool: The trainer with the model and its data.
        ckpt_path: The checkpoint to edit. It is not changed, unless it is also the output.
        output: The file for the edited checkpoint.
        edit: A new file for the edit, which ``undo`` needs.
        indices: Dataset indices of the training examples to forget, such as ``17`` or ``[17,4031]``.
        indices_file: A text file with these indices, separated by white space or commas.
        relabel: Their new labels, in the order of the indices, or one label for all. By default the examples are
            removed.
        step: How far the edit goes: ``auto``, ``match``, ``relinearise``, ``search``, ``natural`` or a step size.
        unseen: Use the validation data as unseen examples, if there are any.
        targets: The parameters that may change.
        refresh_statistics: Recompute the running statistics of BatchNorm.
        record: The audit log; by default that of ``gif.record``.
        solves_to: A folder for the solved changes, from which the same command resumes if it is interrupted. It is
            removed when the edit is written.
    """
    wanted = _indices(indices, indices_file)
    if not wanted:
        raise ConfigurationError("Give the training examples to forget: --indices '[17,4031]' or --indices_file.")
    target, edit_file = _check_output(output, "output"), _check_output(edit, "edit", new=True)
    if target == edit_file:
        raise ConfigurationError(f"--output and --edit must be different files, got {output!r} for both.")
    validation = tool.find_loader("val") if unseen else None
    report = tool.callback.unlearn(
        wanted,
        relabel=torch.tensor(relabel) if isinstance(relabel, list) else relabel,  # type: ignore[arg-type]
        unseen=False if validation is None else validation,
        step=step,
        targets=targets,
        refresh_statistics=refresh_statistics,
        dataloader=tool.loader("train"),
        record=record,
        solves_to=solves_to,
        dry_run=True,
    )
    report.edit.apply(tool.model)
    _rewrite(
        tool.checkpoint,
        report,
        "unlearn",
        target,
        report.record,
        edit=edit_file,
        expected=weights_digest(tool.model),
        solves=None if solves_to is None else Path(solves_to),
    )
    print(report)
    print(f"The edited checkpoint is {output}, the edit {edit}.")
    unchanged = [name for name, part in tool.checkpoint.items() if name != "state_dict" and tensors(part)]
    if unchanged:
        print(f"Other parts of the checkpoint are unchanged and still depend on the data: {', '.join(unchanged)}.")
    if tool.checkpoint.get("optimizer_states"):
        print("The optimizer's state is unchanged. Create a new optimizer before you train further.")
    return 0


def undo(edit: str, ckpt_path: str, output: str, record: str | None = None) -> int:
    """Undoes an edit in a checkpoint: restores the weights bit for bit.

    Args:
        edit: The edit file.
        ckpt_path: The edited checkpoint. It is not changed, unless it is also the output.
        output: The file for the checkpoint without the edit.
        record: The audit log.
    """
    target = _check_output(output, "output")
    checkpoint, report = read_checkpoint(ckpt_path), UnlearnReport.load(edit)
    _check_ties(checkpoint["state_dict"], report.edit)
    _rewrite(checkpoint, report, "undo", target, record)
    print(f"{output} has, bit for bit, the weights before the edit.")
    return 0


def verify(
    record: str,
    edit: list[str] | str | None = None,
    ckpt_path: str | None = None,
    published: str | None = None,
) -> int:
    """Verifies an audit log. Exits with 0 if it is intact, with 1 if not.

    Args:
        record: The audit log.
        edit: An edit file, or a list of edit files. Each must match its entry.
        ckpt_path: A checkpoint. Its weights must match the last entry.
        published: The hash of an entry that was stored elsewhere.
    """
    edits = [edit] if isinstance(edit, str) else edit or []
    verification = _verify(record, edits=edits, checkpoint=ckpt_path, published=published)
    print(verification)
    return 0 if verification.ok else 1


def check(tool: _Tool, ckpt_path: str, n_queries: int = 1, n_forget: int = 64) -> int:
    """Reports how a model's losses are computed, which layers may change, and what the other commands will cost.

    Args:
        tool: The trainer with the model and its data.
        ckpt_path: The checkpoint.
        n_queries: The number of queries whose cost is estimated.
        n_forget: The number of forget examples for which the cost of an edit is estimated.
    """
    print(tool.callback.influence.check(n_queries=n_queries, n_forget=n_forget, dataloader=tool.loader("train")))
    return 0


# --------------------------------------------------------------------------------------------------------------------
# From arguments to a model with its data
# --------------------------------------------------------------------------------------------------------------------

_WITH_MODEL: dict[str, Callable[..., int]] = {
    "check": check,
    "influence": influence,
    "validate": validate,
    "unlearn": unlearn,
}
_WITHOUT_MODEL: dict[str, Callable[..., int]] = {"undo": undo, "verify": verify}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: The arguments, by default those of the process.

    Returns:
        The exit code: 0 for success, 1 for a failed verification, 2 for an error, 130 for Ctrl-C. Errors and Ctrl-C
        print one line.
    """
    commands = {**_WITH_MODEL, **_WITHOUT_MODEL}
    parser = argparse.ArgumentParser(
        prog="lightning-gif",
        description="Influence functions and unlearning for checkpoints of PyTorch Lightning.",
        epilog="\n".join(f"{name:<10} {_first_line(run)}" for name, run in commands.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=commands, help="followed by its arguments, or --help")
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = parser.parse_args(arguments[:1]).command
    try:
        import docstring_parser  # noqa: F401
        import jsonargparse  # noqa: F401
    except ModuleNotFoundError as error:
        return _fail(command, f"The command line needs {error.name}. Install it: pip install 'lightning-gif[cli]'")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as for python -m, because models are given by import path
    try:
        if command in _WITHOUT_MODEL:
            return _run_without_model(command, _WITHOUT_MODEL[command], arguments[1:])
        return _Tool(command, _WITH_MODEL[command], arguments[1:]).run_command()
    except (GIFError, MisconfigurationException, OSError) as error:
        return _fail(command, str(error))
    except KeyboardInterrupt as interrupt:
        message = str(interrupt) or "No file was written in part."
        if not str(interrupt) and command == "unlearn":
            message += " With --solves_to, the same command resumes after the last finished solve."
        if command == "validate":
            message += " The same command resumes after the last model that was trained."
        return _fail(command, f"interrupted. {message}", code=130)


def _run_without_model(command: str, run: Callable[..., int], arguments: list[str]) -> int:
    """Runs a command with arguments from the command line or a config file."""
    import jsonargparse

    parser = jsonargparse.ArgumentParser(**_parser_options(command, run))
    parser.add_argument(
        "-c", "--config", action=jsonargparse.ActionConfigFile, help="A configuration file in JSON or YAML."
    )
    parser.add_function_arguments(run)
    with _explain_errors(parser):
        given = parser.parse_args(arguments).as_dict()
    given.pop("config", None)
    return run(**given)


def _parser_options(command: str, run: Callable[..., int]) -> dict[str, Any]:
    """The options of a command's parser. It raises errors instead of exiting with hundreds of lines of usage."""
    return {
        "prog": f"lightning-gif {command}",
        "usage": "%(prog)s [arguments]; --help lists them",
        "description": _first_line(run),
        "exit_on_error": False,
    }


@contextlib.contextmanager
def _explain_errors(parser: Any) -> Iterator[None]:
    """A block in which an error of the parser becomes one that says what to do.

    Raises:
        ConfigurationError: If the parser does not accept an argument.
    """
    try:
        yield
    except argparse.ArgumentError as error:
        raise ConfigurationError(_remedy(" ".join(str(error).split()), parser)) from None


def _remedy(error: str, parser: Any) -> str:
    """What to do about an error of the parser, followed by the error unless the remedy explains it completely."""
    # The two alternatives are the wordings of newer and older versions of jsonargparse.
    missing = re.match(r'the following arguments are required: (.+)|Key "([\w.]+)" is required', error)
    if missing:
        names = (missing[1] or missing[2]).split(", ")
        return f"{', '.join(f'--{name}' for name in names)} must be given, see --help."
    if unknown := re.match(r"[Uu]nrecognized arguments: --([\w.]+)", error):
        known = [option[2:] for action in parser._actions for option in action.option_strings if option[:2] == "--"]
        close = difflib.get_close_matches(unknown[1], known, n=1)
        return f"{error}. {f'Did you mean --{close[0]}?' if close else 'See --help.'}"
    remedy = "See --help."
    if re.search(r"Parser key \"(model|data)\".*Given value type: <class 'dict'>", error):
        remedy = (
            "If a config file has arguments without a class_path, as for LightningCLI(Model, Data), give the classes"
            " before it: --model package.Model --data package.Data --config …"
        )
    elif re.search(r"Parser key \"(model|data)\".*Given value type: <class 'str'>", error):
        remedy = "Give the class by its import path, such as --model package.module.Class."
    elif lacking := re.match(r"argument (--[\w.]+): expected one argument", error):
        remedy = f"Give it a value, such as {lacking[1]} true, see --help."
    elif listed := re.search(r"list\[.*Given value: ([^\s\[]\S*,\S*)$", error):
        remedy = f"Write a list in brackets: '[{listed[1]}]'."
    return f"{remedy} {error}"


class _Tool(LightningCLI):
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
            parser_kwargs=_parser_options(command, run),
            args=arguments,
            run=False,
        )

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the arguments of the callback and of the command."""
        parser.add_class_arguments(GIFCallback, "gif")
        self._names = parser.add_function_arguments(self._command, skip={"tool"})
        parser.add_argument("--weights_only", help=argparse.SUPPRESS)  # config files of `fit` have it

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the arguments. The model's hyperparameters come from the checkpoint, unless they are given."""
        with _explain_errors(parser):
            self.config = parser.parse_args(args)
        self.checkpoint = read_checkpoint(self.config.ckpt_path)
        saved = self.checkpoint.get("hyper_parameters")
        accepted = self.config.model.get("init_args")
        if isinstance(saved, dict) and accepted is not None:
            with _explain_errors(parser):
                given = parser.parse_args(args, defaults=False).model.get("init_args") or {}
                restored = {name: saved[name] for name in vars(accepted) if name in saved and name not in given}
                self.config = parser.parse_object({"model": {"init_args": restored}}, self.config)

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
            raise TrainingDataError(
                f"There is no {_LOADERS[split]} in the datamodule or the model. Give another --split (train, val or"
                " test), or a datamodule that has one by --data."
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


# --------------------------------------------------------------------------------------------------------------------
# Private
# --------------------------------------------------------------------------------------------------------------------


def _indices(given: list[int] | int | None, file: str | None) -> list[int] | None:
    """The indices from the command line or from a file; ``None`` if neither is given."""
    if given is not None and file is not None:
        raise ConfigurationError("Give --indices or --indices_file, not both.")
    if file is None:
        return [given] if isinstance(given, int) else given
    words = Path(file).read_text(encoding="utf-8", errors="replace").replace(",", " ").split()
    bad = [word for word in words if not word.isdecimal()]
    if bad or not words:
        raise ConfigurationError(
            f"{file!r} must hold whole numbers, separated by white space or commas, but"
            f" {f'there is {bad[0]!r}' if bad else 'it is empty'}."
        )
    return [int(word) for word in words]


def _subset(loader: DataLoader[Any], indices: list[int], split: str) -> DataLoader[Any]:
    """A loader of the examples with the given dataset indices."""
    size = len(loader.dataset)  # type: ignore[arg-type]
    outside = [index for index in indices if not 0 <= index < size]
    if outside or not indices:
        raise ConfigurationError(
            f"--indices must be one or more indices from 0 to {size - 1}, the examples of the split {split!r}, got"
            f" {outside[0] if outside else 'none'}."
        )
    return DataLoader(Subset(loader.dataset, indices), loader.batch_size or 1, collate_fn=loader.collate_fn)


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


def _check_output(path: str, what: str, *, new: bool = False) -> Path:
    """The resolved path of a file to write. Creates its folder.

    Args:
        path: The path that the user gave.
        what: The name of the argument.
        new: Whether the file must not exist.

    Raises:
        ConfigurationError: If the path is a folder, or exists although it must not.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise ConfigurationError(f"--{what} must be a file, but {path!r} is a folder.")
    if new and target.exists():
        raise ConfigurationError(
            f"--{what} {path!r} exists already, and may be needed to undo an edit. Give another file."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _rewrite(
    checkpoint: dict[str, Any],
    report: UnlearnReport,
    event: Literal["unlearn", "undo"],
    output: Path,
    record: str | os.PathLike[str] | None,
    *,
    edit: Path | None = None,
    expected: str | None = None,
    solves: Path | None = None,
) -> None:
    """Applies or undoes an edit in a checkpoint, writes the checkpoint, and records it. If a part fails, none is done.

    The new checkpoint replaces ``output`` last, after everything that can fail because the disk is full.

    Args:
        checkpoint: The content of the checkpoint, which is changed in place.
        report: The report with the edit.
        event: Whether to apply or to undo the edit.
        output: The file to write.
        record: The audit log, or ``None``.
        edit: The file to save a new edit to, or ``None``.
        expected: The digest that the weights should have afterwards, if it is known.
        solves: The folder with the solved changes, which is removed at the end, or ``None``.

    Raises:
        CheckpointError: If the file cannot be written, or the weights differ from the expected ones.
    """
    weights = checkpoint["state_dict"]
    before = weights_digest(weights)
    if event == "undo":
        report.edit.undo(weights)
    else:
        report.edit.apply(weights)
    after = weights_digest(weights)
    if expected not in (None, after):
        raise CheckpointError(
            "The model does not hold the weights of the checkpoint bit for bit: they have another precision, loading"
            " changes them, or the checkpoint has tied weights twice. Nothing was written."
        )
    done = False
    try:
        with contextlib.ExitStack() as end:
            with contextlib.ExitStack() as take_back, replacing(output, take_back.pop_all) as temporary:
                try:
                    torch.save(checkpoint, temporary)
                except RuntimeError as error:  # the C++ writer raises this instead of an OSError if the disk is full
                    raise CheckpointError(f"{str(output)!r} cannot be written: {error}") from error
                sync(temporary)
                end.enter_context(uninterrupted())  # Ctrl-C waits until everything is written
                if edit is not None:
                    take_back.callback(edit.unlink, missing_ok=True)
                    report.save(edit)
                if record is not None:
                    report.write_down(event, record, before, after)
                    reverse: Event = "apply" if event == "undo" else "undo"
                    take_back.callback(report.write_down, reverse, record, after, before)
            if solves is not None:
                Journal.clear(solves)
            done = True
    except KeyboardInterrupt:
        if done:
            raise KeyboardInterrupt(f"{output} and all files that belong to it were written.") from None
        raise


def _check_ties(weights: dict[str, Any], edit: Edit) -> None:
    """Checks that a checkpoint does not have a tied weight twice, because the edit would be undone in one copy only.

    Raises:
        CheckpointError: If an edited weight equals another one. Without the model, it is unknown whether they are tied.
    """
    tensors_by_name = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
    others = {name: value for name, value in tensors_by_name.items() if name not in edit.indices}
    for name in sorted(tensors_by_name.keys() - others.keys()):
        edited = tensors_by_name[name]
        for other, value in others.items():
            if value.dtype == edited.dtype and value.data_ptr() != edited.data_ptr() and torch.equal(value, edited):
                raise CheckpointError(
                    f"{name!r} and {other!r} of the checkpoint are equal. If they are tied weights that were saved"
                    " twice, the edit would be undone in the first one only. Load the model, and use"
                    " UnlearnReport.load(edit, model).undo()."
                )


def _first_line(run: Callable[..., int]) -> str:
    return (run.__doc__ or "").splitlines()[0]


def _fail(command: str, message: str, *, code: int = 2) -> int:
    print(f"lightning-gif {command}: {' '.join(message.split())}", file=sys.stderr)
    return code

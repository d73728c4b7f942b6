"""The command line: ask about a checkpoint, edit it, take the edit back, and verify the record of edits.

Models, data, trainers and config files are given as to ``LightningCLI``, which this is built on.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from typing_extensions import override

from ._compat import LightningArgumentParser, LightningCLI, MisconfigurationException, brings_own
from .callback import GIFCallback, attach
from .data.structure import describe, tensors
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

_LOADERS = {"train": "train_dataloader", "val": "val_dataloader", "test": "test_dataloader"}


# --------------------------------------------------------------------------------------------------------------------
# The commands. Their arguments, but the first of those with a model, are those of the command line.
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
    snapshots: bool = False,
) -> int:
    """Tells which training examples moved the loss on some examples.

    Args:
        tool: The trainer with the model and its data.
        ckpt_path: The checkpoint to ask about.
        output: The folder to save the report to.
        split: Whose examples to ask about.
        indices: Their indices in that dataset, such as ``17`` or ``[17,4031]``; all of them by default.
        indices_file: Or a text file of them, separated by white space or commas.
        per_example: One query for each of them instead of one for their mean.
        k: How many proponents and opponents are shown.
        targets: Which parameters to look at; all by default.
        snapshots: Average over the states of training that the checkpoint has; give as many as ``gif.snapshots``.
    """
    loader = tool.loader(split)
    wanted = _indices(indices, indices_file)
    if wanted is not None:
        loader = _only(loader, wanted, split)
    options: dict[str, Any] = {"k": k, "per_example": per_example, "targets": targets, "snapshots": snapshots}
    report = tool.callback.influence(tool.trainer, loader, dataloader=tool.loader("train"), **options)
    report.save(output)
    print(report)
    print(f"The report is in {output}.")
    return 0


def unlearn(
    tool: _Tool,
    ckpt_path: str,
    output: str,
    edit: str,
    indices: list[int] | int | None = None,
    indices_file: str | None = None,
    relabel: int | float | list[int] | list[float] | None = None,
    step: float | str = "relinearise",
    unseen: bool = True,
    targets: TargetsChoice = "batch",
    refresh_statistics: bool = False,
    record: str | None = None,
    solves_to: str | None = None,
) -> int:
    """Takes training examples out of a checkpoint, or corrects their labels.

    Args:
        tool: The trainer with the model and its data.
        ckpt_path: The checkpoint to edit; it is left as it is, unless it is also the output.
        output: The file for the edited checkpoint.
        edit: The file for the edit, which can take it back.
        indices: The dataset indices of the training examples to forget, such as ``17`` or ``[17,4031]``.
        indices_file: Or a text file of them, separated by white space or commas.
        relabel: The labels they should have had, in the order of the indices, or one for all; they are removed by
            default.
        step: How far to go: ``relinearise``, ``search``, ``natural`` or a number.
        unseen: Compare with the validation data, where there is some: see ``unlearn`` of the callback.
        targets: Which parameters to change.
        refresh_statistics: Compute the running statistics of BatchNorm anew.
        record: The file to record the edit in, where it is not that of ``gif.record``.
        solves_to: A folder to go on from where the command was interrupted; it is removed in the end.
    """
    wanted = _indices(indices, indices_file)
    if not wanted:
        raise ConfigurationError("Say which training examples to forget: --indices '[17,4031]' or --indices_file.")
    target, kept = _check_output(output, "output"), _check_output(edit, "edit", new=True)
    if target == kept:
        raise ConfigurationError(f"--output and --edit must be two files, got {output!r} for both.")
    validation = tool.find_loader("val") if unseen else None
    report = tool.callback.unlearn(
        tool.trainer,
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
        edit=kept,
        expected=weights_digest(tool.model),
        solves=None if solves_to is None else Path(solves_to),
    )
    print(report)
    remembering = [name for name, part in tool.checkpoint.items() if name != "state_dict" and tensors(part)]
    print(f"The edited checkpoint is {output}, the edit {edit}.")
    if remembering:
        print(f"The rest of the checkpoint is as it was and remembers the data: {', '.join(remembering)}.")
    if tool.checkpoint.get("optimizer_states"):
        print("Its optimizer's state is that of before: start a new optimizer to train on.")
    return 0


def undo(edit: str, ckpt_path: str, output: str, record: str | None = None) -> int:
    """Takes an edit out of a checkpoint: its weights are bit by bit those before.

    Args:
        edit: The edit file.
        ckpt_path: The checkpoint that the edit is in; it is left as it is, unless it is also the output.
        output: The file for the checkpoint without the edit.
        record: The file to record this in.
    """
    target = _check_output(output, "output")
    checkpoint, report = read_checkpoint(ckpt_path), UnlearnReport.load(edit)
    _check_ties(checkpoint["state_dict"], report.edit)
    _rewrite(checkpoint, report, "undo", target, record)
    print(f"{output} has, bit by bit, the weights before the edit.")
    return 0


def verify(
    record: str,
    edit: list[str] | str | None = None,
    ckpt_path: str | None = None,
    published: str | None = None,
) -> int:
    """Checks a record of edits: 0 if all is well, 1 if not.

    Args:
        record: The record.
        edit: An edit file, or a list of them, that must be as recorded.
        ckpt_path: A checkpoint, whose weights must be those after the last entry.
        published: A hash of an entry that was kept elsewhere.
    """
    edits = [edit] if isinstance(edit, str) else edit or []
    found = _verify(record, edits=edits, checkpoint=ckpt_path, published=published)
    print(found)
    return 0 if found.ok else 1


# --------------------------------------------------------------------------------------------------------------------
# From arguments to a model with its data
# --------------------------------------------------------------------------------------------------------------------

_WITH_MODEL: dict[str, Callable[..., int]] = {"influence": influence, "unlearn": unlearn}
_WITHOUT: dict[str, Callable[..., int]] = {"undo": undo, "verify": verify}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: The arguments, by default those of the process.

    Returns:
        0 if all went well, 1 for a verification that failed, 2 for an error, 130 for Ctrl-C; both are told in one line.
    """
    commands = {**_WITH_MODEL, **_WITHOUT}
    parser = argparse.ArgumentParser(
        prog="lightning-gif",
        description="Influence and unlearning for checkpoints of PyTorch Lightning.",
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
        sys.path.insert(0, os.getcwd())  # as for a script there, or python -m: models are given by import path
    try:
        if command in _WITHOUT:
            return _run(command, _WITHOUT[command], arguments[1:])
        return _Tool(command, _WITH_MODEL[command], arguments[1:]).run_command()
    except (GIFError, MisconfigurationException, OSError) as error:
        return _fail(command, str(error))
    except KeyboardInterrupt as interrupt:
        goes_on = ""
        if command == "unlearn":
            goes_on = " With --solves_to, the same command goes on from the last solve that was finished."
        told = str(interrupt) or f"No file is written in part.{goes_on}"
        return _fail(command, f"interrupted. {told}", code=130)


def _run(command: str, run: Callable[..., int], arguments: list[str]) -> int:
    import jsonargparse

    parser = jsonargparse.ArgumentParser(**_named(command, run))
    parser.add_argument(
        "-c", "--config", action=jsonargparse.ActionConfigFile, help="A configuration file in JSON or YAML."
    )
    parser.add_function_arguments(run)
    with _told(parser):
        given = parser.parse_args(arguments).as_dict()
    given.pop("config", None)
    return run(**given)


def _named(command: str, run: Callable[..., int]) -> dict[str, Any]:
    """Of a command's parser. All arguments of a trainer, a model and its data would bury each error in their usage."""
    usage = "%(prog)s [arguments], which --help explains"
    return {
        "prog": f"lightning-gif {command}",
        "usage": usage,
        "description": _first_line(run),
        "exit_on_error": False,  # but raise, see _told
    }


@contextlib.contextmanager
def _told(parser: Any) -> Iterator[None]:
    """Turns what the parser does not take into an error that says what to do, where that is known.

    Raises:
        ConfigurationError: In its place.
    """
    try:
        yield
    except argparse.ArgumentError as error:
        raise ConfigurationError(_remedy(" ".join(str(error).split()), parser)) from None


def _remedy(told: str, parser: Any) -> str:
    """What to do about an error of the parser, which names its own classes; and that error."""
    missing = re.match(r'the following arguments are required: (.+)|Key "([\w.]+)" is required', told)
    if missing:  # in the words of the parser's newer and older versions
        names = (missing[1] or missing[2]).split(", ")
        return f"{', '.join(f'--{name}' for name in names)} must be given, see --help."
    if unknown := re.match(r"[Uu]nrecognized arguments: --([\w.]+)", told):
        known = [option[2:] for action in parser._actions for option in action.option_strings if option[:2] == "--"]
        close = difflib.get_close_matches(unknown[1], known, n=1)
        return f"{told}. {f'Did you mean --{close[0]}?' if close else 'See --help.'}"
    remedy = "See --help."
    if re.search(r"Parser key \"(model|data)\".*Given value type: <class 'dict'>", told):
        remedy = (
            "Where a config file gives arguments without a class_path, as that of LightningCLI(Model, Data) does, name"
            " the classes before it: --model package.Model --data package.Data --config …"
        )
    elif re.search(r"Parser key \"(model|data)\".*Given value type: <class 'str'>", told):
        remedy = "Give the class by its import path, such as --model package.module.Class."
    elif lacking := re.match(r"argument (--[\w.]+): expected one argument", told):
        remedy = f"Give it a value, such as {lacking[1]} true, or whatever --help says."
    elif listed := re.search(r"list\[.*Given value: ([^\s\[]\S*,\S*)$", told):
        remedy = f"Write a list in brackets: '[{listed[1]}]'."
    return f"{remedy} {told}"


class _Tool(LightningCLI):
    """``LightningCLI`` without its subcommands, with the callback's settings as ``gif`` and a command's arguments.

    Attributes:
        checkpoint: All that the checkpoint holds.
        callback: Attached to the trainer and the model, which has the checkpoint's weights.
    """

    def __init__(self, command: str, run: Callable[..., int], arguments: list[str]) -> None:
        self._command = run
        self._stages: set[str] = set()
        super().__init__(
            save_config_callback=None,
            trainer_defaults={"devices": 1, "logger": False, "enable_checkpointing": False},
            seed_everything_default=False,
            parser_kwargs=_named(command, run),
            args=arguments,
            run=False,
        )

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The callback's settings, and the arguments of the command."""
        parser.add_class_arguments(GIFCallback, "gif")
        self._names = parser.add_function_arguments(self._command, skip={"tool"})
        parser.add_argument("--weights_only", help=argparse.SUPPRESS)  # in the config files of `fit`

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Takes what the model was made with from the checkpoint, where nothing else is given."""
        with _told(parser):
            self.config = parser.parse_args(args)
        self.checkpoint = read_checkpoint(self.config.ckpt_path)
        kept = self.checkpoint.get("hyper_parameters")
        taken = self.config.model.get("init_args")
        if isinstance(kept, dict) and taken is not None:
            with _told(parser):
                given = parser.parse_args(args, defaults=False).model.get("init_args") or {}
                open_ = {name: kept[name] for name in vars(taken) if name in kept and name not in given}
                self.config = parser.parse_object({"model": {"init_args": open_}}, self.config)

    @override
    def after_instantiate_classes(self) -> None:
        """Loads the checkpoint, and gives the trainer its methods."""
        present = [callback for callback in self.trainer.callbacks if isinstance(callback, GIFCallback)]
        if present and self.config.gif != self.parser.get_defaults().gif:
            raise ConfigurationError(
                "The trainer of the config file has a GIFCallback, and `gif` is given too. Give its settings in one"
                " place: in the file, or by --gif with --trainer.callbacks null behind the file."
            )
        self.callback = present[0] if present else self.config_init.gif
        attach(self.trainer, self.model, datamodule=self.datamodule, callback=self.callback)
        self.model.configure_model()
        # A hook may change what is loaded, but not what will be written.
        loaded = {**self.checkpoint, "state_dict": dict(self.checkpoint["state_dict"])}
        self.model.on_load_checkpoint(loaded)
        try:
            self.model.load_state_dict(loaded["state_dict"])
        except RuntimeError as error:
            raise CheckpointError(
                f"The checkpoint {self.config.ckpt_path!r} does not fit {type(self.model).__name__}: {error} Give the"
                " arguments that it was trained with: --model.init_args.…, or the config file of the run."
            ) from None
        self.callback.on_load_checkpoint(self.trainer, self.model, self.checkpoint)

    def run_command(self) -> int:
        """Runs the command with its arguments."""
        return self._command(self, **{name: self.config[name] for name in self._names})

    def loader(self, split: str) -> DataLoader[Any]:
        """The training, validation or test loader, of the datamodule or else of the model.

        Raises:
            TrainingDataError: If there is none.
        """
        found = self.find_loader(split)
        if found is None:
            raise TrainingDataError(f"There is no {_LOADERS[split]} in the datamodule or the model. Give --data.")
        return found

    def find_loader(self, split: str) -> DataLoader[Any] | None:
        """The same, or ``None`` if there is none."""
        hook, stage = _LOADERS[split], "test" if split == "test" else "fit"
        owner = next((owner for owner in (self.datamodule, self.model) if owner and brings_own(owner, hook)), None)
        if owner is None:
            return None
        if owner is self.datamodule and stage not in self._stages:
            self._stages.add(stage)  # once each, as a trainer does: data may be split at random there
            owner.prepare_data()
            owner.setup(stage)
        found = getattr(owner, hook)()
        found = found[0] if isinstance(found, (list, tuple)) and len(found) == 1 else found
        if not isinstance(found, DataLoader):
            raise TrainingDataError(f"Expected a DataLoader from {hook}, got {describe(found)}.")
        return found


# --------------------------------------------------------------------------------------------------------------------
# Private
# --------------------------------------------------------------------------------------------------------------------


def _indices(given: list[int] | int | None, file: str | None) -> list[int] | None:
    """The indices of the command line or of a file, ``None`` where neither is given."""
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


def _only(loader: DataLoader[Any], indices: list[int], split: str) -> DataLoader[Any]:
    """A loader of some of the examples of another."""
    size = len(loader.dataset)  # type: ignore[arg-type]
    outside = [index for index in indices if not 0 <= index < size]
    if outside or not indices:
        raise ConfigurationError(
            f"--indices must be one or more from 0 to {size - 1}, which the split {split!r} has, got"
            f" {outside[0] if outside else 'none'}."
        )
    return DataLoader(Subset(loader.dataset, indices), loader.batch_size or 1, collate_fn=loader.collate_fn)


def _check_output(path: str, what: str, *, new: bool = False) -> Path:
    """The file to write, in a folder that is there; a link is followed."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise ConfigurationError(f"--{what} must be a file, but {path!r} is a folder.")
    if new and target.exists():
        raise ConfigurationError(
            f"--{what} {path!r} is there already, and may be needed to undo an edit. Name another."
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
    """Edits the weights of a checkpoint, writes it to a file, and tells the record: all of it, or nothing.

    The file takes its place last, when nothing is left that may fail for want of room.

    Args:
        checkpoint: Changed in place.
        report: The edit.
        event: Whether to make it or take it back.
        output: The file.
        record: Its record, if it has one.
        edit: Where to save the edit, if it is new.
        expected: The digest of the weights that there should be then.
        solves: The folder of what was solved for, which is let go of in the end.
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
            "The model does not hold the weights of the checkpoint bit by bit: they are of another precision, are"
            " changed as they are loaded, or tied weights are there twice. Nothing was written."
        )
    done = False
    try:
        with contextlib.ExitStack() as end:
            with contextlib.ExitStack() as take_back, replacing(output, take_back.pop_all) as temporary:
                try:
                    torch.save(checkpoint, temporary)
                except RuntimeError as error:  # of the C++ writer, which raises no OSError where the disk is full
                    raise CheckpointError(f"{str(output)!r} cannot be written: {error}") from error
                sync(temporary)
                end.enter_context(uninterrupted())  # until all is done
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
            raise KeyboardInterrupt(f"{output} is written, and all that belongs to it.") from None
        raise


def _check_ties(weights: dict[str, Any], edit: Edit) -> None:
    """Refuses weights of which one that the edit is in is there twice: the model's, which tells, is not at hand."""
    found = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
    others = {name: value for name, value in found.items() if name not in edit.indices}
    for name in sorted(found.keys() - others.keys()):
        here = found[name]
        for other, value in others.items():
            if value.dtype == here.dtype and value.data_ptr() != here.data_ptr() and torch.equal(value, here):
                raise CheckpointError(
                    f"{name!r} and {other!r} of the checkpoint are equal, as tied weights that were saved twice would"
                    " be, and the edit would be taken back in the first only. Load the model, and use"
                    " UnlearnReport.load(edit, model).undo()."
                )


def _first_line(run: Callable[..., int]) -> str:
    return (run.__doc__ or "").splitlines()[0]


def _fail(command: str, message: str, *, code: int = 2) -> int:
    print(f"lightning-gif {command}: {' '.join(message.split())}", file=sys.stderr)
    return code

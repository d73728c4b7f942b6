"""The commands on a model with its data. Their arguments are those of the command line, except ``tool``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Subset

from ..attribution.gradient_store import RANK
from ..calls import check_record
from ..config import check_count
from ..data.structure import tensors
from ..errors import ConfigurationError
from ..parameters import weights_digest
from ..session import TargetsChoice
from .rewriting import check_output, rewrite
from .tool import Tool

__all__ = ["COMMANDS", "check", "influence", "run", "store", "unlearn", "validate"]


def run(command: str, arguments: Sequence[str]) -> int:
    """Runs one of the commands."""
    return Tool(command, COMMANDS[command], list(arguments)).run_command()


def check(tool: Tool, ckpt_path: str, n_queries: int = 1, n_forget: int = 64) -> int:
    """Reports how a model's losses are computed, which layers may change, and what the other commands will cost.

    Args:
        tool: The trainer with the model and its data.
        ckpt_path: The checkpoint.
        n_queries: The number of queries whose cost is estimated.
        n_forget: The number of forget examples for which the cost of an edit is estimated.
    """
    print(tool.callback.influence.check(n_queries=n_queries, n_forget=n_forget, dataloader=tool.loader("train")))
    return 0


def influence(
    tool: Tool,
    ckpt_path: str,
    output: str,
    split: Literal["train", "val", "test"] = "test",
    indices: list[int] | int | None = None,
    indices_file: str | None = None,
    per_example: bool = False,
    k: int = 10,
    targets: TargetsChoice | None = None,
    snapshots: bool | None = None,
    store: str | None = None,
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
        store: The folder of a store for this checkpoint, which the command ``store`` has written. Then the training
            data are not read.
    """
    loader = tool.loader(split)
    wanted = _indices(indices, indices_file)
    if wanted is not None:
        loader = _subset(loader, wanted, split)
    options: dict[str, Any] = {"k": k, "per_example": per_example, "targets": targets, "snapshots": snapshots}
    train = None if store is not None else tool.loader("train")
    report = tool.callback.influence(loader, dataloader=train, store=store, **options)
    report.save(output)
    print(report)
    print(f"The report is in {output}. To draw it in Python: InfluenceReport.load({output!r}).plot()")
    return 0


def store(
    tool: Tool,
    ckpt_path: str,
    output: str,
    rank: int = RANK,
    snapshots: bool | None = None,
) -> int:
    """Writes a store of the gradients of the training examples, from which `influence` answers.

    After an interruption, the same command resumes after the last complete chunk of 4096 examples.

    Args:
        tool: The trainer with the model and its data.
        ckpt_path: The checkpoint.
        output: The folder of the store.
        rank: The number of coordinates that are kept of each gradient.
        snapshots: Whether to store the gradients at the snapshots in the checkpoint, too, as for ``influence``.
    """
    print(tool.callback.store_gradients(output, rank=rank, snapshots=snapshots, dataloader=tool.loader("train")))
    return 0


def validate(
    tool: Tool,
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
    tool: Tool,
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
    target, edit_file = check_output(output, "output"), check_output(edit, "edit", new=True)
    if target == edit_file:
        raise ConfigurationError(f"--output and --edit must be different files, got {output!r} for both.")
    validation = tool.find_loader("val") if unseen else None
    log = tool.callback.record if record is None else record
    check_record(log)
    report = tool.callback.unlearn(
        wanted,
        relabel=torch.tensor(relabel) if isinstance(relabel, list) else relabel,  # type: ignore[arg-type]
        unseen=False if validation is None else validation,
        step=step,
        targets=targets,
        refresh_statistics=refresh_statistics,
        dataloader=tool.loader("train"),
        record=False,  # the entry is written together with the checkpoint
        solves_to=solves_to,
        dry_run=True,
    )
    report.record = log
    report.edit.apply(tool.model)
    with report.applied():
        rewrite(
            tool.checkpoint,
            report,
            "unlearn",
            target,
            report.record,
            edit=edit_file,
            expected=weights_digest(tool.model),
            solves=None if solves_to is None else Path(solves_to),
        )
    report.note("unlearn")
    print(report)
    print(f"The edited checkpoint is {output}, the edit {edit}.")
    unchanged = [name for name, part in tool.checkpoint.items() if name != "state_dict" and tensors(part)]
    if unchanged:
        print(f"Other parts of the checkpoint are unchanged and still depend on the data: {', '.join(unchanged)}.")
    if tool.checkpoint.get("optimizer_states"):
        print("The optimizer's state is unchanged. Create a new optimizer before you train further.")
    return 0


COMMANDS: dict[str, Callable[..., int]] = {
    "check": check,
    "influence": influence,
    "store": store,
    "validate": validate,
    "unlearn": unlearn,
}


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

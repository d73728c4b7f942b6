"""Adds the callback to modules of packages, uses it as their users would, and compares scores with exact ones.

    python benchmarks/field.py                      # Lightning's own demos
    python benchmarks/field.py timm torch-geometric # other packages, which must be installed

Modules are small, data are synthetic, and nothing is downloaded. For each module the script

- fits with and without the callback: weights and random generators must be equal bit for bit;
- computes `influence`, `self_influence` and `unlearn` with all arguments at their defaults, and undoes the edit;
- compares scores in float64 with those of the exact, damped Gauss-Newton matrix. For these, the loader's collate
  function makes a batch of each single example;
- correlates the scores of EK-FAC with the same exact scores, where all parameters are in layers that are linear in
  them;
- compares the module, its optimizer and the random generators before and after each call.

If a loss needs the method `influence_loss`, all of this is repeated with it. Prints a Markdown table, and the messages
of errors and warnings.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import logging
import random
import sys
import time
import traceback
import types
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import numpy
import torch
from packages import MODULES, Case
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from lightning_gif import ConfigurationError, GIFCallback, GIFError, GIFWarning
from lightning_gif._compat import stage_of_training

DAMPING = 0.1
QUERY = [0, 5, 7]
FORGET = [1, 2, 3]
TOLERANCE = 1e-3
COLUMNS = (
    *("package", "module", "parameters", "training unchanged", "losses", "solver", "error of the scores"),
    *("correlation of EK-FAC", "changed by the edit", "state unchanged", "seconds", "outcome"),
)

# What a warning says, in short.
WARNINGS = {
    "no Gauss–Newton matrix": "the Hessian is used",
    "they are coupled": "weighted or coupled",
    "they are weighted": "weighted or coupled",
    "they are random": "the loss is random",
    "computed one after the other": "one by one",
    "No step size lowered the risk": "the edit changes nothing",
    "Not done. The loss of the forget": "little is forgotten",
    "Too far. The loss of the forget": "forgets too much",
}


# --------------------------------------------------------------------------------------------------------------------
# The state that calls must leave unchanged
# --------------------------------------------------------------------------------------------------------------------


def state(trainer: Any, module: nn.Module) -> dict[str, Any]:
    """All that a call could change, by name; tensors are copies."""
    found: dict[str, Any] = {
        "random generators": generators(),
        "optimizers": [[id(p) for group in one.param_groups for p in group["params"]] for one in trainer.optimizers],
        "flags": [str(trainer.state.fn), str(trainer.state.stage), trainer.global_step],
    }
    for name, parameter in module.named_parameters(remove_duplicate=False):
        found[f"parameter {name}"] = [
            id(parameter),
            parameter.requires_grad,
            plain(parameter.detach()),
            plain(parameter.grad),
        ]
    for name, buffer in module.named_buffers(remove_duplicate=False):
        found[f"buffer {name}"] = plain(buffer)
    for name, one in module.named_modules(remove_duplicate=False):
        for key, value in vars(one).items():
            if key not in ("_parameters", "_buffers", "_modules", "_trainer", "_fabric"):
                found[f"attribute {name}.{key}"] = plain(value)
    return found


def generators() -> list[Any]:
    """The states of the global random generators."""
    return [torch.get_rng_state(), plain(numpy.random.get_state()), plain(random.getstate())]  # noqa: NPY002


def plain(value: Any, depth: int = 6) -> Any:
    """A copy that can be compared; the identity of anything that is neither data nor a container."""
    if isinstance(value, nn.Parameter):  # its values are compared by its name
        return id(value)
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, numpy.ndarray):
        return torch.from_numpy(value.copy()) if value.dtype.kind in "biuf" else id(value)
    if isinstance(value, Mapping) and depth:
        return {str(key): plain(one, depth - 1) for key, one in value.items()}
    if isinstance(value, (list, tuple)) and depth:
        return [plain(one, depth - 1) for one in value]
    return value if isinstance(value, (int, float, str, bool, bytes, type(None))) else id(value)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return (
            one.shape == other.shape
            and one.dtype == other.dtype
            and torch.equal(one.isnan(), other.isnan())
            and (torch.equal(one.nan_to_num(), other.nan_to_num()))
        )
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other) or (one != one and other != other)


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [name for name in {**before, **after} if not same(before.get(name), after.get(name))]


# --------------------------------------------------------------------------------------------------------------------
# The exact scores
# --------------------------------------------------------------------------------------------------------------------


def widened(value: Any) -> Any:
    """Floating-point tensors in float64, inside of any container or object."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: widened(one) for key, one in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(widened, value))
    if isinstance(value, (list, tuple)):
        return type(value)(map(widened, value))
    if is_dataclass(value):
        other = copy.copy(value)
        for one in fields(value):
            object.__setattr__(other, one.name, widened(getattr(value, one.name)))
        return other
    if hasattr(value, "apply"):  # a graph of torch_geometric
        return copy.copy(value).apply(widened)
    if hasattr(value, "__dict__"):
        other = copy.copy(value)
        vars(other).update({name: widened(one) for name, one in vars(value).items()})
        return other
    return value


def copied(trainer: Any, module: nn.Module) -> Any:
    """A copy in evaluation mode that logs nothing."""
    other = copy.deepcopy(module).eval()
    other._trainer = trainer
    for name in ("log", "log_dict"):
        setattr(other, name, lambda *arguments, **options: None)
    return other


def exact_scores(case: Case, trainer: Any, module: nn.Module, batches: list[Any], pair: Any) -> Tensor:
    """``(1/(n−1))·qᵀ(G + λ)⁻¹gᵢ`` for each example, ``(n,)``, from the definition, in float64.

    ``G`` is the mean of ``JᵀHJ`` over the examples, with the Jacobian ``J`` of the predictions and the Hessian ``H`` of
    the loss in them; ``q`` is the mean of the gradients of the query.

    Args:
        case: The predictions and the loss.
        trainer: The trainer of the module.
        module: The module.
        batches: Each training example as a batch.
        pair: A batch with the first training example twice, since some steps fail for one example.

    Raises:
        AssertionError: If the loss of the case is not that of ``training_step``.
    """
    assert case.predict is not None
    assert case.loss is not None
    narrow, wide = copied(trainer, module), copied(trainer, module).double()
    parameters = [parameter for parameter in wide.parameters() if parameter.requires_grad]

    def gradient(value: Tensor) -> Tensor:
        parts = torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True)
        return torch.cat([part.reshape(-1) for part in parts])

    roots, gradients = [], []
    for number, batch in enumerate(batches):
        data = widened(batch)
        predictions = case.predict(wide, data)
        shape, loss = predictions.shape, case.loss(predictions, data)
        if not number and not hasattr(module, "influence_loss"):
            with stage_of_training(trainer):
                step = narrow.training_step(pair, 0)
            step = step["loss"] if isinstance(step, dict) else step
            assert torch.allclose(step.double(), loss, 1e-4, 1e-5), (step, loss)
        flat = predictions.reshape(-1)
        curvature = torch.autograd.functional.hessian(
            lambda z, data=data, shape=shape: case.loss(z.reshape(shape), data), flat.detach()
        )
        values, vectors = torch.linalg.eigh(curvature)
        assert values.min() > -1e-8 * values.max(), "The loss is not convex in the predictions."
        for value, vector in zip(values, vectors.T, strict=True):
            if value > 1e-12 * values.max():
                roots.append(value.sqrt() * gradient(flat @ vector))
        gradients.append(gradient(loss))
    root, rows, n = torch.stack(roots), torch.stack(gradients), len(batches)
    query = rows[QUERY].mean(0)
    if root.shape[1] < 4000:
        matrix = root.T @ root / n + DAMPING * torch.eye(root.shape[1], dtype=root.dtype)
        solution = torch.linalg.solve(matrix, query)
    else:  # the matrix inversion lemma
        gram = root @ root.T + n * DAMPING * torch.eye(len(root), dtype=root.dtype)
        solution = (query - root.T @ torch.linalg.solve(gram, root @ query)) / DAMPING
    return rows @ solution / (n - 1)


# --------------------------------------------------------------------------------------------------------------------
# One module
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """What happened with one module."""

    package: str
    name: str
    cells: dict[str, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    obscure: bool = False

    def call(self, what: str, function: Callable[[], Any]) -> Any:
        """The result of a call; ``None`` and a note if it raises."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                return function()
            except Exception as error:
                self.obscure |= not isinstance(error, GIFError)
                self.errors.append(f"{what}: {type(error).__name__}: {error}")
                if not isinstance(error, GIFError):
                    traceback.print_exc(limit=-6)
            finally:
                own = [str(one.message) for one in caught if issubclass(one.category, GIFWarning)]
                self.warnings.extend(f"{what}: {text}" for text in own if text not in " ".join(self.warnings))
        return None

    @property
    def outcome(self) -> str:
        if self.wrong:
            return "**silently wrong**" if not self.warnings else "wrong, with a warning"
        if self.obscure:
            return "**an unclear error**"
        if self.errors:
            return "an error that says what to do"
        said = " ".join(self.warnings)
        short = [words for text, words in WARNINGS.items() if text in said] or ["other"]
        works = f"works, with a warning ({', '.join(short)})" if self.warnings else "works as it is"
        return ", ".join([works, *(self.cells[name] for name in ("query", "double") if name in self.cells)])


def fit(case: Case, callbacks: list[Any]) -> tuple[Any, list[Any]]:
    """A trainer after the fit of a case, and the weights and random generators after it."""
    torch.manual_seed(0)
    numpy.random.seed(0)  # noqa: NPY002 - the generator that packages use
    random.seed(0)
    trainer = case.fit(callbacks)
    after = {name: plain(value) for name, value in trainer.lightning_module.state_dict().items()}
    return trainer, [after, generators()]


def tried(package: str, case: Case, *, own_loss: bool = False) -> Row:
    """Runs one case as the docstring of this file says."""
    started = time.perf_counter()
    row = Row(package, case.name + (" with `influence_loss`" if own_loss else ""))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _, without = fit(case, [])
        except Exception as error:
            row.cells["outcome"] = f"does not train without the callback either: {type(error).__name__}: {error}"
            return row
    both = row.call("fit", lambda: fit(case, [GIFCallback()]))
    if both is None:
        return row
    trainer, with_it = both
    row.cells["training unchanged"] = "yes" if same(without, with_it) else "no"
    if not same(without, with_it):
        row.wrong.append("training changed")
    (callback,) = (one for one in trainer.callbacks if isinstance(one, GIFCallback))
    module, loader = trainer.lightning_module, callback.loaders.train
    options: dict[str, Any] = {}
    if own_loss:
        module.influence_loss = types.MethodType(case.influence_loss, module)
        if case.dataloader is not None:
            loader = options["dataloader"] = case.dataloader(loader)
    row.cells["parameters"] = str(sum(p.numel() for p in module.parameters() if p.requires_grad))
    try:
        batch = loader.collate_fn([loader.dataset[index] for index in QUERY])
    except Exception:  # no map-style dataset
        batch = next(iter(loader))
    before, changed = state(trainer, module), set()

    def checked(what: str, function: Callable[[], Any]) -> Any:
        result = row.call(what, function)
        changed.update(f"{what}: {name}" for name in differences(before, state(trainer, module)))
        return result

    query = DataLoader(Subset(loader.dataset, QUERY), 3, collate_fn=loader.collate_fn)
    report = checked("influence", lambda: trainer.influence(batch, **options))
    if report is None:  # as the message advises
        report = checked("influence with a loader", lambda: trainer.influence(query, **options))
        if report is not None:
            del row.errors[0]
            row.cells["query"] = "query as a loader"
    if report is not None:
        row.cells["losses"], row.cells["solver"] = report.settings["losses"], report.settings["solver"]
        if not report.scores.isfinite().all() or report.scores.shape[1] != len(loader.dataset):
            row.wrong.append(f"scores {list(report.scores.shape)}")
    if report is not None and case.predict is not None:
        batches = [loader.collate_fn([loader.dataset[index]]) for index in range(len(loader.dataset))]
        exact = exact_scores(case, trainer, module, batches, loader.collate_fn([loader.dataset[0]] * 2))
        converged = {
            **options,
            "snapshots": False,
            "damping": DAMPING,
            "max_iter": 400,
            "rtol": 1e-10,
            "unconverged": "ignore",
        }
        scores = checked("exact influence", lambda: trainer.influence(query, double=True, **converged))
        if scores is None:
            row.cells["double"] = "float32 only"
            scores = checked("exact influence", lambda: trainer.influence(query, **{**converged, "rtol": 1e-6}))
        if scores is not None:
            error = float((scores.scores[0].double() - exact).norm() / exact.norm())
            row.cells["error of the scores"] = f"{error:.0e}"
            if not error < TOLERANCE:
                row.wrong.append(f"scores are wrong by {error:.1e}")
        by_layers = checked("EK-FAC", lambda: by_ekfac(trainer, query, options))
        if by_layers is not None:
            correlation = torch.stack([by_layers.double(), exact]).corrcoef()[0, 1]
            row.cells["correlation of EK-FAC"] = f"{float(correlation):.2f}"
    checked("self_influence", lambda: trainer.self_influence(**options))
    edit = row.call("unlearn", lambda: trainer.unlearn(FORGET, **options))
    if edit is not None:
        after = state(trainer, module)
        kept = [name for name in differences(before, after) if not name.startswith("parameter")]
        changed.update(f"unlearn: {name}" for name in kept)
        changed.update(f"unlearn: {k}" for k in after if k.startswith("param") and after[k][:2] != before[k][:2])
        row.cells["changed by the edit"] = f"{edit.edit.count} of {row.cells['parameters']}"
        row.call("undo", lambda: edit.undo())
    changed.update(f"unlearn and undo: {name}" for name in differences(before, state(trainer, module)))
    row.cells["state unchanged"] = "no" if changed else "yes"
    row.wrong.extend(sorted(changed)[:5])
    row.cells["seconds"] = f"{time.perf_counter() - started:.0f}"
    return row


def by_ekfac(trainer: Any, query: Any, options: dict[str, Any]) -> Tensor | None:
    """The scores of EK-FAC, ``(n,)``; ``None`` if the module has parameters outside of layers."""
    try:
        return trainer.influence(query, **options, snapshots=False, solver="ekfac", damping=DAMPING).scores[0]
    except ConfigurationError as error:
        if "in layers that are linear in them" not in str(error):
            raise
    return None


def rows_of(package: str, only: list[str] | None) -> list[Row]:
    """The rows of a package, or of some of its modules; one row with the reason if it is not installed."""
    try:
        versions = [f"{name} {importlib.metadata.version(name)}" for name in MODULES[package]]
        cases = importlib.import_module(f"packages.{package.replace('-', '_')}").CASES
    except (importlib.metadata.PackageNotFoundError, ImportError) as error:
        row = Row(package, "")
        row.cells["outcome"] = f"skipped: {type(error).__name__}: {error}"
        return [row]
    rows = []
    for case in cases:
        if only and case.name not in only:
            continue
        for own_loss in (False, True)[: 2 if case.influence_loss is not None else 1]:
            print(f"{package}: {case.name}", file=sys.stderr)
            rows.append(tried(", ".join(versions), case, own_loss=own_loss))
    return rows


def show(rows: list[Row]) -> None:
    print(f"\n| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    for row in rows:
        cells = {"package": row.package, "module": row.name, "outcome": row.outcome, **row.cells}
        print(f"| {' | '.join(cells.get(name, '') for name in COLUMNS)} |")
    for row in rows:
        for kind, lines in (("wrong", row.wrong), ("error", row.errors), ("warning", row.warnings)):
            for line in lines:
                print(f"\n{row.package}, {row.name}: {kind}: {' '.join(line.split())}")


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="*", metavar="package", help=f"which packages: {', '.join(MODULES)}, or all")
    parser.add_argument("--only", nargs="+", metavar="name", help="only the modules with these names")
    given = parser.parse_args()
    chosen = given.packages or ["lightning"]
    chosen = list(MODULES) if chosen == ["all"] else chosen
    unknown = sorted(set(chosen) - set(MODULES))
    if unknown:
        parser.error(f"unknown packages: {', '.join(unknown)}; known are {', '.join(MODULES)}")
    logging.disable(logging.WARNING)  # packages set the levels of their loggers themselves
    torch.set_num_threads(1)
    for package in chosen:
        show(rows_of(package, given.only))


if __name__ == "__main__":
    main()

"""Where public names went: each old name works for one more version, with a warning that has the new one."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from operator import attrgetter
from types import ModuleType
from typing import Any

__all__ = ["MOVED", "Finder", "forward", "renamed", "warn_renamed"]

MOVED: dict[str, dict[str, str]] = {
    "checkpoints": {
        "storage.checkpoints": "read_checkpoint",
    },
    "curvature": {
        "curvature.methods": "Group METHODS Method",
        "curvature.products": "CURVATURES Linearise Losses gauss_newton has_gauss_newton hessian",
        "curvature.streaming": "Curvature graph_bytes",
        "solvers.operators": "Combination Scaled Submatrix",
    },
    "data": {
        "data.examples": "Examples example_classes=Examples.classes.func strata=Examples.class_or_zero.fget",
        "data.identity": "check_same_everywhere contents_digest data_digest locate shares_examples",
        "data.relabel": "relabelled",
        "data.batch": "Batch",
        "data.structure": "batch_size describe map_tensors same_structure slice_batch take tensors",
        "data.targets": "TARGET_KEYS class_targets find_targets replace_targets",
    },
    "digests": {
        "storage.digests": "Fingerprint differences digest raw",
    },
    "influence": {
        "attribution.influence": "influence",
        "attribution.self_influence": "self_influence",
    },
    "interrupts": {
        "storage.interrupts": "uninterrupted",
    },
    "journal": {
        "unlearning.journal": "Journal",
    },
    "objective": {
        "objective.objective": "Objective",
        "objective.shadow": "Moment=ModelState",
    },
    "parameters": {
        "edit": "Edit",
    },
    "plain": {
        "storage.schema": "MOST_BYTES damage_is_told=parse_errors_name parse read restored restored_fields",
    },
    "predictions": {
        "objective.predictions": "IndicesInBounds Predictions",
    },
    "ranking": {
        "attribution.ranking": "Ranking Strongest strongest",
    },
    "ranks": {
        "distributed": "ALONE=SINGLE_PROCESS Ranks=ProcessGroup",
    },
    "record": {
        "storage.audit_log": "Event FIRST Record append check_whole read",
    },
    "reports.files": {
        "storage.artifact": "REMEDY read_folder write_folder",
    },
    "reports.groups": {
        "attribution.groups": "Grouping Groups group_scores values_of",
    },
    "reports.influence": {
        "attribution.report": "InfluenceReport first_shown",
    },
    "reports.loggers": {
        "reporting.loggers": "log_figure log_histogram log_scalars log_table log_text running",
    },
    "reports.pictures": {
        "reporting.previews": "Shown figure image_of label_of show text_of",
    },
    "reports.unlearning": {
        "unlearning.report": "Change UnlearnReport",
    },
    "sampling": {
        "curvature.sampling": "SAMPLERS Sampler curvature_sample",
    },
    "settings": {
        "config": "Overrides Settings",
    },
    "snapshots": {
        "selection.snapshots": "Snapshots",
    },
    "solvers.base": {
        "solvers.run": "Run",
        "solvers.vectors": "require_finite",
        "solvers.solution": "Status",
    },
    "steps": {
        "unlearning.problem": "Walk=EditProblem",
        "unlearning.protocol": "Goal=GoalName LocalModel=QuadraticModel Point=Trial",
        "unlearning.tuning": "MOST_SOLVES=Relinearisation.max_solves",
        "unlearning.strategies": "STRATEGIES Strategy natural relinearise search",
    },
    "store": {
        "attribution.score_store": "InMemory ScoreStore",
    },
    "unlearning": {
        "unlearning.step": "Step check_step",
    },
    "writing": {
        "storage.atomic": "replace_file replacing sync",
    },
}
"""Old module, new module, and the names that went there; ``Old=New`` where the name changed."""


def forward(module: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module that gave names away.

    Args:
        module: Its name, ``lightning_gif.…``.
    """
    package, _, old = module.partition(".")

    def __getattr__(name: str) -> Any:
        for new, names in MOVED[old].items():
            for before, _, after in (entry.partition("=") for entry in names.split()):
                if before == name:
                    found = attrgetter(after or name)(importlib.import_module(f"{package}.{new}"))
                    warnings.warn(
                        f"{module}.{name} is now {package}.{new}.{after or name}. The old name will be removed in the"
                        " next version.",
                        DeprecationWarning,
                        stacklevel=2,
                    )
                    return found
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return __getattr__


def warn_renamed(old: str, new: str, stacklevel: int = 3) -> None:
    """Warns about the use of a name that will be removed in the next version.

    Args:
        old: The old name as users write it.
        new: The new name.
        stacklevel: Of the warning; by default that of the caller of a property.
    """
    text = f"`{old}` is now `{new}`. The old name will be removed in the next version."
    warnings.warn(text, DeprecationWarning, stacklevel=stacklevel)


def renamed(old: str, new: str) -> Any:
    """A property with the old name of an attribute or method, which warns and gives the new one.

    Args:
        old: The old name as users write it, such as ``walk.answer``.
        new: The new name, without its owner.
    """

    def get(owner: Any) -> Any:
        warn_renamed(old, new)
        return getattr(owner, new)

    return property(get, doc=f"The old name of ``{new}``.")


class Finder(MetaPathFinder, Loader):
    """Finds modules that are no more, as modules whose names are forwarded."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """A spec for an old module of this package; ``None`` for any other."""
        package, _, old = name.partition(".")
        return ModuleSpec(name, self) if package == __package__ and old in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Gives the module its ``__getattr__``."""
        module.__getattr__ = forward(module.__name__)  # type: ignore[method-assign]

    @classmethod
    def install(cls) -> None:
        """Adds one to the end of the import system's list, where it is only asked for what nothing else finds."""
        if not any(isinstance(finder, cls) for finder in sys.meta_path):
            sys.meta_path.append(cls())

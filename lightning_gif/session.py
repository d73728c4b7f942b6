"""One call of a method of the trainer: the open objective, the data, and the targets."""

from __future__ import annotations

import contextlib
import math
import numbers
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, SequentialSampler

from ._compat import at_epoch, brings_own, isolate_rng, rank_zero_info, rank_zero_warn
from .attribution.gradient_store import GradientStore
from .config import Overrides, Settings
from .curvature.by_solver import DENSE_PARAMETERS, operations
from .curvature.energy import gradient_energies
from .curvature.products import has_gauss_newton, require_gauss_newton, warn_if_asymmetric
from .curvature.sampling import sample_size
from .data.examples import Examples, warn_if_random
from .data.identity import check_same_everywhere, shares_examples
from .data.streams import Stream
from .data.structure import describe, tensors
from .defaults import for_influence, needs_no_cache
from .distributed import ProcessGroup
from .errors import (
    BatchError,
    ConfigurationError,
    GIFError,
    GIFWarning,
    NonFiniteError,
    SelectionError,
    TrainingDataError,
)
from .mixin import LossOfModule
from .objective.objective import Objective
from .parameters import Targets
from .selection import energy_of
from .selection.tracker import TrainingTracker

if TYPE_CHECKING:
    from ._compat import LightningModule, Trainer

__all__ = ["Loaders", "Session", "TargetsChoice", "open_session", "open_stored"]

TargetsChoice = Literal["cached", "class", "batch"]
"""How targets are chosen: those picked in training, neurons ranked for the batch's classes, or ranked on the batch."""


# Epochs at which a loss that depends on the epoch is likely to differ from that of epoch 0.
_OTHER_EPOCHS = (1, 10, 100)


@dataclass
class Loaders:
    """The loaders of the last ``fit``. They are kept here, because ``trainer.test`` removes them from the trainer.

    Attributes:
        train: The training loader.
        unseen: The validation loader.
        epoch: The epoch of the weights, if it was given to :func:`~lightning_gif.attach`.
        ready: The datamodules that were set up here, each with the stage. One is set up once, since it may split the
            data at random.
    """

    train: Any = None
    unseen: Any = None
    epoch: int | None = None
    ready: list[tuple[Any, str]] = field(default_factory=list)

    def remember(self, trainer: Trainer) -> None:
        """Stores the present loaders of the trainer."""
        self.train = trainer.train_dataloader
        validation = trainer.val_dataloaders
        self.unseen = validation
        if isinstance(validation, (list, tuple)) and len(validation) == 1:
            self.unseen = validation[0]

    def training(self, trainer: Trainer, processes: ProcessGroup) -> Any:
        """The training loader of the last ``fit``, else of the datamodule, else of the module.

        Raises:
            TrainingDataError: If there is none.
        """
        loader = self.train if self.train is not None else trainer.train_dataloader
        if loader is None:
            loader = self.find(trainer, "train_dataloader", processes)
        if loader is None:
            raise TrainingDataError(
                "There is no training data: the trainer has none from a fit, and no datamodule. Pass `dataloader=` with"
                " a DataLoader over the training set, or `train_dataloaders=` to lightning_gif.attach()."
            )
        self.train = loader
        return loader

    def find(self, trainer: Trainer, hook: str, processes: ProcessGroup) -> Any:
        """What a hook of the datamodule, or else of the module, returns; ``None`` if neither defines it.

        Args:
            trainer: The trainer, with its module.
            hook: ``"train_dataloader"``, ``"val_dataloader"`` or ``"test_dataloader"``.
            processes: All processes of the trainer.
        """
        datamodule, module = getattr(trainer, "datamodule", None), trainer.lightning_module
        if datamodule is not None and _defines(datamodule, hook):
            stages = ["fit", "test"] if hook == "test_dataloader" else ["fit"]
            # The data of training first, as in a fit: a setup that splits at random then makes the same split.
            for stage in stages:
                if any(owner is datamodule and done == stage for owner, done in self.ready):
                    continue
                on_each_node = getattr(datamodule, "prepare_data_per_node", True)
                if trainer.local_rank == 0 if on_each_node else trainer.is_global_zero:
                    datamodule.prepare_data()
                processes.gather(None)  # the other processes wait for the files that it writes
                datamodule.setup(stage)
                self.ready.append((datamodule, stage))
            return getattr(datamodule, hook)()
        return getattr(module, hook)() if _defines(module, hook) else None


@dataclass(frozen=True)
class Session:
    """The objective, the data and the settings of one call.

    Attributes:
        objective: The open objective of the trainer's module.
        train: The training examples.
        settings: The settings of the call.
        loaders: The loaders of the last ``fit``.
        tracker: The statistics from training, and the cached targets.
        repicks: Whether the call changes how targets are picked, so that cached targets cannot be used.
    """

    objective: Objective
    train: Examples
    settings: Settings
    loaders: Loaders
    tracker: TrainingTracker
    repicks: bool

    # ----------------------------------------------------------------------------------------------------------------
    # Settings of scores
    # ----------------------------------------------------------------------------------------------------------------

    def influence_settings(self, asked: Settings, *, on_targets: bool, queries: int, itself: bool = False) -> Settings:
        """The settings for scores, with defaults for everything that the call left open.

        Args:
            asked: The settings that the call requested.
            on_targets: Whether scores are restricted to target parameters.
            queries: The number of queries.
            itself: Whether each example is scored for its own loss.
        """
        probed = self.objective.probed
        assert probed is not None  # since the structure of the training examples is known
        given = self.objective, self.objective.theta, probed
        ggn = self.objective.is_convex and has_gauss_newton(*given)
        if asked.curvature == "ggn" and not ggn:
            require_gauss_newton(*given)  # says why there is none
        layers = not on_targets and self.objective.space.size > DENSE_PARAMETERS and self.objective.layers is not None
        passes = math.inf
        if layers and probed.divisible and not itself:
            passes = operations(self.objective, probed) * min(sample_size(asked) or math.inf, len(self.train))
        choose = partial(
            for_influence,
            asked,
            on_targets=on_targets,
            queries=queries,
            itself=itself,
            layers=layers,
            operations=passes,
        )
        chosen = choose(ggn=ggn)
        if chosen.curvature != choose(ggn=True).curvature:
            rank_zero_warn(
                f"The loss of {type(self.objective.module).__name__} has no Gauss–Newton matrix, so the curvature of"
                " these scores is the Hessian: they predict retraining less well. The matrix exists where the loss is a"
                " convex function of predictions that enter a loss function of PyTorch, a softmax, a sigmoid or a"
                " difference. Compute the loss with F.cross_entropy or F.mse_loss, for example, or choose"
                " curvature='hessian' to go without this warning.",
                category=GIFWarning,
            )
        if chosen.curvature == "hessian":
            warn_if_asymmetric(*given)
        return chosen

    def check_curvature(self, kind: str) -> None:
        """Checks that PyTorch computes the curvature of an edit.

        Args:
            kind: The curvature that the settings name. All others except ``"ggn"`` begin with the Hessian.

        Raises:
            ObjectiveError: If there is no Gauss–Newton matrix, but it was requested.
        """
        probed = self.objective.probed
        assert probed is not None  # since the structure of the training examples is known
        check = require_gauss_newton if kind == "ggn" else warn_if_asymmetric
        check(self.objective, self.objective.theta, probed)

    # ----------------------------------------------------------------------------------------------------------------
    # Examples
    # ----------------------------------------------------------------------------------------------------------------

    def examples(self, given: Any) -> Examples:
        """The examples of a batch, of a ``DataLoader``, or of a ``Dataset``.

        Raises:
            BatchError: If ``given`` is none of them.
        """
        given = self.as_loader(given)
        size, processes = self.settings.batch_size, self.objective.processes
        if isinstance(given, numbers.Number) or (isinstance(given, (list, tuple, range)) and _are_indices(given)):
            raise BatchError(
                f"Expected a batch as the training loader yields them, or a DataLoader, got {describe(given)}. To give"
                " examples by their dataset indices, pass a loader over them: DataLoader(Subset(dataset, [17, 4]), 64)."
            )
        if isinstance(given, DataLoader):
            examples = Examples.from_loader(
                given, self.objective.prepare, batch_size=size, seed=self.settings.seed, processes=processes
            )
        else:
            examples = Examples.from_batch(
                given,
                self.objective.prepare,
                batch_size=size,
                processes=processes,
                divisible=self.objective.divisible,
            )
        return check_same_everywhere(self.objective.readable(examples), "batch or loader")

    def as_loader(self, given: Any) -> Any:
        """A ``Dataset`` as a loader that collates like the training loader; anything else as it is."""
        if not isinstance(given, Dataset):
            return given
        return DataLoader(given, self.settings.batch_size, collate_fn=self.train.collate)

    def training_subset(self, given: Any) -> Examples | None:
        """The training examples given by indices, a mask or a predicate; ``None`` if ``given`` is none of them.

        Raises:
            BatchError: If a mask has another length than the training dataset, or is true nowhere.
        """
        if callable(given) and not isinstance(given, (Tensor, Dataset)):
            return self.train.where(given)
        mask = _as_mask(given)
        if mask is not None:
            size = len(self.train) if self.train.dataset is None else len(self.train.dataset)
            if len(mask) != size or not mask.any():
                problem = "is true for none" if len(mask) == size else f"has {len(mask)} values"
                raise BatchError(
                    f"A mask must have one truth value for each of the {size} examples of the training dataset, and be"
                    f" true for one or more. This one {problem}. To give examples by their dataset indices, pass whole"
                    " numbers, such as [17, 4031]."
                )
            given = mask.nonzero().flatten()
        if _are_indices(given):
            return check_same_everywhere(self.train.with_ids(list(given)), "indices")
        return None

    def among(self, given: Any) -> Examples | None:
        """The training examples to score; ``None`` for all.

        Raises:
            ConfigurationError: If ``given`` is neither indices nor a predicate.
        """
        chosen = None if given is None else self.training_subset(given)
        if given is not None and chosen is None:
            raise ConfigurationError(
                "`among` must be indices of the training dataset, a mask with a truth value for each of its examples,"
                " or a function from a batch to one truth value for each of its examples, such as lambda batch:"
                f" batch[1] == 3 for the label 3; got {describe(given)}."
            )
        return chosen

    def forget(self, given: Any) -> Examples:
        """The forget examples, given by indices, a mask, a predicate, a batch, a loader or a dataset.

        Raises:
            BatchError: If ``given`` is none of them.
            TrainingDataError: If the training data are an iterable dataset.
        """
        if isinstance(self.train.dataset, Stream):
            raise TrainingDataError(
                "An edit reads the training examples many times and in samples, which an IterableDataset does not"
                " allow. Pass a DataLoader over a map-style dataset as `dataloader=`, and give examples by their"
                " positions in it, not by ids. Scores do not need one."
            )
        chosen = self.training_subset(given)
        if chosen is not None:
            return chosen
        given = self.as_loader(given)
        if not isinstance(given, DataLoader) and not any(tensor.ndim for tensor in tensors(given)):
            raise BatchError(
                "Expected the examples as a batch of the training loader, a DataLoader, a Dataset, a list of indices of"
                " the training dataset, a mask with a truth value for each of its examples, or a function from a batch"
                f" to one truth value for each of its examples; got {describe(given)}. For one example, pass [17]. For"
                " a class, pass its label in a function, such as lambda batch: batch[1] == 3."
            )
        return self.examples(given)

    def unseen(self, given: DataLoader[Any] | Dataset[Any] | Literal[False] | None) -> tuple[Examples | None, str]:
        """Unseen examples, or ``None``; and why the validation data of ``fit`` cannot be used.

        Args:
            given: A loader or dataset of unseen examples. ``None`` takes the validation loader of ``fit``, if its
                batches have the structure of training batches and it has no training examples. ``False`` is for none.

        Returns:
            The examples and an empty text, or ``None`` and the reason. The reason is empty if there are no validation
            data, or none are wanted.

        Raises:
            ConfigurationError: If a given loader has examples of the training data.
            GIFError: If a given loader does not fit the model.
            Exception: If an example cannot be read.
        """
        loader = self.as_loader(self.loaders.unseen if given is None else given)
        if loader is None or loader is False:
            return None, ""
        if not isinstance(loader, DataLoader):
            return None, f"they are not one DataLoader, but {describe(loader)}"
        found, reason, objective, settings = None, "", self.objective, self.settings
        try:
            found = Examples.from_loader(loader, objective.prepare, batch_size=settings.batch_size, seed=settings.seed)
            found = objective.readable(found)
            few = torch.arange(min(2, len(found)))  # a collate function may need several examples
            objective.check(found.subset(few), "unseen")
        except GIFError as error:  # validation batches may be structured in another way than those of training
            if given is not None:
                raise
            found, reason = None, str(error)
        reason = next(filter(None, objective.processes.gather(reason)), "")
        if reason or found is None:
            return None, reason
        found = check_same_everywhere(replace(found, processes=objective.processes), "unseen data")
        if shares_examples(found, self.train):
            if given is not None:
                raise ConfigurationError(
                    "`unseen` has examples of the training data. Pass a loader of examples that were not trained on."
                )
            return None, "they have examples of the training data"
        return found, ""

    # ----------------------------------------------------------------------------------------------------------------
    # Targets
    # ----------------------------------------------------------------------------------------------------------------

    def choose_targets(self, examples: Examples, choice: TargetsChoice, *, measured: bool = False) -> Targets:
        """The target parameters.

        Args:
            examples: The query or the forget examples, on which ``"class"`` and ``"batch"`` depend.
            choice: How targets are chosen.
            measured: Whether a selector by gradient energy takes the gradient of what a query measures, not the loss.

        Raises:
            SelectionError: If no targets can be picked.
        """
        module, settings, tracker = self.objective.module, self.settings, self.tracker
        if energy_of(settings.selector) is not None:
            return self._by_energy(examples, choice, measured=measured)
        if choice == "batch":
            if needs_no_cache(settings):
                return tracker.select(module, settings)
            neurons, gradients = self.objective.observe(examples.sample(sample_size(settings), settings.seed))
            return tracker.select(module, settings, neurons=neurons, gradients=gradients)
        if tracker.ranks_on_demand and tracker.targets is None and not tracker.neurons:
            sample = self.train.sample(sample_size(settings), settings.seed)
            rank_zero_info(f"No statistics from training: neurons are ranked by one pass over {len(sample)} examples.")
            tracker.neurons, tracker.gradients = self.objective.observe(sample)
            tracker.module = module
        if choice == "class":
            return tracker.select(module, settings, classes=_known_classes(examples))
        if self.repicks:
            return tracker.select(module, settings)
        if tracker.targets is None:
            tracker.targets = tracker.select(module, tracker.selection)
        return tracker.targets

    def _by_energy(self, examples: Examples, choice: TargetsChoice, *, measured: bool) -> Targets:
        """The target parameters by a selector that ranks by the energy of the gradient of the examples in question.

        With ``"class"`` these are the training examples of the classes that occur among ``examples``.

        Raises:
            SelectionError: If ``choice`` is ``"cached"``, or ``"class"`` without labels.
        """
        objective, settings = self.objective, self.settings
        energy = energy_of(settings.selector)
        assert energy is not None
        if choice == "cached":
            raise SelectionError(
                f"The selector {settings.selector!r} ranks parameters by the gradient of the query or the forget"
                " examples, which are not known during training. So there are no cached targets. Pass targets='batch',"
                " or targets='class' for the gradient of all training examples of their classes. For self-influence,"
                " use another selector."
            )
        if choice == "class":
            known, classes = _known_classes(examples), self.train.classes
            if classes is None:
                raise SelectionError("targets='class' needs training examples with labels. Use targets='batch'.")
            examples = self.train.subset(torch.isin(classes, torch.tensor(known)).nonzero().squeeze(1))
            if not len(examples):
                raise SelectionError(
                    "No training example has one of the labels of these examples. Use targets='batch'."
                )
        examples = examples.sample(sample_size(settings), settings.seed)
        if measured and choice == "batch":
            gradient = objective.query_gradients(examples, per_example=False)[0]
        else:
            gradient = objective.gradient(examples)
        energies = gradient_energies(energy, objective, self.train, settings, gradient)
        targets = self.tracker.select(objective.module, settings, energies=energies.cpu())
        # Rounding may differ between machines, but all processes must change the same parameters.
        return Targets(objective.processes.broadcast(dict(targets)))


@contextlib.contextmanager
def open_session(
    trainer: Trainer,
    tracker: TrainingTracker,
    loaders: Loaders,
    settings: Settings,
    choice: TargetsChoice,
    dataloader: DataLoader[Any] | None = None,
    overrides: Overrides | None = None,
    influence_loss: LossOfModule | None = None,
) -> Iterator[Session]:
    """Opens the objective and the training data for one call. All processes must make the same call.

    Args:
        trainer: The trainer, with its module.
        tracker: The statistics from training.
        loaders: The loaders of the last ``fit``.
        settings: The settings of the call.
        choice: How the call chooses targets.
        dataloader: A loader of the training data; by default the one of ``fit``.
        overrides: The settings that the call changes.
        influence_loss: A function from the module and a batch to the losses of its examples, if one was given.

    Raises:
        ConfigurationError: If ``choice`` is unknown, if the trainer has no model, or if processes make different calls.
        SelectionError: If cached targets are needed, but there are none.
        TrainingDataError: If there is no training data, or it has no stable order.
    """
    if choice not in ("cached", "class", "batch"):
        raise ConfigurationError(f"`targets` must be 'cached', 'class' or 'batch', got {choice!r}.")
    module = _module_of(trainer)
    processes = ProcessGroup.of(trainer)
    is_unfitted = trainer.current_epoch == 0 and not trainer.training
    epoch = loaders.epoch if is_unfitted else None
    with processes.propagate_errors(), tracker.neurons.paused(), at_epoch(trainer, epoch):
        processes.assert_equal([choice, asdict(settings)], "arguments", "Make the same call on all of them.")
        tracker.sum_over(processes)
        with isolate_rng():
            loader = loaders.training(trainer, processes) if dataloader is None else dataloader
        cached = choice == "cached" and not needs_no_cache(settings)
        if cached and tracker.has_seen_nothing and not tracker.ranks_on_demand:
            raise SelectionError(
                "There are no cached targets: the model was not fitted with this callback, and no checkpoint with its"
                " state was loaded. Call fit, pass targets='batch' to rank neurons on the given batch, or use"
                " lightning_gif.attach(trainer, model, …) for a model that was trained elsewhere."
            )
        opened = Objective.open(
            trainer,
            module,
            seed=settings.seed,
            double=settings.double,
            processes=processes,
            influence_loss=influence_loss,
        )
        with opened as objective:
            train = _training_examples(trainer, loader, objective, settings, given=dataloader is not None)
            if is_unfitted and epoch is None:
                _warn_if_epoch_matters(trainer, objective)
            repicks = not (overrides or {}).keys().isdisjoint(("selector", "ratio", "seed"))
            try:
                yield Session(objective, train, settings, loaders, tracker, repicks)
            except NonFiniteError as error:
                if "at dataset indices" in str(error):
                    raise
                raise NonFiniteError(f"{error}{objective.not_finite_among(train)}") from error
            finally:
                train.close()


@contextlib.contextmanager
def open_stored(
    trainer: Trainer,
    tracker: TrainingTracker,
    loaders: Loaders,
    settings: Settings,
    store: GradientStore,
    dataloader: DataLoader[Any] | None = None,
    influence_loss: LossOfModule | None = None,
) -> Iterator[Session]:
    """Opens the objective for a call that takes its training examples from a store. The data are not read.

    Args:
        trainer: The trainer, with its module.
        tracker: The statistics from training.
        loaders: The loaders of the last ``fit``, which may show examples of a report.
        settings: The settings of the call.
        store: The store.
        dataloader: A loader of the training data, to show examples.
        influence_loss: A function from the module and a batch to the losses of its examples, if one was given.

    Raises:
        ConfigurationError: If the trainer has no model, processes make different calls, or the store has other examples
            than ``dataloader``.
    """
    module = _module_of(trainer)
    processes = ProcessGroup.of(trainer)
    is_unfitted = trainer.current_epoch == 0 and not trainer.training
    epoch = (store.manifest.epoch if loaders.epoch is None else loaders.epoch) if is_unfitted else None
    with processes.propagate_errors(), tracker.neurons.paused(), at_epoch(trainer, epoch):
        processes.assert_equal([store.manifest.mark, asdict(settings)], "store", "Make the same call on all of them.")
        opened = Objective.open(
            trainer,
            module,
            seed=settings.seed,
            double=settings.double,
            processes=processes,
            influence_loss=influence_loss,
        )
        with opened as objective:
            objective.learn_from(store.probe(objective.device))
            train = _at_hand(loaders.train if dataloader is None else dataloader, objective, store, settings)
            if any(processes.gather(train is None)):
                train = None
            if train is None and dataloader is not None:
                raise ConfigurationError(
                    f"The examples of `dataloader` are not those of the store at {str(store.folder)!r}. Give the"
                    " training loader for which it was written, or none."
                )
            if train is None:
                size, options = store.manifest.dataset_size, {"batch_size": settings.batch_size}
                train = Examples.absent(store.ids, size, objective.prepare, processes=processes, **options)
            yield Session(objective, train, settings, loaders, tracker, repicks=False)


def _at_hand(loader: Any, objective: Objective, store: GradientStore, settings: Settings) -> Examples | None:
    """The examples of a store in the dataset of a loader; ``None`` if this is another dataset, or cannot be read."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    options: dict[str, Any] = {"batch_size": settings.batch_size, "seed": settings.seed}
    try:
        with isolate_rng():
            train = Examples.from_loader(loader, objective.prepare, **options, processes=objective.processes)
            same = len(train.dataset) == store.manifest.dataset_size and bool(torch.isin(store.ids, train.ids).all())
            if same:
                train.dataset[int(store.ids[0])]
    except Exception:  # the files may be gone: then examples are not shown
        return None
    return replace(train, ids=store.ids) if same else None


def _module_of(trainer: Trainer) -> LightningModule:
    """The module of a trainer.

    Raises:
        ConfigurationError: If it has none.
    """
    module = trainer.lightning_module
    if module is None:
        raise ConfigurationError("The trainer has no model yet: call fit, validate or test first, or use attach().")
    return module


def _warn_if_epoch_matters(trainer: Trainer, objective: Objective) -> None:
    """Warns if the losses depend on the epoch, but the trainer has not finished one, so the epoch is unknown."""
    batch = objective.probed
    assert batch is not None  # since the structure of the training examples is known

    def loss() -> float:
        return float(objective.losses(objective.theta, batch).sum())

    with torch.no_grad():
        try:
            now = loss()
            later = []
            for epoch in _OTHER_EPOCHS:
                with at_epoch(trainer, epoch):
                    later.append(loss())
        except Exception:  # a schedule may end before these epochs, and errors of the loss itself are raised elsewhere
            return
    if any(not math.isclose(now, other, rel_tol=1e-6, abs_tol=1e-12) for other in later):
        rank_zero_warn(
            f"The training loss of {type(objective.module).__name__} depends on the epoch, but the trainer has not"
            " finished an epoch. So the loss of epoch 0 is used. Pass the epoch of the weights, for example"
            " attach(trainer, model, epoch=10).",
            category=GIFWarning,
        )


def _training_examples(
    trainer: Trainer, loader: Any, objective: Objective, settings: Settings, *, given: bool
) -> Examples:
    """The examples of a training loader. Checks that they are the same on all processes, and learns their structure.

    Args:
        trainer: The trainer.
        loader: The loader.
        objective: The loss.
        settings: The settings of the call.
        given: Whether the call names the loader: then all of its examples count, however many ``fit`` has used.
    """
    most = trainer.fast_dev_run * settings.batch_size if trainer.fast_dev_run else None
    if not given and not trainer.fast_dev_run and (trainer.overfit_batches or trainer.limit_train_batches != 1.0):
        most = _first_examples(trainer, loader)
        if most is None:
            rank_zero_warn(
                "The trainer limits its training batches (overfit_batches or limit_train_batches) and shuffles, but all"
                " examples of the training loader count as training examples. Pass `dataloader=` with the examples that"
                " were used.",
                category=GIFWarning,
            )
    train = Examples.from_loader(
        loader,
        objective.prepare,
        batch_size=settings.batch_size,
        most=most,
        seed=settings.seed,
        processes=objective.processes,
    )
    check_same_everywhere(train, "training data")
    warn_if_random(train)
    return objective.learn_structure(train)


def _first_examples(trainer: Trainer, loader: Any) -> int | None:
    """How many of the first examples of a loader ``fit`` has used; ``None`` if it has used others."""
    batches = trainer.num_training_batches
    in_order = isinstance(loader, DataLoader) and isinstance(loader.sampler, SequentialSampler)
    if not in_order or not loader.batch_size or not 0 < batches < math.inf:
        return None
    return int(batches) * int(loader.batch_size)


def _defines(owner: Any, hook: str) -> bool:
    """Whether a module or datamodule has a hook for data; also one of the instance, as ``from_datasets`` sets it."""
    return hook in vars(owner) or (hasattr(type(owner), hook) and brings_own(owner, hook))


def _are_indices(given: Any) -> bool:
    """Whether ``given`` is a list, tuple, range or 1-d array of integers, and so no batch."""
    if getattr(given, "ndim", None) == 1:
        return "int" in str(getattr(given, "dtype", ""))
    return isinstance(given, (list, tuple, range)) and all(
        isinstance(index, numbers.Integral) and not isinstance(index, bool) for index in given
    )


def _as_mask(given: Any) -> Tensor | None:
    """A tensor, array, list or tuple of truth values as a tensor ``(n,)``; ``None`` if ``given`` is none of them."""
    if getattr(given, "ndim", None) == 1:
        return torch.as_tensor(given) if "bool" in str(getattr(given, "dtype", "")) else None
    listed = isinstance(given, (list, tuple)) and len(given) and all(isinstance(value, bool) for value in given)
    return torch.tensor(given) if listed else None


def _known_classes(examples: Examples) -> list[int]:
    """The labels that occur among examples, sorted.

    Raises:
        SelectionError: If the targets are not labels.
    """
    if examples.classes is None:
        raise SelectionError(
            "targets='class' needs examples with labels (whole numbers, one for each example). Use"
            " targets='cached' or 'batch'."
        )
    return examples.classes.unique().tolist()

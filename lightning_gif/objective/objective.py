"""The training losses of a LightningModule as functions of a flat vector of its parameters."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data.batch import Batch
from ..data.examples import Examples
from ..data.probe import Probe
from ..data.structure import describe, map_tensors, same_structure, tensors
from ..distributed import SINGLE_PROCESS, ProcessGroup
from ..errors import BatchError, ConfigurationError, NonFiniteError, ObjectiveError
from ..mixin import LossOfModule, overrides
from ..reporting.progress import Progress
from ..selection import GradientStatistics, NeuronStatistics
from . import derivatives, outputs
from .batchnorm import refreshed_statistics
from .layer_gradients import LayerGradients, gradients_of
from .losses import LossFunction, OneByOneLoss, OwnLoss, choose_loss
from .observation import observe
from .predictions import IndicesInBounds
from .shadow import ModelState, Shadow, widen_all

if TYPE_CHECKING:
    from .._compat import LightningModule, Trainer

__all__ = ["Objective"]


# How many examples ``training_step`` is tried with: two or more, to distinguish a mean from a sum.
_PROBE = 5

# How many show whether the loss of a batch is a mean or a sum, and what the predictions are.
_MANY = 64

# With more directions than these, gradients of single examples are formed once. For a convolutional network this costs
# as much as about fourteen forward-mode passes (benchmarks/attribution_time.py), for a perceptron less.
FEW_DIRECTIONS = 14

# With more directions than these, gradients of single examples are formed from the layers, if the module has them.
FEW_DIRECTIONS_OF_LAYERS = 1


class Objective:
    """The per-example training losses of a module as a function ``θ ↦ (B,)`` of a flat vector of its parameters.

    If ``influence_loss`` is given, or the module defines it, it gives the losses. Otherwise the loss of an example is
    *defined* as the result of ``training_step`` for a batch of that one example, in evaluation mode.
    :meth:`learn_structure` chooses how it is computed, see :mod:`~lightning_gif.objective.losses`.

    Create an objective with :meth:`open`. Inside that block the module is in evaluation mode on the trainer's device.
    At its end parameters, buffers, metrics, attributes, train/eval flags and random generators are as before, and
    nothing was logged.

    In a distributed run, passes over :class:`~lightning_gif.data.examples.Examples` are divided among the processes,
    and every process gets the same results. Parameters must be the same on all processes. Buffers may differ, as those
    of BatchNorm do; the buffers of the first process are used.

    Args:
        trainer: The trainer; its precision, strategy and hooks prepare batches.
        shadow: The module.
        processes: The process group.

    Attributes:
        convex_in_outputs: Whether the losses are convex in :meth:`outputs`. This holds because :meth:`outputs` records
            the arguments of convex loss functions of PyTorch. It is wrong for a step that subtracts such a loss.
    """

    convex_in_outputs = True

    def __init__(self, trainer: Trainer, shadow: Shadow, processes: ProcessGroup = SINGLE_PROCESS) -> None:
        self.trainer = trainer
        self.shadow = shadow
        self.processes = processes
        self.module = shadow.module
        self.space = shadow.space
        self.device = shadow.device
        # Hidden if the trainer shows none, and on all ranks except the first.
        self.progress = Progress(shown=trainer.progress_bar_callback is not None and trainer.is_global_zero)
        self._own_measurement = overrides(shadow.module, "influence_measurement")
        self._loss: LossFunction | None = None if shadow.influence_loss is None else OwnLoss(shadow)
        self._directional: derivatives.DirectionalDerivatives = derivatives.forward_mode
        self.divisible = True  # whether batches of the training data can be divided into examples
        self._counts_rows = True  # whether the size of a batch shows in the first dimension of its tensors
        self.probe: Probe | None = None  # what the structure was learned from
        self.probed: Batch | None = None  # training examples, in a batch that the losses can be computed for
        self.is_convex = True  # whether there are predictions in which the loss is convex
        self._reference: Any = None  # the structure of training batches

    @property
    def measures(self) -> str:
        """What a query measures: ``"loss"``, or ``"influence_measurement"`` if the module defines that."""
        return "influence_measurement" if self._own_measurement else "loss"

    @staticmethod
    def check_module(module: LightningModule, influence_loss: LossOfModule | None = None) -> None:
        """Checks that the module can give a loss outside the training loop.

        Raises:
            ConfigurationError: If there is no ``influence_loss``, and the module optimises manually or its
                ``training_step`` takes a ``dataloader_iter``.
        """
        if influence_loss is not None or overrides(module, "influence_loss"):
            return
        remedy = (
            "Define `influence_loss(self, batch) -> (B,)` on it (see GIFMixin), or pass such a function as"
            " GIFCallback(influence_loss=...)."
        )
        if not module.automatic_optimization:
            raise ConfigurationError(
                f"{type(module).__name__} optimises manually: calling its training_step to get a loss would step the"
                f" optimizers. {remedy}"
            )
        if "dataloader_iter" in inspect.signature(module.training_step).parameters:
            raise ConfigurationError(
                f"{type(module).__name__}.training_step takes a dataloader_iter, so it cannot be called on one batch."
                f" {remedy}"
            )

    @classmethod
    @contextlib.contextmanager
    def open(
        cls,
        trainer: Trainer,
        module: LightningModule,
        *,
        seed: int = 0,
        double: bool = False,
        processes: ProcessGroup = SINGLE_PROCESS,
        influence_loss: LossOfModule | None = None,
    ) -> Iterator[Objective]:
        """A block that yields the objective and restores the module at its end.

        Args:
            trainer: See the class.
            module: The module, unwrapped.
            seed: Seed of random numbers that a loss may draw.
            double: Compute in float64 instead of float32.
            processes: See the class.
            influence_loss: A function from the module and a batch to the losses of its examples, which replaces the
                module's own.

        Raises:
            ConfigurationError: If the module cannot give a loss, or the processes do not have the same parameters.
        """
        cls.check_module(module, influence_loss)
        device = trainer.strategy.root_device
        opened = Shadow.open(
            trainer, module, device, processes, seed=seed, double=double, influence_loss=influence_loss
        )
        with opened as shadow:
            objective = cls(trainer, shadow, processes)
            try:
                yield objective
            finally:
                objective.progress.close()

    # ----------------------------------------------------------------------------------------------------------------
    # The state of the model
    # ----------------------------------------------------------------------------------------------------------------

    @property
    def theta(self) -> Tensor:
        """The present parameters, ``(p,)``, in float32 or wider."""
        return self.shadow.theta

    @property
    def statistics(self) -> dict[str, Tensor]:
        """Buffers by name that replace the module's own in all computations."""
        return self.shadow.state.statistics

    @statistics.setter
    def statistics(self, buffers: dict[str, Tensor]) -> None:
        self.shadow.state = ModelState(self.theta, buffers)

    def model_state(self, state: Mapping[str, Tensor] | None = None) -> ModelState:
        """A state for :meth:`at_state`: the present one, or one given by parameters and buffers by name."""
        if state is None:
            return self.shadow.state
        theta = torch.cat([state[name].reshape(-1) for name in self.space.slots]).to(self.theta)
        buffers = {name: buffer for name, buffer in self.module.named_buffers() if name in state}
        common = self.processes.broadcast({name: state[name] for name in buffers})
        return ModelState(theta, {name: common[name].to(buffer) for name, buffer in buffers.items()})

    def state_of(self, other: LightningModule) -> ModelState:
        """The state of another module of the same architecture, for :meth:`at_state`. Frozen parameters belong to it.

        Raises:
            ConfigurationError: If its parameters or buffers have other names, or its parameters other shapes.
        """
        own, values = _members(self.module), _members(other)
        shapes, given = (
            {name: list(value.shape) if isinstance(value, nn.Parameter) else None for name, value in members.items()}
            for members in (own, values)
        )
        differing = sorted(name for name in {*shapes, *given} if shapes.get(name, ...) != given.get(name, ...))
        if differing:
            name = differing[0]
            what = [
                "no such name"
                if name not in of
                else "a buffer"
                if of[name] is None
                else f"a parameter of shape {of[name]}"
                for of in (given, shapes)
            ]
            raise ConfigurationError(
                f"The {type(other).__name__} has other parameters or buffers than the {type(self.module).__name__}, at"
                f" {len(differing)} names. {name!r} is {what[0]} there, and {what[1]} here."
            )
        state = self.model_state({name: value.detach() for name, value in values.items()})
        frozen = {name: value for name, value in values.items() if isinstance(value, nn.Parameter)}
        rest = {name: value.detach().to(own[name]) for name, value in frozen.items() if name not in self.space.slots}
        return ModelState(state.theta, {**state.statistics, **rest})

    def at_state(self, state: ModelState) -> contextlib.AbstractContextManager[None]:
        """Inside the block, computations use the parameters and buffers of another state. The module keeps its own."""
        return self.shadow.at(state)

    # ----------------------------------------------------------------------------------------------------------------
    # Batches
    # ----------------------------------------------------------------------------------------------------------------

    def prepare(self, data: Any) -> Any:
        """A batch as the training loop would pass it to ``training_step``, but in the dtype of :attr:`theta`."""
        strategy = self.trainer.strategy
        # Inference tensors (from a test loop) cannot be saved for the backward pass; their copies can.
        data = map_tensors(data, lambda tensor: tensor.clone() if tensor.is_inference() else tensor)
        data = strategy.precision_plugin.convert_input(data)
        data = self.module._on_before_batch_transfer(data, dataloader_idx=0)
        data = strategy.batch_to_device(data, device=self.device, dataloader_idx=0)
        return widen_all(data, self.theta.dtype)

    def learn_structure(self, train: Examples) -> Examples:
        """Learns from a few training examples how batches are structured and how losses are computed.

        A query cannot replace them: a single example does not show whether a loss is a mean or a sum.

        Returns:
            The training examples, to be read in batches that the losses can be computed for.
        """
        self.learn_from(Probe.of(train, _PROBE, _MANY))
        return self.readable(train)

    def learn_from(self, probe: Probe) -> None:
        """Learns from a probe of the training examples what :meth:`learn_structure` learns."""
        self.probe = probe
        self._reference = probe.together.data
        self.divisible = probe.divisible
        self._counts_rows = probe.counts_rows
        self._loss = choose_loss(self.shadow, probe)
        probed = list(probe.singles) if self._takes_one_at_a_time else [probe.many]
        self.is_convex = outputs.choose_predictions(self._loss, *probed)
        self.probed = replace(probed[0], divisible=probe.divisible and not self._takes_one_at_a_time)

    @property
    def _takes_one_at_a_time(self) -> bool:
        """Whether a batch of several examples does not have the sum of their losses."""
        one_by_one = isinstance(self._loss, OneByOneLoss)
        return one_by_one and (not self.divisible or self._loss.reduction is None)  # type: ignore[union-attr]

    def readable(self, examples: Examples) -> Examples:
        """The examples, to be read in batches that the losses can be computed for, as :meth:`learn_structure` found.

        These are batches of one example if losses are computed one by one, and either batches cannot be divided, or
        their loss is neither the mean nor the sum of those of the examples.

        Raises:
            BatchError: If the examples are a single batch that would have to be divided.
        """
        given = examples.dataset is None
        if self.divisible and not self._takes_one_at_a_time:
            return examples
        if self.divisible and given:
            wholes = examples.in_memory or ()
            singles = tuple(whole.slice(at, at + 1) for whole in wholes for at in range(whole.size))
            return replace(examples, in_memory=singles, batch_size=1)
        if given and not (self._counts_rows and (len(examples) == 1 or not self._takes_one_at_a_time)):
            for batch in examples.in_memory or ():
                batch.require_rows()
        size = 1 if self._takes_one_at_a_time else examples.batch_size
        return replace(examples, divisible=False, batch_size=size)

    def learn_derivatives(self, train: Examples) -> None:
        """Chooses how :meth:`directional_derivatives` are computed, by a comparison on a few training examples."""
        self._directional = derivatives.choose_derivatives(self.loss, train)

    def check(self, examples: Examples, what: str, *, measured: bool = False) -> None:
        """Checks that ``examples`` have the structure of the training batches and finite losses.

        Args:
            examples: The examples.
            what: Their name in error messages.
            measured: Check the measurement of a query instead of the loss.

        Raises:
            BatchError: If a batch has another structure, or its losses cannot be computed.
            NonFiniteError: If a value is not finite.
        """
        measured = measured and self._own_measurement
        name = "measurements" if measured else "losses"
        values_of = self.measurements if measured else self.losses
        for batch in examples.local_batches():
            if self.divisible and not (measured or self.loss.any_structure):
                self._check_structure(batch, what)
            try:
                with torch.no_grad():
                    if self.shadow.fails_for_good:
                        with IndicesInBounds():
                            (self.measurements if measured else self.loss.evaluate)(self.theta, batch)
                    values = values_of(self.theta, batch)
                    finite = bool(torch.isfinite(values).all())  # waits for a GPU, which now reports kernel errors
            except (BatchError, ObjectiveError, ConfigurationError):
                raise
            except Exception as error:
                raise BatchError(
                    f"The {name} of the {what} batch could not be computed: {type(error).__name__}:"
                    f" {str(error).rstrip('.')}. Given: {describe(batch.data)}. A batch of {_PROBE}"
                    f" training examples: {describe(self._reference)}."
                ) from error
            if not finite:
                bad = batch.ids[~torch.isfinite(values).cpu()].tolist()
                where = "at positions" if examples.dataset is None else "at dataset indices"
                raise NonFiniteError(
                    f"{len(bad)} of {batch.size} {name} of the {what} batch are not finite, {where} {_few(bad)}"
                    f"{self._why_not_finite(batch)}. Nothing was changed. Correct these examples, or leave them out."
                )

    def not_finite_among(self, train: Examples) -> str:
        """A sentence with the indices of training examples whose losses are not finite; empty if none or all are such.

        Args:
            train: The training examples, of which each process looks at its own part.
        """
        bad, good = list[int](), 0
        with torch.no_grad():
            for batch in train.local_batches():
                try:
                    finite = torch.isfinite(self.losses(self.theta, batch)).cpu()
                except Exception:  # the error that is being explained is more important
                    return ""
                bad += batch.ids[~finite].tolist()
                good += int(finite.sum())
        if not bad or not good:  # if all are bad, the reason is not in the examples
            return ""
        return (
            f" The losses of {len(bad)} training examples are not finite, at dataset indices {_few(bad)}. Correct these"
            " examples, or leave them out of the training data."
        )

    def _check_structure(self, batch: Batch, what: str) -> None:
        data = batch.data
        if same_structure(data, self._reference):
            return
        several = isinstance(data, Tensor) and data.ndim > 1 and not data.is_floating_point()
        remedy = (
            "To pass dataset indices, give a tensor with one dimension, such as `.indices[0]`."
            if several
            else "Give a batch as the training loader yields it, with its targets. For single items of a dataset, pass"
            " a loader over them: DataLoader(Subset(dataset, [17, 4]), 64)."
        )
        raise BatchError(
            f"The {what} batch does not have the structure of the training batches. Given: {describe(data)}."
            f" A batch of {_PROBE} training examples: {describe(self._reference)}. {remedy}"
        )

    def _why_not_finite(self, batch: Batch) -> str:
        parts = self.module.state_dict().items()
        names = [name for name, part in parts if isinstance(part, Tensor) and not torch.isfinite(part).all()]
        if names:
            shown = f"{', '.join(names[:5])}{' …' if len(names) > 5 else ''}"
            return f": weights or buffers of the model are not finite ({shown})"
        inputs = [tensor for tensor in tensors(batch.data) if tensor.is_floating_point()]
        bad = sum(int((~torch.isfinite(tensor)).sum()) for tensor in inputs)
        if bad:
            return f": the batch has {bad} non-finite value(s)"
        return (
            ", although the batch and the weights are finite: the model overflows, or its loss uses the value of a"
            " torchmetrics metric"
        )

    # ----------------------------------------------------------------------------------------------------------------
    # Losses of a prepared batch
    # ----------------------------------------------------------------------------------------------------------------

    @property
    def loss(self) -> LossFunction:
        """The loss function.

        Raises:
            ObjectiveError: Before :meth:`learn_structure`, unless there is an ``influence_loss``.
        """
        if self._loss is None:
            raise ObjectiveError(
                f"It is not known yet how {type(self.module).__name__}.training_step gives losses of single examples."
                " Call learn_structure with the training examples first."
            )
        return self._loss

    @cached_property
    def layers(self) -> LayerGradients | None:
        """How gradients of single examples are computed by one backward pass; ``None`` if they cannot be.

        A few training examples are used to find out, so it is ``None`` before :meth:`learn_structure`.
        """
        return self.choose_layers()

    def choose_layers(self) -> LayerGradients | None:
        """Finds out what :attr:`layers` is, which takes a few passes."""
        if self.probed is None or not self.probed.divisible:
            return None
        return LayerGradients.choose(self.loss, self.probed)

    @property
    def finds_outputs(self) -> bool:
        """Whether :meth:`outputs` are those of a loss that is written by hand."""
        return self._loss is not None and self._loss.entries is not None

    def losses(self, theta: Tensor, batch: Batch) -> Tensor:
        """The training loss of each example, ``(B,)``, at ``theta`` ``(p,)``; differentiable in ``theta``."""
        return self.loss.losses(theta, batch)

    def measurements(self, theta: Tensor, batch: Batch) -> Tensor:
        """What a query measures, ``(B,)``: ``influence_measurement`` if the module defines it, else the losses."""
        if self._own_measurement:
            return self.shadow.per_example(theta, "influence_measurement", batch.data)
        return self.losses(theta, batch)

    def loss_sum(self, theta: Tensor, batch: Batch) -> Tensor:
        """The sum of the losses, ``()``; differentiable in ``theta``."""
        return self.loss.loss_sum(theta, batch)

    def outputs(self, theta: Tensor, batch: Batch) -> Tensor:
        """The predictions that the losses are computed from, see :func:`~.outputs.outputs`."""
        return outputs.outputs(self.loss, theta, batch)

    def loss_sum_at(self, theta: Tensor, batch: Batch) -> Callable[[Tensor], Tensor]:
        """The sum of the losses as a function of :meth:`outputs` alone."""
        return outputs.loss_sum_at(self.loss, theta, batch)

    def n_classes(self, examples: Examples) -> int | None:
        """The number of classes, see :func:`~.outputs.n_classes`; ``None`` if the model is no classifier."""
        return outputs.n_classes(self.loss, self.theta, examples, self.shadow.seed)

    def logits(self, theta: Tensor, batch: Batch) -> Tensor:
        """The logits ``(B, C)`` of a classifier, see :func:`~.outputs.logits`."""
        return outputs.logits(self.loss, theta, batch)

    def loss_and_logits(self, theta: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """:meth:`loss_sum` and :meth:`logits`, in one pass if possible, see :func:`~.outputs.loss_and_logits`."""
        return outputs.loss_and_logits(self.loss, theta, batch)

    def gradients(self, batch: Batch) -> Iterator[Tensor]:
        """Yields the gradients of the losses at the present parameters, ``(b, p)`` for the next ``b`` examples."""
        if self.layers is not None:
            return self.layers.gradients(batch)
        return gradients_of(self.loss, batch)

    def directional_derivatives(self, batch: Batch, directions: Tensor) -> Tensor:
        """``wᵀ∇ℓ(zᵢ)`` for each direction ``w`` and each example ``zᵢ``, at the present parameters.

        :meth:`learn_derivatives` has chosen how they are computed. For many directions they are computed from gradients
        of single examples, if these are vectorised.

        Args:
            batch: A batch of B examples.
            directions: ``(q, p)``.

        Returns:
            ``(q, B)``.
        """
        if len(directions) > FEW_DIRECTIONS_OF_LAYERS and self.layers is not None:
            return self.layers.products(batch, directions)
        if len(directions) > FEW_DIRECTIONS and self.loss.vectorised:
            return derivatives.from_gradients(self.loss, batch, directions).detach()
        return self._directional(self.loss, batch, directions).detach()

    # ----------------------------------------------------------------------------------------------------------------
    # Passes over examples
    # ----------------------------------------------------------------------------------------------------------------

    def mean(self, examples: Examples, function: Callable[[Tensor, Batch], Tensor], theta: Tensor) -> float:
        """The mean of a function over examples, at ``theta``; ``function(θ, batch)`` returns its sum over a batch."""
        with torch.no_grad():
            total = sum(float(function(theta, batch)) for batch in examples.local_batches())
        return self.processes.total(total) / len(examples)

    def mean_loss(self, examples: Examples, theta: Tensor | None = None) -> float:
        """The mean loss over examples, at ``theta`` or, by default, the present parameters."""
        return float(self.all_losses(examples, theta).double().mean())

    def all_losses(self, examples: Examples, theta: Tensor | None = None) -> Tensor:
        """The losses ``(n,)`` of all examples, at ``theta`` or, by default, the present parameters."""
        at = self.theta if theta is None else theta
        with torch.no_grad():
            losses = [self.losses(at, batch) for batch in examples.local_batches()]
            return examples.all_gather(losses).to(self.device)

    def gradient(
        self,
        examples: Examples,
        theta: Tensor | None = None,
        loss_sum: Callable[[Tensor, Batch], Tensor] | None = None,
    ) -> Tensor:
        """The gradient ``(p,)`` of the mean loss over examples.

        Args:
            examples: The examples.
            theta: Parameters ``(p,)``, by default the present ones.
            loss_sum: The sum over a batch of the function to differentiate, by default :meth:`loss_sum`.

        Raises:
            NonFiniteError: If the gradient is not finite.
        """
        at = self.theta if theta is None else theta
        return derivatives.mean_gradient(examples, at, loss_sum or self.loss_sum, self.space)

    def query_gradients(self, examples: Examples, *, per_example: bool) -> Tensor:
        """The gradients ``(q, p)`` of the query's measurement at the present parameters.

        Args:
            examples: The ``n`` examples of the query.
            per_example: Whether to return one gradient for each example (q = n). Otherwise the gradient of the mean
                over all examples is returned (q = 1).

        Raises:
            NonFiniteError: If a gradient is not finite.
        """
        return derivatives.query_gradients(
            examples,
            self.theta,
            self.measurements,
            self.space,
            per_example=per_example,
            rows=None if self._own_measurement else self.gradients,
        )

    def observe(self, examples: Examples) -> tuple[NeuronStatistics, GradientStatistics]:
        """The statistics of neurons and parameters on the examples, see :func:`~.observation.observe`."""
        return observe(self.loss, examples)

    def refreshed_statistics(self, theta: Tensor, *examples: Examples) -> dict[str, Tensor]:
        """The running statistics of BatchNorm at ``theta``, see :func:`~.batchnorm.refreshed_statistics`."""
        return refreshed_statistics(self.loss, theta, *examples)


def _members(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a module by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _few(numbers: list[int]) -> str:
    """The first of some numbers as text."""
    return f"{numbers[:5]}{' …' if len(numbers) > 5 else ''}"

"""A LightningModule as pure functions of a flat parameter vector, with everything else left as it is."""

from __future__ import annotations

import contextlib
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from tqdm.auto import tqdm

from .._compat import LightningModule, Trainer, rank_zero_info
from ..data.examples import Examples
from ..data.structure import batch_size, describe, map_tensors, same_structure, slice_batch, tensors
from ..data.targets import class_targets
from ..distributed import SINGLE_PROCESS, ProcessGroup
from ..errors import BatchError, ConfigurationError, GIFWarning, NonFiniteError, ObjectiveError
from ..mixin import overrides
from ..parameters import ParameterSpace
from ..selection import GradientStatistics, NeuronStatistics
from ..storage.digests import digest
from ..storage.interrupts import uninterrupted
from .predictions import IndicesInBounds, Predictions
from .shadow import fails_for_good, isolated, replaced

__all__ = ["ModelState", "Objective"]


# How many examples the check of the derived losses looks at: two are enough to tell a mean from a sum.
_PROBE = 3

# How many examples, spread over the data, tell how derivatives may be taken.
_SPREAD = 8

# Two ways to the same derivative differ by less than this share of it, by dtype.
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-6}

# How many are looked at to see what is predicted.
_PREDICTED = 64

# For more directions, gradients of single examples are formed once: of a convolutional net they cost as much as some
# fourteen forward-mode passes (benchmarks/attribution_time.py), of a perceptron less.
_FEW_DIRECTIONS = 14

# What PyTorch says where a function cannot be differentiated in forward mode, but in reverse mode.
_NO_FORWARD_MODE = ("forward", "mutating directly with `.data` inside functorch transform")

# What the gradients of single examples may take at a time.
_GRADIENT_BYTES = 2**28


class ModelState(NamedTuple):
    """What an objective computes with.

    Attributes:
        theta: The parameters ``(p,)``.
        statistics: Buffers in the place of the module's own, by name.
    """

    theta: Tensor
    statistics: dict[str, Tensor]


class Objective:
    """The per-example training losses of a module as a function ``θ ↦ (B,)`` of a flat vector of its parameters.

    Losses come from ``influence_loss`` where the module defines it. Otherwise they are *defined* as what
    ``training_step`` returns for a batch of that one example, in evaluation mode, and computed for all examples of a
    batch at once by ``torch.func.vmap``. A first look at the data checks that this gives the same numbers as one
    example after the other, and falls back to that, with a warning, where it does not.

    Use :meth:`open`. Inside of it the module is in evaluation mode on the trainer's device, and nothing that the
    computations do to it lasts: parameters, buffers, metrics, logged values, attributes, train/eval flags and random
    generators are as before.

    Passes over examples are shared out over the processes that these know
    (:class:`~lightning_gif.data.examples.Examples`), and what is computed is the same on all of them. Parameters must
    be, too. Buffers, which BatchNorm lets drift apart, are taken from the first process.

    Args:
        trainer: Whose precision, strategy and hooks prepare batches.
        module: The module, unwrapped.
        seed: Of random numbers that a loss may draw; the same at every evaluation, so that the loss is one function.
        processes: The processes that share out the work.

    Attributes:
        convex_in_outputs: Whether losses are convex in :meth:`outputs`. They are, as these are the predictions that are
            given to loss functions of PyTorch which are convex in them; a step that subtracts such a loss breaks it.
    """

    convex_in_outputs = True

    def __init__(
        self, trainer: Trainer, module: LightningModule, *, seed: int = 0, processes: ProcessGroup = SINGLE_PROCESS
    ) -> None:
        self.trainer = trainer
        self.processes = processes
        self.module = module
        self.space = ParameterSpace(module)
        self.device = trainer.strategy.root_device
        self._seed = seed
        self._own_loss = overrides(module, "influence_loss")
        self._own_measurement = overrides(module, "influence_measurement")
        self._vmap: bool | None = True if self._own_loss else None
        self._reduction: str | None = None
        self._reference: Any = None
        self._derivatives = Objective._forward  # how directional derivatives are taken
        self.statistics: dict[str, Tensor] = {}
        self._common: dict[str, Tensor] = {}  # the first process's buffers, where they are not this one's
        self.check_module(module)

    @staticmethod
    def check_module(module: LightningModule) -> None:
        """Raises a :class:`~lightning_gif.errors.ConfigurationError` if no loss can be had from the module.

        Only ``influence_loss`` can give one where the optimisation is manual, or where ``training_step`` takes an
        iterator.
        """
        if overrides(module, "influence_loss"):
            return
        remedy = "Define `influence_loss(self, batch) -> (B,)` on it (see GIFMixin)."
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
    ) -> Iterator[Objective]:
        """The objective, inside of everything that isolates its evaluation from the user's run.

        Args:
            trainer: See the class.
            module: See the class.
            seed: See the class.
            double: Compute in float64 instead of float32.
            processes: See the class.

        Raises:
            ConfigurationError: If the processes do not have the same parameters.
        """
        objective = cls(trainer, module, seed=seed, processes=processes)
        least = torch.float64 if double else torch.float32
        dtype = torch.promote_types(next(iter(objective._parameters())).dtype, least)
        with isolated(module, objective.device, dtype, trainer.loggers, processes):
            objective.theta = objective.space.flatten(module, dtype)
            objective._synchronise()
            yield objective

    def _synchronise(self) -> None:
        """Makes sure that all processes compute with the same weights."""
        if self.processes.size == 1:
            return
        self.processes.assert_equal(
            digest(dict(self.module.named_parameters())),
            "weights",
            "Load the same checkpoint on all of them; apply and undo an edit on all of them, not on the first alone.",
        )
        buffers = {name: buffer.detach().cpu() for name, buffer in self.module.named_buffers()}
        marks = self.processes.gather(digest(buffers))
        if any(mark != marks[0] for mark in marks):
            common = self.processes.broadcast(buffers)
            self._common = {name: common[name].to(buffer.device) for name, buffer in self.module.named_buffers()}

    theta: Tensor
    """The parameters as they are, ``(p,)``, in float32 or wider."""

    statistics: dict[str, Tensor]
    """Buffers that everything is computed with in place of the module's own, by name."""

    def model_state(self, state: Mapping[str, Tensor] | None = None) -> ModelState:
        """A state of the module, its parameters and buffers by name, for :meth:`at_state`; by default the present."""
        if state is None:
            return ModelState(self.theta, self.statistics)
        theta = torch.cat([state[name].reshape(-1) for name in self.space.slots]).to(self.theta)
        buffers = {name: buffer for name, buffer in self.module.named_buffers() if name in state}
        common = self.processes.broadcast({name: state[name] for name in buffers})
        return ModelState(theta, {name: common[name].to(buffer) for name, buffer in buffers.items()})

    @contextlib.contextmanager
    def at_state(self, moment: ModelState) -> Iterator[None]:
        """Inside of it, parameters and buffers are those of a moment; the module's stay."""
        own = self.model_state()
        self.theta, self.statistics = moment
        try:
            yield
        finally:
            self.theta, self.statistics = own

    # ----------------------------------------------------------------------------------------------------------------
    # Batches
    # ----------------------------------------------------------------------------------------------------------------

    def prepare(self, data: Any) -> Any:
        """A batch as the training loop would hand it to ``training_step``, but in the dtype of :attr:`theta`."""
        strategy = self.trainer.strategy
        # Inference tensors (from a test loop) cannot be saved for backward; a copy made outside of that mode can.
        data = map_tensors(data, lambda tensor: tensor.clone() if tensor.is_inference() else tensor)
        data = strategy.precision_plugin.convert_input(data)
        data = self.module._on_before_batch_transfer(data, dataloader_idx=0)
        data = strategy.batch_to_device(data, device=self.device, dataloader_idx=0)
        return map_tensors(data, self._widen)

    def _widen(self, tensor: Tensor) -> Tensor:
        narrow = tensor.is_floating_point() and torch.finfo(tensor.dtype).bits < torch.finfo(self.theta.dtype).bits
        if tensor.is_complex():
            return tensor.to(torch.promote_types(tensor.dtype, self.theta.dtype))
        return tensor.to(self.theta.dtype) if narrow else tensor

    def learn_structure(self, train: Examples) -> None:
        """Takes from the first training examples how batches look and how losses are derived.

        Never from a query: a single example could not tell a mean from a sum.
        """
        few = train.subset(torch.arange(min(_PROBE, len(train))))
        self._reference = next(few.batches()).data
        if not self._own_loss:
            self._probe(self._reference)

    def check(self, examples: Examples, what: str, *, measured: bool = False) -> None:
        """Makes sure that ``examples`` can be asked about: structure as in training, finite values.

        Args:
            examples: The examples.
            what: What they are, for messages.
            measured: Look at the measurement of a query instead of the loss.

        Raises:
            BatchError: If a batch is not structured as training batches are.
            NonFiniteError: If a value is not finite.
        """
        if measured and self._own_measurement:
            own, function, name = True, self.measurements, "measurements"
        else:
            own, function, name = self._own_loss, self.losses, "losses"
        for batch in examples.local_batches():
            if not own and not same_structure(batch.data, self._reference):
                several = isinstance(batch.data, Tensor) and batch.data.ndim > 1 and not batch.data.is_floating_point()
                remedy = " Indices in the training dataset have one dimension, as `.indices[0]` has." if several else ""
                raise BatchError(
                    f"The {what} batch is not structured as the training batches are. Given: {describe(batch.data)}."
                    f" In training, three at a time: {describe(self._reference)}.{remedy}"
                )
            try:
                with torch.no_grad():
                    if fails_for_good(self.device):
                        with IndicesInBounds():
                            (function if own else self._training_step)(self.theta, batch.data)
                    values = function(self.theta, batch.data)
                    finite = bool(torch.isfinite(values).all())  # where a GPU tells what its kernels met
            except (BatchError, ObjectiveError, ConfigurationError):
                raise
            except Exception as error:
                raise BatchError(
                    f"The {name} of the {what} batch could not be computed: {type(error).__name__}: {error}. Given:"
                    f" {describe(batch.data)}. In training, three at a time: {describe(self._reference)}."
                ) from error
            if not finite:
                raise NonFiniteError(
                    f"{int((~torch.isfinite(values)).sum())} of {batch.size} {name} of the {what} batch are"
                    f" not finite{self._why_not_finite(batch.data)}. Nothing was changed."
                )

    def _why_not_finite(self, data: Any) -> str:
        parts = self.module.state_dict().items()
        names = [name for name, part in parts if isinstance(part, Tensor) and not torch.isfinite(part).all()]
        if names:
            return f": the model's own weights are not ({', '.join(names[:5])}{' …' if len(names) > 5 else ''})"
        bad = sum(int((~torch.isfinite(tensor)).sum()) for tensor in tensors(data) if tensor.is_floating_point())
        if bad:
            return f": its tensors hold {bad} non-finite value(s)"
        return ", though its tensors are: the model overflows, or its loss uses the value of a torchmetrics metric"

    # ----------------------------------------------------------------------------------------------------------------
    # Functions of θ
    # ----------------------------------------------------------------------------------------------------------------

    def losses(self, theta: Tensor, data: Any) -> Tensor:
        """Training losses of a prepared batch, ``(B,)``, at ``theta`` ``(p,)``; differentiable in ``theta``."""
        if self._own_loss:
            return self._call_own(theta, data, "influence_loss")
        if self._vmap is None:
            self._probe(data)
        return self._losses_vmap(theta, data) if self._vmap else self._losses_one_by_one(theta, data)

    def measurements(self, theta: Tensor, data: Any) -> Tensor:
        """What a query measures, ``(B,)``: ``influence_measurement`` where the module defines it, else the losses."""
        if self._own_measurement:
            return self._call_own(theta, data, "influence_measurement")
        return self.losses(theta, data)

    def loss_sum(self, theta: Tensor, data: Any) -> Tensor:
        """The sum of the losses of a prepared batch, ``()``."""
        if self._vmap is None:
            self._probe(data)
        if not self._vmap and self._reduction is not None:  # one pass instead of B of them
            loss = self._training_step(theta, data)
            return loss * batch_size(data) if self._reduction == "mean" else loss
        return self.losses(theta, data).sum()

    def outputs(self, theta: Tensor, data: Any) -> Tensor:
        """The predictions of a prepared batch that the loss is computed from, ``(B, d)`` or flat; differentiable.

        Raises:
            ObjectiveError: If the loss is not computed by a loss function of PyTorch.
        """

        def predictions(*example: Any) -> Tensor:
            with Predictions() as noted:
                self._loss_of(theta, *example)
            try:
                found = noted.flat()
            except RuntimeError as error:
                raise ObjectiveError(
                    f"{type(self.module).__name__} computes its losses inside of a vmap, out of which their predictions"
                    " cannot be taken for curvature='ggn' and curvature_sampling='logits'. Use curvature='hessian'."
                ) from error
            if found is None:
                raise ObjectiveError(
                    "curvature='ggn' and curvature_sampling='logits' need the predictions of the loss, but"
                    f" {type(self.module).__name__} calls none of PyTorch's losses (F.cross_entropy, F.mse_loss,"
                    " nn.BCEWithLogitsLoss, …). Use curvature='hessian', or one of these."
                )
            return found

        return self._over_examples(predictions, data)

    def predictions(self, data: Any) -> Tensor:
        """The predictions for each example of a prepared batch, ``(B, d)``, on the CPU; of several heads side by side.

        Raises:
            ObjectiveError: If the loss is not computed by a loss function of PyTorch.
            ConfigurationError: If a prediction does not have one row for each example.
        """
        size = batch_size(data)
        with torch.no_grad():
            found = self.outputs(self.theta, data)
            if found.ndim == 2:
                return found.cpu()
            with Predictions() as noted:
                self.loss_sum(self.theta, data)
        rows = noted.rows(size)
        if rows is None:
            raise ConfigurationError(
                f"curvature_sampling='logits' needs predictions with one row for each example, which"
                f" {type(self.module).__name__} does not make. Use 'features' or 'random'."
            )
        return rows.cpu()

    def features(self, data: Any) -> Tensor:
        """What enters the last Linear layer for each example of a prepared batch, ``(B, d)``, on the CPU.

        Positions of a sequence are averaged.

        Raises:
            ConfigurationError: If the module has no Linear layer, or it does not see one row an example.
        """
        entered: list[Tensor] = []
        hooks: list[RemovableHandle] = []
        try:
            with uninterrupted():
                for layer in self.module.modules():
                    if isinstance(layer, nn.Linear):
                        note = layer.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0].detach()))
                        hooks.append(note)
            with torch.no_grad():
                if self._own_loss:
                    self._call_own(self.theta, data, "influence_loss")
                else:
                    self._training_step(self.theta, data)
        finally:
            with uninterrupted():
                for hook in hooks:
                    hook.remove()
        if not entered or len(entered[-1]) != batch_size(data):
            raise ConfigurationError(
                f"curvature_sampling='features' needs a Linear layer that sees one row for each example, which"
                f" {type(self.module).__name__} does not end in. Use 'logits' or 'random'."
            )
        last = entered[-1]
        return last.reshape(len(last), -1, last.shape[-1]).mean(1).cpu()

    def loss_sum_at(self, theta: Tensor, data: Any) -> Callable[[Tensor], Tensor]:
        """The sum of a prepared batch's losses as a function of its predictions alone, shaped as by :meth:`outputs`."""

        def loss_sum(outputs: Tensor) -> Tensor:
            def loss(part: Tensor, *example: Any) -> Tensor:
                with Predictions(part):
                    return self._loss_of(theta, *example)

            return self._over_examples(loss, data, outputs).sum()

        return loss_sum

    def _loss_of(self, theta: Tensor, data: Any) -> Tensor:
        """The loss of what :meth:`_over_examples` hands out: one example, or a whole batch."""
        return self._training_step(theta, data) if self._vmap and not self._own_loss else self.loss_sum(theta, data)

    def _over_examples(self, function: Callable[..., Tensor], data: Any, *rows: Tensor) -> Tensor:
        """``function(*rows, data)`` of each example where that can be vectorised, else of the whole batch."""
        if self._vmap is None:
            self._probe(data)
        if self._vmap and not self._own_loss:
            return self._map_examples(function, data, *rows)
        if not self._own_loss and self._reduction is None:
            raise ObjectiveError(
                f"curvature='ggn' needs the losses of {type(self.module).__name__} for a whole batch at once, but its"
                " training_step can be neither vectorised nor taken for a mean. Define `influence_loss` (see GIFMixin)."
            )
        return function(*rows, data)

    def n_classes(self, examples: Examples) -> int | None:
        """``C``, if the loss looks at one softmax over ``C`` classes for each example, in the order of the labels.

        ``None`` if it calls no cross-entropy of PyTorch, or with other targets than the labels in the batch.
        """
        few = next(examples.sample(_PREDICTED, self._seed).batches()).data
        with torch.no_grad():
            _, found = self._classified(self.theta, few)
        labels = class_targets(few)
        if found is None or labels is None or not torch.equal(found[1].cpu().long(), labels.cpu().long()):
            return None
        return found[0].shape[1]

    def logits(self, theta: Tensor, data: Any) -> Tensor:
        """The predictions ``(B, C)`` of a prepared batch, where :meth:`n_classes` has found some; differentiable.

        Raises:
            ObjectiveError: If there are none in this batch.
        """
        return self._logits_of(self._classified(theta, data)[1], data)

    def loss_and_logits(self, theta: Tensor, data: Any) -> tuple[Tensor, Tensor]:
        """The sum of the losses of a prepared batch, and :meth:`logits`, by one pass where losses are not coupled."""
        if self._vmap is None:
            self._probe(data)
        loss, found = self._classified(theta, data)
        if self._own_loss:
            loss = loss.sum()
        elif self._reduction is None:
            loss = self.losses(theta, data).sum()
        elif self._reduction == "mean":
            loss = loss * batch_size(data)
        return loss, self._logits_of(found, data)

    def _logits_of(self, found: tuple[Tensor, Tensor] | None, data: Any) -> Tensor:
        if found is None:
            raise ObjectiveError(
                f"{type(self.module).__name__} predicts classes by a cross-entropy for some batches, but not for this"
                f" one: {describe(data)}."
            )
        return found[0]

    def _classified(self, theta: Tensor, data: Any) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """A loss, and the logits and targets of all examples: predictions of an example do not depend on the others."""
        with Predictions() as noted:
            loss = (self.losses if self._own_loss else self._training_step)(theta, data)
        return loss, noted.classified()

    def mean(self, examples: Examples, function: Callable[[Tensor, Any], Tensor], theta: Tensor) -> float:
        """The mean over examples of a function that is summed over batches, ``(θ, batch) → ()``, at ``theta``."""
        with torch.no_grad():
            found = sum(float(function(theta, batch.data)) for batch in examples.local_batches())
        return self.processes.total(found) / len(examples)

    def mean_loss(self, examples: Examples, theta: Tensor | None = None) -> float:
        """The mean loss over examples at ``theta``, by default at the present parameters."""
        return float(self.all_losses(examples, theta).double().mean())

    def all_losses(self, examples: Examples, theta: Tensor | None = None) -> Tensor:
        """The losses of all examples, ``(n,)``, at ``theta``."""
        with torch.no_grad():
            at = self.theta if theta is None else theta
            return examples.all_gather([self.losses(at, batch.data) for batch in examples.local_batches()]).to(
                self.device
            )

    def gradient(
        self,
        examples: Examples,
        theta: Tensor | None = None,
        loss_sum: Callable[[Tensor, Any], Tensor] | None = None,
    ) -> Tensor:
        """The gradient ``(p,)`` of the mean loss over examples at ``theta``, by default at the present parameters.

        Args:
            examples: The examples.
            theta: ``(p,)``.
            loss_sum: The sum over a batch of another function of its examples, see :meth:`loss_sum`.

        Raises:
            NonFiniteError: If it is not finite.
        """
        total = torch.zeros_like(self.theta)
        for batch in examples.local_batches():
            at = (self.theta if theta is None else theta).detach().requires_grad_()
            total += self._gradient((loss_sum or self.loss_sum)(at, batch.data), at)
        return self._finite(self.processes.sum(total) / len(examples))

    def query_gradients(self, examples: Examples, *, per_example: bool) -> Tensor:
        """Gradients of the measurement, ``(q, p)``: of its mean over all examples (q = 1), or of each (q = n).

        Raises:
            NonFiniteError: If one is not finite.
        """
        rows, total = [], torch.zeros_like(self.theta)
        for batch in examples.local_batches():
            theta = self.theta.detach().requires_grad_()
            values = self.measurements(theta, batch.data)
            if per_example:
                rows += [self._gradient(value, theta, retain_graph=True) for value in values]
            else:
                total += self._gradient(values.sum(), theta)
        if not per_example:
            return self._finite(self.processes.sum(total)[None] / len(examples))
        if self.processes.size == 1:
            return self._finite(torch.stack(rows))
        found = self.theta.new_zeros(len(examples), self.space.size)
        for position, row in enumerate(rows, examples.shard[0]):
            found[position] = row
        return self._finite(self.processes.sum(found))

    def observe(self, examples: Examples) -> tuple[NeuronStatistics, GradientStatistics]:
        """What neurons and parameters would show if the examples were trained on now: one forward and backward pass."""
        neurons, gradients = NeuronStatistics(), GradientStatistics()
        try:
            with uninterrupted():
                neurons.attach(self.module)
            for batch in examples.strided_batches():
                theta = self.theta.detach().requires_grad_()
                neurons.record(class_targets(batch.data), batch.size)
                if self._own_loss:
                    loss = self._call_own(theta, batch.data, "influence_loss").mean()
                else:
                    loss = self._training_step(theta, batch.data)
                gradients.add(self.space.unflatten(self._gradient(loss, theta)).items())
        finally:
            with uninterrupted():
                neurons.detach()
        neurons.sum_over(self.processes)
        gradients.sum_over(self.processes)
        return neurons, gradients

    def refreshed_statistics(self, theta: Tensor, *examples: Examples) -> dict[str, Tensor]:
        """The running means and variances of BatchNorm over examples at ``theta``, by the names of the buffers.

        As :func:`torch.optim.swa_utils.update_bn` does it, forward passes in training mode whose statistics are
        averaged, but with the same weight for each example, and with everything else, dropout above all, in evaluation
        mode.

        Raises:
            ConfigurationError: If the module has no such layers, or there is no batch of two examples.
        """
        layers = {
            name: layer
            for name, layer in self.module.named_modules()
            if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None
        }
        if not layers:
            raise ConfigurationError(
                f"refresh_statistics=True computes the running statistics of BatchNorm anew, but"
                f" {type(self.module).__name__} has no layer that keeps any. Leave it out."
            )
        if self.processes.size > 1 and any(isinstance(layer, nn.SyncBatchNorm) for layer in layers.values()):
            raise ConfigurationError(
                "refresh_statistics=True does not work while BatchNorm is synchronised over processes (sync_batchnorm):"
                " call it after `fit`, when Lightning has turned that back."
            )
        buffers, seen = self._buffers(), 0
        names = [f"{name}.{kind}" for name in layers for kind in ("running_mean", "running_var")]
        momenta = {name: layer.momentum for name, layer in layers.items()}
        function, more = ("influence_loss", []) if self._own_loss else ("training_step", self._index)
        generator = torch.Generator().manual_seed(self._seed)
        for layer in layers.values():
            layer.train()
        try:
            with torch.no_grad():
                for part in examples:
                    for batch in part.subset(torch.randperm(len(part), generator=generator)).strided_batches():
                        if batch.size == 1:  # which has no variance
                            continue
                        seen += batch.size
                        for layer in layers.values():
                            layer.momentum = batch.size / seen  # the mean over all, each example with the same weight
                        self._call(theta, function, batch.data, *more, buffers=buffers)
        finally:
            for name, layer in layers.items():
                layer.momentum = momenta[name]
                layer.eval()
        everywhere = self.processes.total(seen)
        if not everywhere:
            raise ConfigurationError(
                "refresh_statistics=True needs batches of two or more examples: what stays is one, or batch_size is 1."
            )
        if self.processes.size == 1:
            return {name: buffers[name] for name in names}
        return {name: self.processes.sum(buffers[name] * seen) / everywhere for name in names}

    def directional_derivatives(self, data: Any, directions: Tensor) -> Tensor:
        """``wᵀ∇ℓ(zᵢ)`` for each direction ``w`` and each example of a prepared batch.

        Forward mode: the losses are evaluated once in dual numbers for each direction, and no per-example gradient is
        ever formed. Where an operation of the module has no forward-mode rule, or a step assigns to the ``.data`` of a
        tensor, which ``torch.func`` refuses, the same numbers come from two reverse passes (the derivative of
        ``Σ uᵢ wᵀ∇ℓ(zᵢ)`` by the dummy weights ``u``). For many directions it is cheaper to form the gradients of a few
        examples at a time, once for all directions. A way that :meth:`learn_derivatives` has found to differ from the
        gradients is not used.

        Args:
            data: A prepared batch of B examples.
            directions: ``(q, p)``.

        Returns:
            ``(q, B)``.
        """
        if self._vmap is None:
            self._probe(data)
        if len(directions) > _FEW_DIRECTIONS and self._vmap and not self._own_loss:
            return self._explicit(data, directions)
        return self._derivatives(self, data, directions)

    def _forward(self, data: Any, directions: Tensor) -> Tensor:
        if self._vmap:  # code that is not for vmap is not for jvp either; plain reverse mode takes it
            try:
                return torch.stack(
                    [torch.func.jvp(lambda t: self.losses(t, data), (self.theta,), (w,))[1] for w in directions]
                )
            except (NotImplementedError, RuntimeError) as error:
                if not any(reason in str(error).lower() for reason in _NO_FORWARD_MODE):
                    raise
        return self._twice_reverse(data, directions)

    def _twice_reverse(self, data: Any, directions: Tensor) -> Tensor:
        theta = self.theta.detach().requires_grad_()
        losses = self.losses(theta, data)
        weights = torch.ones_like(losses, requires_grad=True)
        (gradient,) = torch.autograd.grad(losses, theta, weights, create_graph=True, materialize_grads=True)
        return torch.stack(
            [
                torch.autograd.grad(gradient, weights, w, retain_graph=True, materialize_grads=True)[0]
                for w in directions
            ]
        )

    def _explicit(self, data: Any, directions: Tensor) -> Tensor:
        return torch.cat([directions @ rows.T for rows in self.gradients(data)], dim=1)

    def learn_derivatives(self, train: Examples) -> None:
        """Decides how :meth:`directional_derivatives` takes them, on a few training examples spread over the data.

        Training follows reverse mode. Forward mode differs from it where a step stops or changes gradients by other
        means than its functions: it goes through ``torch.no_grad()``, sees no ``Tensor.register_hook``, and follows the
        ``jvp`` of a ``torch.autograd.Function``. Of forward mode, two reverse passes, and explicit gradients, the first
        is taken that agrees with the gradients of single examples.

        Args:
            train: The training examples.
        """
        some = train.subset(torch.linspace(0, len(train) - 1, min(len(train), _SPREAD)).long().unique())
        batches = [batch.data for batch in some.batches()]
        for self._derivatives in (Objective._forward, Objective._twice_reverse):
            if not any(self._differs(self._unlike_gradients, data) for data in batches):
                return
            if self._vmap and self._derivatives is Objective._forward:
                rank_zero_info(
                    "Scores are computed in reverse mode: the forward-mode derivatives of the losses of"
                    f" {type(self.module).__name__} are not the gradients that training follows (torch.no_grad() around"
                    " a part that depends on the parameters, a hook on gradients, or a torch.autograd.Function of its"
                    " own)."
                )
        self._derivatives = Objective._explicit

    def _unlike_gradients(self, data: Any) -> float:
        """How far derivatives in a random direction are from its inner products with the gradient of each example."""
        generator = torch.Generator().manual_seed(self._seed)
        direction = torch.randn(self.space.size, generator=generator, dtype=torch.float64).to(self.theta)
        theta = self.theta.detach().requires_grad_()
        rows = [self._gradient(loss, theta, retain_graph=True) for loss in self.losses(theta, data)]
        expected, lengths = torch.stack([row @ direction for row in rows]), torch.stack([row.norm() for row in rows])
        try:
            found = self._derivatives(self, data, direction[None])[0].detach()
        except (NotImplementedError, RuntimeError):
            return math.inf
        return _distance((found - expected).abs(), lengths)

    def _differs(self, distance: Callable[[Any], float], data: Any) -> bool:
        """Whether two ways to differentiate differ for a prepared batch, and by more than rounding.

        Of an example that is learned to the last digit, gradients in float32 are rounding alone. So ways that seem to
        differ are looked at again in float64, where rounding is less and a difference is not.

        Args:
            distance: How far they are apart for a batch, see :func:`_distance`, in the dtype of :attr:`theta`.
            data: The batch.
        """
        narrow = distance(data)
        if not narrow or math.isinf(narrow):
            return bool(narrow)
        if self.theta.dtype == torch.float64 or self.device.type == "mps":  # which has no float64
            return True
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with self.at_state(ModelState(self.theta.double(), self.statistics)):
                return distance(map_tensors(data, self._widen)) > 0.1 * narrow
        except Exception:  # the step asks for float32 itself
            return True
        finally:
            torch.set_default_dtype(default)

    def gradients(self, data: Any) -> Iterator[Tensor]:
        """The gradients of a prepared batch's losses at the present parameters, some examples ``(b, p)`` at a time."""
        if self._vmap is None:
            self._probe(data)
        size = batch_size(data)
        if not self._vmap or self._own_loss:
            for position in range(size):
                theta = self.theta.detach().requires_grad_()
                loss = self.loss_sum(theta, slice_batch(data, position, position + 1))
                yield self._gradient(loss, theta)[None]
            return
        gradient = torch.func.grad(self._training_step)
        step = max(_GRADIENT_BYTES // self.theta.nbytes, 1)
        for start in range(0, size, step):
            part = slice_batch(data, start, start + step)
            yield self._map_examples(partial(gradient, self.theta), part)

    def progress(self, description: str, total: int | None = None) -> tqdm[Any]:
        """A progress bar; silent where the trainer shows none, and on all ranks but the first."""
        shown = self.trainer.progress_bar_callback is not None and self.trainer.is_global_zero
        return tqdm(total=total, desc=description, disable=not shown, leave=False)

    # ----------------------------------------------------------------------------------------------------------------
    # Calls into the module
    # ----------------------------------------------------------------------------------------------------------------

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for parameter in self.module.parameters() if parameter.requires_grad)

    def _buffers(self) -> dict[str, Tensor]:
        """Throw-away copies."""
        buffers = {**dict(self.module.named_buffers()), **self._common, **self.statistics}
        return {name: self._widen(buffer.detach().clone()) for name, buffer in buffers.items()}

    def _call(self, theta: Tensor, function: str, *args: Any, buffers: dict[str, Tensor] | None = None) -> Any:
        """A method of the module with parameters from ``theta`` and with buffers, by default throw-away copies.

        Trainable and frozen parameters are throw-away copies, too: a step may write to them, through ``.data`` or in
        place, as momentum encoders and weight clipping do. Version counters do not see a write through ``.data``, and
        comparing values afterwards reads as much memory as a copy. A copy has to be made inside of this call: a
        transform of ``torch.func`` refuses in-place operations on tensors from outside of it.
        """
        values = self._buffers() if buffers is None else buffers
        frozen = {
            name: self._widen(parameter.detach().clone())
            for name, parameter in self.module.named_parameters()
            if not parameter.requires_grad
        }
        trainable = {name: value.clone() for name, value in self.space.unflatten(theta).items()}
        # torch.manual_seed would format a stack trace for every kind of accelerator that is not in use.
        torch.default_generator.manual_seed(self._seed)
        if self.device.type != "cpu":
            torch.manual_seed(self._seed)
        with replaced(self.module, {**values, **frozen, **trainable}):
            return getattr(self.module, function)(*args)

    def _call_own(self, theta: Tensor, data: Any, function: str) -> Tensor:
        found = self._call(theta, function, data)
        sizes = {tensor.shape[0] for tensor in tensors(data) if tensor.ndim}
        if not isinstance(found, Tensor) or found.ndim != 1 or (sizes and len(found) not in sizes):
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ObjectiveError(
                f"{type(self.module).__name__}.{function} must return one value for each example, shape (B,), not"
                f" {shape} for a batch {describe(data)}. With a loss of PyTorch, pass reduction='none'."
            )
        return found

    def _training_step(self, theta: Tensor, data: Any) -> Tensor:
        """The loss ``()`` that ``training_step`` returns for a prepared batch."""
        output = self._call(theta, "training_step", data, *self._index)
        loss = output.get("loss") if isinstance(output, dict) else output
        if loss is None:  # the step was skipped: these examples were not trained on
            return theta.new_zeros(())
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ObjectiveError(
                f"{type(self.module).__name__}.training_step must return a scalar loss, a dict with one under 'loss',"
                f" or None; it returned {describe(output)}."
            )
        return loss.reshape(())

    @property
    def _index(self) -> list[int]:
        """What ``training_step`` gets beside the batch: as in the training loop, a second parameter is its index."""
        parameters = inspect.signature(self.module.training_step).parameters.values()
        takes_index = len(parameters) >= 2 or any(p.kind is p.VAR_POSITIONAL for p in parameters)
        return [0] if takes_index else []

    def _losses_one_by_one(self, theta: Tensor, data: Any) -> Tensor:
        return torch.stack([self._training_step(theta, slice_batch(data, i, i + 1)) for i in range(batch_size(data))])

    def _losses_vmap(self, theta: Tensor, data: Any) -> Tensor:
        return self._map_examples(lambda example: self._training_step(theta, example), data)

    def _map_examples(self, function: Callable[..., Tensor], data: Any, *rows: Tensor) -> Tensor:
        """``function(*rows, example)`` for all examples of a batch at once; each is a batch of one."""
        batch_size(data)
        leaves = tensors(data)

        def one(*parts: Tensor) -> Tensor:
            remaining = iter(parts[len(rows) :])

            def put(tensor: Tensor) -> Tensor:
                row = next(remaining)
                return row.unsqueeze(0) if tensor.ndim else row

            return function(*parts[: len(rows)], map_tensors(data, put))

        in_dims = (0,) * len(rows) + tuple(0 if leaf.ndim else None for leaf in leaves)
        return torch.func.vmap(one, in_dims=in_dims, randomness="same")(*rows, *leaves)

    def _probe(self, data: Any) -> None:
        """Decides, on a few examples, how the losses are derived from ``training_step``."""
        few = slice_batch(data, 0, min(_PROBE, batch_size(data)))
        with torch.no_grad():
            expected = self._losses_one_by_one(self.theta, few)
            together = self._training_step(self.theta, few)
        try:
            theta = self.theta.detach().requires_grad_()
            found, reason = self._losses_vmap(theta, few), "it gave other losses than one example at a time"
            self._gradient(found.sum(), theta)  # activation checkpointing fails here at the earliest
            self._vmap = _close(found, expected)
            if self._vmap and self._differs(self._unlike_one_by_one, few):
                self._vmap, reason = False, "it gave other gradients, as with a hook on a tensor"
        except Exception as error:
            self._vmap, reason = False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if _close(together, expected.mean()):
            self._reduction = "mean"
        elif _close(together, expected.sum()):
            self._reduction = "sum"
        elif torch.isfinite(expected).all() and torch.isfinite(together):
            warnings.warn(
                f"The loss that {type(self.module).__name__}.training_step gives for a batch is neither the mean"
                " nor the sum of its losses for the single examples (they are coupled, or weighted). Influence and"
                " unlearning refer to the losses of single examples. Override `influence_loss` (see GIFMixin) to define"
                " them.",
                GIFWarning,
                stacklevel=2,
            )
        if not self._vmap:
            warnings.warn(
                f"The losses of single examples are computed one after the other, which is slow: training_step could"
                f" not be vectorised ({reason}). Override `influence_loss` (see GIFMixin) to compute them at once.",
                GIFWarning,
                stacklevel=2,
            )

    def _unlike_one_by_one(self, data: Any) -> float:
        """How far the gradient of the vectorised losses is from that of one example at a time: vmap drops hooks."""
        theta = self.theta.detach().requires_grad_()
        found = self._gradient(self._losses_vmap(theta, data).sum(), theta)
        losses = self._losses_one_by_one(theta, data)
        rows = torch.stack([self._gradient(loss, theta, retain_graph=True) for loss in losses])
        return _distance((found - rows.sum(0)).norm()[None], rows.norm(dim=1).sum()[None])

    def _gradient(self, value: Tensor, theta: Tensor, *, retain_graph: bool = False) -> Tensor:
        if not value.requires_grad:
            return torch.zeros_like(theta)
        (gradient,) = torch.autograd.grad(value, theta, retain_graph=retain_graph, materialize_grads=True)
        return gradient

    def _finite(self, gradient: Tensor) -> Tensor:
        if torch.isfinite(gradient).all():
            return gradient
        where = self.space.unflatten(gradient.reshape(-1, self.space.size).abs().sum(0))
        names = [name for name, part in where.items() if not torch.isfinite(part).all()]
        raise NonFiniteError(
            f"The gradient has non-finite entries in {', '.join(names[:5])}{' …' if len(names) > 5 else ''}. Nothing"
            " was changed."
        )


def _close(one: Tensor, other: Tensor) -> bool:
    tolerance = 1e-4 if one.dtype == torch.float32 else 1e-9
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance * 1e-2, equal_nan=True)


def _distance(differences: Tensor, lengths: Tensor) -> float:
    """The greatest of differences ``(m,)`` that are more than rounding of gradients of lengths ``(m,)``; else 0.

    What is not finite is none: it is reported where it is used.
    """
    rounding = _ROUNDING.get(lengths.dtype, _ROUNDING[torch.float32])
    return float(torch.where(differences > rounding * lengths, differences, 0.0).max())

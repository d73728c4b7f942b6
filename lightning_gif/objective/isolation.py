"""A block in which the user's module can be evaluated; at its end the module is restored."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .._compat import is_lightning_module, isolate_rng, rank_zero_warn, stage_of_training
from ..distributed import ProcessGroup
from ..errors import GIFWarning
from ..storage.interrupts import uninterrupted
from .attributes import Attributes, attributes_restored
from .equivalents import without_checkpoints
from .silence import Metrics, silenced

if TYPE_CHECKING:
    from .._compat import LightningModule, Trainer

__all__ = ["Isolation", "fails_for_good", "isolated", "restore_members"]


class Isolation(NamedTuple):
    """What evaluations need to know of the block that they run in.

    Attributes:
        attributes: The attributes that every evaluation is to find.
        metrics: The module's metrics.
    """

    attributes: Attributes
    metrics: Metrics


def fails_for_good(device: torch.device) -> bool:
    """Whether an index out of bounds in a kernel makes every later operation on the device fail."""
    return device.type != "cpu"


@contextlib.contextmanager
def isolated(
    trainer: Trainer, module: LightningModule, device: torch.device, dtype: torch.dtype, processes: ProcessGroup
) -> Iterator[Isolation]:
    """Inside the block the module can be evaluated and differentiated twice; its end undoes every change to it.

    Args:
        trainer: The module's trainer. Inside, it looks as in training, and none of its loggers logs.
        module: The module.
        device: Where it is evaluated.
        dtype: The default dtype inside.
        processes: The process group.
    """
    home = next(module.parameters()).device
    fastpath = torch.backends.mha.get_fastpath_enabled()
    with contextlib.ExitStack() as stack:
        with uninterrupted():
            stack.enter_context(isolate_rng())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autocast(device.type, enabled=False))
            # Neither compiled code nor fused attention has second derivatives.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            # cuDNN's recurrent layers have no second derivatives, and in evaluation mode no first ones. TF32 is off,
            # because float32 has to have its full precision here, whatever the trainer allows.
            recurrent = any(isinstance(submodule, nn.RNNBase) for submodule in module.modules())
            cudnn = torch.backends.cudnn
            stack.enter_context(
                cudnn.flags(
                    enabled=cudnn.enabled and not recurrent,
                    benchmark=cudnn.benchmark,
                    deterministic=cudnn.deterministic,
                    allow_tf32=False,
                )
            )
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
            stack.callback(torch.backends.mha.set_fastpath_enabled, fastpath)
            torch.backends.mha.set_fastpath_enabled(False)
            stack.enter_context(without_checkpoints())
            # Tensors that a step creates should have the dtype of the computation.
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(dtype)
            stack.enter_context(_unchanged(module))
            stack.enter_context(_members_restored(module))
            attributes = stack.enter_context(attributes_restored(module))
            stack.enter_context(_evaluation_mode(module))
            metrics = stack.enter_context(silenced(module, trainer.loggers, processes))
            stack.enter_context(stage_of_training(trainer))
            if home != device:  # the strategy's teardown after fit moves the module to the CPU
                stack.enter_context(_moved(module, device))
            for submodule in module.modules():  # a step may cast its input to `self.dtype`
                if is_lightning_module(submodule):
                    submodule._dtype = dtype
            inside = Isolation(Attributes(module, attributes), metrics)
        try:
            yield inside
        except BaseException:
            with uninterrupted():
                try:
                    stack.close()
                except RuntimeError as error:
                    if not fails_for_good(device):
                        raise
                    # On a failed device nothing can be restored, for example its random state. The first error is more
                    # useful to the user than this one.
                    rank_zero_warn(
                        f"The state of the module could not be restored completely on {device}: {error}",
                        category=GIFWarning,
                    )
            raise
        with uninterrupted():
            stack.close()


@contextlib.contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Warns at the end of the block if a parameter or buffer of the module is another object or was written to."""

    def state() -> dict[str, tuple[int, int, bool]]:
        held = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
        # Inference tensors have no version.
        versions = [0 if tensor.is_inference() else tensor._version for _, tensor in held]
        facts = zip(held, versions, strict=True)
        return {name: (id(tensor), version, tensor.requires_grad) for (name, tensor), version in facts}

    before = state()
    try:
        yield
    finally:
        after = state()
        changed = sorted({name for name, _ in before.items() ^ after.items()})
        if changed:
            rank_zero_warn(
                f"An evaluation has changed {type(module).__name__}: {', '.join(changed[:5])}"
                f"{' …' if len(changed) > 5 else ''}. Load a checkpoint from before the call, and define"
                " `influence_loss` (see GIFMixin) without what changes the module.",
                category=GIFWarning,
            )


@contextlib.contextmanager
def _members_restored(module: nn.Module) -> Iterator[None]:
    """At the end of the block all modules hold the same parameter, buffer and submodule objects, in the same order.

    Every evaluation replaces some of them and puts them back. This block covers evaluations that were interrupted.
    """
    names: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (held, dict(held)) for one in module.modules() for held in (one._parameters, one._buffers, one._modules)
    ]
    try:
        yield
    finally:
        for held, before in names:
            restore_members(held, before)


@contextlib.contextmanager
def _moved(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside the block the module is on another device; at its end it has its original tensors again.

    Nothing is copied back, because the device may have failed: after an index out of bounds nothing can be read from a
    GPU any more. Nothing writes to the module's own tensors inside. The states of metrics and the ``device`` of a
    module are plain attributes, see :class:`~.attributes.Attributes`.
    """
    own: list[Tensor] = list(module.parameters())
    own += [tensor.grad for tensor in own if tensor.grad is not None]
    values = [(tensor, tensor.data) for tensor in own]
    with _members_restored(module):
        try:
            module.to(device)
            yield
        finally:
            for tensor, value in values:
                tensor.data = value


@contextlib.contextmanager
def _evaluation_mode(module: nn.Module) -> Iterator[None]:
    flags = {submodule: submodule.training for submodule in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for submodule, training in flags.items():
            submodule.training = training


def restore_members(members: dict[str, Any], own: dict[str, Any]) -> None:
    """Puts a module's parameters, buffers or submodules back, and drops those registered since then.

    Args:
        members: The ``_parameters``, ``_buffers`` or ``_modules`` of the module.
        own: A copy of ``members`` from before.
    """
    if list(members.keys()) != list(own):  # ``.keys()``, because a scripted module has a dictionary-like object here
        members.clear()
    for name, member in own.items():
        if name not in members or members[name] is not member:
            members[name] = member

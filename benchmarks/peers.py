"""Training-data attribution by other libraries, each with the settings of its own documentation or examples.

    scores = PEERS["kronfluence EK-FAC"](model, train, queries)

All libraries have the same signature: ``model(x)`` returns logits, and the loss is the cross-entropy. The scores are
``(n_queries, n_train)`` with our sign: positive if removing the training example raises the query's loss. Each library
reports the inner product of a query's and an example's gradients in some metric. This has our sign already. The scale
is the library's own, so only ranks can be compared. Scores that are not finite raise a RuntimeError.

The model is copied and never changed. The copy is in evaluation mode, so BatchNorm is a fixed affine map. Data and
model must be on one device. The libraries are not dependencies of this project: each function imports its library when
it is called.
"""

from __future__ import annotations

import copy
import functools
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["PEERS"]


def frozen(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, since libraries wrap modules, load weights and leave gradients behind."""
    return copy.deepcopy(model).eval()


def usable(scores: Tensor) -> Tensor:
    """The scores in float32 on the CPU.

    Raises:
        RuntimeError: Some scores are not finite, so they have no ranks.
    """
    lost = int((~scores.isfinite().all(1)).sum())
    if lost:
        raise RuntimeError(f"Scores are not finite for {lost} of {len(scores)} queries: the library's solve diverged.")
    return scores.detach().float().cpu()


def device_of(model: nn.Module) -> str:
    return str(next(model.parameters()).device)


def blocks(data: TensorDataset, size: int) -> DataLoader[Any]:
    return DataLoader(
        data, size, shuffle=False, generator=torch.Generator()
    )  # else each pass draws from the global generator


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Seeds PyTorch's CPU generator and ignores warnings inside the block, and restores both afterwards."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        yield


def gradient_dot_product(
    model: nn.Module,
    train: TensorDataset,
    queries: TensorDataset,
    *,
    checkpoints: Sequence[dict[str, Tensor]] = (),
    batch_size: int = 256,
) -> Tensor:
    """Inner products of the gradients at the final weights: influence with the identity as the Hessian.

    Memory holds the gradients of one batch of queries and of one batch of examples.

    Sign: a gradient step on an example lowers the loss of a query if their gradients have a positive inner product.
    """
    model = frozen(model)
    weights = {name: value.detach() for name, value in model.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, weights, (x[None],)), y[None])

    gradients = vmap(grad(loss), (None, 0, 0))

    def products(asked: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        found = gradients(weights, x, y)
        return torch.stack([asked[name].flatten(1) @ found[name].flatten(1).mT for name in weights]).sum(0)

    rows = []
    for x, y in blocks(queries, batch_size):
        asked = gradients(weights, x, y)
        rows.append(torch.cat([products(asked, *batch) for batch in blocks(train, batch_size)], dim=1))
    return usable(torch.cat(rows))


def classification() -> Any:
    """The task that kronfluence needs: the cross-entropy, also for labels drawn from the model's predictions."""
    from kronfluence.task import Task

    class Classification(Task):  # type: ignore[misc]
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            x, y = batch
            logits = model(x)
            if sample:
                y = torch.multinomial(logits.detach().softmax(1), 1)[:, 0]
            return F.cross_entropy(logits, y, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    return Classification()


def kronfluence_ekfac(
    model: nn.Module,
    train: TensorDataset,
    queries: TensorDataset,
    *,
    checkpoints: Sequence[dict[str, Tensor]] = (),
    batch_size: int = 256,
    damping: float | None = None,
) -> Tensor:
    """EK-FAC of the true Fisher matrix, with one label drawn from the model for each example (Grosse et al. 2023).

    All settings except the damping are the library's defaults. It tracks ``Linear`` and ``Conv2d`` modules only, so
    curvature and inner products leave out the weights and biases of BatchNorm.

    Sign: the measurement is the query's loss, and examples with positive scores lower it, as ours do.

    Args:
        model: The network.
        train: The training examples.
        queries: The queries.
        checkpoints: Not used.
        batch_size: The batch size of all passes.
        damping: Added to the eigenvalues. ``None`` is the heuristic of the paper, a tenth of their mean in each layer.
            The library's default is 1e-8. Its manual calls both reasonable.
    """
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments

    logging.getLogger("kronfluence").setLevel(logging.ERROR)  # the library's argument would set the root logger's level
    task = classification()
    with tempfile.TemporaryDirectory() as folder, seeded():
        prepared = prepare_model(frozen(model), task)
        analyzer = Analyzer("peer", prepared, task, cpu=device_of(model) == "cpu", disable_tqdm=True, output_dir=folder)
        factors = FactorArguments(strategy="ekfac")
        analyzer.fit_all_factors("factors", train, per_device_batch_size=batch_size, factor_args=factors)
        analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            queries,
            train,
            per_device_query_batch_size=batch_size,
            per_device_train_batch_size=batch_size,
            score_args=ScoreArguments(damping_factor=damping),
        )
        return usable(analyzer.load_pairwise_scores("scores")["all_modules"])


def dattri_task(model: nn.Module) -> Any:
    """The task of dattri's README: the loss at the weights of the model."""
    from dattri.task import AttributionTask

    model = frozen(model)

    def loss(weights: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch  # LiSSA converts the labels to floating-point numbers
        return F.cross_entropy(functional_call(model, weights, (x,)), y.long())

    return AttributionTask(loss, model, model.state_dict())


def dattri_scores(
    attributor: Any, train: TensorDataset, queries: TensorDataset, *, batch_size: int, whole: bool = True
) -> Tensor:
    """The transposed result of ``attributor.attribute``, computed in bounded memory.

    The library's own loop solves for the queries again at each batch of examples, or holds the gradients of all
    examples. This function makes the same calls, but computes each representation of a query or an example once.
    Queries are solved one by one, since each needs the memory of a backward pass over all data.

    Args:
        attributor: An attributor whose scores are inner products.
        train: The training examples.
        queries: The queries.
        batch_size: The number of example gradients in memory at once.
        whole: Whether the curvature gets the training data in one batch, as the library requires. With several batches,
            CG, LiSSA and the explicit inverse add up the *inverses*.
    """

    def represent(part: str, batch: Any) -> Tensor:
        found = getattr(attributor, f"generate_{part}_rep")(0, tuple(tensor[None] for tensor in batch))
        return getattr(attributor, f"transform_{part}_rep")(0, found).detach()

    with seeded():
        attributor.cache(blocks(train, len(train) if whole else batch_size))
        with torch.no_grad():
            asked = torch.cat([represent("test", batch) for batch in blocks(queries, 1)])
            parts = [asked @ represent("train", batch).mT for batch in blocks(train, batch_size)]
    return usable(torch.cat(parts, dim=1))


def dattri_cg(
    model: nn.Module,
    train: TensorDataset,
    queries: TensorDataset,
    *,
    checkpoints: Sequence[dict[str, Tensor]] = (),
    batch_size: int = 256,
) -> Tensor:
    """Conjugate gradients on the full Hessian, with the settings of the library's example for an MLP on MNIST.

    It makes ten iterations (its default), starts from the gradient, and adds 0.005 to the Hessian. It ignores the
    tolerance. The Hessian of a ReLU network has eigenvalues below -0.005. Conjugate gradients are not meant for these,
    so ten iterations end far from a solution, and their end depends on rounding.

    Sign: the inner products have our sign.
    """
    from dattri.algorithm.influence_function import IFAttributorCG

    attributor = IFAttributorCG(dattri_task(model), max_iter=10, regularization=5e-3, device=device_of(model))
    return dattri_scores(attributor, train, queries, batch_size=batch_size)


def dattri_lissa(
    model: nn.Module,
    train: TensorDataset,
    queries: TensorDataset,
    *,
    checkpoints: Sequence[dict[str, Tensor]] = (),
    batch_size: int = 256,
) -> Tensor:
    """LiSSA on the full Hessian, with the first settings of the library's benchmark of MLPs on MNIST.

    It makes a hundred steps on batches of 100 examples, drawn anew for each query. Scale 50 and no damping are its
    defaults. So few steps with this scale act like a damping of about one half.

    Sign: the inner products have our sign.
    """
    from dattri.algorithm.influence_function import IFAttributorLiSSA

    size, device = min(100, len(train)), device_of(model)
    attributor = IFAttributorLiSSA(dattri_task(model), batch_size=size, recursion_depth=100, device=device)
    return dattri_scores(attributor, train, queries, batch_size=batch_size)


def dattri_arnoldi(
    model: nn.Module,
    train: TensorDataset,
    queries: TensorDataset,
    *,
    checkpoints: Sequence[dict[str, Tensor]] = (),
    batch_size: int = 256,
) -> Tensor:
    """The inverse of the full Hessian on a Krylov space of 50 dimensions, with 0.01 added to the Hessian.

    Both are in the grid of the library's benchmark of MLPs on MNIST. The library takes the square roots of all
    eigenvalues. Its scores are NaN if one is negative, as in every ReLU network. Its warning says that it leaves out
    such eigenvalues, so this function does. A remaining eigenvalue can be near zero, and its inverse then dominates.

    Sign: the inner products have our sign.
    """
    from dattri.algorithm.influence_function import IFAttributorArnoldi

    class Positive(IFAttributorArnoldi):  # type: ignore[misc]
        def transform_test_rep(self, ckpt_idx: int, test_rep: Tensor) -> Tensor:
            return super().transform_test_rep(ckpt_idx, test_rep).nan_to_num(0)

        def transform_train_rep(self, ckpt_idx: int, train_rep: Tensor) -> Tensor:
            return super().transform_train_rep(ckpt_idx, train_rep).nan_to_num(0)

    attributor = Positive(dattri_task(model), regularization=1e-2, max_iter=50, device=device_of(model))
    return dattri_scores(attributor, train, queries, batch_size=batch_size)


def dattri_ekfac(
    model: nn.Module,
    train: TensorDataset,
    queries: TensorDataset,
    *,
    checkpoints: Sequence[dict[str, Tensor]] = (),
    batch_size: int = 256,
) -> Tensor:
    """EK-FAC of the empirical Fisher matrix, for ``Linear`` modules only, damped by 0.1 as in the library's tests.

    Scores leave out all other modules, so those of a convolutional network come from its last layer. Version 0.3.0 uses
    the eigenvectors transposed: ``eigh`` returns columns, and it takes rows. It also joins the weights and biases of a
    layer in another order than the factors have. So the result is that of the library, but not that of EK-FAC.

    Sign: the inner products have our sign.
    """
    from dattri.algorithm.influence_function import IFAttributorEKFAC

    attributor = IFAttributorEKFAC(dattri_task(model), damping=0.1, device=device_of(model))
    return dattri_scores(attributor, train, queries, batch_size=batch_size, whole=False)


def captum_gradients(model: nn.Module, batch_size: int) -> tuple[dict[str, Any], int]:
    """Options for captum's per-example gradients, and the batch size.

    For ``Linear`` and ``Conv2d`` modules, captum computes the gradients of a batch at once. With other modules, each
    example costs a backward pass over its batch, so batches are small.
    """
    owners = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    batched = all(isinstance(module, nn.Linear | nn.Conv2d) for module in owners)
    loss = nn.CrossEntropyLoss(reduction="sum" if batched else "none")
    return {"loss_fn": loss, "sample_wise_grads_per_batch": batched}, batch_size if batched else min(batch_size, 16)


def captum_tracincp(
    model: nn.Module,
    train: TensorDataset,
    queries: TensorDataset,
    *,
    checkpoints: Sequence[dict[str, Tensor]] = (),
    batch_size: int = 256,
) -> Tensor:
    """Inner products of gradients, summed over checkpoints of the training (Pruthi et al. 2020).

    Each checkpoint is a state dict with learning rate 1. Without checkpoints, the final weights are the only one.

    Sign: the library's *proponents* have positive scores and lower the query's loss, as ours do.
    """
    from captum.influence import TracInCP

    model = frozen(model)

    def load(model: nn.Module, checkpoint: dict[str, Tensor]) -> float:
        model.load_state_dict(checkpoint)
        return 1.0

    states = list(checkpoints) or [copy.deepcopy(model.state_dict())]
    options, size = captum_gradients(model, batch_size)
    tracin = TracInCP(model, blocks(train, size), iter(states), load, **options)
    with seeded():
        parts = [tracin.influence(blocks(TensorDataset(*part), size)) for part in blocks(queries, batch_size)]
    return usable(torch.cat(parts))


def captum_arnoldi(
    model: nn.Module,
    train: TensorDataset,
    queries: TensorDataset,
    *,
    checkpoints: Sequence[dict[str, Tensor]] = (),
    batch_size: int = 256,
) -> Tensor:
    """The inverse of the full Hessian on its 50 largest eigenvalues (Schioppa et al. 2022), with default settings.

    The eigenvalues come from a Krylov space of 200 dimensions. The Hessian is summed over all training examples.

    Sign: the library's *proponents* have positive scores and lower the query's loss, as ours do.
    """
    from captum.influence._core.arnoldi_influence_function import ArnoldiInfluenceFunction

    model = frozen(model)
    options, size = captum_gradients(model, batch_size)
    with seeded():
        arnoldi = ArnoldiInfluenceFunction(
            model,
            blocks(train, size),
            "",
            lambda model, checkpoint: 1.0,
            hessian_dataset=blocks(train, batch_size),
            **options,
        )
        return usable(arnoldi.influence(blocks(queries, size)))


PEERS: dict[str, Callable[..., Tensor]] = {
    "gradient dot product": gradient_dot_product,
    "kronfluence EK-FAC": kronfluence_ekfac,
    "kronfluence EK-FAC, damping 1e-8": functools.partial(kronfluence_ekfac, damping=1e-8),
    "dattri CG": dattri_cg,
    "dattri LiSSA": dattri_lissa,
    "dattri Arnoldi": dattri_arnoldi,
    "dattri EK-FAC": dattri_ekfac,
    "captum TracInCP": captum_tracincp,
    "captum Arnoldi": captum_arnoldi,
}
"""By name: ``(model, train, queries, *, checkpoints=(), batch_size=256) ↦`` scores ``(n_queries, n_train)``."""

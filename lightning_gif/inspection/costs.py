"""Estimates of the time and memory of calls, from passes that are measured on two batches."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..config import Settings
from ..curvature.by_solver import (
    DENSE_PARAMETERS,
    MOST_TOGETHER,
    POWER_ITERATIONS,
    SKETCH_COPIES,
    SketchInverse,
    SolverInverse,
    from_layers,
    inverse_for_queries,
    n_outputs,
)
from ..curvature.corrected import CorrectedEKFAC
from ..curvature.ekfac import EKFACInverse, eigenvectors
from ..curvature.methods import METHODS
from ..curvature.products import CURVATURES, Linearise
from ..curvature.sampling import sample_size
from ..curvature.solve import max_iter, solve
from ..curvature.streaming import graph_bytes
from ..data.batch import Batch
from ..data.examples import Examples
from ..objective.autograd import gradient_of
from ..objective.memory import bytes_to_keep
from ..objective.objective import Objective
from ..solvers import SOLVERS, low_rank
from ..unlearning.goals import Goal
from ..unlearning.leave_out import POWER_STEPS
from ..unlearning.matching import Matching
from ..unlearning.task import SampleSizes
from ..unlearning.tuning import Relinearisation
from .peak import PeakMemory

__all__ = ["Costs", "Estimate", "PassCosts", "measure"]

# The measured part of a batch has one of this many examples.
_PART = 8

# A pass that is shorter than this is measured several times, and the median counts.
_SHORT, _REPEATS = 0.2, 5

# The largest number of parameters for which the algebra of a solver is measured. Above, time is taken as proportional.
_MOST_ENTRIES = 200_000

# How many rows of Jacobians are multiplied to measure a product.
_MEASURED_ROWS = 64

# How many trials a search along the influence direction evaluates, and how many a further change. Rough numbers: edits
# of a small perceptron evaluated 13 trials for three changes, and 20 for five.
_SEARCH_TRIALS, _CHANGE_TRIALS = 7, 2

_GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """The expected cost of a call.

    Attributes:
        call: The call, as the user writes it.
        seconds: The time of the call in seconds.
        gib: The memory in GiB of the tensors at the peak of the call, in addition to the model and the data. The
            process takes more, because of libraries and of memory that is not returned to the system.
        seconds_per_change: For an edit, the time of each change after the first, in addition to ``seconds``.
        further_changes: For an edit, the largest number of changes after the first.
        products: The number of products with the curvature. Each is over all examples that the curvature is taken over.
    """

    call: str
    seconds: float
    gib: float
    products: int
    seconds_per_change: float | None = None
    further_changes: int = 0


@dataclass(frozen=True)
class Pass:
    """The seconds of a pass over a batch, as a linear function of the number of examples.

    Attributes:
        fixed: The seconds for any batch.
        each: The additional seconds for each example.
        peak: The bytes of new tensors at the peak of a pass over a whole batch.
    """

    fixed: float
    each: float
    peak: int = 0

    def over(self, n: float, size: int) -> float:
        """The seconds of a pass over ``n`` examples in batches of ``size``."""
        return math.ceil(n / size) * self.fixed + n * self.each


@dataclass(frozen=True)
class CurvatureCosts:
    """The costs of the curvature of one batch.

    Attributes:
        first: The first pass.
        product: A product after it, for each of the vectors that are multiplied together.
        alone: A product with one vector alone.
        kept: The bytes that the first pass over a whole batch keeps.
        working: The bytes of the first pass and a product at their peak, without those that are kept.
    """

    first: Pass
    product: Pass
    alone: Pass
    kept: int
    working: int


@dataclass(frozen=True)
class PassCosts:
    """The costs of passes over one batch.

    Attributes:
        size: The number of examples in a whole batch.
        read: Reading and collating the batch.
        loss: The losses.
        gradient: The gradient of their sum.
        score: One directional derivative of each loss.
        queries: One directional derivative of each loss for each of the queries.
        rows: The gradient of each loss.
        scores: The curvature that scores use.
        edits: The curvature that an edit uses first.
        batch_bytes: The size of the batch.
        itself: What self-influence computes for each loss: its quadratic form by EK-FAC, or else its gradient.
        layers: The EK-FAC inverse, whose fixed time is spent once for all examples; ``None`` if scores do not use it.
        layers_bytes: The size of that inverse.
        root: The seconds of a product of its root with a vector.
        opening: The bytes at the peak of finding out how gradients of single examples are computed.
    """

    size: int
    read: Pass
    loss: Pass
    gradient: Pass
    score: Pass
    queries: Pass
    rows: Pass
    itself: Pass
    scores: CurvatureCosts
    edits: CurvatureCosts
    batch_bytes: int
    layers: Pass | None
    layers_bytes: int
    root: float
    opening: int


def measure(
    objective: Objective, train: Examples, kinds: tuple[str, str], scores: Settings, n_queries: int = 1
) -> PassCosts:
    """Measures passes on two batches. The first is a warm-up. The second, and a part of it, are measured.

    Args:
        objective: An open objective, which knows the structure of the training data.
        train: The training examples.
        kinds: The kinds of curvature of scores and of edits.
        scores: The settings of scores.
        n_queries: The number of queries.
    """
    sample = train.sample(2 * train.batch_size, 0)
    first, second, read = _two_batches(sample)
    part = second.slice(0, math.ceil(second.size / _PART)) if second.divisible else second
    theta = objective.theta

    def line(seconds: Callable[[Batch], float]) -> Pass:
        whole = seconds(second)
        if part.size == second.size:
            return Pass(0.0, whole / second.size)
        each = min(max(whole - seconds(part), 0.0) / (second.size - part.size), whole / second.size)
        return Pass(whole - each * second.size, each)

    def of(run: Callable[[Batch], Any]) -> Pass:
        peak = _peak(lambda: run(first))
        return replace(line(lambda batch: _seconds(lambda: run(batch), objective.device)), peak=peak)

    with torch.no_grad():
        loss = of(lambda batch: objective.losses(theta, batch))
    curvatures, of_scores = {}, _of_scores(objective, train, scores, kinds[0])
    for name, linearise in {"edits": CURVATURES[kinds[1]](objective), "scores": of_scores}.items():
        kept = graph_bytes(*linearise(theta, second)[1])
        start = of(partial(linearise, theta))
        measured = partial(_product_seconds, objective, linearise, _together(scores, n_queries))
        working = max(_peak(partial(measured, first)) - kept, 0)
        product = line(measured)
        alone = product if n_queries == 1 else line(partial(_product_seconds, objective, linearise, 1))
        curvatures[name] = CurvatureCosts(start, product, alone, kept, working)
    rows = of(lambda batch: [rows.sum() for rows in objective.gradients(batch)])
    layers, layers_bytes, root, itself = None, 0, 0.0, rows
    if inverse_for_queries(scores).corrections(scores, n_queries) is not None:
        layers, inverse = _inverse(objective, sample, scores)
        layers_bytes, root = inverse.nbytes, _seconds(lambda: inverse.root(theta[None]), objective.device)
        if inverse.of_losses(objective, part) is not None:
            itself = of(lambda batch: inverse.of_losses(objective, batch))
    direction, differentiated = torch.ones_like(theta)[None], theta.detach().requires_grad_()
    score = of(lambda batch: objective.directional_derivatives(batch, direction))
    queries = score
    if n_queries > 1:
        directions = direction.expand(n_queries, -1).contiguous()
        queries = of(lambda batch: objective.directional_derivatives(batch, directions))
    return PassCosts(
        size=second.size,
        read=Pass(0.0, read),
        loss=loss,
        gradient=of(lambda batch: gradient_of(objective.loss_sum(differentiated, batch), differentiated)),
        score=score,
        queries=queries,
        rows=rows,
        itself=itself,
        scores=curvatures["scores"],
        edits=curvatures["edits"],
        batch_bytes=second.nbytes,
        layers=layers,
        layers_bytes=layers_bytes,
        root=root,
        opening=_peak(objective.choose_layers),
    )


def _two_batches(sample: Examples) -> tuple[Batch, Batch, float]:
    """The first batch; the second, or the first again if there is no other of its size; and the seconds per example."""
    begin, times, batches = time.perf_counter(), list[float](), list[Batch]()
    for batch in sample.batches():
        times.append(time.perf_counter() - begin)
        batches.append(batch)
        if len(batches) == 2:
            break
        begin = time.perf_counter()
    second = batches[-1] if batches[-1].size == batches[0].size else batches[0]
    return batches[0], second, times[-1] / batches[-1].size


def _inverse(objective: Objective, sample: Examples, settings: Settings) -> tuple[Pass, EKFACInverse]:
    """The seconds of the EK-FAC inverse, measured over a sample; and the inverse.

    The fixed part is that of the eigenvectors. It is measured on matrices of full rank, as of many examples. On those
    of few examples it may take longer.
    """
    method, everything = METHODS[settings.method], torch.arange(objective.space.size)
    sample = sample.cached(math.inf)
    with PeakMemory() as memory:  # and a warm-up
        inverse = EKFACInverse.fit(objective, sample, settings, method, everything)
    whole = _seconds(lambda: EKFACInverse.fit(objective, sample, settings, method, everything), objective.device)
    moments = [(basis * torch.linspace(1, 2, len(basis)).to(basis)) @ basis.T for basis in inverse.bases]
    fixed = min(_seconds(lambda: [eigenvectors(moment) for moment in moments], objective.device), whole)
    return Pass(fixed, (whole - fixed) / len(sample), memory.peak), inverse


def _of_scores(objective: Objective, train: Examples, settings: Settings, kind: str) -> Linearise:
    """The curvature of a batch, computed as queries with these settings do."""
    inverse, found = inverse_for_queries(settings), None
    # The same settings with fewer queries may correct EK-FAC by products.
    inverse = CorrectedEKFAC if inverse is EKFACInverse else inverse
    if issubclass(inverse, (SolverInverse, CorrectedEKFAC)):
        found = inverse.linearise(objective, settings, min(sample_size(settings) or len(train), len(train)))
    return found or CURVATURES[kind](objective)


def _together(settings: Settings, n_queries: int) -> int:
    """The number of vectors in one product with the curvature."""
    is_sketch = issubclass(inverse_for_queries(settings), SketchInverse)
    return MOST_TOGETHER if is_sketch else min(n_queries, MOST_TOGETHER)


def _product_seconds(objective: Objective, linearise: Linearise, n: int, batch: Batch) -> float:
    """The seconds of one of ``n`` products with the curvature of a batch, after its first pass."""
    product, _ = linearise(objective.theta, batch)
    vector, takes_columns = torch.ones_like(objective.theta), getattr(product, "takes_columns", False)
    apply = partial(product, vector[:, None].expand(-1, n) if takes_columns else vector)
    apply()
    return _seconds(apply, objective.device) / (n if takes_columns else 1)


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """The seconds of ``run``: the median of several runs, if they are short."""

    def once() -> float:
        _wait(device)
        begin = time.perf_counter()
        run()
        _wait(device)
        return time.perf_counter() - begin

    times = [once()]
    while times[0] < _SHORT and len(times) < _REPEATS:
        times.append(once())
    return statistics.median(times)


def _peak(run: Callable[[], Any]) -> int:
    """The bytes of new tensors at the peak of ``run``."""
    with PeakMemory() as memory:
        run()
    return memory.peak


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Decaying:
    """A diagonal matrix whose eigenvalues decay slowly, to count the products and measure the algebra of a solver."""

    def __init__(self, size: int, like: Tensor, positive_semidefinite: bool) -> None:
        self.positive_semidefinite = positive_semidefinite
        self._values = torch.logspace(0, -6, size, dtype=like.dtype, device=like.device)
        self.shape, self.dtype, self.device = (size, size), like.dtype, like.device
        self.products = self.examples = 0

    def matvec(self, vectors: Tensor) -> Tensor:
        self.products += 1 if vectors.ndim == 1 else vectors.shape[1]
        return self._values * vectors if vectors.ndim == 1 else self._values[:, None] * vectors

    rmatvec = matvec

    def draw(self, seed: int) -> _Decaying:
        return self


@dataclass(frozen=True)
class Costs:
    """Estimates for one module and its training data.

    Attributes:
        objective: An open objective.
        passes: The measured passes.
        n_train: The number of training examples.
        start: The seconds that every call takes to open the objective and the data.
    """

    objective: Objective
    passes: PassCosts
    n_train: int
    start: float

    def query(self, settings: Settings, n_queries: int, n_states: int = 1) -> Estimate:
        """The cost of ``trainer.influence`` on one batch, as a whole or with ``n_queries`` queries.

        Args:
            settings: The settings of its scores.
            n_queries: The number of queries.
            n_states: The number of states of training over which scores are averaged.
        """
        passes = self.passes
        if passes.layers is None:
            algebra, products = self._solves(
                settings,
                n_queries,
                semidefinite=CURVATURES.declared(CURVATURES[settings.curvature], "positive_semidefinite"),
            )
            solves, kept = self._solve(passes.scores, settings, self._sample(settings), products)
            solving = kept + passes.scores.working
            copies = SKETCH_COPIES * max_iter(settings) if SOLVERS[settings.solver].is_sketch else 12
        else:
            algebra, copies = 0.0, 4 * min(n_queries, EKFACInverse.block_size)
            solves, kept, solving = self._layers(passes.layers, settings)
            products = inverse_for_queries(settings).corrections(settings, n_queries) or 0
            if products:
                copies = 12 * min(n_queries, MOST_TOGETHER)
                costs = passes.scores if n_queries > 1 else replace(passes.scores, product=passes.scores.alone)
                corrections, graphs = self._curvature(costs, settings, self._sample(settings), products)
                algebra, solves, kept = 2 * products * passes.root, solves + corrections, kept + graphs
                solving = max(solving, kept + passes.scores.working)
        scoring = passes.queries if n_queries > 1 else passes.score
        each = algebra + solves + n_queries * self._over(1, passes.gradient) + self._over(self.n_train, scoring)
        stored = (n_states * n_queries + n_states - 1) * self.objective.theta.nbytes
        working = copies * self.objective.theta.nbytes
        return Estimate(
            "trainer.influence(batch)"
            if n_queries == 1
            else f"trainer.influence(batch, per_example=True), {n_queries} queries",
            self.start + self._over(self.n_train, passes.read) + n_states * each,
            self._gib(solving, kept + stored + max(working, scoring.peak, passes.gradient.peak)),
            n_states * products,
        )

    def self_influence(self, settings: Settings) -> Estimate:
        """The cost of ``trainer.self_influence()``."""
        passes, theta = self.passes, self.objective.theta
        scoring = self._over(self.n_train, passes.read)
        if passes.layers is not None and settings.solver not in SOLVERS:
            solves, kept, solving = self._layers(passes.layers, settings)
            scoring += self._over(self.n_train, passes.itself)
            gib = self._gib(solving, kept + passes.itself.peak)
            return Estimate("trainer.self_influence()", self.start + solves + scoring, gib, products=0)
        scoring += self._over(self.n_train, passes.rows)
        size, measured = len(theta), min(len(theta), _MOST_ENTRIES)
        dense = size <= DENSE_PARAMETERS
        operator = _Decaying(measured, theta, True)
        rank = min(size if dense else settings.max_iter or 1, size)
        damped = POWER_ITERATIONS if settings.damping is None else 0
        rows = torch.ones(passes.size, measured, dtype=theta.dtype, device=theta.device)
        algebra = quadratic = 0.0
        if not dense:
            sketch = low_rank(operator, rank)
            algebra = _seconds(lambda: low_rank(operator, rank), theta.device) * size / measured
            quadratic = _seconds(lambda: sketch.quadratic(rows, 1.0), theta.device) * size / measured
        products = rank + damped
        n = self._sample(settings)
        layers = from_layers(self.objective, settings, n, rank)
        if not dense and layers is None and SketchInverse.uses_jacobians(self.objective, settings, n):
            solves, kept = self._jacobians(n, products)
        else:
            solves, kept = self._curvature(passes.scores, settings, n, products)
        scoring += self.n_train / passes.size * quadratic
        held = theta.nbytes * rank * SKETCH_COPIES if not dense else 8 * rank**2
        return Estimate(
            "trainer.self_influence()",
            self.start + algebra + solves + scoring,
            self._gib(kept + held + passes.scores.working, kept + held + passes.rows.peak),
            products,
        )

    def edit(self, settings: Settings, n_forget: int, n_unseen: int, sizes: SampleSizes) -> Estimate:
        """The cost of ``trainer.unlearn`` for examples that are removed.

        Args:
            settings: The settings of the edit.
            n_forget: The number of forget examples.
            n_unseen: The number of unseen examples.
            sizes: The numbers of examples that an edit uses.
        """
        passes, n_retain = self.passes, max(self.n_train - n_forget, 1)
        n_fit = min(n_retain, self._sample(settings))
        n_eval = min(n_retain, n_fit, sizes.evaluation)
        n_forget_eval, n_unseen = min(n_forget, n_eval), min(n_unseen, n_fit)
        compares = min(n_forget, n_unseen) >= sizes.min_compared
        n_terms = 2 if compares else 1
        n_unseen = n_unseen if compares else 0
        measured = [n_eval, n_forget_eval] + ([n_forget, n_unseen] if compares else [])
        trial = sum(self._over(n, passes.loss) for n in measured)
        algebra, products = self._solves(replace(settings, damping=settings.damping or 0.0), 1, semidefinite=False)
        products += 1  # the curvature along the change
        influence, kept = self._solve(passes.edits, settings, n_fit, products)
        begin = (
            self._over(n_fit + n_eval + n_unseen + 2 * n_forget, passes.read)
            + sum(self._over(n, passes.gradient) for n in (n_forget, n_forget, n_eval, n_fit))
            + 3 * self._over(n_forget, passes.loss)
            + self._over(n_unseen, passes.loss)
        )
        n_curvature = min(n_fit, sizes.descent_curvature)
        further, _ = self._curvature(passes.edits, settings, n_curvature, Goal.descent_iterations + 2)
        change = (
            n_terms * further
            + self._over(n_fit, passes.gradient)
            + (self._over(n_forget, passes.gradient) if compares else 0.0)
            + _CHANGE_TRIALS * trial
        )
        return Estimate(
            f"trainer.unlearn of {n_forget} example{'s' * (n_forget != 1)}",
            self.start + begin + algebra + influence + (_SEARCH_TRIALS + 3) * trial,
            self._gib(kept + 12 * self.objective.theta.nbytes + max(passes.edits.working, passes.gradient.peak)),
            products,
            change,
            further_changes=Relinearisation().max_solves - 1,
        )

    def match(
        self,
        settings: Settings,
        n_forget: int,
        n_unseen: int,
        sizes: SampleSizes,
        numbers: Matching,
        n_states: int,
        *,
        knows_damping: bool,
    ) -> Estimate:
        """The cost of ``trainer.unlearn`` for examples that are removed by ``step="match"``.

        Args:
            settings: The settings of the edit.
            n_forget: The number of forget examples.
            n_unseen: The number of unseen examples.
            sizes: The numbers of examples that an edit uses.
            numbers: The tuned numbers of the strategy.
            n_states: The number of states of training at which the gradient of the leave-out step is taken.
            knows_damping: Whether the damping is given, or the training was recorded. Else it is measured.
        """
        passes, n_retain = self.passes, max(self.n_train - n_forget, 1)
        automatic = isinstance(settings.curvature_examples, str)
        n_fit = min(n_retain, max(numbers.curvature_examples, n_forget) if automatic else self._sample(settings))
        n_eval = min(n_retain, n_fit, sizes.evaluation, numbers.evaluation)
        n_unseen = min(n_unseen, n_fit) if min(n_forget, n_unseen) >= sizes.min_compared else 0
        few, aimed = min(numbers.rate_examples, n_fit), min(numbers.rate_examples // 4, n_forget)
        trial = sum(self._over(n, passes.loss) for n in (n_eval, min(n_forget, n_eval), n_forget, n_unseen))
        products = (settings.max_iter or numbers.iterations) + (0 if knows_damping else POWER_STEPS)
        solves, kept = self._curvature(passes.edits, settings, n_fit, products)
        root, fitting, n_root = 0.0, 0.0, min(n_fit, numbers.preconditioner_examples)
        if passes.layers is not None:
            root = passes.layers.fixed + n_root * passes.layers.each
            fitting = passes.layers.peak * min(n_root / passes.size, 1)
        root += 2 * products * passes.root  # from both sides of the matrix
        rate = sum(self._curvature(passes.edits, settings, n, POWER_STEPS)[0] for n in (few, aimed))
        parts = min(numbers.retained, n_retain), min(numbers.forgotten, n_forget)
        stepping = sum(self._over(n, one) for n in parts for one in (passes.loss, passes.gradient))
        predicted = sum(
            self._over(n, passes.edits.first) + self._over(n, passes.edits.product) / 2 for n in (n_eval, 2 * n_forget)
        )
        begin = (
            self._over(n_fit + n_eval + n_unseen + 2 * n_forget, passes.read)
            + n_states * self._over(n_forget + n_fit, passes.gradient)
            + self._over(n_unseen, passes.loss)
        )
        return Estimate(
            f"trainer.unlearn of {n_forget} example{'s' * (n_forget != 1)}",
            self.start + begin + solves + root + predicted + 4 * trial,
            self._gib(
                fitting + (0.0 if knows_damping else kept),  # else the graphs of the curvature exist before
                passes.layers_bytes
                + kept
                + 12 * self.objective.theta.nbytes
                + max(passes.edits.working, passes.gradient.peak),
            ),
            products,
            rate + numbers.steps * (stepping + self._over(numbers.retained, passes.read)) + trial,
            further_changes=1,
        )

    def _layers(self, cost: Pass, settings: Settings) -> tuple[float, float, float]:
        """The seconds of the EK-FAC inverse, the bytes that are kept, and those at the peak of its computation."""
        n = self._sample(settings)
        cached = n / self.passes.size * self.passes.batch_bytes
        cached = cached if cached <= bytes_to_keep(settings, self.objective) else 0.0
        seconds = self._over(n, self.passes.read) + cost.fixed + n * cost.each
        return seconds, float(self.passes.layers_bytes), cached + cost.peak

    def _gib(self, *stages: float) -> float:
        """The GiB at the peak of a call: of its opening, or of the stage that needs the most bytes.

        The weights as a vector, and a result like it, are there all the time.
        """
        return (max(self.passes.opening, *stages) + 2 * self.objective.theta.nbytes) / _GIB

    def _sample(self, settings: Settings) -> int:
        """The number of examples that the curvature is taken over."""
        return min(self.n_train, sample_size(settings) or self.n_train)

    def _over(self, n: float, cost: Pass) -> float:
        """The seconds of a pass over ``n`` examples."""
        return cost.over(n, self.passes.size)

    def _curvature(self, costs: CurvatureCosts, settings: Settings, n: int, products: int) -> tuple[float, float]:
        """The seconds of products with the curvature over ``n`` examples, and the bytes that are kept for them."""
        batches = n / self.passes.size
        room = bytes_to_keep(settings, self.objective)
        held = min(batches, room / costs.kept) if costs.kept else batches
        first = self._over(n, costs.first)
        repeated = (batches - held) / batches * first * max(products - 1, 0)
        seconds = self._over(n, self.passes.read) + first + products * self._over(n, costs.product) + repeated
        cached = batches * self.passes.batch_bytes
        # The graph of a batch exists while it is used, even if it is not kept.
        return seconds, max(held, 1) * costs.kept + (cached if cached <= room else 0.0)

    def _solve(self, costs: CurvatureCosts, settings: Settings, n: int, products: int) -> tuple[float, float]:
        """As :meth:`_curvature`, for the products of the solver of the settings."""
        if not SOLVERS[settings.solver].requires_draws:
            return self._curvature(costs, settings, n, products)
        few = min(n, self.passes.size)  # each product is over another batch
        seconds = products * sum(self._over(few, one) for one in (self.passes.read, costs.first, costs.product))
        return seconds, float(costs.kept)

    def _jacobians(self, n: int, products: int) -> tuple[float, float]:
        """As :meth:`_curvature`, for products with the Jacobians of single examples."""
        theta, probed = self.objective.theta, self.objective.probed
        assert probed is not None  # else no Jacobians are used
        rows = n * n_outputs(self.objective, probed)
        some = torch.ones(min(rows, _MEASURED_ROWS), len(theta), dtype=theta.dtype, device=theta.device)
        column = torch.ones(len(theta), 1, dtype=theta.dtype, device=theta.device)
        product = _seconds(lambda: some.T @ (some @ column), theta.device) * rows / len(some)
        first = n * self.passes.gradient.over(1, self.passes.size) + rows * self.passes.gradient.each
        return self._over(n, self.passes.read) + first + products * product, float(rows * theta.nbytes)

    def _solves(self, settings: Settings, n_queries: int, *, semidefinite: bool) -> tuple[float, int]:
        """The seconds of the algebra of a solver without its products, and the number of products."""
        theta = self.objective.theta
        operator = _Decaying(min(len(theta), _MOST_ENTRIES), theta, semidefinite)
        measures = settings.damping is None
        fixed = replace(settings, damping=1e-3 if measures else settings.damping, unconverged="ignore")
        rhs = torch.randn(operator.shape[0], n_queries, generator=torch.Generator().manual_seed(0)).to(theta)
        begin = time.perf_counter()
        solve(fixed, operator, rhs)
        seconds = (time.perf_counter() - begin) * len(theta) / operator.shape[0]
        return seconds, operator.products + POWER_ITERATIONS * measures

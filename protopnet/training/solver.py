"""The convex problem of the last layer: pure numpy, knows no Ray and no torch.

Over the class connections W (K×P), with the similarities S (n×P) of the training images fixed:

    F(W) = mean cross-entropy(S Wᵀ, labels) + l1·‖off-class W‖₁ + ridge/2·‖W − W₀‖²,    W ≥ floor

The solver sees the data only through a `SmoothLoss`, so rows may stay wherever they were computed: an
iteration moves W there and a gradient back. `RowBlock` is the loss of the rows in one place; `mean_over`
adds up blocks in this process, `add_up` the answers of blocks elsewhere.

Method: FISTA (accelerated proximal gradient) with backtracking, restarted when the momentum points uphill or
the objective rises, in the metric of `proximal.py`. It stops on the KKT residual, the largest absolute entry
of the minimum-norm subgradient of F at W: zero exactly at the optimum, in the unit of F per connection.
Because of the ridge, F(W) − min F ≤ ‖subgradient‖²/(2·ridge): `Solution.gap` is that certificate.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from protopnet.training.proximal import Array, Metric, metric_of

__all__ = ["Progress", "RowBlock", "SmoothLoss", "Solution", "add_up", "mean_over", "metric_over", "solve"]

_SLACK = 1e-9  # relative; a smaller rise of the objective is rounding
_MOST_DOUBLINGS = 60
# Numbers up to which a block is kept in float64: on few rows the rounding of float32 hides the descent.
_MOST_DOUBLES = 1 << 20
_SHRINK = 0.95  # of the curvature estimate after each step, so that it follows the loss down again


class SmoothLoss(Protocol):
    """Mean cross-entropy over all rows, wherever they are, and its gradient (K×P)."""

    def __call__(self, weights: Array, /) -> tuple[float, Array]: ...


class RowBlock:
    """The rows of the similarity matrix that one place holds. Sums, not means: blocks add up."""

    def __init__(self, similarities: NDArray[Any], labels: ArrayLike, num_classes: int, chunk_rows: int = 2048) -> None:
        self.labels = np.asarray(labels, dtype=np.int64)
        kept = np.asarray(similarities)
        single = kept.dtype == np.float32 and kept.size > _MOST_DOUBLES
        self.similarities = kept if single else kept.astype(np.float64, copy=False)
        self.num_classes = num_classes
        self.chunk_rows = chunk_rows
        if self.similarities.ndim != 2 or self.labels.shape != self.similarities.shape[:1]:
            raise ValueError(f"{self.similarities.shape} similarities for {self.labels.shape} labels")
        if not all(np.isfinite(self.similarities[rows]).all() for rows in self._chunks()):
            raise ValueError("similarities that are not finite")
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < num_classes:
            raise ValueError(f"labels outside 0 … {num_classes - 1}")

    def __len__(self) -> int:
        return len(self.labels)

    def _chunks(self) -> Iterator[slice]:
        return (slice(first, first + self.chunk_rows) for first in range(0, len(self), self.chunk_rows))

    def loss_and_gradient(self, weights: Array) -> tuple[float, Array]:
        """Sum over the rows of the cross-entropy, and its gradient. Memory beyond the result: one chunk."""
        # Adding the same row to all classes changes no cross-entropy; without their common part logits are
        # small, and float32 similarities lose nothing that matters.
        centred = (weights - weights.mean(axis=0)).astype(self.similarities.dtype)
        loss, gradient = 0.0, np.zeros(weights.shape)
        for rows in self._chunks():
            part, residual = _cross_entropy(self.similarities[rows] @ centred.T, self.labels[rows])
            loss += part
            gradient += residual.T @ self.similarities[rows]
        return loss, gradient

    def second_moment(self, vector: Array) -> Array:
        """SᵀS·vector, for `metric_over`."""
        image = self.similarities @ vector.astype(self.similarities.dtype)
        return np.asarray(image @ self.similarities, dtype=np.float64)


def _cross_entropy(logits: NDArray[Any], labels: NDArray[np.int64]) -> tuple[float, NDArray[Any]]:
    """Sum of the cross-entropies, and softmax minus one-hot, which overwrites the logits."""
    each = np.arange(len(labels))
    logits -= logits.max(axis=1, keepdims=True)
    own = logits[each, labels].astype(np.float64)
    np.exp(logits, out=logits)
    total = logits.sum(axis=1, keepdims=True)
    loss = float((np.log(total[:, 0].astype(np.float64)) - own).sum())
    logits /= total
    logits[each, labels] -= 1
    return loss, logits


def add_up(parts: Iterable[tuple[float, Array]], rows: int) -> tuple[float, Array]:
    """Mean loss and gradient from the sums of the blocks; in the order given, so that runs repeat."""
    losses, gradients = zip(*parts, strict=True)
    return sum(losses) / rows, np.sum(gradients, axis=0) / rows


def mean_over(blocks: Sequence[RowBlock]) -> SmoothLoss:
    """Loss over blocks in this process."""
    rows = sum(map(len, blocks))
    return lambda weights: add_up((block.loss_and_gradient(weights) for block in blocks), rows)


def metric_over(blocks: Sequence[RowBlock]) -> Metric:
    """Metric for blocks in this process; for others: `metric_of` with a sum over their `second_moment`."""
    size = blocks[0].similarities.shape[1]
    return metric_of(lambda v: np.sum([block.second_moment(v) for block in blocks], axis=0), size)


class Progress(NamedTuple):
    """State after an iteration."""

    iteration: int
    objective: float
    residual: float


@dataclass(frozen=True)
class Solution:
    """Result of `solve`; `gap` bounds how far the objective is above the optimum."""

    weights: Array
    objective: float
    residual: float
    gap: float
    iterations: int
    evaluations: int
    converged: bool
    history: list[Progress] = field(repr=False)


class _Point(NamedTuple):
    """Weights with value and gradient of the smooth part, and the whole objective."""

    weights: Array
    smooth: float
    gradient: Array
    objective: float


class _Problem:
    def __init__(self, loss: SmoothLoss, anchor: Array, penalty: Array, ridge: float, floor: Array) -> None:
        self.loss, self.anchor, self.penalty, self.ridge, self.floor = loss, anchor, penalty, ridge, floor
        self.evaluations = 0

    def at(self, weights: Array) -> _Point:
        self.evaluations += 1
        loss, gradient = self.loss(weights)
        away = weights - self.anchor
        smooth = loss + self.ridge / 2 * float(np.vdot(away, away))
        objective = smooth + float(np.vdot(self.penalty, np.abs(weights)))
        if not np.isfinite(objective):
            raise FloatingPointError("the objective of the last layer is not finite")
        return _Point(weights, smooth, gradient + self.ridge * away, objective)

    def subgradient(self, point: _Point) -> Array:
        """Minimum-norm subgradient of the objective; on the floor only what would lead up counts."""
        zero = np.sign(point.gradient) * np.maximum(np.abs(point.gradient) - self.penalty, 0)
        free = np.where(point.weights != 0, point.gradient + self.penalty * np.sign(point.weights), zero)
        return np.where(point.weights > self.floor, free, np.minimum(free, 0))


def solve(
    loss: SmoothLoss,
    start: Array,
    off_class: NDArray[Any],
    *,
    l1: float,
    ridge: float,
    tolerance: float = 1e-5,
    max_iterations: int = 2000,
    metric: Metric | None = None,
    initial: Array | None = None,
    floor: Array | None = None,
    on_iteration: Callable[[Progress], None] | None = None,
) -> Solution:
    """Minimise F. `start` is W₀ of the ridge and, unless `initial` is given, the first iterate.

    `off_class` (K×P, true or 1) marks the connections under the L1 norm; `floor` (K×P) is what they may not fall below,
    -inf where they may. The objective of the result is never above that of the first iterate, which is raised to the
    floor. `converged` says whether the residual fell to the tolerance.
    """
    anchor = np.array(start, dtype=np.float64)
    least = np.full(anchor.shape, -np.inf) if floor is None else np.asarray(floor, dtype=np.float64)
    problem = _Problem(loss, anchor, np.where(off_class, l1, 0.0), ridge, least)
    metric = metric or Metric.plain(anchor.shape[1])
    best = problem.at(np.maximum(anchor if initial is None else np.array(initial, dtype=np.float64), least))
    ahead, momentum, curvature = best, 1.0, 1.0
    history: list[Progress] = []
    residual = _note(problem, best, history, on_iteration)
    while residual > tolerance and len(history) <= max_iterations:
        new, curvature = _step(problem, metric, ahead, curvature)
        if new is None:
            break  # rounding hides any descent: the tolerance is below what the similarities' type can show
        if new.objective > best.objective + _SLACK * abs(best.objective) and ahead is not best:
            ahead, momentum = best, 1.0  # a plain step from the best point always descends
            continue
        if metric.inner(ahead.weights - new.weights, new.weights - best.weights) > 0:
            momentum = 1.0
        following = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        push = (momentum - 1) / following
        previous, best, momentum, curvature = best, new, following, curvature * _SHRINK
        residual = _note(problem, best, history, on_iteration)
        if residual > tolerance and push > 0:
            ahead = problem.at(best.weights + push * (best.weights - previous.weights))
        else:
            ahead = best
    return _solution(problem, best, history, tolerance)


def _step(problem: _Problem, metric: Metric, origin: _Point, curvature: float) -> tuple[_Point | None, float]:
    """Proximal gradient step with a curvature that the loss doesn't exceed on the way."""
    descent = metric.solve(origin.gradient)
    for _ in range(_MOST_DOUBLINGS):
        target = metric.proximal(origin.weights - descent / curvature, problem.penalty / curvature, problem.floor)
        new = problem.at(target)
        way = target - origin.weights
        bound = curvature / 2 * metric.inner(way, way)
        # Either proves the descent: the second by convexity, and it survives rounding near the optimum,
        # where the difference of two losses is all noise.
        above_tangent = new.smooth - origin.smooth - float(np.vdot(origin.gradient, way))
        if above_tangent <= bound or float(np.vdot(new.gradient - origin.gradient, way)) <= bound:
            return new, curvature
        curvature *= 2
    return None, curvature


def _note(problem: _Problem, point: _Point, history: list[Progress], tell: Callable[[Progress], None] | None) -> float:
    residual = float(np.abs(problem.subgradient(point)).max())
    history.append(Progress(len(history), point.objective, residual))
    if tell:
        tell(history[-1])
    return residual


def _solution(problem: _Problem, point: _Point, history: list[Progress], tolerance: float) -> Solution:
    subgradient = problem.subgradient(point)
    residual = float(np.abs(subgradient).max())
    gap = float(np.vdot(subgradient, subgradient)) / (2 * problem.ridge) if problem.ridge else np.inf
    return Solution(
        weights=point.weights,
        objective=point.objective,
        residual=residual,
        gap=gap,
        iterations=len(history) - 1,
        evaluations=problem.evaluations,
        converged=residual <= tolerance,
        history=history,
    )

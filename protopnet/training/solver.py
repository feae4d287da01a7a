"""The convex problem of the last layer; knows no Ray.

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

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from protopnet.model.prototypes import true_float32
from protopnet.training.proximal import Array, Metric, metric_of

__all__ = ["Progress", "RowBlock", "SmoothLoss", "Solution", "add_up", "mean_over", "metric_over", "solve"]

_SLACK = 1e-9  # relative; a smaller rise of the objective is rounding
_MOST_DOUBLINGS = 60
# Numbers up to which a block is kept in float64: on few rows the rounding of float32 hides the descent.
_MOST_DOUBLES = 1 << 20
_CHUNK, _LARGE_CHUNK = 256, 1 << 14  # rows at a time on a CPU, elsewhere
_SHRINK = 0.95  # of the curvature estimate after each step, so that it follows the loss down again


class SmoothLoss(Protocol):
    """Mean cross-entropy over all rows, wherever they are, and its gradient (K×P)."""

    def __call__(self, weights: Array, /) -> tuple[float, Array]: ...


class RowBlock:
    """The rows of the similarity matrix that one place holds. Sums, not means: blocks add up.

    They stay on `device`, in their own type: in float16, if they come so, and all is exact for what float16 made of them.
    Products are of float32 (of float64 where there are few rows), sums of float64; weights and gradients are numpy's.
    """

    def __init__(
        self,
        similarities: NDArray[Any],
        labels: ArrayLike,
        num_classes: int,
        chunk_rows: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        labels_n, kept = np.asarray(labels, dtype=np.int64), np.asarray(similarities)
        if kept.ndim != 2 or labels_n.shape != kept.shape[:1]:
            raise ValueError(f"{kept.shape} similarities for {labels_n.shape} labels")
        if len(labels_n) and not 0 <= labels_n.min() <= labels_n.max() < num_classes:
            raise ValueError(f"labels outside 0 … {num_classes - 1}")
        self.num_classes = num_classes
        self.chunk_rows = chunk_rows or (_CHUNK if torch.device(device).type == "cpu" else _LARGE_CHUNK)
        large = kept.dtype in (np.float32, np.float16) and kept.size > _MOST_DOUBLES
        self.dtype = torch.float32 if large else torch.float64
        kept = kept if large else kept.astype(np.float64, copy=False)
        self.columns_Pn = torch.from_numpy(kept.T).to(device)  # a prototype after another, where a column is contiguous
        self.labels_n = torch.from_numpy(labels_n).to(device)
        if kept.size and not all(bool(extreme.isfinite()) for extreme in self.columns_Pn.aminmax()):
            raise ValueError("similarities that are not finite")

    def __len__(self) -> int:
        return len(self.labels_n)

    def chunks(self) -> list[slice]:
        """Rows that are worked on at a time, where there is a number for each row and class."""
        return [slice(first, first + self.chunk_rows) for first in range(0, len(self), self.chunk_rows)]

    def here(self, values: NDArray[Any]) -> torch.Tensor:
        """Beside the rows, in the type of the products."""
        return torch.tensor(values, dtype=self.dtype, device=self.columns_Pn.device)

    def loss_and_gradient(self, weights: Array) -> tuple[float, Array]:
        """Sum over the rows of the cross-entropy, and its gradient. Memory beyond the result: one chunk."""
        # Adding the same row to all classes changes no cross-entropy; without their common part logits are
        # small, and float32 similarities lose nothing that matters.
        centred_KP, loss = self.here(weights - weights.mean(axis=0)), 0.0
        gradient_KP = torch.zeros(weights.shape, dtype=torch.float64, device=centred_KP.device)
        with true_float32():
            for rows in self.chunks():
                some_Pc = self.columns_Pn[:, rows].to(self.dtype)
                part, residual_Kc = _cross_entropy(centred_KP @ some_Pc, self.labels_n[rows])
                loss += part
                gradient_KP += residual_Kc @ some_Pc.T
        return loss, gradient_KP.cpu().numpy()

    def second_moment(self, vector: Array) -> Array:
        """SᵀS·vector, for `metric_over`."""
        vector_P, result_P = self.here(vector), np.zeros(len(vector))
        for rows in self.chunks():
            some_Pc = self.columns_Pn[:, rows].to(self.dtype)
            result_P += (some_Pc @ (vector_P @ some_Pc)).cpu().numpy()
        return result_P


def _cross_entropy(logits_Kc: torch.Tensor, labels_c: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Sum of the cross-entropies, and softmax minus one-hot, which overwrites the logits."""
    logits_Kc -= logits_Kc.amax(dim=0)
    own_c = logits_Kc.gather(0, labels_c[None])[0].double()
    total_c = logits_Kc.exp_().sum(dim=0)
    loss = float((total_c.double().log() - own_c).sum())
    logits_Kc /= total_c
    logits_Kc[labels_c, torch.arange(len(labels_c), device=labels_c.device)] -= 1
    return loss, logits_Kc


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
    size = len(blocks[0].columns_Pn)
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

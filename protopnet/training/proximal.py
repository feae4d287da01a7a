"""The metric in which the last-layer solver measures steps, and its proximal map.

Similarities have a large common mean: their second-moment matrix has one eigenvalue that can be thousands of
times the next (log similarities with mean 3 and standard deviation 0.25: 1700 times). A scalar step size has
to obey that one direction and crawls in all others. The metric I + c·u uᵀ takes the direction out; the
proximal map of a weighted L1 norm in it needs only one number a row, the root of a monotone piecewise linear
function (Becker and Fadili 2012).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_MOST_STRETCH = 1e4  # of few rows the second eigenvalue is 0, while the ridge goes on counting
_ROOT_STEPS = 100


@dataclass(frozen=True)
class Metric:
    """The metric I + stretch · direction directionᵀ on each row of the weights; direction has norm 1."""

    direction: Array
    stretch: float

    @classmethod
    def plain(cls, size: int) -> "Metric":
        """The Euclidean metric."""
        return cls(np.zeros(size), 0.0)

    def inner(self, a: Array, b: Array) -> float:
        """Inner product of two K×P matrices."""
        along = float((a @ self.direction) @ (b @ self.direction)) if self.stretch else 0.0
        return float(np.vdot(a, b)) + self.stretch * along

    def solve(self, gradient: Array) -> Array:
        """Inverse of the metric applied to each row."""
        if not self.stretch:
            return gradient
        share = self.stretch / (1 + self.stretch)
        return gradient - share * np.outer(gradient @ self.direction, self.direction)

    def proximal(self, point: Array, threshold: Array, floor: Array | float = -np.inf) -> Array:
        """argmin over X ≥ floor of ‖X − point‖²/2 in this metric + Σ threshold·|X|.

        With a = uᵀ(x − point), x is the soft threshold of point − c·a·u, not below the floor; a is the root of h below.
        """
        if not self.stretch:
            return np.maximum(soft_threshold(point, threshold), floor)
        return self._proximal(point, threshold, np.broadcast_to(floor, point.shape))

    def _proximal(self, point: Array, threshold: Array, floor: Array) -> Array:
        u, c = self.direction, self.stretch
        result = np.empty_like(point)
        rows = np.arange(len(point))
        root = np.zeros(len(point))
        low, high = np.full(len(point), -np.inf), np.full(len(point), np.inf)
        precision = 1e-13 * (np.abs(point) @ np.abs(u)) + 1e-300
        for _ in range(_ROOT_STEPS):
            v, t, a, low_x = point[rows], threshold[rows], root[rows], floor[rows]
            x = np.maximum(soft_threshold(v - c * np.outer(a, u), t), low_x)
            h = (x - v) @ u - a  # falls with a, its slope between -1-c and -1
            result[rows] = x
            near, far = a + h / (1 + c), a + h  # the root lies between
            low[rows] = np.maximum(low[rows], np.minimum(near, far))
            high[rows] = np.minimum(high[rows], np.maximum(near, far))
            newton = a + h / (1 + c * ((((x != 0) | (t == 0)) & (x > low_x)) @ (u * u)))
            outside = (newton < low[rows]) | (newton > high[rows])
            root[rows] = np.where(outside, (low[rows] + high[rows]) / 2, newton)
            rows = rows[(np.abs(h) > precision[rows]) & (root[rows] != a)]
            if not len(rows):
                break
        return result


def soft_threshold(values: Array, threshold: Array) -> Array:
    """argmin over x of (x − value)²/2 + threshold·|x|, element by element."""
    return values - np.clip(values, -threshold, threshold)


def metric_of(multiply: Callable[[Array], Array], size: int, steps: int = 15) -> Metric:
    """Metric from the two largest eigenvalues of a second-moment matrix, by power iteration.

    `multiply(v)` gives the matrix (any positive multiple of it) times v. The two need only be roughly right:
    the metric changes the way to the solution, never the solution.
    """
    first, direction = _leading(multiply, size, steps, None)
    second, _ = _leading(multiply, size, steps, direction)
    if first <= 0 or size < 2:
        return Metric.plain(size)
    stretch = first / max(second, first / _MOST_STRETCH) - 1
    return Metric(direction, stretch) if stretch > 1 else Metric.plain(size)


def _leading(multiply: Callable[[Array], Array], size: int, steps: int, without: Array | None) -> tuple[float, Array]:
    vector = np.random.default_rng(0 if without is None else 1).random(size) + 0.1  # not all along `without`
    value = 0.0
    for _ in range(steps):
        if without is not None:
            vector = vector - without * (without @ vector)
        norm = float(np.linalg.norm(vector))
        if norm == 0:
            return 0.0, vector
        vector = vector / norm
        image = multiply(vector)
        value, vector = float(vector @ image), image
    norm = float(np.linalg.norm(vector))
    return value, vector / norm if norm else vector

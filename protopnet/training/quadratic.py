"""Second-order models of the last layer: their minimum under an L1 norm and a floor, and conjugate gradients.

Legend: A connections.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from protopnet.training.proximal import Array, soft_threshold

_MOST_MODEL_STEPS = 60
_CG_STEPS, _CG_ACCURACY = 30, 1e-2


def subgradient(weights: Array, gradient: Array, penalty: Array, floor: Array) -> Array:
    """Minimum-norm subgradient, as `training.solver` has it."""
    free = np.where(weights != 0, gradient + penalty * np.sign(weights), soft_threshold(gradient, penalty))
    return np.where(weights > floor, free, np.minimum(free, 0))


def conjugate_gradients(
    multiply: Callable[[Array], Array], precondition: Callable[[Array], Array], right: Array
) -> Array:
    """Solve roughly."""
    x, rest = np.zeros_like(right), right.copy()
    ahead = precondition(rest)
    way, size = ahead, float(rest @ ahead)
    first = size
    for _ in range(_CG_STEPS):
        if size <= _CG_ACCURACY * first or size <= 0:
            break
        image = multiply(way)
        length = size / float(way @ image)
        x, rest = x + length * way, rest - length * image
        ahead = precondition(rest)
        size, before = float(rest @ ahead), size
        way = ahead + size / before * way
    return x


def least_quadratic(
    hessian_AA: Array, gradient_A: Array, weights_A: Array, penalty_A: Array, floor_A: Array, tolerance: float
) -> Array:
    """argmin over x ≥ floor of gradientᵀ(x − w) + (x − w)ᵀ hessian (x − w)/2 + Σ penalty·|x|, by sets of signs.

    With the signs known it is a linear system. Its solution is gone to up to the first connection that would change its
    sign, which stays at 0; the objective falls each time, so that no set of signs comes back.
    """
    x = weights_A.copy()
    for _ in range(_MOST_MODEL_STEPS):
        slope_A = gradient_A + hessian_AA @ (x - weights_A)
        step_A = subgradient(x, slope_A, penalty_A, floor_A)
        if np.abs(step_A).max(initial=0) <= tolerance:
            break
        free = np.flatnonzero((step_A != 0) | ((x != 0) & (x > floor_A)))
        sign_A = np.where(x != 0, np.sign(x), -np.sign(step_A)) * (penalty_A > 0)
        x = _towards(hessian_AA, slope_A + penalty_A * sign_A, x, sign_A, floor_A, free, step_A)
    return x


def _towards(
    hessian_AA: Array, slope_A: Array, x: Array, sign_A: Array, floor_A: Array, free: NDArray[np.int64], step_A: Array
) -> Array:
    """From x towards the minimum over `free`, as far as signs and floors hold; what can't move at all is left out."""
    while len(free):
        way = -_solved(hessian_AA[np.ix_(free, free)], slope_A[free])
        start = x[free]
        with np.errstate(divide="ignore", invalid="ignore"):
            crossing = np.where((sign_A[free] != 0) & (sign_A[free] * way < 0), -start / way, np.inf)
            falling = np.where(way < 0, (floor_A[free] - start) / way, np.inf)
        reach = np.minimum(crossing, falling)
        reach[np.isnan(reach)] = np.inf
        length = min(1.0, float(reach.min()))
        if length > 0:
            result = x.copy()
            result[free] = start + length * way
            stopped = free[reach <= length]
            result[stopped] = np.where(crossing[reach <= length] <= falling[reach <= length], 0.0, floor_A[stopped])
            return result
        stuck = reach <= 0
        if stuck.all():
            break
        free = free[~stuck]
    return x


def _solved(matrix: Array, vector: Array) -> Array:
    try:
        return np.asarray(np.linalg.solve(matrix, vector))
    except np.linalg.LinAlgError:
        return np.asarray(np.linalg.lstsq(matrix, vector, rcond=None)[0])

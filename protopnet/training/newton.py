"""The last layer where all rows are in one process: Newton's method on the connections that aren't 0.

The problem is that of `training.solver`. At its optimum hardly any connection to another class is left, while each
iteration there computes with all K×P of them, twice. Here a cycle has three parts:

1. One class after another, all others as they are: on its working set (its own prototypes, the others it has, and those
   that ought to be let in) the second-order model of the loss with l1, ridge and floor is minimised exactly
   (`least_quadratic`), with a line search on F. Only its logits change, and the next class sees them.
2. One Newton step for all classes together, as they hold each other up: conjugate gradients on the connections that aren't
   0, preconditioned with the models of step 1. What would change its sign stays at 0; taken only where F falls.
3. The gradient over all K×P connections, rows in chunks: it certifies the KKT residual, or says what is to be let in, at
   most as many again as a class has.

Beside the rows it holds their logits, in the rows' precision, and three numbers a connection; all else is of some rows
or of one class. Sums are float64.

Legend: n rows, P prototypes, K classes, A connections of a class, C those of all classes together.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from protopnet.training.proximal import Array
from protopnet.training.quadratic import conjugate_gradients, least_quadratic, subgradient
from protopnet.training.solver import Progress, RowBlock, Solution, mean_over, metric_over, solve

_CHUNK = 2048  # rows at a time, where there is a number for each row and class
_SMALL_SET = 32  # connections that a working set may grow to at once
_WIDE = 8, 128  # with more than P / 8 connections a class, and more than 128, a dense product is as quick
_NO_CURVATURE = 1e-6  # rows that weigh less are left out of a model, never out of F or its gradient
_LEAST = 1e-15  # of what a sum of exponents may shrink to in one step, relative
_MOST_EXPONENT = 500.0
_SUFFICIENT, _MOST_HALVINGS = 1e-3, 20  # of the descent that a model promises
_JOINT_HALVINGS = 6
_PATIENCE = 3  # cycles without descent

Indices = NDArray[np.int64]


def solve_here(
    block: RowBlock,
    start: ArrayLike,
    off_class: ArrayLike,
    *,
    l1: float,
    ridge: float,
    tolerance: float = 1e-5,
    max_iterations: int = 2000,
    initial: ArrayLike | None = None,
    floor: ArrayLike | None = None,
    on_iteration: Callable[[Progress], None] | None = None,
) -> Solution:
    """As `training.solver.solve`, of rows in this process; an iteration is a cycle.

    Where the optimum turns out not to be sparse it is left to `solve`, from what has been reached.
    """
    anchor = np.asarray(start, dtype=np.float64)
    least = np.broadcast_to(-np.inf, anchor.shape) if floor is None else np.asarray(floor, dtype=np.float64)
    off = np.asarray(off_class, dtype=bool)
    search = _Search(block, anchor, off, l1, ridge, least, tolerance)
    search.place(np.maximum(anchor if initial is None else initial, least, dtype=np.float64))
    history: list[Progress] = []
    residual = search.note(history, on_iteration)
    search.thin_out()
    without = 0
    while residual > tolerance and len(history) <= max_iterations and without < _PATIENCE:
        if search.is_wide():
            shared = {"l1": l1, "ridge": ridge, "tolerance": tolerance, "max_iterations": max_iterations}
            places = {"metric": metric_over([block]), "initial": search.weights, "floor": least}
            return solve(mean_over([block]), anchor, off, **shared, **places, on_iteration=on_iteration)  # type: ignore[arg-type]
        search.each_class()
        search.all_together()
        residual = search.note(history, on_iteration)
        without = 0 if history[-1].objective < min(past.objective for past in history[:-1]) else without + 1
    subgradient = search.subgradient
    return Solution(
        weights=search.weights,
        objective=search.objective,
        residual=residual,
        gap=float(np.vdot(subgradient, subgradient)) / (2 * ridge) if ridge else np.inf,
        iterations=len(history) - 1,
        evaluations=len(history),
        converged=residual <= tolerance,
        history=history,
    )


@dataclass
class _Model:
    """Second derivatives of a class's loss and ridge over some of its connections."""

    columns_A: Indices
    hessian_AA: Array

    def over(self, columns: Indices) -> Array | None:
        """Of these connections; None unless it has them all."""
        at = np.searchsorted(self.columns_A, columns)
        if len(self.columns_A) == 0 or (self.columns_A[np.minimum(at, len(self.columns_A) - 1)] != columns).any():
            return None
        hessian_AA: Array = self.hessian_AA[np.ix_(at, at)]
        return hessian_AA


class _Search:
    """The weights reached, with their logits (a class at a time, so that one can change) and F."""

    def __init__(
        self,
        block: RowBlock,
        anchor: Array,
        off: NDArray[np.bool_],
        l1: float,
        ridge: float,
        floor: Array,
        tolerance: float,
    ) -> None:
        self.columns_nP = np.asfortranarray(block.similarities)  # of which a few are picked again and again
        self.labels_n, self.rows = block.labels, len(block)
        self.anchor, self.off, self.l1, self.ridge, self.floor = anchor, off & (l1 > 0), l1, ridge, floor
        self.tolerance = tolerance
        self.classes = len(anchor)
        self.own = [np.flatnonzero(block.labels == k) for k in range(self.classes)]
        self.models: dict[int, _Model] = {}
        self.logits_Kn = np.empty((self.classes, self.rows), self.columns_nP.dtype)
        self.subgradient = np.empty(anchor.shape)

    def place(self, weights: Array) -> None:
        """Be here."""
        self.weights = weights
        self._find_logits()
        self._find_norm()
        self.objective = self._objective()
        if not np.isfinite(self.objective):
            raise FloatingPointError("the objective of the last layer is not finite")

    def thin_out(self) -> None:
        """Begin without the connections under l1 that nothing pulls away from 0, if that isn't worse."""
        before = self.weights, self.objective
        idle = self.off & (self.anchor == 0) & (self.weights != 0)
        if np.count_nonzero(idle) <= self.weights.size // 16:
            return
        self.place(np.where(idle, np.maximum(0.0, self.floor), self.weights))
        if self.objective > before[1]:
            self.place(before[0])
        self._find_subgradient()

    def is_wide(self) -> bool:
        share, most = _WIDE
        a_class = np.count_nonzero((self.weights != 0) | ~self.off) / self.classes
        return bool(a_class > max(most, self.weights.shape[1] / share))

    def note(self, history: list[Progress], tell: Callable[[Progress], None] | None) -> float:
        """Step 3."""
        self._find_subgradient()
        residual = float(max(self.subgradient.max(), -self.subgradient.min()))
        history.append(Progress(len(history), self.objective, residual))
        if tell:
            tell(history[-1])
        return history[-1].residual

    def each_class(self) -> None:
        """Step 1, the class furthest from its optimum first."""
        furthest_K = np.maximum(self.subgradient.max(axis=1), -self.subgradient.min(axis=1))
        for k in np.argsort(-furthest_K, kind="stable").tolist():
            self._step(k, self._working_set(k))
        self.place(self.weights)  # what rounding has added up is gone

    def _working_set(self, k: int) -> Indices:
        weights_P, wish_P = self.weights[k], np.abs(self.subgradient[k])
        kept = np.flatnonzero((weights_P != 0) | ~self.off[k])
        new = np.flatnonzero((weights_P == 0) & self.off[k] & (wish_P > self.tolerance / 2))
        most = max(_SMALL_SET, len(kept))
        if len(new) > most:
            new = new[np.argsort(-wish_P[new], kind="stable")[:most]]
        return np.union1d(kept, new)

    def _step(self, k: int, A: Indices) -> None:
        """Minimise the model of a class over these connections and go there, as far as F falls."""
        columns_nA = self.columns_nP[:, A]
        weights_A, floor_A, anchor_A = (matrix[k, A] for matrix in (self.weights, self.floor, self.anchor))
        penalty_A = self.l1 * self.off[k, A]
        probability_n = np.exp(self.logits_Kn[k] - self.norm_n)
        error_n = probability_n.copy()
        error_n[self.own[k]] -= 1
        gradient_A = error_n.astype(columns_nA.dtype) @ columns_nA / self.rows + self.ridge * (weights_A - anchor_A)
        wish_A = subgradient(weights_A, gradient_A, penalty_A, floor_A)
        if np.abs(wish_A).max(initial=0) <= self.tolerance / 10:
            return
        hessian_AA = self._hessian(columns_nA, probability_n)
        self.models[k] = _Model(A, hessian_AA)
        target_A = least_quadratic(hessian_AA, gradient_A, weights_A, penalty_A, floor_A, self.tolerance / 100)
        way_A = target_A - weights_A
        rise_n = (columns_nA @ way_A.astype(columns_nA.dtype)).astype(np.float64)
        promise = gradient_A @ way_A + penalty_A @ (np.abs(target_A) - np.abs(weights_A))
        length, own_rise = 1.0, float(rise_n[self.own[k]].sum()) / self.rows
        for _ in range(_MOST_HALVINGS):
            new_A = weights_A + length * way_A
            growth_n = probability_n * np.expm1(np.minimum(length * rise_n, _MOST_EXPONENT))
            growth_n = np.log1p(np.maximum(growth_n, _LEAST - 1))
            away = (new_A + weights_A - 2 * anchor_A) @ (new_A - weights_A)
            change = growth_n.mean() - length * own_rise + self.ridge / 2 * away
            change += penalty_A @ (np.abs(new_A) - np.abs(weights_A))
            if change <= _SUFFICIENT * length * promise:
                self.weights[k, A] = new_A if length < 1 else target_A
                self.logits_Kn[k] += (length * rise_n).astype(self.logits_Kn.dtype)
                self.norm_n += growth_n
                return
            length /= 2

    def _hessian(self, columns_nA: NDArray[np.floating], probability_n: Array) -> Array:
        curvature_n = probability_n * (1 - probability_n) / self.rows
        rows = np.flatnonzero(curvature_n * self.rows > _NO_CURVATURE)
        hessian = np.zeros((columns_nA.shape[1],) * 2)
        for first in range(0, len(rows), _CHUNK):
            rows_c = rows[first : first + _CHUNK]
            some = columns_nA[rows_c]
            hessian += (some * curvature_n[rows_c, None].astype(some.dtype)).T @ some
        hessian[np.diag_indices(len(hessian))] += self.ridge
        return hessian

    def all_together(self) -> None:
        """Step 2."""
        free, slope_C, cuts = self._free()
        inverses = [self._inverse(k, A) for k, A in enumerate(free)]

        def precondition(v_C: Array) -> Array:
            return np.concatenate([inverse @ v for inverse, v in zip(inverses, np.split(v_C, cuts), strict=True)])

        way = np.split(conjugate_gradients(lambda v: self._curved(free, cuts, v), precondition, -slope_C), cuts)
        before, lowest, length = self.weights, self.objective, 1.0
        for _ in range(_JOINT_HALVINGS):
            new = before.copy()
            for k, A in enumerate(free):
                x = new[k, A] + length * way[k]
                new[k, A] = np.where(self.off[k, A] & (np.sign(x) != np.sign(new[k, A])), 0.0, x)
            self.place(np.maximum(new, self.floor, out=new))
            if self.objective < lowest:
                return
            length /= 2
        self.place(before)

    def _free(self) -> tuple[list[Indices], Array, Indices]:
        """Of each class the connections that aren't held at 0 or by the floor; F's slope along them; where to cut it."""
        free, slopes = [], []
        for k in range(self.classes):
            A = np.flatnonzero((self.weights[k] != 0) | ~self.off[k])
            error_n = np.exp(self.logits_Kn[k] - self.norm_n)
            error_n[self.own[k]] -= 1
            slope_A = error_n.astype(self.columns_nP.dtype) @ self.columns_nP[:, A] / self.rows
            weights_A = self.weights[k, A]
            slope_A = (
                slope_A + self.ridge * (weights_A - self.anchor[k, A]) + self.l1 * self.off[k, A] * np.sign(weights_A)
            )
            inside = (weights_A > self.floor[k, A]) | (slope_A < 0)
            free.append(A[inside])
            slopes.append(slope_A[inside])
        return free, np.concatenate(slopes), np.cumsum([len(A) for A in free])[:-1]

    def _inverse(self, k: int, A: Indices) -> Array:
        hessian_AA = self.models[k].over(A) if k in self.models else None
        if hessian_AA is None:
            hessian_AA = self._hessian(self.columns_nP[:, A], np.exp(self.logits_Kn[k] - self.norm_n))
            self.models[k] = _Model(A, hessian_AA)
        return np.asarray(np.linalg.inv(hessian_AA), dtype=self.columns_nP.dtype)  # to precondition is not to solve

    def _curved(self, free: list[Indices], cuts: Indices, v_C: Array) -> Array:
        """Second derivatives of the loss of all classes, and of the ridge, times a vector."""
        single, parts = self.columns_nP.dtype, np.split(v_C, cuts)
        result = self.ridge * v_C
        sums = np.split(result, cuts)
        for rows in self._chunks():
            p_Kc = np.exp(self.logits_Kn[:, rows] - self.norm_n[rows].astype(single))
            rise_Kc = np.stack([self.columns_nP[rows, A] @ v.astype(single) for A, v in zip(free, parts, strict=True)])
            rise_Kc *= p_Kc
            p_Kc *= rise_Kc.sum(axis=0)
            rise_Kc -= p_Kc
            for A, risen_c, sum_A in zip(free, rise_Kc, sums, strict=True):
                sum_A += risen_c @ self.columns_nP[rows, A] / self.rows
        return result

    def _find_subgradient(self) -> None:
        """Of F, over all connections: first the gradient of the smooth part."""
        found, single = self.subgradient, self.columns_nP.dtype
        np.subtract(self.weights, self.anchor, out=found)
        found *= self.ridge
        for rows in self._chunks():
            error_Kc = self._probabilities(rows)
            labels_c = self.labels_n[rows]
            error_Kc[labels_c, np.arange(len(labels_c))] -= 1
            found += (error_Kc / self.rows).astype(single) @ self.columns_nP[rows]
        for k, gradient_P in enumerate(found):
            found[k] = subgradient(self.weights[k], gradient_P, self.l1 * self.off[k], self.floor[k])

    def _probabilities(self, rows: slice) -> Array:
        p_Kc: Array = self.logits_Kn[:, rows] - self.norm_n[rows]
        return np.exp(p_Kc, out=p_Kc)

    def _find_logits(self) -> None:
        weights, single = self.weights, self.columns_nP.dtype
        if np.count_nonzero(weights) > weights.size // _WIDE[0]:  # to pick nearly all columns would copy them
            for rows in self._chunks():
                self.logits_Kn[:, rows] = weights.astype(single) @ self.columns_nP[rows].T
            return
        for k, weights_P in enumerate(weights):
            A = np.flatnonzero(weights_P)
            self.logits_Kn[k] = self.columns_nP[:, A] @ weights_P[A].astype(single)

    def _find_norm(self) -> None:
        self.norm_n = np.empty(self.rows)
        for rows in self._chunks():
            highest_c = self.logits_Kn[:, rows].max(axis=0).astype(np.float64)
            self.norm_n[rows] = highest_c
            self.norm_n[rows] += np.log(self._probabilities(rows).sum(axis=0))

    def _objective(self) -> float:
        loss = float((self.norm_n - self.logits_Kn[self.labels_n, np.arange(self.rows)]).mean())
        for weights_P, anchor_P, off_P in zip(self.weights, self.anchor, self.off, strict=True):
            away_P = weights_P - anchor_P
            loss += self.l1 * float(np.abs(weights_P[off_P]).sum()) + self.ridge / 2 * float(away_P @ away_P)
        return loss

    def _chunks(self) -> list[slice]:
        return [slice(first, first + _CHUNK) for first in range(0, self.rows, _CHUNK)]

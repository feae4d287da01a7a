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

What has a number for each row is torch, on the device where the rows are; weights and models are numpy. Beside the rows
it holds their logits, in the type of the products, and three numbers a connection; all else is of some rows or of one
class. Sums are float64.

Legend: n rows, P prototypes, K classes, A connections of a class, C those of all classes together.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from protopnet.model.prototypes import true_float32
from protopnet.training.proximal import Array
from protopnet.training.quadratic import conjugate_gradients, least_quadratic, subgradient
from protopnet.training.solver import Progress, RowBlock, Solution, mean_over, metric_over, solve

_SMALL_SET = 32  # connections that a working set may grow to at once
_WIDE = 8, 128  # with more than P / 8 connections a class, and more than 128, a dense product is as quick
_NO_CURVATURE = 1e-6  # rows that weigh less are left out of a model, never out of F or its gradient
_LEAST, _MOST_EXPONENT = 1e-15, 500.0  # what a sum of exponents may shrink to in one step, relative
_SUFFICIENT, _MOST_HALVINGS, _JOINT_HALVINGS = 1e-3, 20, 6  # of the descent that a model promises
_PATIENCE = 3  # cycles without descent

Indices = NDArray[np.int64]


@true_float32()
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
        self.block, self.dtype, self.rows = block, block.dtype, len(block)
        self.columns_Pn, self.labels_n = block.columns_Pn.contiguous(), block.labels_n  # a few columns again and again
        self.anchor, self.off, self.l1, self.ridge, self.floor = anchor, off & (l1 > 0), l1, ridge, floor
        self.tolerance = tolerance
        self.classes = len(anchor)
        self.own = [(block.labels_n == k).nonzero()[:, 0] for k in range(self.classes)]
        self.models: dict[int, _Model] = {}
        self.logits_Kn = self.columns_Pn.new_empty((self.classes, self.rows), dtype=self.dtype)
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

    def _columns(self, A: Indices) -> torch.Tensor:
        """Similarities to these prototypes, A×n."""
        return self.columns_Pn.index_select(0, torch.from_numpy(A).to(self.columns_Pn.device)).to(self.dtype)

    def _probability(self, k: int) -> torch.Tensor:
        return (self.logits_Kn[k] - self.norm_n).exp_()

    def _slope(self, k: int, columns_An: torch.Tensor, probability_n: torch.Tensor) -> Array:
        """Of the loss, along these connections of a class."""
        error_n = probability_n.clone()
        error_n[self.own[k]] -= 1
        return (columns_An @ error_n.to(self.dtype)).cpu().numpy().astype(np.float64) / self.rows

    def _step(self, k: int, A: Indices) -> None:
        """Minimise the model of a class over these connections and go there, as far as F falls."""
        columns_An, probability_n = self._columns(A), self._probability(k)
        weights_A, floor_A, anchor_A = (matrix[k, A] for matrix in (self.weights, self.floor, self.anchor))
        penalty_A = self.l1 * self.off[k, A]
        gradient_A = self._slope(k, columns_An, probability_n) + self.ridge * (weights_A - anchor_A)
        wish_A = subgradient(weights_A, gradient_A, penalty_A, floor_A)
        if np.abs(wish_A).max(initial=0) <= self.tolerance / 10:
            return
        hessian_AA = self._hessian(columns_An, probability_n)
        self.models[k] = _Model(A, hessian_AA)
        target_A = least_quadratic(hessian_AA, gradient_A, weights_A, penalty_A, floor_A, self.tolerance / 100)
        way_A = target_A - weights_A
        rise_n = (self.block.here(way_A) @ columns_An).double()
        promise = gradient_A @ way_A + penalty_A @ (np.abs(target_A) - np.abs(weights_A))
        length, own_rise = 1.0, float(rise_n[self.own[k]].sum()) / self.rows
        for _ in range(_MOST_HALVINGS):
            new_A = weights_A + length * way_A
            growth_n = (length * rise_n).clamp_(max=_MOST_EXPONENT).expm1_().mul_(probability_n)
            growth_n = growth_n.clamp_(min=_LEAST - 1).log1p_()
            growth_n = growth_n.maximum(length * rise_n + self.logits_Kn[k] - self.norm_n)  # beyond any exponent
            away = (new_A + weights_A - 2 * anchor_A) @ (new_A - weights_A)
            change = float(growth_n.mean()) - length * own_rise + self.ridge / 2 * away
            change += penalty_A @ (np.abs(new_A) - np.abs(weights_A))
            if change <= _SUFFICIENT * length * promise:
                self.weights[k, A] = new_A if length < 1 else target_A
                self.logits_Kn[k] += (length * rise_n).to(self.dtype)
                self.norm_n += growth_n
                return
            length /= 2

    def _hessian(self, columns_An: torch.Tensor, probability_n: torch.Tensor) -> Array:
        curvature_n = probability_n * (1 - probability_n)
        rows_c = (curvature_n > _NO_CURVATURE).nonzero()[:, 0]
        root_c = (curvature_n[rows_c] / self.rows).sqrt_().to(self.dtype)
        hessian = torch.zeros((len(columns_An),) * 2, dtype=torch.float64, device=columns_An.device)
        for rows, root in zip(rows_c.split(self.block.chunk_rows), root_c.split(self.block.chunk_rows), strict=True):
            hessian += _times_itself(columns_An.index_select(1, rows).mul_(root))
        hessian.diagonal().add_(self.ridge)
        return hessian.cpu().numpy()

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
            slope_A = self._slope(k, self._columns(A), self._probability(k))
            weights_A = self.weights[k, A]
            slope_A += self.ridge * (weights_A - self.anchor[k, A])
            slope_A += self.l1 * self.off[k, A] * np.sign(weights_A)
            inside = (weights_A > self.floor[k, A]) | (slope_A < 0)
            free.append(A[inside])
            slopes.append(slope_A[inside])
        return free, np.concatenate(slopes), np.cumsum([len(A) for A in free])[:-1]

    def _inverse(self, k: int, A: Indices) -> Array:
        hessian_AA = self.models[k].over(A) if k in self.models else None
        if hessian_AA is None:
            hessian_AA = self._hessian(self._columns(A), self._probability(k))
            self.models[k] = _Model(A, hessian_AA)
        return np.asarray(np.linalg.inv(hessian_AA), dtype=np.float32)  # to precondition is not to solve

    def _curved(self, free: list[Indices], cuts: Indices, v_C: Array) -> Array:
        """Second derivatives of the loss of all classes, and of the ridge, times a vector."""
        vectors = self._sparse(np.concatenate(free), [len(A) for A in free], v_C)
        result_C = torch.zeros(len(v_C), dtype=torch.float64, device=vectors.device)
        for rows in self.block.chunks():
            p_Kc, some_Pc = self._probabilities(rows).to(self.dtype), self.columns_Pn[:, rows].to(self.dtype)
            rise_Kc = (vectors @ some_Pc).mul_(p_Kc)
            rise_Kc -= p_Kc.mul_(rise_Kc.sum(dim=0))
            result_C += torch.sparse.sampled_addmm(vectors, rise_Kc, some_Pc.T, beta=0).values()
        return self.ridge * v_C + result_C.cpu().numpy() / self.rows

    def _sparse(self, columns_C: Indices, sizes_K: list[int], values_C: Array) -> torch.Tensor:
        """K×P, where each class has so many of these columns, in order."""
        starts = np.concatenate([[0], np.cumsum(sizes_K)])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            return torch.sparse_csr_tensor(  # type: ignore[no-untyped-call]
                torch.from_numpy(starts),
                torch.from_numpy(columns_C),
                self.block.here(values_C),
                self.anchor.shape,
                device=self.columns_Pn.device,
                check_invariants=False,
            )

    def _find_subgradient(self) -> None:
        """Of F, over all connections: first the gradient of the smooth part."""
        found = self.subgradient
        np.subtract(self.weights, self.anchor, out=found)
        found *= self.ridge
        sums_KP = torch.from_numpy(found).to(self.columns_Pn.device)  # on a CPU it is `found`
        for rows in self.block.chunks():
            error_Kc, labels_c = self._probabilities(rows), self.labels_n[rows]
            error_Kc[labels_c, torch.arange(len(labels_c), device=labels_c.device)] -= 1
            sums_KP += error_Kc.div_(self.rows).to(self.dtype) @ self.columns_Pn[:, rows].to(self.dtype).T
        torch.from_numpy(found).copy_(sums_KP)
        for k, gradient_P in enumerate(found):
            found[k] = subgradient(self.weights[k], gradient_P, self.l1 * self.off[k], self.floor[k])

    def _probabilities(self, rows: slice) -> torch.Tensor:
        return (self.logits_Kn[:, rows] - self.norm_n[rows]).exp_()

    def _find_logits(self) -> None:
        weights = self.weights
        if np.count_nonzero(weights) > weights.size // _WIDE[0]:  # a dense product is as quick
            weights_KP = self.block.here(weights)
        else:
            classes, columns = np.nonzero(weights)
            sizes = np.bincount(classes, minlength=self.classes).tolist()
            weights_KP = self._sparse(columns, sizes, weights[classes, columns])
        for rows in self.block.chunks():
            self.logits_Kn[:, rows] = weights_KP @ self.columns_Pn[:, rows].to(self.dtype)

    def _find_norm(self) -> None:
        self.norm_n = self.logits_Kn.new_empty(self.rows, dtype=torch.float64)
        for rows in self.block.chunks():
            self.norm_n[rows] = self.logits_Kn[:, rows].amax(dim=0)
            self.norm_n[rows] += self._probabilities(rows).sum(dim=0).log_()

    def _objective(self) -> float:
        loss = float((self.norm_n - self.logits_Kn.gather(0, self.labels_n[None])[0]).mean())
        for weights_P, anchor_P, off_P in zip(self.weights, self.anchor, self.off, strict=True):
            away_P = weights_P - anchor_P
            loss += self.l1 * float(np.abs(weights_P[off_P]).sum()) + self.ridge / 2 * float(away_P @ away_P)
        return loss


def _times_itself(some_Ac: torch.Tensor) -> torch.Tensor:
    """The product with its transpose; numpy's computes but half of it."""
    if some_Ac.device.type != "cpu":
        return some_Ac @ some_Ac.T
    some = some_Ac.numpy()
    return torch.from_numpy(some @ some.T)

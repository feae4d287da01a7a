"""The class connections while prototypes are being corrected: solved again from the last solution, and what that changes.

All rows are in memory. A prototype that is gone has similarities of 0 and connections of 0, so that columns stay where they
are. Two answers: `quick` solves the own-class connections of the classes concerned, in milliseconds; `resolve` is the
certified optimum.

Legend: n rows to learn from, m rows to look at, P prototypes, K classes.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from protopnet.config import LastLayerSettings
from protopnet.training.newton import solve_here
from protopnet.training.solver import Progress, RowBlock, Solution

_NEWTON_STEPS = 8
_LEAST, _MOST = 1e-14, 500  # of the sum of the others' exponents, relative; of an exponent
_CHUNK = 256  # rows at a time, where a number for each row and prototype is worked out


@dataclass(frozen=True)
class Rows:
    """Similarities of images to all prototypes, with what the images are."""

    similarities_nP: np.ndarray
    labels_n: np.ndarray
    image_ids_n: np.ndarray


def resolve(
    rows: Rows,
    start_KP: np.ndarray,
    anchor_KP: np.ndarray,
    off_KP: np.ndarray,
    settings: LastLayerSettings,
    floor_KP: np.ndarray | None = None,
    on_iteration: Callable[[Progress], None] | None = None,
) -> Solution:
    """The optimum on these rows, from a start that is near it."""
    return solve_here(
        RowBlock(rows.similarities_nP, rows.labels_n, len(start_KP)),
        anchor_KP,
        off_KP,
        l1=settings.l1,
        ridge=settings.ridge,
        tolerance=settings.tolerance,
        max_iterations=settings.max_iterations,
        initial=start_KP,
        floor=floor_KP,
        on_iteration=on_iteration,
    )


class Fit:
    """The rows, which it changes, and the last solution. rows: to learn from; shown: to measure on.

    anchor_KP, off_KP: as `training.connections` has them.
    """

    def __init__(
        self,
        rows: Rows,
        shown: Rows,
        weights_KP: np.ndarray,
        anchor_KP: np.ndarray,
        off_KP: np.ndarray,
        settings: LastLayerSettings,
    ) -> None:
        self.rows, self.shown, self.settings = rows, shown, settings
        self.weights_KP = np.array(weights_KP, dtype=np.float64)
        self.whole_anchor_KP, self.anchor_KP, self.off_KP = anchor_KP, anchor_KP.copy(), off_KP
        self.floor_KP = np.full(off_KP.shape, -np.inf)

    def set_column(self, p: int, similarities_n: np.ndarray, similarities_m: np.ndarray) -> None:
        """Prototype p is another one, or is there again."""
        self.rows.similarities_nP[:, p], self.shown.similarities_nP[:, p] = similarities_n, similarities_m
        if not self.anchor_KP[:, p].any():
            self.weights_KP[:, p] = self.whole_anchor_KP[:, p]
        self.anchor_KP[:, p] = self.whole_anchor_KP[:, p]

    def drop_column(self, p: int) -> None:
        """Prototype p is gone."""
        for matrix in (self.rows.similarities_nP, self.shown.similarities_nP, self.weights_KP, self.anchor_KP):
            matrix[:, p] = 0

    def set_floors(self, floors: Mapping[tuple[int, int], float]) -> list[int]:
        """What connections (class, prototype) may not fall below; the prototypes for which that is new."""
        floor_KP = np.full(self.floor_KP.shape, -np.inf)
        for at, least in floors.items():
            floor_KP[at] = least
        changed: list[int] = np.flatnonzero((floor_KP != self.floor_KP).any(axis=0)).tolist()
        self.floor_KP = floor_KP
        return changed

    def predictions(self) -> np.ndarray:
        """Class of each row to look at."""
        predicted_m: np.ndarray = (self.shown.similarities_nP @ self.weights_KP.T.astype(np.float32)).argmax(1)
        return predicted_m

    def strongest(self) -> np.ndarray:
        """Of each row to look at the prototype that gives its predicted class the most points."""
        predicted_m, similarities_mP = self.predictions(), self.shown.similarities_nP
        found_m = np.empty(len(predicted_m), dtype=np.int64)
        for start in range(0, len(found_m), _CHUNK):
            rows = slice(start, start + _CHUNK)
            found_m[rows] = (similarities_mP[rows] * self.weights_KP[predicted_m[rows]]).argmax(1)
        return found_m

    def quick(self, labels: Sequence[int]) -> None:
        """Solve the own-class connections of these classes, one class after another, all others as they are."""
        if not labels:
            return
        logits_nK = (self.rows.similarities_nP @ self.weights_KP.T.astype(np.float32)).astype(np.float64)
        highest_n = logits_nK.max(axis=1)
        exponents_nK = np.exp(logits_nK - highest_n[:, None])
        total_n = exponents_nK.sum(axis=1)
        for label in labels:
            own = np.flatnonzero(self.anchor_KP[label])
            others_n = highest_n + np.log(np.maximum(total_n - exponents_nK[:, label], _LEAST))
            rest_n = logits_nK[:, label] - self.rows.similarities_nP[:, own] @ self.weights_KP[label, own]
            weights_Q = self._newton(label, own, rest_n, others_n)
            self.weights_KP[label, own] = np.maximum(weights_Q, self.floor_KP[label, own])
            new_n = rest_n + self.rows.similarities_nP[:, own] @ self.weights_KP[label, own]
            new_n = np.exp(np.minimum(new_n - highest_n, _MOST))
            total_n += new_n - exponents_nK[:, label]
            exponents_nK[:, label] = new_n

    def _newton(self, label: int, own: np.ndarray, rest_n: np.ndarray, others_n: np.ndarray) -> np.ndarray:
        """argmin over w of mean log(e^others + e^(rest + S w)) - [label](rest + S w) + ridge/2 ‖w - anchor‖²."""
        similarities_nQ = self.rows.similarities_nP[:, own].astype(np.float64)
        is_own_n = self.rows.labels_n == label
        weights_Q, anchor_Q = self.weights_KP[label, own], self.anchor_KP[label, own]

        def objective(weights: np.ndarray) -> float:
            logit_n = rest_n + similarities_nQ @ weights
            away = weights - anchor_Q
            loss = np.logaddexp(others_n, logit_n).mean() - (is_own_n * logit_n).mean()
            return float(loss + self.settings.ridge / 2 * away @ away)

        value = objective(weights_Q)
        for _ in range(_NEWTON_STEPS):
            probability_n = 1 / (1 + np.exp(np.clip(others_n - rest_n - similarities_nQ @ weights_Q, -700, 700)))
            gradient_Q = similarities_nQ.T @ (probability_n - is_own_n) / len(is_own_n)
            gradient_Q += self.settings.ridge * (weights_Q - anchor_Q)
            curvature_n = probability_n * (1 - probability_n) / len(is_own_n)
            hessian_QQ = (similarities_nQ * curvature_n[:, None]).T @ similarities_nQ
            step_Q = np.linalg.solve(hessian_QQ + self.settings.ridge * np.eye(len(own)), gradient_Q)
            length = 1.0
            while (new := objective(weights_Q - length * step_Q)) > value and length > 1e-4:
                length /= 2
            if new > value:
                break
            weights_Q, value = weights_Q - length * step_Q, new
            if np.abs(gradient_Q).max() < self.settings.tolerance:
                break
        return weights_Q

    def residual(self) -> float:
        """Of the present connections: 0 at the optimum (see `training.solver`)."""
        nothing = self.settings.model_copy(update={"max_iterations": 0})
        return resolve(self.rows, self.weights_KP, self.anchor_KP, self.off_KP, nothing, self.floor_KP).residual

    def solve(self, on_iteration: Callable[[Progress], None] | None = None) -> Solution:
        """The optimum, which becomes the last solution."""
        places = (self.weights_KP, self.anchor_KP, self.off_KP)
        solution = resolve(self.rows, *places, self.settings, self.floor_KP, on_iteration)
        self.weights_KP = solution.weights
        return solution


@dataclass(frozen=True)
class Worth:
    """What dropping a prototype by itself would do to the images looked at, before anything is solved again: how many right
    ones it would cost, and how many wrong ones it would put right."""

    lost_P: np.ndarray
    gained_P: np.ndarray


def worth(fit: Fit, prototype_class_P: np.ndarray, gone: Collection[int] = ()) -> Worth:
    """By its points for its own class alone: those against other classes are few and small."""
    similarities_mP = fit.shown.similarities_nP
    logits_mK = similarities_mP @ fit.weights_KP.T.astype(np.float32)
    rows, labels_m = np.arange(len(logits_mK)), fit.shown.labels_n
    order_mK = np.argsort(-logits_mK, axis=1, kind="stable")[:, :2]
    first_m, second_m = order_mK[:, 0], order_mK[:, -1]
    lead_m = logits_mK[rows, first_m] - logits_mK[rows, second_m]
    lost_P, gained_P = np.zeros(len(prototype_class_P), np.int64), np.zeros(len(prototype_class_P), np.int64)
    for p, label in enumerate(prototype_class_P.tolist()):
        if p in gone:
            continue
        points_m = similarities_mP[:, p] * fit.weights_KP[label, p]
        toppled_m = (first_m == label) & (points_m > lead_m)
        lost_P[p] = np.count_nonzero(toppled_m & (labels_m == label))
        gained_P[p] = np.count_nonzero(toppled_m & (labels_m == second_m))
    return Worth(lost_P, gained_P)

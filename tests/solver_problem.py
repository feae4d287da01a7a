"""Last layers to be solved, and ways of solving them."""

from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp

from protopnet.training.newton import solve_here
from protopnet.training.solver import (
    RowBlock,
    Solution,
    mean_over,
    metric_over,
    solve,
)


@dataclass
class Problem:
    similarities: np.ndarray
    labels: np.ndarray
    start: np.ndarray
    l1: float = 1e-3
    ridge: float = 1e-3

    @property
    def off_class(self) -> np.ndarray:
        return self.start < 0

    def blocks(self, *cuts: int) -> list[RowBlock]:
        pairs = zip(np.split(self.similarities, cuts), np.split(self.labels, cuts), strict=True)
        return [RowBlock(rows, labels, len(self.start), chunk_rows=40) for rows, labels in pairs]

    def objective(self, weights: np.ndarray) -> float:
        """F, written down afresh."""
        logits = self.similarities.astype(np.float64) @ weights.T
        own = logits[np.arange(len(logits)), self.labels]
        return float(
            np.mean(logsumexp(logits, axis=1) - own)
            + self.l1 * np.abs(weights[self.off_class]).sum()
            + self.ridge / 2 * ((weights - self.start) ** 2).sum()
        )

    def solve(self, *, preconditioned: bool = True, **options: object) -> Solution:
        blocks = self.blocks()
        metric = metric_over(blocks) if preconditioned else None
        options = {"tolerance": 1e-8, "max_iterations": 20000, "metric": metric, **options}
        return solve(mean_over(blocks), self.start, self.off_class, l1=self.l1, ridge=self.ridge, **options)

    def solve_here(self, device: str = "cpu", **options: object) -> Solution:
        block = RowBlock(self.similarities, self.labels, len(self.start), chunk_rows=40, device=device)
        options = {"tolerance": 1e-8, "max_iterations": 100, **options}
        return solve_here(block, self.start, self.off_class, l1=self.l1, ridge=self.ridge, **options)


def problem(
    rows: int = 90, prototypes: int = 12, classes: int = 4, *, seed: int = 0, mean: float = 1.5, spread: float = 0.5
) -> Problem:
    """Similarities as a network makes them: a common mean, higher for an image's own class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    prototype_class = np.arange(prototypes) * classes // prototypes
    own = labels[:, None] == prototype_class
    scores = rng.normal(size=(rows, prototypes)) + 2 * own * (rng.random((rows, prototypes)) < 0.6)
    start = np.where(prototype_class == np.arange(classes)[:, None], 1.0, -0.5)
    return Problem(mean + spread * scores, labels, start)

"""The last-layer solver against independent solvers, and its properties."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import logsumexp
from solver_problem import Problem, problem
from threadpoolctl import threadpool_limits

from protopnet.training.connections import anchor_KP, off_class_KP
from protopnet.training.newton import solve_here
from protopnet.training.solver import (
    Progress,
    RowBlock,
    Solution,
    mean_over,
    metric_over,
    solve,
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """The matrices are tiny: more threads only wait for one another."""
    with threadpool_limits(1):
        yield


def reference(task: Problem, floor: np.ndarray | None = None) -> float:
    """Least objective by L-BFGS-B on W = U − V, with bounds that make the L1 norm linear. floor: above 0, or -inf."""
    shape, size = task.start.shape, task.start.size
    one_hot = np.eye(len(task.start))[task.labels]

    def function(uv: np.ndarray) -> tuple[float, np.ndarray]:
        positive, negative = uv[:size].reshape(shape), uv[size:].reshape(shape)
        weights = positive - negative
        logits = task.similarities @ weights.T
        norm = logsumexp(logits, axis=1, keepdims=True)
        value = np.mean(norm[:, 0] - (logits * one_hot).sum(1)) + task.ridge / 2 * ((weights - task.start) ** 2).sum()
        gradient = (np.exp(logits - norm) - one_hot).T @ task.similarities / len(logits)
        gradient += task.ridge * (weights - task.start)
        value += task.l1 * (positive + negative)[task.off_class].sum()
        penalty = task.l1 * task.off_class
        return value, np.concatenate([(gradient + penalty).ravel(), (penalty - gradient).ravel()])

    split = np.concatenate([np.maximum(task.start, 0).ravel(), np.maximum(-task.start, 0).ravel()])
    limits = {"maxiter": 50000, "maxfun": 100000, "ftol": 1e-15, "gtol": 1e-9, "maxcor": 30}
    bounds: list[tuple[float, float | None]] = [(0, None)] * (2 * size)
    for index in np.flatnonzero(np.isfinite(floor)) if floor is not None else []:
        bounds[index], bounds[size + index] = (floor.ravel()[index], None), (0, 0)
        split[index], split[size + index] = max(split[index], floor.ravel()[index]), 0
    found = minimize(function, split, jac=True, method="L-BFGS-B", bounds=bounds, options=limits)
    return float(found.fun)


PROBLEMS = [
    problem(),
    problem(60, 30, 3, seed=1),  # separable
    problem(120, 12, 4, seed=2, mean=3, spread=0.25),  # a large common mean
    problem(80, 12, 4, seed=3, mean=-2),  # the linear similarity is negative
    problem(90, 8, 2, seed=4, mean=0.6, spread=0.1),
]


WAYS: dict[str, Callable[..., Solution]] = {
    "metric": Problem.solve,
    "plain": partial(Problem.solve, preconditioned=False),
    "newton": Problem.solve_here,
}
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
on_gpu = pytest.param(partial(Problem.solve_here, device="cuda"), marks=GPU, id="newton-cuda")
each_way = pytest.mark.parametrize("way", [*(pytest.param(way, id=name) for name, way in WAYS.items()), on_gpu])


@each_way
@pytest.mark.parametrize("task", PROBLEMS, ids=range(len(PROBLEMS)))
def test_matches_an_independent_solver(task: Problem, way: Callable[..., Solution]) -> None:
    solution = way(task)
    assert solution.converged
    assert solution.residual <= 1e-8
    assert solution.objective == pytest.approx(task.objective(solution.weights), rel=1e-12)
    assert solution.objective == pytest.approx(reference(task), rel=1e-6)


@each_way
@pytest.mark.parametrize("task", PROBLEMS, ids=range(len(PROBLEMS)))
def test_a_floor_is_kept_and_the_rest_is_the_best_there_is(task: Problem, way: Callable[..., Solution]) -> None:
    """Floors above what the optimum has, and one below, which changes nothing."""
    free = task.solve().weights
    floor = np.full(task.start.shape, -np.inf)
    (own_class, own), (other_class, other) = np.argwhere(~task.off_class)[[0, -1]]
    floor[own_class, own] = max(free[own_class, own], 0) + 1
    floor[other_class, other] = max(free[other_class, other] / 2, 1e-3)
    solution = way(task, floor=floor)
    assert solution.converged
    assert (solution.weights >= floor).all()
    assert solution.weights[own_class, own] == floor[own_class, own]
    assert solution.objective == pytest.approx(task.objective(solution.weights), rel=1e-12)
    assert solution.objective == pytest.approx(reference(task, floor), rel=1e-6)
    rough = way(task, floor=floor, tolerance=1e-2)
    assert -1e-12 <= rough.objective - solution.objective <= rough.gap + 1e-12


def test_matches_sklearn_without_l1() -> None:
    """With W₀ = 0 and l1 = 0 it is ridge logistic regression."""
    from sklearn.linear_model import LogisticRegression

    task = problem(80, 9, 3, seed=5)
    blocks = task.blocks()
    start = np.zeros_like(task.start)
    found = solve(mean_over(blocks), start, task.off_class, l1=0, ridge=1e-2, tolerance=1e-9, max_iterations=20000)
    peer = LogisticRegression(C=1 / (1e-2 * 80), fit_intercept=False, tol=1e-10, max_iter=10000)
    weights = peer.fit(task.similarities, task.labels).coef_
    np.testing.assert_allclose(found.weights, weights, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 60),
    per_class=st.integers(1, 4),
    classes=st.integers(2, 5),
    mean=st.floats(-3, 9),
    l1=st.sampled_from([0.0, 1e-4, 1e-2, 1.0]),
    single=st.booleans(),
)
@each_way
def test_properties(
    way: Callable[..., Solution],
    seed: int,
    rows: int,
    per_class: int,
    classes: int,
    mean: float,
    l1: float,
    single: bool,
) -> None:
    task = problem(rows, per_class * classes, classes, seed=seed, mean=mean)
    task.l1 = l1
    if single:
        task.similarities = task.similarities.astype(np.float32)
    solution = way(task, tolerance=1e-4, max_iterations=3000)
    assert np.isfinite(solution.weights).all()
    assert solution.objective <= task.objective(task.start) * (1 + 1e-6)
    assert solution.residual <= 1e-4
    objectives = np.array([progress.objective for progress in solution.history])
    assert (np.diff(objectives) <= 1e-5 * np.abs(objectives[:-1])).all()


@pytest.mark.parametrize("seed", [0, 12])
def test_a_step_that_no_exponent_holds_is_seen_as_what_it_is(seed: int) -> None:
    """Few rows leave a class without curvature: its model leads thousands away."""
    task = problem(6, 20, 5, seed=seed, mean=1.0)
    task.l1 = 1.0
    solution = task.solve_here(tolerance=1e-6)
    assert solution.converged
    assert (np.diff([progress.objective for progress in solution.history]) < 0).all()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_half_precision_is_exact_for_what_it_keeps(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr("protopnet.training.solver._MOST_DOUBLES", 0)
    task = problem(300, 60, 6, mean=3, spread=0.25)
    half = task.similarities.astype(np.float16)
    block = RowBlock(half, task.labels, len(task.start), device=device)
    assert block.columns_Pn.dtype == torch.float16
    found = solve_here(block, task.start, task.off_class, l1=task.l1, ridge=task.ridge)
    task.similarities = half
    assert found.converged
    assert found.objective == pytest.approx(task.objective(found.weights), rel=1e-6)
    loss, gradient = block.loss_and_gradient(found.weights)
    monkeypatch.undo()
    expected_loss, expected = RowBlock(half.astype(float), task.labels, len(task.start)).loss_and_gradient(
        found.weights
    )
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    np.testing.assert_allclose(gradient, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("kind", [np.float64, np.float32])
@pytest.mark.parametrize(("seed", "l1"), [(0, 0.0), (3, 1e-2)])
def test_one_row_converges(seed: int, l1: float, kind: type) -> None:
    """Rows of one direction only; and in float32 the rounding of tiny problems."""
    task = problem(1, 3, 3, seed=seed, mean=0.0)
    task.l1 = l1
    task.similarities = task.similarities.astype(kind)
    assert task.solve(tolerance=1e-4, max_iterations=1000).converged


def test_newton_takes_in_what_is_missing_and_needs_few_cycles(monkeypatch: pytest.MonkeyPatch) -> None:
    """From own classes only and from connections to all; a class may take in a few at a time."""
    monkeypatch.setattr("protopnet.training.newton._SMALL_SET", 2)
    task = problem(600, 300, 30, seed=7, mean=0.0)
    off = task.off_class
    (block,), anchor, how = task.blocks(), np.where(off, 0.0, 1.0), {"l1": 1e-3, "ridge": 1e-3, "tolerance": 1e-7}
    best = solve(mean_over([block]), anchor, off, metric=metric_over([block]), **how)
    for initial in (anchor, task.start):
        found = solve_here(block, anchor, off, initial=initial, **how)
        assert found.converged
        assert found.iterations < best.iterations / 5
        assert found.objective == pytest.approx(best.objective, abs=1e-9)
        assert found.history[0].objective == pytest.approx(
            solve(mean_over([block]), anchor, off, initial=initial, **{**how, "max_iterations": 0}).objective
        )
        np.testing.assert_array_equal(found.weights == 0, best.weights == 0)


def test_beside_the_rows_little_is_in_memory() -> None:
    random, classes = np.random.default_rng(0), 20
    labels, of_prototype = np.arange(16000) % classes, np.arange(800) % classes
    centres, noise = (
        random.standard_normal((classes, 32), np.float32),
        partial(random.standard_normal, dtype=np.float32),
    )
    similarities = (centres[labels] + noise((16000, 32))) @ (centres[of_prototype] + noise((800, 32))).T / 64
    similarities = np.asfortranarray(similarities)
    off = off_class_KP(of_prototype, classes)
    places = anchor_KP(off, 1.0), off
    grown = []
    for rows in (2000, 16000):  # the first one loads what is loaded late
        block = RowBlock(np.asfortranarray(similarities[:rows]), labels[:rows], classes)
        before = peak_bytes(reset=True)
        found = solve_here(block, *places, l1=1e-4, ridge=1e-4, initial=np.where(off, -0.5, 1.0))
        grown.append(peak_bytes() - before)
    assert block.dtype == torch.float32
    assert found.converged
    assert grown[1] < 0.45 * block.columns_Pn.nbytes  # the logits alone are a fortieth


def peak_bytes(reset: bool = False) -> int:
    """The most that the process had in memory, or has now."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def test_a_dense_optimum_is_left_to_the_other_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without l1 no connection is 0."""
    monkeypatch.setattr("protopnet.training.newton._WIDE", (8, 4))
    task = problem(100, 40, 4)
    task.l1 = 0.0
    found, expected = task.solve_here(tolerance=1e-6, max_iterations=5000), task.solve(tolerance=1e-6)
    assert found.converged
    np.testing.assert_array_equal(found.weights, expected.weights)


def test_the_metric_saves_iterations() -> None:
    task = problem(300, 60, 6, mean=3, spread=0.25)
    task.l1 = task.ridge = 1e-4
    plain = task.solve(preconditioned=False, tolerance=1e-5)
    assert task.solve(tolerance=1e-5).iterations < 0.7 * plain.iterations


@each_way
def test_starts_where_it_is_told_and_reports(way: Callable[..., Solution]) -> None:
    task = problem()
    seen: list[Progress] = []
    solution = way(task, on_iteration=seen.append)
    assert seen == solution.history
    assert seen[0].objective == pytest.approx(task.objective(task.start))
    assert [progress.iteration for progress in seen] == list(range(solution.iterations + 1))
    again = way(task, initial=solution.weights)
    assert again.iterations == 0
    assert again.objective == pytest.approx(solution.objective)


@each_way
def test_says_when_it_runs_out_of_iterations(way: Callable[..., Solution]) -> None:
    solution = way(problem(), max_iterations=3)
    assert not solution.converged
    assert solution.iterations == 3


@pytest.mark.parametrize(
    ("similarities", "labels"),
    [
        (np.zeros((2, 3)), [0]),
        (np.zeros(3), [0, 0, 0]),
        (np.full((1, 3), np.nan), [0]),
        (np.zeros((1, 3)), [2]),
        (np.zeros((1, 3)), [-1]),
    ],
)
def test_nonsense_is_refused(similarities: np.ndarray, labels: list[int]) -> None:
    with pytest.raises(ValueError):
        RowBlock(similarities, labels, 2)

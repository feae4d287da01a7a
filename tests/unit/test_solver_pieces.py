"""What the solver is made of: the gap, the residual, gradients by blocks, the proximal map in a metric."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_problem import Problem, problem

from protopnet.training.proximal import Metric, metric_of, soft_threshold
from protopnet.training.solver import (
    add_up,
    mean_over,
    solve,
)


def test_gap_bounds_the_distance_from_the_optimum() -> None:
    task = problem()
    best = task.solve(tolerance=1e-10).objective
    for tolerance in (1e-1, 1e-2, 1e-3, 1e-4):
        rough = task.solve(tolerance=tolerance)
        assert 0 <= rough.objective - best <= rough.gap + 1e-12


def test_residual_is_that_of_the_objective() -> None:
    """At a point off the optimum: the residual against finite differences of F."""
    task = problem()
    rng = np.random.default_rng(0)
    point = task.start + rng.normal(0, 0.1, task.start.shape)
    residual = task.solve(initial=point, max_iterations=0).residual
    slopes = np.empty(point.size)
    for index in range(point.size):
        step = np.zeros(point.size)
        step[index] = 1e-6
        moved = step.reshape(point.shape)
        slopes[index] = (task.objective(point + moved) - task.objective(point - moved)) / 2e-6
    assert residual == pytest.approx(np.abs(slopes).max(), rel=1e-5)


def test_separable_data_has_a_finite_solution() -> None:
    labels = np.repeat(np.arange(3), 10)
    similarities = np.where(labels[:, None] == np.arange(3), 9.0, 0.0)
    task = Problem(similarities, labels, np.where(np.eye(3) > 0, 1.0, -0.5), l1=0.0, ridge=1e-4)
    solution = task.solve()
    assert solution.converged
    assert np.abs(solution.weights).max() < 20


def test_strong_penalty_gives_exact_zeros() -> None:
    task = problem()
    task.l1 = 1.0
    solution = task.solve()
    assert (solution.weights[task.off_class] == 0).all()
    assert (solution.weights[~task.off_class] != 0).all()


def test_the_same_whatever_the_blocks() -> None:
    task = problem(90)
    weights = task.start + 0.1
    whole = mean_over(task.blocks())(weights)
    for cuts in [(30, 60), (1, 2, 89), (45,), (0, 90)]:  # the last has empty blocks
        loss, gradient = mean_over(task.blocks(*cuts))(weights)
        assert loss == pytest.approx(whole[0], rel=1e-13)
        np.testing.assert_allclose(gradient, whole[1], rtol=0, atol=1e-14)
    blocks = task.blocks(30, 60)
    loss, gradient = add_up([block.loss_and_gradient(weights) for block in blocks], 90)
    assert loss == pytest.approx(whole[0], rel=1e-13)
    split = solve(mean_over(blocks), task.start, task.off_class, l1=1e-3, ridge=1e-3, tolerance=1e-8)
    np.testing.assert_allclose(split.weights, task.solve(preconditioned=False).weights, atol=1e-6)


def test_gradient_of_a_block() -> None:
    task = problem(20)
    (block,) = task.blocks()
    weights = task.start.copy()
    _, gradient = block.loss_and_gradient(weights)
    weights[1, 2] += 1e-6
    above, _ = block.loss_and_gradient(weights)
    weights[1, 2] -= 2e-6
    below, _ = block.loss_and_gradient(weights)
    assert gradient[1, 2] == pytest.approx((above - below) / 2e-6, rel=1e-6)


def test_float32_similarities_give_the_same_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protopnet.training.solver._MOST_DOUBLES", 0)
    task = problem(200, 20, 5, seed=2, mean=3, spread=0.25)
    task.similarities = task.similarities.astype(np.float32)
    single = task.solve(tolerance=1e-5)
    assert single.converged
    task.similarities = task.similarities.astype(np.float64)
    double = task.solve(tolerance=1e-5)
    assert single.objective == pytest.approx(double.objective, rel=1e-5)


def test_soft_threshold() -> None:
    values = np.array([-3.0, -1.0, 0.0, 0.5, 2.0])
    np.testing.assert_array_equal(soft_threshold(values, np.ones(5)), [-2, 0, 0, 0, 1])


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 8), stretch=st.sampled_from([0.0, 0.5, 10.0, 1e3, 1e6]))
def test_proximal_map_is_optimal(seed: int, size: int, stretch: float) -> None:
    """0 is a subgradient of ‖x − v‖²/2 + Σ t|x| in the metric, at the result; on the floor it may only lead up."""
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=size) + 1
    metric = Metric(direction / np.linalg.norm(direction), stretch)
    point, threshold = rng.normal(size=(3, size)), rng.choice([0.0, 0.1, 1.0], (3, size))
    floor = rng.choice([-np.inf, -0.2, 0.0, 0.7], (3, size))
    result = metric.proximal(point, threshold, floor)
    assert (result >= floor).all()
    way = result - point
    gradient = way + stretch * np.outer(way @ metric.direction, metric.direction)
    slack = 1e-8 * (1 + stretch)
    moving, free = result != 0, result > floor
    slope = gradient + threshold * np.sign(result)
    np.testing.assert_allclose(slope[moving & free], 0, atol=slack)
    assert (slope[moving & ~free] >= -slack).all()
    assert (gradient[~moving] >= -threshold[~moving] - slack).all()
    assert (gradient[~moving & free] <= threshold[~moving & free] + slack).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(2, 8))
def test_the_metric_is_solved_by_its_inverse(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=size)
    metric = Metric(direction / np.linalg.norm(direction), 7.0)
    matrix = np.eye(size) + 7 * np.outer(metric.direction, metric.direction)
    a, b = rng.normal(size=(2, 3, size))
    np.testing.assert_allclose(metric.solve(a) @ matrix, a, atol=1e-12)
    assert metric.inner(a, b) == pytest.approx(np.trace(a @ matrix @ b.T))


def test_metric_of_a_known_matrix() -> None:
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))
    matrix = turn @ np.diag([100, 2, 1, 0.5, 0.1]) @ turn.T
    metric = metric_of(lambda v: matrix @ v, 5, steps=50)
    assert metric.stretch == pytest.approx(49, rel=1e-3)
    assert abs(metric.direction @ turn[:, 0]) == pytest.approx(1)
    assert metric_of(lambda v: v, 5).stretch == 0
    assert metric_of(lambda v: 0 * v, 5).stretch == 0

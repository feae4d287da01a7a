"""Which stages a run has, when it stops, and which cycle it keeps."""

import pytest

from protopnet.config import RunSettings
from protopnet.training.schedule import (
    Stage,
    after_training,
    before_training,
    best_cycle,
    keep_going,
    training_cycles,
)


def run_of(kind: str = "protopnet", **train: int) -> RunSettings:
    return RunSettings.model_validate({"model": {"kind": kind}, "train": train})


def names(stages: list[Stage]) -> list[str]:
    return [stage.name for stage in stages]


def all_names(settings: RunSettings) -> list[str]:
    cycles = training_cycles(settings)
    return names([*before_training(settings), *sum(cycles, []), *after_training(settings, len(cycles) - 1)])


def test_one_cycle() -> None:
    assert all_names(run_of()) == [
        "00-data",
        "01-start",
        "02-joint",
        "03-push",
        "04-last-layer",
        "05-bundle",
        "06-evaluate",
    ]


def test_each_cycle_trains_pushes_and_optimises() -> None:
    cycles = training_cycles(run_of(warm_epochs=5, joint_epochs=6, next_joint_epochs=10, cycles=3))
    assert [names(cycle) for cycle in cycles] == [
        ["02-joint", "03-push", "04-last-layer"],
        ["05-joint", "06-push", "07-last-layer"],
        ["08-joint", "09-push", "10-last-layer"],
    ]
    epochs = [cycle[0].epochs for cycle in cycles]
    assert [(e.first, e.end, e.warm, e.total) for e in epochs if e] == [
        (0, 11, 5, 31),
        (11, 21, 5, 31),
        (21, 31, 5, 31),
    ]
    assert [stage.cycle for stage in cycles[2]] == [2, 2, 2]


def test_warm_epochs_come_first_and_only_once() -> None:
    first, second = training_cycles(run_of(warm_epochs=2, joint_epochs=1, next_joint_epochs=2, cycles=2))
    assert first[0].epochs
    assert second[0].epochs
    phases = [first[0].epochs.phase(e) for e in range(3)] + [second[0].epochs.phase(e) for e in range(3, 5)]
    assert phases == ["warm", "warm", "joint", "joint", "joint"]


def test_a_run_may_begin_with_the_push() -> None:
    cycles = training_cycles(run_of(warm_epochs=0, joint_epochs=0, cycles=2))
    assert [names(cycle) for cycle in cycles] == [
        ["03-push", "04-last-layer"],
        ["05-joint", "06-push", "07-last-layer"],
    ]


def test_a_baseline_trains_as_many_epochs_in_one_stage() -> None:
    settings = run_of("baseline", warm_epochs=5, joint_epochs=6, next_joint_epochs=10, cycles=3)
    assert all_names(settings) == ["00-data", "02-joint", "11-bundle", "12-evaluate"]
    [[stage]] = training_cycles(settings)
    assert stage.epochs
    assert (stage.epochs.first, stage.epochs.end) == (0, 31)


@pytest.mark.parametrize("best", [0, 2])
def test_an_early_stop_renames_nothing(best: int) -> None:
    settings = run_of(cycles=3)
    assert names(after_training(settings, best)) == ["11-bundle", "12-evaluate"]
    assert after_training(settings, best)[0].cycle == best


@pytest.mark.parametrize(
    ("accuracies", "patience", "expected"),
    [
        ([0.5], 1, True),
        ([0.5, 0.6], 1, True),
        ([0.5, 0.5], 1, False),
        ([0.5, 0.4], 1, False),
        ([0.5, 0.4], 2, True),
        ([0.5, 0.4, 0.6], 2, True),
        ([0.5, 0.4, 0.5], 2, False),
    ],
)
def test_training_goes_on_while_validation_improves(
    accuracies: list[float | None], patience: int, expected: bool
) -> None:
    assert keep_going(accuracies, patience) is expected


def test_without_a_validation_split_every_cycle_is_run_and_the_last_is_kept() -> None:
    assert keep_going([None], 1)
    assert keep_going([None, None], 1)
    assert keep_going([None] * 5, 1)
    assert best_cycle([None, None, None]) == 2


@pytest.mark.parametrize(
    ("accuracies", "best"), [([0.5], 0), ([0.5, 0.7, 0.6], 1), ([0.5, 0.7, 0.7], 2), ([0.7, 0.5], 0)]
)
def test_the_best_cycle_is_kept_and_the_later_of_equals(accuracies: list[float | None], best: int) -> None:
    assert best_cycle(accuracies) == best

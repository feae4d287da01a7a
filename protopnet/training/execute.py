"""Running the stages so that any may be cut off at any moment.

Each writes its own folder `stages/<nn>-<kind>/`, `result.json` last, which marks it complete. Starting the same run
again skips complete stages. What a stage does is in `stages`, the order in `schedule`.
"""

from ray.exceptions import ActorUnavailableError, NodeDiedError, ObjectLostError, RayActorError, WorkerCrashedError

from protopnet import storage
from protopnet.cluster import connect
from protopnet.progress import Stopwatch
from protopnet.training.run import Result, Run
from protopnet.training.schedule import (
    Stage,
    after_training,
    before_training,
    best_cycle,
    importing,
    keep_going,
    training_cycles,
)
from protopnet.training.stages import STAGES
from protopnet.words import percent


def execute(run: Run) -> dict[str, Result]:
    """Bring a run to its end from wherever it is; returns the result of each stage by name, in order.

    Errors as `Run.claimed`, and those of its stages.

    Connects to Ray when the first stage needs it: after the images were read and the model was built, so that what is
    wrong with them is said at once, and not at all for a run that is complete.
    """
    with run.claimed():
        _run_stages(run)
    return run.results


def execute_import(run: Run) -> dict[str, Result]:
    """The same for a network of the authors' code, which `model.weights` names: nothing is trained."""
    with run.claimed():
        state = None
        for stage in importing(run.settings):
            _complete(run, stage, state)
            state = state if stage.kind in ("bundle", "evaluate") else run.state_uri(stage)
    return run.results


def _run_stages(run: Run) -> None:
    state = None
    for stage in before_training(run.settings):
        _complete(run, stage, state)
        state = run.state_uri(stage)
    accuracies: list[float | None] = []
    ends: list[Stage] = []
    for stages in training_cycles(run.settings):
        if accuracies and not keep_going(accuracies, run.settings.train.patience):
            break
        for stage in stages:
            _complete(run, stage, state)
            state = run.state_uri(stage)
        ends.append(stages[-1])
        accuracies.append(run.results[stages[-1].name]["validation_accuracy"])
    best = ends[best_cycle(accuracies)]
    for stage in after_training(run.settings, best.cycle):
        _complete(run, stage, run.state_uri(best))


def _complete(run: Run, stage: Stage, state_in: str | None) -> None:
    """Run the stage unless it is complete already."""
    marker = storage.join(run.folder(stage), "result.json")
    done = storage.exists(marker)
    if done:
        result = storage.read_json(marker)
        run.seconds_before += result["seconds"]
    else:
        if stage.kind != "data":
            connect(run.settings.compute, run.paths())
        watch = Stopwatch()
        result = _persistently(run, stage, state_in)
        result = {"name": stage.name, "cycle": stage.cycle, **result, "seconds": round(watch.seconds, 2)}
        run.log.add(stage.name, result)
        run.flush()
        run.lease.check()
        storage.write_json(marker, result)
    if stage.kind == "joint":
        storage.delete_tree(run.checkpoints(stage))  # they serve nothing once the stage is marked complete
    run.results[stage.name] = result
    run.reporter.end(stage.name, result["seconds"], _in_words(result, done))


# What a stage meets when a node goes with the only copy of something. Lost processes alone Ray replaces itself.
_LOST = (ActorUnavailableError, ObjectLostError, RayActorError, WorkerCrashedError, NodeDiedError)


def _persistently(run: Run, stage: Stage, state_in: str | None) -> Result:
    """Run the stage; begin it again where a lost node took what can't be made again within it.

    A stage reads and writes files only, so a second beginning is like a first. (Of a joint stage Ray Train goes on from
    the last epoch, and counts its own failures.)
    """
    for _ in range(run.settings.compute.max_failures):
        try:
            return STAGES[stage.kind](run, stage, state_in)
        except _LOST as error:
            run.reporter.note(f"begins again: {type(error).__name__}, a node or a process was lost")
    return STAGES[stage.kind](run, stage, state_in)


def _in_words(result: Result, done: bool) -> str:
    said = ["done before"] if done else []
    for split in ("validation", "test"):
        if result.get(f"{split}_accuracy") is not None:
            said.append(f"{split} accuracy {percent(result[f'{split}_accuracy'])}")
    return ", ".join([*said, *([result["says"]] if result.get("says") else [])])

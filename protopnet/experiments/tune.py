"""A search over settings on Ray Tune: each trial is an ordinary run, the poor ones are stopped early (ASHA), and what
has come to its end is kept when the search is killed and gone on with.

    <output>/search.json                 what is searched; another search needs another folder
    <output>/data/                       the images, shared by the trials, which don't see those for testing
    <output>/trial-<nnn>/                a run, as jobs/train.py leaves it; of one that was stopped stopped.json
    <output>/table.json, .md, .html      written anew after each trial, as is
    <output>/best.yaml                   the settings of the best trial, for jobs/train.py
"""

import logging
import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from protopnet import storage
from protopnet.cli import changed_settings
from protopnet.cluster import connect
from protopnet.config import RunSettings
from protopnet.errors import UserError
from protopnet.experiments.reproduce import is_finished
from protopnet.experiments.shared_data import on_shared_data
from protopnet.experiments.space import Drawn, TuneSettings, drawn
from protopnet.experiments.trial import FOLDER, Trial, accuracies
from protopnet.experiments.trials_table import Ended, as_markdown, as_page, best_yaml, trials_figures
from protopnet.lease import Lease
from protopnet.training.run import FREE_ON_RESUME
from protopnet.words import percent

_FREE = (
    *(f"settings.{name}" for name in (*FREE_ON_RESUME, "name")),
    "search.trials",
    "search.parallel",
    "search.output",
)
_RETRIES = 3  # of a trial whose actor was lost, with its node
STOPPED = "stopped.json"


def search(settings: RunSettings, searched: TuneSettings) -> dict[str, Any]:
    """Bring all trials to their ends; returns the content of table.json.

    `UserError` for settings and data that can't be, before anything is trained, for a folder with another search, and
    where no trial came to its end.
    """
    trials = drawn(settings, searched)
    if searched.measure and settings.model.kind == "baseline":
        raise UserError(f"tune.measure is {searched.measure}, but model.kind baseline explains nothing; leave it out")
    output = storage.located(searched.output)
    storage.check_writable(output, "tune.output")
    with Lease(output, "--tune.output"):
        _check_same(output, settings, searched)
        shared = on_shared_data(settings, storage.join(output, "data"), settings.seed).data
        _check_validation(shared.path, settings)
        return _Search(settings, searched, output, trials).run(shared.model_copy(update={"hide_test": True}))


def _check_same(output: str, settings: RunSettings, searched: TuneSettings) -> None:
    """Write what is searched, or refuse the folder of another search."""
    path = storage.join(output, "search.json")
    now = {"settings": settings.model_dump(mode="json"), "search": searched.model_dump(mode="json")}
    if storage.exists(path):
        for name, old, new in changed_settings(storage.read_json(path), now):
            if not name.startswith(_FREE):
                name = name.removeprefix("settings.").replace("search.", "tune.", 1)
                raise UserError(
                    f"the search in {output} was begun with {name} = {old}, now it is {new}; set it back to go on, or "
                    "choose another --tune.output"
                )
    storage.write_json(path, now)


def _check_validation(shards: str | None, settings: RunSettings) -> None:
    counts = storage.read_json(storage.join(storage.located(shards or ""), "dataset.json")).get("counts", {})
    if settings.data.validation == 0 and not counts.get("validation"):
        raise UserError(
            "data.validation is 0 and the data has no validation images, by which settings are chosen; "
            "set it to the share of training images to keep for that, e.g. 0.1"
        )


class _Search(tune.Callback):
    """What Tune says of the trials, put down as it comes."""

    def __init__(self, settings: RunSettings, searched: TuneSettings, output: str, trials: Sequence[Drawn]) -> None:
        self.settings, self.searched, self.output, self.trials = settings, searched, output, trials
        self.ended: dict[str, Ended] = {}

    def run(self, data: Any) -> dict[str, Any]:
        runs = {
            each.name: each.settings.model_copy(update={"name": each.name, "storage": self.output, "data": data})
            for each in self.trials
        }
        before = [each.name for each in self.trials if self._was_ended(each.name, runs[each.name])]
        scheduler = _asha(self.searched, list(runs.values()))
        for name in before:
            self.ended[name] = self._ended(name)
            _remember(scheduler, name, accuracies(storage.join(self.output, name)))
        if before:
            print(f"{len(before)} of {len(self.trials)} trials were done before", flush=True)
        figures = self._write()
        if todo := [name for name in runs if name not in before]:
            self._tune([runs[name] for name in todo], scheduler)
            figures = self._write()
        if figures["best"] is None:
            failures = [each["failure"] for each in figures["trials"] if each["failure"]]
            raise UserError(f"no trial came to its end: {failures[0] if failures else 'all were stopped'}")
        return figures

    def _tune(self, runs: Sequence[RunSettings], scheduler: ASHAScheduler) -> None:
        connect(self.settings.compute, {"tune.output": self.output})
        address = ray.get_runtime_context().gcs_address
        os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # else Ctrl-C would look like an end in order
        logging.getLogger("ray.tune").setLevel(logging.ERROR)
        joined = [
            run.model_copy(update={"compute": run.compute.model_copy(update={"address": address})}) for run in runs
        ]
        configs = [
            {"settings": run.model_dump(mode="json"), "measured": self.searched.measure is not None} for run in joined
        ]
        filesystem, path = storage.arrow_filesystem(storage.join(self.output, "tune"))
        tune.Tuner(
            tune.with_resources(Trial, {"CPU": 0.001}),  # what trains asks for its own share
            param_space={"run": tune.grid_search(configs)},
            tune_config=tune.TuneConfig(
                scheduler=scheduler, max_concurrent_trials=self.searched.parallel, reuse_actors=True
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=path,
                storage_filesystem=filesystem,
                verbose=0,
                callbacks=[self],
                failure_config=tune.FailureConfig(max_failures=_RETRIES),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the run's folder is all of it
            ),
        ).fit()
        storage.delete_tree(storage.join(self.output, "tune"))
        for name, each in self.ended.items():
            if each.state == "stopped":  # what it would go on with, which it won't
                storage.delete_tree(storage.join(self.output, name, "stages"))

    # ----------------------------------------------------------------------- what Tune says of a trial

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        if not result.get("done"):
            print(f"{_name(trial)}  epoch {result['epoch']:<4} validation {percent(result['accuracy'])}", flush=True)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        name, last = _name(trial), trial.last_result
        if last["failure"]:
            self.ended[name] = Ended("failed", failure=last["failure"])
        else:
            if not storage.exists(storage.join(self.output, name, "summary.json")):
                storage.write_json(storage.join(self.output, name, STOPPED), {"epoch": last["epoch"]})
            self.ended[name] = self._ended(name)
        self._say(name)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self.ended[_name(trial)] = Ended("failed", failure="its process was lost, too often")
        self._say(_name(trial))

    def _say(self, name: str) -> None:
        figures = self._write()
        [row] = [row for row in figures["trials"] if row["trial"] == name]
        said = {
            "finished": f"validation {percent(row['accuracy'])}",
            "stopped": f"stopped after {row['epochs']} epochs",
            "failed": row["failure"],
        }
        print(f"{name}  {said[row['state']]} ({len(self.ended)} of {len(self.trials)} trials)\n", flush=True)

    # ------------------------------------------------------------------------------ what is on the disk

    def _was_ended(self, name: str, run: RunSettings) -> bool:
        folder = storage.join(self.output, name)
        if storage.exists(storage.join(folder, STOPPED)):
            return True
        measured = self.searched.measure is None or storage.exists(storage.join(folder, FOLDER, "metrics.json"))
        return is_finished(run) and measured

    def _ended(self, name: str) -> Ended:
        folder = storage.join(self.output, name)
        if not storage.exists(storage.join(folder, "summary.json")):
            return Ended("stopped", accuracies(folder))
        measured = storage.join(folder, FOLDER, "metrics.json")
        quality = storage.read_json(measured)["quality"] if storage.exists(measured) else {}
        return Ended(
            "finished", accuracies(folder), storage.read_json(storage.join(folder, "summary.json")), quality=quality
        )

    def _write(self) -> dict[str, Any]:
        figures = trials_figures(self.trials, self.ended, self.searched)
        files = {"table.md": as_markdown(figures), "table.html": as_page(figures)}
        if figures["best"] is not None:
            files["best.yaml"] = best_yaml(figures, self.trials, self.settings)
        for name, text in files.items():
            storage.write_bytes(storage.join(self.output, name), text.encode())
        storage.write_json(storage.join(self.output, "table.json"), figures)
        return figures


def _name(trial: Any) -> str:
    return str(trial.config["run"]["settings"]["name"])


def _asha(searched: TuneSettings, runs: Sequence[RunSettings]) -> ASHAScheduler:
    longest = max(
        run.train.warm_epochs + run.train.joint_epochs + (run.train.cycles - 1) * run.train.next_joint_epochs
        for run in runs
    )
    return ASHAScheduler(
        time_attr="epoch",
        metric="accuracy",
        mode="max",
        max_t=max(longest, searched.grace),
        grace_period=searched.grace,
        reduction_factor=searched.reduction,
        stop_last_trials=False,  # the last epoch isn't the end of a run
    )


def _remember(scheduler: ASHAScheduler, name: str, epochs: Sequence[float]) -> None:
    """Let the scheduler judge by a trial of before, too."""
    trial: Any = SimpleNamespace(trial_id=name)
    controller: Any = None
    scheduler.on_trial_add(controller, trial)
    for epoch, accuracy in enumerate(epochs, 1):
        scheduler.on_trial_result(controller, trial, {"epoch": epoch, "accuracy": accuracy})

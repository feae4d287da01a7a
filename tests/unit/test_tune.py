"""The search of `jobs/tune.py` without Ray: what is drawn, what is kept, what comes out."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from protopnet import storage
from protopnet.cli import checked, parse
from protopnet.commands.tune import TuneJobSettings
from protopnet.config import RunSettings
from protopnet.datasets.open import open_dataset
from protopnet.errors import UserError
from protopnet.experiments import tune
from protopnet.experiments.space import TuneSettings, drawn
from protopnet.experiments.trials_table import Ended, as_markdown, as_page, best_yaml, trials_figures

CONFIGS = Path(__file__).parents[2] / "configs"
SPACE = {
    "model": {"similarity": ["cosine", "log"]},
    "train.lr_features": {"log": [1e-3, 1e-2]},
    "train.joint_epochs": {"between": [4, 9]},
}


def searched(**settings: Any) -> TuneSettings:
    return checked(TuneJobSettings, {"tune.space": SPACE} | {f"tune.{k}": v for k, v in settings.items()}).tune


class TestWhatIsDrawn:
    def test_the_quickstarts_search(self) -> None:
        given = parse(TuneJobSettings, ["--config", str(CONFIGS / "quickstart-tune.yaml")])
        settings = RunSettings.model_validate(given.model_dump(exclude={"tune"}))
        trials = drawn(settings, given.tune)
        assert [each.name for each in trials] == [f"trial-{n:03}" for n in range(8)]
        assert trials[0].settings == settings
        assert trials[0].changes["train.lr_features"] == settings.train.lr_features

    def test_within_the_space_each_once_and_more_go_on(self) -> None:
        trials = drawn(RunSettings(), searched(trials=40))
        assert len({json.dumps(each.changes) for each in trials}) == 40
        for each in trials[1:]:
            assert each.settings.model.similarity in ("cosine", "log")
            assert 1e-3 <= each.settings.train.lr_features <= 1e-2
            assert each.settings.train.joint_epochs in range(4, 10)
        assert {each.settings.train.joint_epochs for each in trials[1:]} == set(range(4, 10))
        below = [each.settings.train.lr_features < 10**-2.5 for each in trials[1:]]
        assert 10 <= sum(below) <= 29  # even over the logarithm: evenly drawn, a quarter would be
        assert drawn(RunSettings(), searched(trials=5)) == trials[:5]
        assert drawn(RunSettings(), searched(trials=5, seed=1))[1:] != trials[1:5]

    def test_a_space_that_is_used_up_and_settings_that_dont_go_together(self) -> None:
        space = {"model.start": ["data", "parts"], "train.batch_size": [8, 16]}  # parts needs a linear add-on
        trials = drawn(RunSettings(), TuneSettings(space=space))
        assert sorted(each.settings.train.batch_size for each in trials) == [8, 16, 80]
        assert {each.settings.model.start for each in trials} == {"data"}

    @pytest.mark.parametrize(
        ("space", "sentence"),
        [
            ({"model.similarty": ["log"]}, "model.similarty can't be searched; did you mean model.similarity?"),
            ({"data.validation": [0.1, 0.2]}, "data.validation can't be searched"),
            ({"model.similarity": ["log", "cosin"]}, "model.similarity: cosin is not valid; expected one of log"),
            ({"train.batch_size": {"between": [0, 4]}}, "train.batch_size: 0 is not valid; expected a whole number"),
            ({"train.lr_features": {"log": [1e-2, 1e-3]}}, "expected the lower number first"),
            ({"train.lr_features": {"between": [1e-2]}}, "expected a list of values"),
            ({"train.lr_features": 1e-2}, "expected a list of values"),
        ],
    )
    def test_a_space_that_cant_be(self, space: dict, sentence: str) -> None:
        with pytest.raises(UserError, match="^tune") as error:
            checked(TuneJobSettings, {"tune.space": space})
        assert sentence in str(error.value)

    def test_other_settings_that_cant_be(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="tune.space is missing"):
            drawn(RunSettings(), TuneSettings())
        with pytest.raises(UserError, match="tune.measure: purty is not valid; expected one of truth"):
            checked(TuneJobSettings, {"tune.measure": "purty"})
        black_box = checked(RunSettings, {"model.kind": "baseline"})
        with pytest.raises(UserError, match="explains nothing"):
            tune.search(black_box, searched(measure="purity", output=str(tmp_path)))


def summary(accuracy: float) -> dict[str, Any]:
    stages = [{"cycle": cycle, "validation_accuracy": value} for cycle, value in ((0, 0.1), (0, accuracy), (1, 0.99))]
    stages += [{"cycle": 0, "validation_accuracy": None}, {"cycle": 0}]  # the bundle is of the first cycle
    return {"stages": stages, "image_passes": 1200, "seconds": 61.0, "test_accuracy": None}


class TestTheTable:
    def figures(self, search: TuneSettings) -> dict[str, Any]:
        def purity(value: float) -> dict[str, Any]:
            return {"purity": {"value": value}, "deletion": {"value": value}}

        ended = {
            "trial-000": Ended("finished", [0.2, 0.5], summary(0.8), quality=purity(0.5)),
            "trial-001": Ended("stopped", [0.1]),
            "trial-002": Ended("failed", failure="the loss is no number"),
            "trial-003": Ended("finished", [0.3, 0.6], summary(0.9), quality=purity(0.2)),
        }
        return trials_figures(drawn(RunSettings(), search), ended, search)

    def test_the_best_is_of_the_bundles_cycle_on_validation(self) -> None:
        figures = self.figures(searched())
        assert [row["accuracy"] for row in figures["trials"]] == [0.8, None, None, 0.9]
        assert figures["best"] == "trial-003"

    def test_a_measure_counts_beside_it_whichever_way_is_better(self) -> None:
        assert self.figures(searched(measure="purity", weight=0.5))["best"] == "trial-000"
        assert self.figures(searched(measure="purity", weight=0.1))["best"] == "trial-003"
        assert self.figures(searched(measure="deletion", weight=0.5))["best"] == "trial-003"
        assert self.figures(searched(measure="truth"))["best"] is None  # which wasn't measured

    def test_for_people(self) -> None:
        figures = self.figures(searched(measure="purity", weight=0.5))
        lines = as_markdown(figures).splitlines()
        assert "| trial-000 | log | 0.0001 | 6 | 80.0 % | 0.500 | 1.050 | 50.0 % | 2 | 1,200 | 1 min 1 s | best |" in [
            line.replace("cosine", "log") for line in lines
        ]
        assert any(line.endswith("| 1 |  |  | stopped |") for line in lines)
        assert "| trial-002 | the loss is no number |" in lines
        assert as_page(figures).count("<table>") == 2

    def test_its_best_settings_are_a_file_for_training(self, tmp_path: Path) -> None:
        search = searched()
        given = checked(
            RunSettings, {"name": "mine", "data.source": "folder", "data.path": "images", "data.classes": 3}
        )
        figures = self.figures(search)
        (tmp_path / "best.yaml").write_text(best_yaml(figures, drawn(given, search), given))
        read = parse(RunSettings, ["--config", str(tmp_path / "best.yaml")])
        assert read == drawn(given, search)[3].settings.model_copy(update={"name": "mine-tuned"})


class Asked:
    """A trial as Tune has it."""

    def __init__(self, name: str, epoch: int, failure: str | None = None) -> None:
        self.config = {"run": {"settings": {"name": name}}}
        self.last_result = {"epoch": epoch, "failure": failure}


class TestGoingOn:
    """A search that was killed: what it left on the disk, and what it makes of it."""

    def searching(self, folder: Path) -> tune._Search:
        trials = drawn(RunSettings(), searched(trials=4))
        return tune._Search(RunSettings(), searched(trials=4), str(folder), trials)

    def leave(self, folder: Path, name: str, epochs: list[float]) -> None:
        (folder / name).mkdir(parents=True)
        rows = [
            {"stage": "02-joint", "epoch": n, "step": n, "name": "validation_accuracy", "value": value}
            for n, value in enumerate(epochs)
        ]
        (folder / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def test_what_ended_is_known_again(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        first = self.searching(tmp_path)
        self.leave(tmp_path, "trial-000", [0.5, 0.9])
        (tmp_path / "trial-000/summary.json").write_text(json.dumps(summary(0.9)))
        self.leave(tmp_path, "trial-001", [0.2])
        self.leave(tmp_path, "trial-002", [0.7])  # killed with the search
        first.on_trial_complete(0, [], Asked("trial-000", 2))
        first.on_trial_complete(0, [], Asked("trial-001", 1))
        first.on_trial_complete(0, [], Asked("trial-003", 0, "no such weights"))
        assert "trial-001  stopped after 1 epochs (2 of 4 trials)" in capsys.readouterr().out
        runs = {each.name: each.settings for each in first.trials}
        runs["trial-000"] = runs["trial-000"].model_copy(update={"storage": str(tmp_path), "name": "trial-000"})
        (tmp_path / "trial-000/config.yaml").write_text(yaml.safe_dump(runs["trial-000"].model_dump(mode="json")))
        again = self.searching(tmp_path)
        assert [name for name, run in runs.items() if again._was_ended(name, run)] == ["trial-000", "trial-001"]
        assert again._ended("trial-000") == first.ended["trial-000"]
        assert again._ended("trial-001") == Ended("stopped", [0.2])
        assert storage.read_json(str(tmp_path / "table.json"))["best"] == "trial-000"
        assert (tmp_path / "best.yaml").exists()

    def test_earlier_trials_count_when_later_ones_are_judged(self) -> None:
        scheduler = tune._asha(searched(grace=2, reduction=2), [RunSettings()])
        for name, accuracies in (("trial-000", [0.5, 0.8, 0.9]), ("trial-001", [0.4, 0.6])):
            tune._remember(scheduler, name, accuracies)
        poor: Any = SimpleNamespace(trial_id="new")
        scheduler.on_trial_add(None, poor)  # type: ignore[arg-type]

        def decided(epoch: int, accuracy: float) -> str:
            return scheduler.on_trial_result(None, poor, {"epoch": epoch, "accuracy": accuracy})  # type: ignore[arg-type]

        assert decided(1, 0.1) == "CONTINUE"  # its grace
        assert decided(2, 0.3) == "STOP"

    def test_the_folder_of_another_search(self, tmp_path: Path) -> None:
        tune._check_same(str(tmp_path), RunSettings(), searched())
        tune._check_same(str(tmp_path), checked(RunSettings, {"compute.threads": 2}), searched(trials=30, parallel=2))
        with pytest.raises(UserError, match="begun with train.batch_size = 80, now it is 8; .*--tune.output"):
            tune._check_same(str(tmp_path), checked(RunSettings, {"train.batch_size": 8}), searched())
        with pytest.raises(UserError, match="begun with tune.seed = 0, now it is 1"):
            tune._check_same(str(tmp_path), RunSettings(), searched(seed=1))

    def test_hidden_test_images_are_gone_and_the_others_as_they_were(self, tmp_path: Path) -> None:
        small = {"birds.classes": 2, "birds.train_per_class": 6, "birds.test_per_class": 2, "birds.size": 32}
        whole = open_dataset(checked(RunSettings, small), str(tmp_path))
        seen = whole.without("test")
        assert (whole.counts()["test"], seen.counts()) == (4, whole.counts() | {"test": 0})
        assert seen.split("validation")["uri"] == whole.split("validation")["uri"]
        assert seen.table["image_id"].to_pylist() == list(range(12))

    def test_without_validation_images(self, tmp_path: Path) -> None:
        small = {"birds.classes": 2, "birds.train_per_class": 4, "birds.test_per_class": 2, "birds.size": 32}
        with pytest.raises(UserError, match="data.validation is 0 .* e.g. 0.1"):
            tune.search(checked(RunSettings, small | {"data.validation": 0}), searched(output=str(tmp_path)))

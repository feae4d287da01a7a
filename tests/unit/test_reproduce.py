"""Tables of runs: what is asked for, and what is made of what the runs have left."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml

from protopnet import storage
from protopnet.commands.reproduce import ReproduceSettings, chosen
from protopnet.datasets.open import open_dataset
from protopnet.errors import UserError
from protopnet.experiments.figures import Outcome, ensemble_accuracy, failures, read_outcome, table_figures
from protopnet.experiments.shared_data import on_shared_data
from protopnet.experiments.table import Table, given_settings, members, read_table_file
from protopnet.experiments.text import as_markdown, as_page
from protopnet.tables import write_table

CUB200 = Path(__file__).parents[2] / "configs/cub200"
CLASSES = ["Cardinal", "Jay", "Wren"]
TABLE = {
    "seeds": [0, 1],
    "settings": {"data.source": "birds", "train": {"batch_size": 9}},
    "rows": {
        "net": {
            "label": "Net",
            "settings": {"train.batch_size": 12},
            "baseline": "box",
            "published": 80,
            "published_deviation": 0.5,
        },
        "box": {"settings": {"model": {"kind": "baseline"}}, "published": 78.5},
    },
    "ensembles": {"both": {"members": ["net", "box"]}, "all": {"members": ["net"], "across_seeds": True}},
}


def file_of(folder: Path, content: dict) -> str:
    path = folder / "table.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(path)


def changed(**changes: object) -> dict:
    return json.loads(json.dumps(TABLE)) | changes


class TestWhatIsAskedFor:
    def test_the_papers_table(self) -> None:
        table = read_table_file(str(CUB200 / "table.yaml"))
        runs = members(table, CUB200, "runs/table", {"data.path": "CUB"})
        assert len(runs) == 3 * 15
        assert len({run.settings.name for run in runs}) == len(runs)
        by_row = {run.row: run.settings for run in runs}
        for name, row in table.rows.items():
            backbone, _, kind = name.partition("-")
            settings = by_row[name]
            assert (settings.model.backbone, settings.data.path) == (backbone, "CUB")
            assert settings.model.kind == ("baseline" if kind == "baseline" else "protopnet")
            assert settings.data.crop == ("none" if kind == "full" else "boxes")
            assert (row.published is None) == (kind == "full")
            assert row.baseline == (None if kind else f"{backbone}-baseline")

    def test_all_rows_of_eight_kinds_take_as_many_looks(self) -> None:
        table = read_table_file(str(CUB200.parent / "cub8/table.yaml"))
        for run in members(table, CUB200.parent / "cub8", "runs/cub8", {}):
            assert (run.settings.data.classes, run.settings.model.image_size) == (8, 112)
            around = 0 if run.settings.model.kind == "baseline" else 1 + 1 + 1 + run.settings.last_layer.copies
            assert run.settings.train.joint_epochs + around == 10

    def test_both_ways_of_a_hundred_kinds_take_five_looks(self) -> None:
        table = read_table_file(str(CUB200.parent / "cub100/table.yaml"))
        runs = {run.row: run.settings for run in members(table, CUB200.parent / "cub100", "runs/cub100", {})}
        assert runs["lite0-baseline"].train.joint_epochs == 5
        for name in ("lite0", "lite2", "resnet18"):
            settings = runs[name]
            assert (settings.model.start, settings.train.joint_epochs, settings.last_layer.copies) == ("parts", 0, 1)

    def test_a_later_setting_wins(self, tmp_path: Path) -> None:
        (tmp_path / "own.yaml").write_text("train: {batch_size: 8, joint_epochs: 3}\nmodel: {kind: baseline}\n")
        content = changed()
        content["rows"]["box"] = {"config": "own.yaml"}
        table = read_table_file(file_of(tmp_path, content))
        runs = {run.settings.name: run.settings for run in members(table, tmp_path, "out", {"train.clip": 1})}
        assert list(runs) == ["net-seed0", "box-seed0", "net-seed1", "box-seed1"]
        assert [run.train.batch_size for run in runs.values()] == [12, 9, 12, 9]
        assert (runs["box-seed1"].train.joint_epochs, runs["box-seed1"].model.kind) == (3, "baseline")
        assert all(run.train.clip == 1 and run.storage == "out" for run in runs.values())
        assert [run.seed for run in runs.values()] == [0, 0, 1, 1]

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"rows": {}}, "rows: "),
            ({"rows": {"a": {"labl": "A"}}}, "rows.a.labl: "),
            ({"rows": {"a/b": {}}}, "rows.a/b: "),
            ({"seeds": [-1]}, "seeds.0: "),
            ({"ensembles": {"both": {"members": ["net", "bax"]}}}, "there is no row bax; did you mean box"),
            ({"rows": {"net": {"baseline": "box"}}, "ensembles": {}}, "rows.net.baseline: there is no row box"),
        ],
    )
    def test_a_table_that_cant_be(self, tmp_path: Path, changes: dict, sentence: str) -> None:
        with pytest.raises(UserError, match=r"^TABLE .*table\.yaml: ") as error:
            read_table_file(file_of(tmp_path, changed(**changes)))
        assert sentence in str(error.value)

    @pytest.mark.parametrize(
        ("row", "sentence"),
        [
            (
                {"settings": {"model.bakbone": "vgg16"}},
                "row net: unknown setting model.bakbone; did you mean model.backbone?",
            ),
            ({"config": "none.yaml"}, "there is no such file"),
            ({"settings": {"train.batch_size": 0}}, "row net: train.batch_size: 0 is not valid"),
        ],
    )
    def test_a_row_that_cant_be(self, tmp_path: Path, row: dict, sentence: str) -> None:
        table = read_table_file(file_of(tmp_path, {"rows": {"net": row}}))
        with pytest.raises(UserError, match=r"^row net: ") as error:
            members(table, tmp_path, "out", {})
        assert sentence in str(error.value)

    def test_settings_from_the_command_line(self) -> None:
        given = given_settings(["data.classes=8", "data.path=a=b", "model.weights=null", "data.classes=[x, y]"])
        assert given == {"data.classes": ["x", "y"], "data.path": "a=b", "model.weights": None}
        with pytest.raises(UserError, match="'data.classes' is not valid; expected NAME=VALUE"):
            given_settings(["data.classes"])

    def test_some_rows_and_seeds(self) -> None:
        table = Table.model_validate(TABLE)
        some = chosen(table, ReproduceSettings(table="t", rows=["net"], seeds=[7]))
        assert (list(some.rows), some.seeds, list(some.ensembles)) == (["net"], [7], ["all"])
        assert some.rows["net"].baseline is None
        assert chosen(table, ReproduceSettings(table="t")) == table
        with pytest.raises(UserError, match="no row nett; did you mean net"):
            chosen(table, ReproduceSettings(table="t", rows=["nett"]))


class TestSharedData:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return tmp_path_factory.mktemp("data")

    def prepared(self, folder: Path, **settings: object):
        table = Table.model_validate(
            {"seeds": [0, 1], "rows": {"a": {}, "b": {"settings": {"model.kind": "baseline"}}}}
        )
        small = {"birds.classes": 2, "birds.train_per_class": 6, "birds.test_per_class": 2, "birds.size": 32}
        runs = members(table, folder, str(folder), small | settings)
        return [on_shared_data(run.settings, str(folder / "data")) for run in runs]

    def test_rows_with_the_same_images_share_them(self, folder: Path) -> None:
        runs = self.prepared(folder)
        assert len({run.data.path for run in runs}) == 1
        assert {run.data.source for run in runs} == {"shards"}
        first, second = (open_dataset(run, str(folder)) for run in (runs[0], runs[2]))
        assert first.source["kind"] == "birds"
        assert first.split("test")["uri"].to_pylist() == second.split("test")["uri"].to_pylist()
        assert len(first.split("validation")) == len(second.split("validation")) == 2
        assert self.prepared(folder, **{"data.validation": 0.4})[0].data.path == runs[0].data.path
        assert self.prepared(folder, **{"data.classes": [first.classes[1]]})[0].data.path != runs[0].data.path

    def test_shards_are_read_where_they_are(self, folder: Path) -> None:
        run = self.prepared(folder)[0]
        assert on_shared_data(run, str(folder / "elsewhere")) == run


def leave(folder: Path, row: str, seed: int, accuracy: float, classes: list[str] = CLASSES) -> Outcome:
    """What a run leaves, as far as tables read it: random logits, quality of a network that isn't `box`."""
    run = folder / f"{row}-seed{seed}"
    logits_nK = np.random.default_rng([seed, len(row)]).normal(size=(12, 3)).astype(np.float32)
    order = np.random.default_rng(seed).permutation(12)
    columns = {"uri": [f"{n:02}" for n in order], "label": [int(n) % 3 for n in order]}
    write_table(
        str(run / "stages/06-evaluate/predictions.parquet"), pa.table(columns | {"logits": list(logits_nK[order])})
    )
    quality = (
        {"purity": {"value": 0.25 + seed / 2}, "sparsity": {"value": 0.5}, "truth": None} if row == "net" else None
    )
    metrics = {"top1": accuracy, "per_class": dict.fromkeys(classes)} | ({"quality": quality} if quality else {})
    storage.write_json(str(run / "stages/06-evaluate/metrics.json"), metrics)
    summary = {
        "test_accuracy": accuracy,
        "seconds": 60 + seed,
        "image_passes": 1000,
        "stages": [{"name": "06-evaluate"}],
    }
    storage.write_json(str(run / "summary.json"), summary)
    return read_outcome(seed, str(run), "protopnet" if row == "net" else "baseline")


class TestFigures:
    @pytest.fixture(scope="class")
    def outcomes(self, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
        folder = tmp_path_factory.mktemp("runs")
        nets = [leave(folder, "net", 0, 0.80), leave(folder, "net", 1, 0.90)]
        return {
            "net": nets,
            "box": [leave(folder, "box", 0, 0.75), Outcome(1, "runs/box-seed1", "no weights", "baseline")],
        }

    @pytest.fixture(scope="class")
    def figures(self, outcomes: dict[str, list[Outcome]]) -> dict:
        return table_figures(Table.model_validate(TABLE), outcomes)

    def test_means_and_gaps(self, figures: dict) -> None:
        net, box = figures["rows"]
        assert net["accuracy"] == {"mean": pytest.approx(0.85), "deviation": pytest.approx(0.05 * 2**0.5), "count": 2}
        assert box["accuracy"] == {"mean": 0.75, "deviation": None, "count": 1}
        assert (net["gap"], net["published_gap"]) == (pytest.approx(0.10), pytest.approx(0.015))
        assert (net["seconds"], net["image_passes"]) == (60.5, 1000)
        assert net["quality"] == {"purity": 0.5, "sparsity": 0.5}
        assert box["quality"] == {}

    def test_a_run_that_failed_costs_its_cells(self, figures: dict) -> None:
        assert failures(figures) == [("box-seed1", "no weights"), ("both", "its member box-seed1 failed")]
        both, everything = figures["ensembles"]
        assert (both["accuracy"]["count"], everything["accuracy"]["count"]) == (1, 1)

    def test_an_ensemble_is_the_sum_of_logits(self, figures: dict, outcomes: dict[str, list[Outcome]]) -> None:
        def logits_of(row: str, seed: int) -> np.ndarray:
            return np.random.default_rng([seed, len(row)]).normal(size=(12, 3)).astype(np.float32)

        expected = np.mean((logits_of("net", 0) + logits_of("box", 0)).argmax(1) == np.arange(12) % 3)
        both, everything = figures["ensembles"]
        assert both["accuracy"]["mean"] == pytest.approx(expected)
        assert (both["best_member"], both["gain"]) == (pytest.approx(0.85), pytest.approx(expected - 0.85))
        expected = np.mean((logits_of("net", 0) + logits_of("net", 1)).argmax(1) == np.arange(12) % 3)
        assert everything["accuracy"]["mean"] == pytest.approx(expected)

    def test_members_of_other_data_are_no_ensemble(self, outcomes: dict[str, list[Outcome]], tmp_path: Path) -> None:
        other = leave(tmp_path, "net", 0, 0.5, ["Cardinal", "Jay", "Robin"])
        with pytest.raises(UserError, match="other images or classes"):
            ensemble_accuracy([outcomes["net"][0].evaluation, other.evaluation])

    def test_nothing_yet(self) -> None:
        figures = table_figures(Table.model_validate(TABLE), {})
        assert figures["rows"][0]["accuracy"] == {"mean": None, "deviation": None, "count": 0}
        assert failures(figures) == []
        assert "| Net |  | 80.0 ± 0.5 % |  | 0 of 2 |" in as_markdown(figures)

    def test_as_text(self, figures: dict) -> None:
        lines = as_markdown(figures).splitlines()
        assert "| Net | ProtoPNet | 80.0 ± 0.5 % | 85.0 ± 7.1 % | 2 of 2 | +10.0 | +1.5 | 1,000 | 1 min 0 s |" in lines
        assert "| box | black box | 78.5 % | 75.0 % | 1 of 2 |  |  | 1,000 | 1 min 0 s |" in lines
        assert "| Net | 50.0 % | 0.50 |" in lines
        assert "| box-seed1 | no weights |" in lines
        page = as_page(figures)
        assert "85.0 ± 7.1 %" in page
        assert page.count("<table>") == 4

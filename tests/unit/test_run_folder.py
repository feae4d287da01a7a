"""A run folder belongs to one set of settings, and to one job at a time."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from protopnet.config import RunSettings
from protopnet.errors import UserError
from protopnet.progress import LineReporter
from protopnet.training.run import Run
from protopnet.training.schedule import Stage
from protopnet.training.stages import run_data


def run_in(folder: Path, **settings: object) -> Run:
    return Run(RunSettings.model_validate({"name": "mine", "storage": str(folder), **settings}), LineReporter())


def recorded_seed(folder: Path) -> int:
    seed: int = yaml.safe_load((folder / "mine/config.yaml").read_text())["seed"]
    return seed


def test_a_job_that_is_refused_leaves_the_settings_of_the_one_that_works_there(tmp_path: Path) -> None:
    with run_in(tmp_path, seed=1).claimed():
        with pytest.raises(UserError, match="another job works in"), run_in(tmp_path, seed=2).claimed():
            pass
        assert recorded_seed(tmp_path) == 1


def test_a_run_that_has_begun_is_gone_on_with_by_the_same_settings_only(tmp_path: Path) -> None:
    with run_in(tmp_path, seed=1).claimed():
        pass
    with run_in(tmp_path, seed=2).claimed():  # nothing was done with the first ones yet
        assert recorded_seed(tmp_path) == 2
    data = tmp_path / "mine/stages/00-data"
    data.mkdir(parents=True)
    (data / "result.json").write_text("{}")
    with run_in(tmp_path, seed=2, compute={"threads": 1}).claimed():
        pass
    with pytest.raises(UserError, match="begun with seed = 2, now it is 3"), run_in(tmp_path, seed=3).claimed():
        pass


@pytest.mark.parametrize(("side", "warned"), [(32, True), (64, False)])
def test_a_patch_that_is_the_whole_image_is_warned_of(tmp_path: Path, side: int, warned: bool) -> None:
    run = run_in(
        tmp_path,
        birds={"classes": 2, "train_per_class": 4, "test_per_class": 1, "size": 32},
        model={"backbone": "resnet18", "image_size": side, "prototypes": 2},
    )
    says = run_data(run, Stage(0, "data"), None)["says"]
    assert ("covers the whole 1 x 1 map, so its patch is the whole image: set model.image_size" in says) == warned


def test_held_out_images_that_are_nearly_training_images_are_named_at_the_start(tmp_path: Path) -> None:
    for split, shift in (("train", 0), ("test", 8)):
        for label in range(2):
            (tmp_path / f"data/{split}/{label}").mkdir(parents=True)
            for n in range(4):
                photo_like(100 * label + n + shift).save(tmp_path / f"data/{split}/{label}/{n}.png")
    photo_like(101).save(tmp_path / "data/test/1/again.jpg", quality=50)
    model = {"backbone": "resnet18", "cut": "layer1", "image_size": 32, "prototypes": 4, "start": "random"}
    data = {"source": "folder", "path": str(tmp_path / "data"), "validation": 0}
    run = run_in(tmp_path, model=model, data=data)
    with run.claimed():
        says = run_data(run, Stage(0, "data"), None)["says"]
    assert "1 test image is nearly in training too: " in says
    [pair] = pq.read_table(tmp_path / "mine/stages/00-data/near_duplicates.parquet").to_pylist()
    assert (Path(pair["uri"]).name, Path(pair["train_uri"]).name) == ("again.jpg", "1.png")
    assert 0.93 <= pair["correlation"] <= 1


def photo_like(seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC)

"""jobs/explain.py on a trained bundle, and what its explanations must hold true of training images."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from running_jobs import Jobs, TrainedRun

from protopnet import imaging
from protopnet.datasets.reader import ImageReader
from protopnet.datasets.rows import Dataset
from protopnet.evidence.records import Explanation
from protopnet.model.bundle import load_bundle, save_bundle
from protopnet.predictor import Predictor


@pytest.fixture(scope="module")
def photos(trained: TrainedRun, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two test birds as files, one of them larger than the network's input and not square."""
    rows = Dataset.load(str(trained.folder / "stages/00-data")).split("test")
    folder = tmp_path_factory.mktemp("photos of birds")
    files = []
    for number, data in enumerate(ImageReader().read(rows.slice(0, 2), range(2))):
        image = imaging.decode(data)
        files.append(folder / f"bird {number}.png")
        (image if number else image.resize((300, 170))).save(files[-1])
    return files


def test_it_writes_pictures_a_page_and_numbers_that_add_up(
    trained: TrainedRun, jobs: Jobs, photos: list[Path], tmp_path: Path
) -> None:
    bundle = str(trained.folder / "bundle")
    classes = load_bundle(bundle).classes
    done = jobs.run("explain", bundle, bundle, *map(str, photos), "--class", classes[3], "--output", str(tmp_path))
    assert done.code == 0, done
    predictor = Predictor.load([bundle, bundle])  # the same member twice: an ensemble
    written = json.loads((tmp_path / "explanations.json").read_text())
    assert [entry.pop("uri") for entry in written] == [str(file) for file in photos]
    for file, entry in zip(photos, written, strict=True):
        explanation = Explanation.model_validate(entry)
        image = imaging.decode(file.read_bytes())
        assert (explanation.width, explanation.height) == image.size
        pixels = torch.from_numpy(imaging.resize(image, predictor.size))[None]
        logits = predictor.scores(imaging.normalise(pixels, predictor.preprocessing)).logits_BK[0]
        assert explanation.top.class_ == int(logits.argmax())
        assert 3 in [found.class_ for found in explanation.classes]
        assert len(explanation.most_similar) == 10
        for found in explanation.classes:
            total = sum(e.points for e in found.evidence) + found.remainder.points
            assert total == pytest.approx(float(logits[found.class_]), abs=1e-4)
            figure = next(tmp_path.glob(f"{file.name}-*-{found.class_name.replace(' ', '_')}.png"))
            assert Image.open(figure).size[0] > 1200
            for e in found.evidence:
                assert e.source is not None
                assert e.source.thumbnail is not None
                assert e.source.thumbnail.startswith(b"\xff\xd8")
    document = (tmp_path / "explanation.html").read_text()
    assert all(f"Why {name}?" in document for name in [classes[3]])
    assert str(tmp_path) in done.out


def test_a_training_image_shows_its_own_prototypes_at_their_own_patches(trained: TrainedRun) -> None:
    predictor = Predictor.load([str(trained.folder / "bundle")])
    prototypes = pq.read_table(trained.folder / "bundle/prototypes.parquet").to_pylist()
    rows = Dataset.load(str(trained.folder / "stages/00-data")).table
    for prototype in prototypes:
        own = rows.filter(pa.compute.equal(rows["image_id"], prototype["image_id"]))
        image = imaging.decode(ImageReader().read(own, range(1))[0])
        pixels = torch.from_numpy(imaging.resize(image, predictor.size))[None]
        found = predictor.explain(
            imaging.normalise(pixels, predictor.preprocessing),
            [image.size],
            top_classes=1,
            asked=[[prototype["class"]]],
            top_prototypes=8,
        )[0]
        entry = next(entry for entry in found.classes if entry.class_ == prototype["class"])
        shown = next(e for e in entry.evidence if e.prototype == prototype["prototype"])
        assert shown.similarity == pytest.approx(prototype["self_similarity"], abs=1e-5)
        assert (shown.row, shown.column) == (prototype["row"], prototype["column"])
        assert list(shown.box) == prototype["box"]
        assert shown.source is not None
        assert shown.source.box == shown.box


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{bundle}"], "no image among what was given"),
        (["{photo}"], "no bundle among what was given"),
        (["{bundle}", "{photo}", "--class", "albatros"], "there is no class 'albatros'"),
        (["{bundle}", "{bundle}/model.json"], "not an image of a known kind"),
        (["{bundle}", "nowhere.jpg"], "there is no file or folder nowhere.jpg"),
        (["{bare}", "{photo}"], "figures need a bundle with thumbnails"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    trained: TrainedRun, jobs: Jobs, photos: list[Path], tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    bundle = load_bundle(str(trained.folder / "bundle"))
    bare = str(tmp_path / "bare")
    save_bundle(bare, bundle.network, bundle.info.architecture, bundle.classes, {})
    places = {"bundle": trained.folder / "bundle", "photo": photos[0], "bare": bare}
    given = [argument.format(**places) for argument in arguments]
    assert sentence in jobs.run_here("explain", *given, "--output", str(tmp_path / "out")).error


def test_a_bundle_without_thumbnails_explains_in_numbers(
    trained: TrainedRun, jobs: Jobs, photos: list[Path], tmp_path: Path
) -> None:
    bundle = load_bundle(str(trained.folder / "bundle"))
    save_bundle(str(tmp_path / "bare"), bundle.network, bundle.info.architecture, bundle.classes, {})
    output = tmp_path / "out"
    done = jobs.run_here(
        "explain", str(tmp_path / "bare"), str(photos[0]), "--pictures", "none", "--output", str(output)
    )
    assert done.code == 0, done
    written = json.loads((output / "explanations.json").read_text())
    assert [file.name for file in output.iterdir()] == ["explanations.json"]
    assert written[0]["classes"][0]["evidence"][0]["source"] is None
    assert np.isfinite(written[0]["classes"][0]["logit"])

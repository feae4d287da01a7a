"""Images with more pixels than the usual limit, where `data.max_pixels` allows them: every reader must know of it."""

import io
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from PIL import Image
from serving import CLASSES, make_bundle, photo

from protopnet import imaging
from protopnet.config import BirdSettings, DataSettings
from protopnet.datasets.open import open_dataset
from protopnet.datasets.rows import Dataset
from protopnet.model.bundle import load_bundle
from protopnet.passes.describe import THUMBNAIL_SIDE, DescribeTask
from protopnet.predictor import Predictor
from protopnet.training.examples import explained_examples

SIDE = 7_100
LIMIT = 60_000_000


@pytest.fixture(scope="module")
def large() -> bytes:
    assert imaging.MAX_PIXELS < SIDE**2 < LIMIT
    sink = io.BytesIO()
    Image.new("L", (SIDE, SIDE), 90).save(sink, "PNG", compress_level=1)
    return sink.getvalue()


@pytest.fixture(scope="module")
def dataset(large: bytes, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """An image a class, the first of them large."""
    folder = tmp_path_factory.mktemp("images")
    for number, name in enumerate(CLASSES):
        (folder / name).mkdir()
        (folder / name / "1.png").write_bytes(photo(number, kind="PNG") if number else large)
    data = DataSettings(source="folder", path=str(folder), max_pixels=LIMIT, validation=0, test=0)
    source: Any = SimpleNamespace(data=data, birds=BirdSettings(), seed=0)
    return open_dataset(source, str(folder))


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    bundle = load_bundle(make_bundle(tmp_path_factory.mktemp("large"), 0))
    rows = [row | {"thumbnail": photo(row["prototype"])} for row in bundle.prototypes.to_pylist()]
    return Predictor([replace(bundle, prototypes=pa.Table.from_pylist(rows, bundle.prototypes.schema))])


def test_the_report_explains_a_large_image(predictor: Predictor, dataset: Dataset) -> None:
    predictions = pa.table({"image_id": [0], "label": [0], "prediction": [0], "probability": [1.0]})
    [example], _ = explained_examples(predictor, dataset, predictions, LIMIT)
    assert example["name"] == "1.png"
    with pytest.raises(imaging.BadImage, match="more than data.max_pixels"):
        explained_examples(predictor, dataset, predictions)


def test_a_prototype_on_a_large_image_is_described(predictor: Predictor, dataset: Dataset, large: bytes) -> None:
    network = predictor.bundles[0].network
    places = pa.table({"prototype": [0], "image_id": [0], "row": [1], "column": [2]})

    def described(**more: int) -> dict[str, Any]:
        task = DescribeTask(network, places, CLASSES, sources=False, **more).to(torch.device("cpu"))
        images_13HW = imaging.normalise(
            torch.from_numpy(imaging.load(large, predictor.size, LIMIT))[None], predictor.preprocessing
        )
        return task(images_13HW, dataset.table.slice(0, 1)).to_pylist()[0]

    row = described(max_pixels=LIMIT)
    assert (row["width"], row["height"]) == (SIDE, SIDE)
    assert max(Image.open(io.BytesIO(row["thumbnail"])).size) == THUMBNAIL_SIDE
    with pytest.raises(imaging.BadImage, match="more than data.max_pixels"):
        described()

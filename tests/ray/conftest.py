"""A small real ProtoPNet and generated birds, some of them hard on a push: copies, and images of one colour."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from protopnet import imaging
from protopnet.cluster import PassPlan
from protopnet.config import BirdSettings, ModelSettings
from protopnet.datasets.birds import bird_kinds, bird_rows
from protopnet.datasets.reader import ImageReader
from protopnet.datasets.rows import Dataset
from protopnet.datasets.shards import write_shards
from protopnet.model.network import ProtoPNet, build_network, placed
from protopnet.model.prototypes import true_float32
from protopnet.passes.image_pass import PassOptions

SIZE = 64
COPIES = 7  # of one image of each class
BIRDS = BirdSettings(classes=3, train_per_class=12, test_per_class=4, size=SIZE)
MODEL = ModelSettings(
    backbone="resnet18", cut="layer2", image_size=SIZE, prototype_depth=16, prototypes=12, similarity="log"
)


@pytest.fixture(autouse=True)
def _needs_ray(request: pytest.FixtureRequest) -> None:
    if "s3" not in request.node.nodeid:
        request.getfixturevalue("local_ray")


def hard_rows() -> Iterator[dict[str, Any]]:
    """The birds; after the first training image of each class copies of it, and an image of one colour."""
    image_id, copied = 0, set()
    for row in bird_rows(BIRDS):
        following = [row]
        if row["split"] == "train" and row["label"] not in copied:
            copied.add(row["label"])
            following += [row | {"uri": f"{row['uri']}-copy-{n}"} for n in range(COPIES - 1)]
            following.append(row | {"uri": f"{row['uri']}-plain", "image": one_colour(50 * row["label"])})
        for each in following:
            yield each | {"image_id": image_id}
            image_id += 1


def one_colour(value: int) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), (value, 90, 120)).save(sink, "PNG")
    return sink.getvalue()


@pytest.fixture(scope="session")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    uri = str(tmp_path_factory.mktemp("birds"))
    return write_shards(hard_rows(), uri, [kind.name for kind in bird_kinds(BIRDS)], {"kind": "birds"})


@pytest.fixture
def rows(birds: Dataset) -> pa.Table:
    """The training images."""
    return birds.split("train")


@pytest.fixture
def network() -> ProtoPNet:
    torch.manual_seed(0)
    built = placed(build_network(MODEL, BIRDS.classes), torch.device("cpu"))
    assert isinstance(built, ProtoPNet)
    return built


Options = Callable[..., PassOptions]


@pytest.fixture
def options() -> Options:
    """Options of a pass by number of workers, blocks and images a batch, in actors or here; two threads in all."""

    def make(
        workers: int = 1, blocks: int | None = None, batch: int = 64, in_driver: bool = False, **more: Any
    ) -> PassOptions:
        plan = PassPlan(workers, 1.0, 0.0, 2 // workers, in_driver=in_driver)
        return PassOptions(plan, batch_size=batch, blocks=blocks, **more)

    return make


def pixels(rows: pa.Table) -> torch.Tensor:
    """Normalised images of manifest rows."""
    encoded = ImageReader().read(rows, range(len(rows)))
    pixels_BHWC = torch.from_numpy(np.stack([imaging.load(data, SIZE) for data in encoded]))
    return imaging.normalise(pixels_BHWC, imaging.Preprocessing(size=SIZE))


@pytest.fixture(scope="session")
def latents_of() -> Callable[[ProtoPNet, pa.Table], torch.Tensor]:
    """Latent maps of manifest rows, computed here, one image at a time."""

    def compute(network: ProtoPNet, rows: pa.Table) -> torch.Tensor:
        with torch.inference_mode(), true_float32():
            return torch.cat([network.latent(image) for image in pixels(rows).split(1)])

    return compute


@pytest.fixture(scope="session")
def pixels_of() -> Callable[[pa.Table], torch.Tensor]:
    return pixels


@pytest.fixture
def birds_on_disk(birds: Dataset, tmp_path: Path) -> Dataset:
    """The same images as files that a test may delete."""
    files = []
    for n, data in enumerate(ImageReader().read(birds.table, range(len(birds.table)))):
        path = tmp_path / "images" / f"{n:03d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        files.append(str(path))
    columns = {"file": pa.array(files), "uri": pa.array(files)}
    nowhere = pa.array(np.full(len(files), -1, np.int32))
    columns |= {"row_group": nowhere, "row": nowhere}
    table = birds.table
    for name, column in columns.items():
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(at), column)
    return Dataset(birds.classes, table, birds.source, birds.errors)

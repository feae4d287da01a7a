"""One complete tiny run that the tests of jobs share, and one Serve for those of the service."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from browsing import chromium
from installed import build_wheel, install
from PIL import Image
from running_jobs import Finished, Jobs, Left, Scored, TrainedRun
from serving import CLASSES, Client, LocalServe, make_bundle, photo


@pytest.fixture(scope="session")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """Those of the wheel, outside the checkout."""
    folder = tmp_path_factory.mktemp("installed")
    return Jobs(install(build_wheel(folder), folder / "venv"), tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture(scope="session")
def trained(jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    storage = tmp_path_factory.mktemp("runs")
    job = jobs.train(storage, name="tiny")
    assert job.code == 0, job
    return TrainedRun(storage, storage / "tiny", job)


@pytest.fixture(scope="session")
def own_run(jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """Another way through: own folders without splits, start from data, two cycles, log similarity."""
    folder = tmp_path_factory.mktemp("folders")
    random = np.random.default_rng(0)
    for label, name in enumerate(("Cardinal", "Jay", "Wren")):
        (folder / "images" / name).mkdir(parents=True)
        for n in range(14):
            pixels = random.integers(0, 90, (80, 70, 3), np.uint8) + np.uint8(55 * label)
            Image.fromarray(pixels).save(folder / "images" / name / f"{n:02d}.png")
    (folder / "images/Jay/broken.png").write_bytes(b"not an image")
    changes = {"data__source": "folder", "data__path": folder / "images", "train__cycles": 2, "augment__copies": 1}
    changes |= {"model__start": "data", "model__similarity": "log", "model__prototypes": "null"}
    changes |= {"train__warm_epochs": 1, "train__joint_epochs": 0, "train__next_joint_epochs": 1, "train__patience": 2}
    job = jobs.train(folder, name="own", last_layer__copies=0, **changes)
    assert job.code == 0, job
    return TrainedRun(folder, folder / "own", job)


@pytest.fixture(scope="session")
def local_serve(local_ray: None) -> Iterator[LocalServe]:
    serving = LocalServe()
    yield serving
    serving.stop()


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three of the same classes, with different weights; the first knows what is usual."""
    folder = tmp_path_factory.mktemp("bundles")
    names = ("first", "second", "third")
    return [make_bundle(folder / name / "bundle", seed, calibrated=seed == 0) for seed, name in enumerate(names)]


@pytest.fixture(scope="session")
def service(local_serve: LocalServe, bundles: list[str]) -> Client:
    """One bundle, served with the settings nobody changes."""
    return local_serve.deploy("plain", bundles[:1], prefix="/")


@pytest.fixture(scope="session")
def audited(trained: TrainedRun, jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> Left:
    """The audit of that run's bundle."""
    folder = tmp_path_factory.mktemp("audit") / "out"
    arguments = [str(trained.bundle), str(trained.data), "--output", str(folder), "--train_patches", "4"]
    return Left(folder, jobs.run("audit", *arguments))


@pytest.fixture(scope="session")
def evaluated(trained: TrainedRun, jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> Left:
    """Its evaluation, with the quality of its explanations."""
    folder = tmp_path_factory.mktemp("evaluated")
    arguments = ["--output", str(folder), "--quality", "true", "--curve_images", "2", "--compute.threads", "1"]
    return Left(folder, jobs.run("evaluate", str(trained.bundle), str(trained.shards), *arguments))


@pytest.fixture(scope="session")
def scored(jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> Scored:
    """Scores of photos, one in twelve of which is none."""
    folder = tmp_path_factory.mktemp("scored")
    images, bundle = folder / "in", make_bundle(folder / "bundle", 0)
    for n in range(Scored.IMAGES):
        path = images / CLASSES[n % len(CLASSES)] / f"photo {n:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(n, width=90 + n % 7) if n % 12 else b"no picture")
    todo = Scored(images, bundle, folder / "out", Finished(0, "", ""))
    return replace(todo, job=jobs.run("score", *todo.arguments(todo.output)))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = chromium()
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as starter:
        browser = starter.chromium.launch(executable_path=path)
        yield browser
        browser.close()

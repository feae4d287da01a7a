"""One complete tiny run that the tests of jobs share, and one Serve for those of the service."""

from collections.abc import Iterator

import pytest
from running_jobs import Jobs, TrainedRun
from serving import Client, LocalServe, make_bundle


@pytest.fixture(scope="session")
def jobs() -> Jobs:
    return Jobs()


@pytest.fixture(scope="session")
def trained(jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    storage = tmp_path_factory.mktemp("runs")
    job = jobs.train(storage, name="tiny")
    assert job.code == 0, job
    return TrainedRun(storage, storage / "tiny", job)


@pytest.fixture(scope="session")
def local_serve(local_ray: None) -> Iterator[LocalServe]:
    serving = LocalServe()
    yield serving
    serving.stop()


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three of the same classes, with different weights."""
    folder = tmp_path_factory.mktemp("bundles")
    return [make_bundle(folder / name / "bundle", seed) for seed, name in enumerate(("first", "second", "third"))]


@pytest.fixture(scope="session")
def service(local_serve: LocalServe, bundles: list[str]) -> Client:
    """One bundle, served with the settings nobody changes."""
    return local_serve.deploy("plain", bundles[:1], prefix="/")

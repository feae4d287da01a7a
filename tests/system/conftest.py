"""One complete tiny run that the tests of jobs share."""

import pytest
from running_jobs import Jobs, TrainedRun


@pytest.fixture(scope="session")
def jobs() -> Jobs:
    return Jobs()


@pytest.fixture(scope="session")
def trained(jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    storage = tmp_path_factory.mktemp("runs")
    job = jobs.train(storage, name="tiny")
    assert job.code == 0, job
    return TrainedRun(storage, storage / "tiny", job)

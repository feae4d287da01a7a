"""What all tests share. tests/unit and tests/networks (real ones, of torchvision and timm) need no Ray; tests/ray share one
local Ray; tests/system start jobs of their own."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).parents[1]

# How long an example takes says more about what else the machine does than about the code.
hypothesis.settings.register_profile("any machine", deadline=None, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("any machine")


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    """Test networks are tiny: more threads only wait for one another. And sums come out the same every time."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A real Ray on this machine. Four CPUs on paper, whatever there is, so that nothing starves."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_metrics_report_interval_ms", "1000")
    import ray

    from protopnet.cluster import quieten

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    quieten()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of the real test data: CUB-200-2011, weights."""
    folder = Path(os.environ.get("PROTOPNET_TEST_DATA") or ROOT.parent / "shared/data")
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}: set PROTOPNET_TEST_DATA")
    return folder

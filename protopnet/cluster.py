"""Connecting to Ray, and how much of it each kind of work may take.

Actors that hold every CPU starve the tasks that feed them, and Ray Data then waits for ever. The budget here is
the one place that knows this rule: what a plan takes stays below what the cluster has.
"""

import logging
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray

from protopnet.config import ComputeSettings
from protopnet.errors import UserError

# A local Ray is given this many CPUs beyond the real ones. They are bookkeeping: they keep a place free for the
# small tasks between the actors, whatever the machine's size.
SPARE_LOCAL_CPUS = 2


@dataclass(frozen=True)
class TrainPlan:
    """Data-parallel workers of an SGD stage."""

    workers: int
    threads: int
    gpu: bool

    @property
    def resources_per_worker(self) -> dict[str, float]:
        return {"CPU": 1.0, **({"GPU": 1.0} if self.gpu else {})}


@dataclass(frozen=True)
class PassPlan:
    """Actors of a pass over images without gradients."""

    actors: int
    cpus: float
    gpus: float
    threads: int


def connect(compute: ComputeSettings) -> None:
    """Connect to the cluster the settings name, to the one this job was submitted to, or start a local Ray."""
    if ray.is_initialized():
        return
    # Ray Train's controller looks at its workers this often; the default of 2 s would add seconds to each stage.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else C++ notices about healthy actors on stderr
    address = compute.address or os.environ.get("RAY_ADDRESS")
    try:
        with _without_c_stderr():
            _init(address)
    except (ConnectionError, ValueError) as error:
        raise UserError(f"no Ray cluster at {address}: {error}; change compute.address") from error
    quieten()


def _init(address: str | None) -> None:
    if address:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        return
    ray.init(
        address="local",
        num_cpus=(os.cpu_count() or 1) + SPARE_LOCAL_CPUS,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


@contextmanager
def _without_c_stderr() -> Iterator[None]:
    """Drop what Ray's C++ core says on stderr while it starts; what matters is raised as an exception."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def quieten() -> None:
    """Keep Ray's own progress bars and notices out of the jobs' output."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = 600
    for name in ("ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)


def plan_training(compute: ComputeSettings) -> TrainPlan:
    """Workers of an SGD stage: one a GPU, or one in all where there is none."""
    cpus, gpus = _size_of_cluster()
    use_gpu = compute.gpu if compute.gpu is not None else gpus > 0
    if use_gpu and not gpus:
        raise UserError("compute.gpu is true, but the cluster has no GPU; set compute.gpu to false")
    most = gpus if use_gpu else cpus
    workers = compute.workers or (gpus if use_gpu else 1)
    if workers > most:
        raise UserError(
            f"compute.workers is {workers}, but the cluster has {most} {'GPUs' if use_gpu else 'CPUs'}; "
            f"set compute.workers to at most {most}"
        )
    return TrainPlan(workers, compute.threads or max(1, cpus // workers), use_gpu)


def plan_pass(compute: ComputeSettings) -> PassPlan:
    """Actors of a pass: one a GPU; without GPUs one a node, with all of the node's cores as threads."""
    cpus, gpus = _size_of_cluster()
    nodes = max(1, sum(1 for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")))
    use_gpu = compute.gpu if compute.gpu is not None else gpus > 0
    actors = compute.pass_workers or (gpus if use_gpu and gpus else nodes)
    share = ray.cluster_resources().get("CPU", 1.0) - 1
    return PassPlan(
        actors=actors,
        cpus=max(0.1, min(1.0, math.floor(10 * share / actors) / 10)),
        gpus=min(1.0, gpus / actors) if use_gpu and gpus else 0.0,
        threads=max(1, cpus // actors),
    )


def _size_of_cluster() -> tuple[int, int]:
    """Real CPUs and GPUs of all nodes."""
    resources = ray.cluster_resources()
    cpus = int(resources.get("CPU", 1))
    if _is_local():
        cpus -= SPARE_LOCAL_CPUS
    return max(1, cpus), int(resources.get("GPU", 0))


def _is_local() -> bool:
    nodes = ray.nodes()
    return len(nodes) == 1 and int(nodes[0]["Resources"].get("CPU", 0)) == (os.cpu_count() or 1) + SPARE_LOCAL_CPUS

"""Connecting to Ray, and seeing what it has.

What each kind of work may take of it is arithmetic, and in `budget.py`.
"""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import ray

from protopnet import storage
from protopnet.budget import Cluster, Group, Node, PassPlan, TrainPlan, mark, pass_plan, training_plan
from protopnet.config import ComputeSettings
from protopnet.errors import UserError
from protopnet.machine import usable_cpus

__all__ = ["PassPlan", "TrainPlan", "connect", "plan_pass", "plan_training", "quieten", "spread", "survey"]

# A local Ray is given this many CPUs beyond the real ones. They are bookkeeping: they keep a place free for the
# small tasks between the actors, whatever the machine's size.
SPARE_LOCAL_CPUS = 2

_BUILT_IN = {"CPU", "GPU", "memory", "object_store_memory"}

# A socket's path may have so many bytes, and those of a local Ray are this long below its temporary folder.
_SOCKET_PATH = 103 if sys.platform == "darwin" else 107
_BELOW = len("/ray/session_2026-12-31_23-59-59_999999_4194304/sockets/plasma_store")


def connect(compute: ComputeSettings, paths: Mapping[str, str] | None = None) -> None:
    """Connect to the cluster the settings name, to the one this job was submitted to, or start a local Ray.

    paths: by the name of their setting, files and folders that every node must see. `UserError` where one is on this
    machine's disk and others would work, too.
    """
    if not ray.is_initialized():
        _connect(compute)
    context = ray.data.DataContext.get_current()
    context.execution_no_progress_timeout_s = 60 * compute.patience
    others = {node["NodeID"] for node in ray.nodes() if node["Alive"] and _may_work(node["Resources"], compute)}
    check_shared(paths or {}, compute, len(others - {ray.get_runtime_context().get_node_id()}))


def check_shared(paths: Mapping[str, str], compute: ComputeSettings, other_nodes: int) -> None:
    """`UserError` for a path that only this machine sees, where other nodes would work with it."""
    if compute.shared_storage or not other_nodes:
        return
    for setting, path in paths.items():
        if not storage.is_remote(path):
            raise UserError(
                f"{setting} is {path}, a place on this machine, but other nodes of the cluster ({other_nodes}) would work "
                "with it; expected s3://…, or compute.shared_storage true where every node sees the same files there"
            )


def _may_work(resources: dict[str, float], compute: ComputeSettings) -> bool:
    return resources.get("CPU", 0) >= 1 and (compute.nodes is None or compute.nodes in resources)


def _connect(compute: ComputeSettings) -> None:
    address = compute.address or os.environ.get("RAY_ADDRESS")
    if not address:  # no one takes nodes away here, and Ray Train's default of 2 s would add seconds to each stage
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else C++ notices about healthy actors on stderr
    logging.getLogger("ray.widgets").setLevel(logging.ERROR)  # else notes on widgets in every notebook
    on_stop = signal.getsignal(signal.SIGTERM)
    try:
        with _without_c_stderr():
            _init(address)
    except (ConnectionError, ValueError) as error:
        raise UserError(f"no Ray cluster at {address}: {error}; change compute.address") from error
    if callable(on_stop) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_stop)  # Ray's own, put in place by its start, ends the process without a word
    quieten()


def temporary_folder() -> tuple[str, str]:
    """The variable of the environment that says where a local Ray keeps its sockets and logs, and the folder."""
    for variable in ("RAY_TMPDIR", "TMPDIR"):
        if variable in os.environ and not (variable == "TMPDIR" and sys.platform == "darwin"):
            return variable, os.environ[variable]
    return "RAY_TMPDIR", "/tmp"


def check_temporary_folder() -> None:
    """`UserError` where the sockets of a local Ray would have longer names than the system allows."""
    variable, folder = temporary_folder()
    length, longest = len(os.fsencode(folder)), _SOCKET_PATH - _BELOW
    if length > longest:
        raise UserError(
            f"{variable} has {length} characters ({folder}), too many for the sockets of a local Ray; set RAY_TMPDIR to a "
            f"folder of at most {longest}, such as /tmp"
        )


def _init(address: str | None) -> None:
    if address:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        return
    check_temporary_folder()
    ray.init(
        address="local",
        num_cpus=usable_cpus() + SPARE_LOCAL_CPUS,
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
    for name in ("ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)


def plan_training(compute: ComputeSettings) -> TrainPlan:
    """Workers of an SGD stage on the cluster this process is connected to; errors as `budget.training_plan`."""
    return training_plan(compute, survey())


def plan_pass(compute: ComputeSettings) -> PassPlan:
    """Actors of a pass on the cluster this process is connected to; errors as `budget.pass_plan`."""
    return pass_plan(compute, survey())


def spread(compute: ComputeSettings, work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """`map(work, items)` in tasks of a core each on all nodes, results as they come; a `UserError` of one ends them.

    A few more tasks wait than there are cores, so that items may be many. One whose node is lost is done again.
    """
    task = ray.remote(num_cpus=1, max_retries=-1, scheduling_strategy="SPREAD", resources=mark(compute.nodes))(
        _as_value
    )
    running: set[Any] = set()
    waiting = iter(items)
    while True:
        most = 4 + 2 * int(ray.cluster_resources().get("CPU", 1))
        running |= {task.remote(work, item) for item in islice(waiting, most - len(running))}
        if not running:
            return
        done, _ = ray.wait(list(running))
        running -= set(done)
        for value, error in ray.get(done):
            if error is not None:
                raise UserError(error)
            yield value


def _as_value(work: Callable[[Any], Any], item: Any) -> tuple[Any, str | None]:
    try:
        return work(item), None
    except UserError as error:
        return None, str(error)


def survey() -> Cluster:
    """The cluster this process is connected to: its nodes with their real CPUs, and what it may grow to."""
    nodes = [_node(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    if len(nodes) == 1 and int(nodes[0].cpus) == usable_cpus() + SPARE_LOCAL_CPUS:
        return Cluster((replace(nodes[0], cpus=nodes[0].cpus - SPARE_LOCAL_CPUS),), spare_cpus=SPARE_LOCAL_CPUS)
    return Cluster(tuple(nodes), _groups())


def _groups() -> tuple[Group, ...]:
    """What the autoscaler may start; nothing where there is none."""
    # No public call of Ray tells what the cluster may grow to (2.60: `ray.nodes` and the status know what is there);
    # Ray Train and Ray Data read it here too.
    config = ray._private.state.state.get_cluster_config()
    if config is None:
        return ()
    return tuple(
        Group(_node(dict(group.resources)), sys.maxsize if group.max_count < 0 else group.max_count)
        for group in config.node_group_configs
    )


def _node(resources: dict[str, float]) -> Node:
    kinds = frozenset(name for name in resources if name not in _BUILT_IN and ":" not in name)
    return Node(resources.get("CPU", 0), resources.get("GPU", 0), kinds, resources.get("memory", 0))

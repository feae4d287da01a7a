"""How much of a cluster each kind of work takes: arithmetic on what `cluster.survey` found, knows no Ray.

Actors that hold every CPU starve the tasks that feed them, and Ray Data then waits for ever. The budget here is
the one place that knows this rule: what a plan takes stays below what the cluster has.

Only nodes that can run a worker count: a head that offers no CPUs, or a node without the resource that
`compute.nodes` asks for, takes no part. Where the cluster grows by itself, a plan may ask for more than is there now.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from protopnet.config import ComputeSettings, TrainSettings
from protopnet.errors import UserError

# What a worker takes of the resource named by `compute.nodes`: a mark of the node's kind, not a quantity.
MARK = 0.001


@dataclass(frozen=True)
class Node:
    """What a node offers. `kinds`: its custom resources, e.g. `on_demand`; memory: bytes for processes, 0 if unknown."""

    cpus: float
    gpus: float = 0
    kinds: frozenset[str] = frozenset()
    memory: float = 0


@dataclass(frozen=True)
class Group:
    """Nodes of one kind that the autoscaler may start, `most` of them."""

    node: Node
    most: int


@dataclass(frozen=True)
class Cluster:
    """The nodes that are there, and those that could be. `spare_cpus`: bookkeeping beyond the real ones."""

    nodes: tuple[Node, ...]
    groups: tuple[Group, ...] = ()
    spare_cpus: float = 0


@dataclass(frozen=True)
class TrainPlan:
    """Data-parallel workers of an SGD stage: `workers`, or from `fewest` to `workers` where the group may change.

    cpus: that each is given a place for. in_driver: a single one, in the driver's process.
    """

    workers: int
    threads: int
    gpu: bool
    fewest: int | None = None
    share: float = 1.0
    nodes: str | None = None
    cpus: int = 1
    in_driver: bool = False

    @property
    def num_workers(self) -> int | tuple[int, int]:
        """As Ray Train takes it."""
        return self.workers if self.fewest in (None, self.workers) else (self.fewest, self.workers)

    @property
    def resources_per_worker(self) -> dict[str, float]:
        return {"CPU": float(self.cpus), **({"GPU": self.share} if self.gpu else {}), **mark(self.nodes)}


@dataclass(frozen=True)
class PassPlan:
    """Actors of a pass over images without gradients. in_driver: a single one, in the driver's process."""

    actors: int
    cpus: float
    gpus: float
    threads: int
    nodes: str | None = None
    in_driver: bool = False


def mark(nodes: str | None) -> dict[str, float]:
    """The resource that keeps a worker on nodes of this kind."""
    return {nodes: MARK} if nodes else {}


def training_plan(compute: ComputeSettings, cluster: Cluster) -> TrainPlan:
    """Workers of an SGD stage: one a GPU, or one in all where there is none. `UserError` where they don't fit."""
    eligible = _eligible(compute, cluster)
    gpu = _use_gpu(compute, eligible)
    if gpu and not eligible.has_gpus:
        raise UserError(f"compute.gpu is true, but {_which(compute)} no GPU; set compute.gpu to false")
    here = sum(_places(node, compute, gpu) for node in eligible.nodes)
    most = max(here, sum(group.most * _places(group.node, compute, gpu) for group in eligible.groups))
    default = max(1, here) if gpu else 1
    fewest, workers = compute.workers if isinstance(compute.workers, tuple) else (None, compute.workers or default)
    if (fewest or workers) > most:
        raise UserError(
            f"compute.workers is {fewest or workers}{' at least' if fewest else ''}, but {_which(compute)} "
            f"{most} {'GPUs' if gpu else 'CPUs'}; set compute.workers to at most {most}"
        )
    if gpu and workers > 1 and compute.gpu_share <= 0.5:
        raise UserError(
            f"compute.gpu_share is {compute.gpu_share:g}, but two training workers can't share a GPU; "
            "set it above 0.5, or compute.workers to 1"
        )
    room = _threads(eligible, workers, gpu)
    threads = compute.threads or room
    return TrainPlan(
        workers,
        threads,
        gpu,
        fewest,
        share=compute.gpu_share if gpu else 1.0,
        nodes=compute.nodes,
        cpus=min(threads, room),
        in_driver=workers == 1 and fewest is None and cluster.spare_cpus > 0,
    )


def check_batch(plan: TrainPlan, train: TrainSettings) -> None:
    """`UserError` where a step can't be shared out: BatchNorm can't train on one image, nor be shared by CPUs."""
    pieces = plan.workers * train.accumulate
    if pieces > 1 and train.batch_size < 2 * pieces:
        raise UserError(
            f"train.batch_size is {train.batch_size} for {plan.workers} workers together, each in {train.accumulate} "
            f"pieces; expected at least {2 * pieces}, or compute.workers × train.accumulate of at most "
            f"{max(1, train.batch_size // 2)}"
        )
    if train.sync_batchnorm and not plan.gpu:
        raise UserError("train.sync_batchnorm needs GPUs, and there are none (compute.gpu); set it to false")


def pass_plan(compute: ComputeSettings, cluster: Cluster) -> PassPlan:
    """Actors of a pass: as many a GPU as `compute.gpu_share` lets in; without GPUs one a node, with all its cores.

    Where no GPU is there yet but may come, one actor; `compute.pass_workers` asks for more.
    """
    eligible = _eligible(compute, cluster)
    gpu = _use_gpu(compute, eligible) and eligible.has_gpus
    running = [node for node in eligible.nodes if node.gpus] if gpu else list(eligible.nodes)
    places = sum(math.floor(node.gpus / compute.gpu_share + 1e-9) for node in running) if gpu else len(running)
    actors = compute.pass_workers or max(1, places)
    return PassPlan(
        actors=actors,
        cpus=_cpus_of_an_actor(actors, running or [group.node for group in eligible.groups], cluster),
        gpus=_gpus_of_an_actor(actors, sum(node.gpus for node in running), compute.gpu_share) if gpu else 0.0,
        threads=_threads(eligible, actors, gpu),
        nodes=compute.nodes,
        in_driver=actors == 1 and compute.pass_workers is None and cluster.spare_cpus > 0,
    )


@dataclass(frozen=True)
class _Eligible:
    nodes: tuple[Node, ...]
    groups: tuple[Group, ...]

    @property
    def has_gpus(self) -> bool:
        return any(node.gpus for node in (*self.nodes, *(group.node for group in self.groups)))


def _eligible(compute: ComputeSettings, cluster: Cluster) -> _Eligible:
    """The nodes that may run a worker at all."""

    def fits(node: Node) -> bool:
        return node.cpus >= 1 and (compute.nodes is None or compute.nodes in node.kinds)

    found = _Eligible(
        tuple(filter(fits, cluster.nodes)), tuple(group for group in cluster.groups if group.most and fits(group.node))
    )
    if found.nodes or found.groups:
        return found
    if compute.nodes:
        known = sorted({kind for node in _all_nodes(cluster) for kind in node.kinds})
        raise UserError(
            f"compute.nodes is {compute.nodes}, but the cluster has no such nodes; "
            + (f"expected one of {', '.join(known)}" if known else "its nodes have no custom resources: leave it out")
        )
    raise UserError("no node of the cluster offers a CPU: start workers, or Ray on the head without --num-cpus=0")


def _all_nodes(cluster: Cluster) -> Iterable[Node]:
    return (*cluster.nodes, *(group.node for group in cluster.groups))


def _which(compute: ComputeSettings) -> str:
    return f"the cluster's {compute.nodes} nodes have" if compute.nodes else "the cluster has"


def _use_gpu(compute: ComputeSettings, eligible: _Eligible) -> bool:
    return compute.gpu if compute.gpu is not None else eligible.has_gpus


def _places(node: Node, compute: ComputeSettings, gpu: bool) -> int:
    """Training workers that a node has room for: each takes a CPU, and its share of a GPU."""
    by_gpu = math.floor(node.gpus) * math.floor(1 / compute.gpu_share + 1e-9) if gpu else math.inf
    return int(min(math.floor(node.cpus), by_gpu))


def _threads(eligible: _Eligible, workers: int, gpu: bool) -> int:
    """Threads of each of the workers, spread evenly; no more than the smallest node has for those it may get."""
    groups = [group for group in eligible.groups if group.node.gpus or not gpu]
    nodes = [node for node in eligible.nodes if node.gpus or not gpu] or [group.node for group in groups]
    if gpu:
        gpus = max(sum(node.gpus for node in nodes), sum(group.most * group.node.gpus for group in groups))
        on_a_gpu = math.ceil(workers / gpus)
        return max(1, min(math.floor(node.cpus / (node.gpus * on_a_gpu)) for node in nodes))
    on_a_node = math.ceil(workers / max(len(nodes), sum(group.most for group in groups)))
    return max(1, min(math.floor(node.cpus / on_a_node) for node in nodes))


def _cpus_of_an_actor(actors: int, running: list[Node], cluster: Cluster) -> float:
    """At most one, so that it always finds a place; a CPU of the cluster stays free for the tasks between the actors."""
    total = sum(node.cpus for node in cluster.nodes) + cluster.spare_cpus
    if not cluster.nodes or total < 1:  # all of it is still to come
        total = sum(node.cpus for node in running)
    on_a_node = math.ceil(actors / max(1, len(running)))
    room = min((node.cpus + cluster.spare_cpus) / on_a_node for node in running)
    return max(0.1, min(1.0, math.floor(10 * min((total - 1) / actors, room)) / 10))


def _gpus_of_an_actor(actors: int, gpus: float, share: float) -> float:
    """The share asked for; less where more actors were asked for than have room, so that all of them fit."""
    if not gpus:
        return share
    return min(share, 1.0 / math.ceil(actors / gpus))

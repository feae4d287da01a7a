"""What a job would use, before it is started: `--plan` of the jobs prints it and starts nothing.

Numbers come from the settings, the cluster and a forward pass on meta tensors (shapes without contents); none of them
is measured. Hours need a rate, which is asked for: `bench/joint_step.py` measures it on the device in question.
"""

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import Field

from protopnet.budget import Cluster, Node, PassPlan, TrainPlan, check_batch, pass_plan, training_plan
from protopnet.cluster import connect, survey
from protopnet.config import ComputeSettings, RunSettings, Section
from protopnet.datasets.count import Images, count_images
from protopnet.datasets.order import batch_lengths
from protopnet.machine import usable_cpus
from protopnet.memory import Memory, pass_memory, training_memory
from protopnet.model.network import Baseline, ProtoPNet, build_network
from protopnet.training.passes import blocks_of
from protopnet.training.schedule import training_cycles
from protopnet.training.start import IMAGES_PER_CLASS


class PlanSettings(Section):
    """What the job would use, printed instead of starting it (`--plan`)."""

    show: bool = Field(False, description="print the plan and stop; --plan for short")
    images_per_second: float | None = Field(
        None, gt=0, description="what one worker makes of this network (bench/joint_step.py measures it): gives hours"
    )

    @property
    def wanted(self) -> bool:
        return self.show or self.images_per_second is not None


@dataclass(frozen=True)
class Plan:
    """What a job would use, a line each: what, how much, and how that comes about."""

    title: str
    lines: Sequence[tuple[str, str, str]]

    def __str__(self) -> str:
        names, values = (max(len(line[column]) for line in self.lines) for column in (0, 1))
        rows = (f"  {name:<{names}}  {value:<{values}}  {note}".rstrip() for name, value, note in self.lines)
        return "\n".join([self.title, *rows])


def arguments() -> list[str]:
    """The command line, with `--plan` spelt out."""
    return ["--plan.show" if argument == "--plan" else argument for argument in sys.argv[1:]]


def plan_training(settings: RunSettings, cluster: Cluster, images_per_second: float | None = None) -> Plan:
    """What `jobs/train.py` would use on this cluster. `UserError` for what would be refused when it starts."""
    images = count_images(settings)
    network = build_network(settings.model, images.classes, start_weights=False)
    train, passes = training_plan(settings.compute, cluster), pass_plan(settings.compute, cluster)
    check_batch(train, settings.train)
    per_worker = math.ceil(settings.train.batch_size / (train.fewest or train.workers))
    blocks = blocks_of(images.train, passes.actors, settings.push.batch_size)
    work = _work(settings, images)
    lines = [
        ("cluster", _in_words(cluster), _growth(cluster)),
        ("images", f"{images.train:,} training", f"{images.validation:,} validation, {images.test:,} test"),
        ("training", _workers(train), f"{train.threads} threads each{_share(train)}"),
        (
            "  a step",
            f"{settings.train.batch_size} images",
            f"{per_worker} a worker{' at most' if train.fewest else ''}",
        ),
        ("  an epoch", f"{_steps(settings, images):,} steps", f"{_an_epoch(settings, images):,} image passes"),
        ("passes", _actors(passes), f"{passes.threads} threads each; push, last layer, evaluation"),
        ("  a push", f"{blocks:,} blocks", "the unit that a lost actor repeats"),
        *_memory_lines(
            training_memory(network, settings, per_worker),
            pass_memory(network, settings.model.image_size, settings.push.batch_size),
            train.gpu,
        ),
        *_storage_lines(network, settings, images),
        ("image passes", f"{work.training:,} training", f"{work.without:,} without gradients"),
        _hours(work, train, passes, images_per_second),
    ]
    return Plan(f"{settings.name}: what it would use", lines)


def plan_passes(
    title: str, images: int, unit: str, units: int, passes: PassPlan, memory: Memory, images_per_second: float | None
) -> Plan:
    """What a job of one pass over images would use (scoring, evaluation). unit: what its work is cut into."""
    hours = "give --plan.images_per_second"
    if images_per_second:
        hours = _duration(images / (images_per_second * passes.actors))
    lines = [
        ("images", f"{images:,}", ""),
        ("actors", _actors(passes), f"{passes.threads} threads each"),
        (unit, f"{units:,}", "what a lost actor repeats"),
        (f"memory a {'GPU' if passes.gpus else 'actor'}", _bytes(memory.total), f"weights {_bytes(memory.weights)}"),
        ("time", hours, f"at {images_per_second:g} img/s an actor" if images_per_second else ""),
    ]
    return Plan(title, lines)


# ------------------------------------------------------------------------------------------ what there is to do


@dataclass(frozen=True)
class _Work:
    training: int
    without: int


def _work(settings: RunSettings, images: Images) -> _Work:
    """Image passes with and without gradients, of all cycles that there may be."""
    cycles = training_cycles(settings)
    epochs = [stage.epochs for stages in cycles for stage in stages if stage.epochs]
    training = sum(each.end - each.first for each in epochs) * _an_epoch(settings, images)
    checks = sum((each.end - each.first) * images.validation + 2 * images.test for each in epochs)
    if settings.model.kind == "baseline":
        return _Work(training, checks + images.test)
    start = min(images.train, IMAGES_PER_CLASS * images.classes) if settings.model.start == "data" else 0
    similarities = images.train * (1 + settings.last_layer.copies) + images.validation + images.test
    return _Work(training, start + checks + len(cycles) * (images.train + similarities) + images.test)


def _an_epoch(settings: RunSettings, images: Images) -> int:
    return images.train * settings.augment.copies


def _steps(settings: RunSettings, images: Images) -> int:
    return len(batch_lengths(_an_epoch(settings, images), settings.train.batch_size))


def _hours(work: _Work, train: TrainPlan, passes: PassPlan, rate: float | None) -> tuple[str, str, str]:
    if rate is None:
        return "time", "give --plan.images_per_second", "what one worker makes of this network"
    joint, rest = work.training / (rate * train.workers), work.without / (rate * passes.actors)
    note = f"{_duration(joint)} of it training, at {rate:g} img/s a worker; passes, which are faster, counted alike"
    return "time", _duration(joint + rest), note


# -------------------------------------------------------------------------------------------------- in words


def _in_words(cluster: Cluster) -> str:
    cpus, gpus = sum(node.cpus for node in cluster.nodes), sum(node.gpus for node in cluster.nodes)
    return f"{_count(len(cluster.nodes), 'node')}, {_count(int(cpus), 'CPU')}, {_count(int(gpus), 'GPU')}"


def _growth(cluster: Cluster) -> str:
    nodes = sum(group.most for group in cluster.groups if group.node.cpus)
    gpus = sum(group.most * group.node.gpus for group in cluster.groups)
    return f"grows by up to {_count(nodes, 'node')}, {_count(int(gpus), 'GPU')}" if nodes else ""


def _workers(train: TrainPlan) -> str:
    if isinstance(train.num_workers, tuple):
        return f"{train.num_workers[0]} to {train.num_workers[1]} workers"
    return _count(train.workers, "worker")


def _share(train: TrainPlan) -> str:
    kind = f", on {train.nodes} nodes" if train.nodes else ""
    return (f", {train.share:g} GPU each" if train.gpu else ", no GPU") + kind


def _actors(passes: PassPlan) -> str:
    what = f"{passes.gpus:g} GPU" if passes.gpus else f"{passes.cpus:g} CPU"
    return f"{_count(passes.actors, 'actor')}, {what} each"


def _memory_lines(training: Memory, passing: Memory, gpu: bool) -> list[tuple[str, str, str]]:
    place = "GPU" if gpu else "worker"
    parts = ", ".join(f"{name} {_bytes(size)}" for name, size in training.parts)
    context = "; CUDA's own beside it; bf16 keeps half the activations" if gpu else ""
    return [
        (f"memory a {place}, training", _bytes(training.total), parts + context),
        (f"memory a {place}, passes", _bytes(passing.total), ", ".join(f"{n} {_bytes(s)}" for n, s in passing.parts)),
    ]


def _storage_lines(network: ProtoPNet | Baseline, settings: RunSettings, images: Images) -> list[tuple[str, str, str]]:
    state = sum(tensor.nbytes for tensor in network.state_dict().values())
    learnt = sum(parameter.nbytes for parameter in network.parameters())
    lines = [("a checkpoint", _bytes(state + 2 * learnt), f"network {_bytes(state)} and Adam's two moments, an epoch")]
    if isinstance(network, ProtoPNet):
        rows = images.train * (1 + settings.last_layer.copies) + images.validation + images.test
        matrix = rows * len(network.prototypes) * 4
        lines.append(("the last layer's matrix", _bytes(matrix), "in the object stores of the nodes together"))
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"


def _duration(seconds: float) -> str:
    if seconds < 3600:
        return f"{max(1, math.ceil(seconds / 60))} min"
    return f"{seconds / 3600:,.1f} h"


def this_cluster(compute: ComputeSettings) -> Cluster:
    """The cluster that the job would run on; without an address what a local Ray would be, which isn't started."""
    if compute.address or os.environ.get("RAY_ADDRESS"):
        connect(compute)
        return survey()
    return Cluster((Node(usable_cpus(), torch.cuda.device_count()),))

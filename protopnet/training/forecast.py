"""What training would use, before it is begun: `jobs/train.py --plan`."""

import math
from dataclasses import dataclass

from protopnet.budget import Cluster, PassPlan, TrainPlan, check_batch, pass_plan, training_plan
from protopnet.config import RunSettings
from protopnet.datasets.count import Images, count_images
from protopnet.datasets.order import batch_lengths
from protopnet.memory import Memory, pass_memory, training_memory
from protopnet.model.network import Baseline, ProtoPNet, build_network
from protopnet.passes.image_pass import blocks_of
from protopnet.plan import Plan, actors_text, hours_text, size_text
from protopnet.training.schedule import training_cycles
from protopnet.training.start import IMAGES_PER_CLASS, start_bytes
from protopnet.words import counted

_MOST_BESIDE = 2.7  # the peak of the last layer's solver over its rows, at the most that was measured (docs/results.md)


def plan_run(settings: RunSettings, cluster: Cluster, images_per_second: float | None = None) -> Plan:
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
        ("passes", actors_text(passes), f"{passes.threads} threads each; push, last layer, evaluation"),
        ("  a push", f"{blocks:,} blocks", "the unit that a lost actor repeats"),
        *_memory_lines(
            training_memory(network, settings, per_worker),
            pass_memory(network, settings.model.image_size, settings.push.batch_size),
            train.gpu,
        ),
        *_start_lines(network, settings, images),
        *_storage_lines(network, settings, images, sum(node.memory for node in cluster.nodes)),
        ("image passes", f"{work.training:,} training", f"{work.without:,} without gradients"),
        _hours(work, train, passes, images_per_second),
    ]
    return Plan(f"{settings.name}: what it would use", lines)


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
    start = _start_images(images) if settings.model.start == "data" else 0
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
    note = f"{hours_text(joint)} of it training, at {rate:g} img/s a worker; passes, which are faster, counted alike"
    return "time", hours_text(joint + rest), note


def _in_words(cluster: Cluster) -> str:
    cpus, gpus = sum(node.cpus for node in cluster.nodes), sum(node.gpus for node in cluster.nodes)
    return f"{counted(len(cluster.nodes), 'node')}, {counted(int(cpus), 'CPU')}, {counted(int(gpus), 'GPU')}"


def _growth(cluster: Cluster) -> str:
    nodes = sum(group.most for group in cluster.groups if group.node.cpus)
    gpus = sum(group.most * group.node.gpus for group in cluster.groups)
    return f"grows by up to {counted(nodes, 'node')}, {counted(int(gpus), 'GPU')}" if nodes else ""


def _workers(train: TrainPlan) -> str:
    if isinstance(train.num_workers, tuple):
        return f"{train.num_workers[0]} to {train.num_workers[1]} workers"
    return counted(train.workers, "worker")


def _share(train: TrainPlan) -> str:
    kind = f", on {train.nodes} nodes" if train.nodes else ""
    return (f", {train.share:g} GPU each" if train.gpu else ", no GPU") + kind


def _memory_lines(training: Memory, passing: Memory, gpu: bool) -> list[tuple[str, str, str]]:
    place = "GPU" if gpu else "worker"
    context = "; CUDA's own beside it; bf16 keeps half the activations" if gpu else ""
    return [
        (f"memory a {place}, training", size_text(training.total), _parts(training) + context),
        (f"memory a {place}, passes", size_text(passing.total), _parts(passing)),
    ]


def _parts(memory: Memory) -> str:
    return ", ".join(f"{name} {size_text(size)}" for name, size in memory.parts)


def _start_lines(network: ProtoPNet | Baseline, settings: RunSettings, images: Images) -> list[tuple[str, str, str]]:
    if settings.model.start != "data" or not isinstance(network, ProtoPNet):
        return []
    seen = _start_images(images)
    return [("memory, start", size_text(start_bytes(network, seen)), f"patches of {seen:,} images, in the driver")]


def _start_images(images: Images) -> int:
    return min(images.train, IMAGES_PER_CLASS * images.classes)


def _storage_lines(
    network: ProtoPNet | Baseline, settings: RunSettings, images: Images, memory: float
) -> list[tuple[str, str, str]]:
    state = sum(tensor.nbytes for tensor in network.state_dict().values())
    learnt = sum(parameter.nbytes for parameter in network.parameters())
    note = f"network {size_text(state)} and Adam's two moments, an epoch"
    lines = [("a checkpoint", size_text(state + 2 * learnt), note)]
    if isinstance(network, ProtoPNet):
        rows = images.train * (1 + settings.last_layer.copies) + images.validation + images.test
        matrix = rows * len(network.prototypes) * 4
        where = "in the object stores of the nodes together, and once more in what solves it"
        half = settings.last_layer.precision == "float16"
        lines.append(("the last layer's matrix", size_text(matrix), where + (" in float16" if half else "")))
        if memory:
            lines.append(("  what solves it", *_fits(matrix // 2 if half else matrix, memory, half)))
    return lines


def _fits(size: int, memory: float, half: bool) -> tuple[str, str]:
    """Whether rows of this size are solved in the memory of the nodes, and if not, what to do."""
    has = f"the nodes have {size_text(int(memory))} for processes"
    if size * _MOST_BESIDE <= memory:
        return "fits", has
    if not half and size / 2 * _MOST_BESIDE <= memory:
        return "too large", f"{has}: set last_layer.precision to float16"
    return "too large", f"{has}: lower last_layer.copies or model.prototypes, or use more nodes"

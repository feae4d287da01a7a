"""What is counted, and how it is read: Ray's metrics, which every node exports for all processes on it.

Each replica counts for itself, Ray adds who it was (`deployment`, `replica`). So whichever replica answers
`GET /metrics`, it must not answer for itself alone: it asks the exporters of all nodes and passes on what is this
application's, as Prometheus would find it there. Ray collects every 10 s (`RAY_metrics_report_interval_ms`).
"""

import urllib.request
from collections import Counter as TallyOf
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from ray.serve.metrics import Counter, Histogram

from protopnet.model.usual import TENTHS
from protopnet.quality.watch import OfClass

_SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30]
_OURS = "ray_protopnet_"
_TIMEOUT_S = 3
_COUNTED = {"predictions_total": "images", "abstentions_total": "abstained", "unknown_total": "unknown"}


class Metrics:
    """Of one ingress replica. model: hash of what it serves."""

    def __init__(self, model: str) -> None:
        self._requests = Counter(
            "protopnet_requests",
            description="Requests by route and status",
            tag_keys=("route", "status"),  # type: ignore[arg-type]  # Ray means a tuple of any length
        )
        self._seconds = Histogram(
            "protopnet_request_seconds",
            description="Seconds from a request's first byte to the last of its answer",
            boundaries=_SECONDS,
            tag_keys=("route",),
        )
        self._images = Counter("protopnet_images", description="Images answered, by route", tag_keys=("route",))
        of_class: Any = ("class_name", "model")  # Ray means a tuple of any length
        self._predictions = Counter(
            "protopnet_predictions", description="Images by their first class", tag_keys=of_class
        )
        self._abstentions = Counter("protopnet_abstentions", description="Images abstained from", tag_keys=of_class)
        self._unknown = Counter(
            "protopnet_unknown", description="Images that look like nothing known", tag_keys=of_class
        )
        self._tenths = Counter(
            "protopnet_tenths",
            description="Images in each tenth of what is usual, by measure",
            tag_keys=("measure", "tenth", *of_class),  # type: ignore[arg-type]
        )
        self._shadow = Counter(
            "protopnet_shadow",
            description="Images by what the shadow would have said: the same first class, another, or nothing",
            tag_keys=("shadow", "answer", *of_class),  # type: ignore[arg-type]
        )
        self._model = model

    def request(self, route: str, status: int, seconds: float) -> None:
        self._requests.inc(tags={"route": route, "status": str(status)})
        self._seconds.observe(seconds, tags={"route": route})

    def images(self, route: str, seen: Mapping[str, OfClass]) -> None:
        """Images answered, by first class."""
        for class_name, counts in seen.items():
            tags = {"class_name": class_name, "model": self._model}
            self._images.inc(counts.images, tags={"route": route})
            self._predictions.inc(counts.images, tags=tags)
            for counter, number in ((self._abstentions, counts.abstained), (self._unknown, counts.unknown)):
                if number:
                    counter.inc(number, tags=tags)
            for measure, tenths in counts.tenths.items():
                for tenth in (n for n, number in enumerate(tenths) if number):
                    self._tenths.inc(tenths[tenth], tags=tags | {"measure": measure, "tenth": str(tenth)})

    def shadowed(self, shadow: str, answers: Sequence[tuple[str, str]]) -> None:
        """First class and `same`, `other` or `missed` of each image that was answered with a shadow beside."""
        for (class_name, answer), number in TallyOf(answers).items():
            self._shadow.inc(
                number, tags={"class_name": class_name, "model": self._model, "shadow": shadow, "answer": answer}
            )


def samples_of(exported: str, model: str) -> list[Sample]:
    """What `collect` says of a model."""
    families = text_string_to_metric_families(exported)
    return [sample for family in families for sample in family.samples if sample.labels.get("model") == model]


def shadow_of(samples: Iterable[Sample], shadow: str) -> dict[str, dict[str, int]]:
    """Of a shadow beside a model: images by first class and by `same`, `other` and `missed`."""
    found: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(("same", "other", "missed"), 0))
    for sample in samples:
        if sample.name == f"{_OURS}shadow_total" and sample.labels["shadow"] == shadow:
            found[sample.labels["class_name"]][sample.labels["answer"]] += int(sample.value)
    return dict(found)


def seen_by(samples: Iterable[Sample]) -> dict[str, OfClass]:
    """Of the images that a model has answered, by first class."""
    tenths: dict[str, dict[str, list[int]]] = defaultdict(dict)
    numbers: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(_COUNTED.values(), 0))
    for sample in samples:
        name, class_name = sample.name.removeprefix(_OURS), sample.labels["class_name"]
        if name == "tenths_total":
            counts = tenths[class_name].setdefault(sample.labels["measure"], [0] * TENTHS)
            counts[int(sample.labels["tenth"])] += int(sample.value)
        elif name in _COUNTED:
            numbers[class_name][_COUNTED[name]] += int(sample.value)
    return {name: OfClass(**counts, tenths=tenths[name]) for name, counts in numbers.items()}


def collect() -> str:
    """This application's metrics of all nodes in Prometheus' text format. Waits for the network."""
    exporters = [
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for node in ray.nodes()
        if node["Alive"] and node.get("MetricsExportPort")
    ]
    with ThreadPoolExecutor(max(1, min(16, len(exporters)))) as pool:
        return merged(pool.map(_read, exporters))


def _read(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:
            text: str = answer.read().decode()
            return text
    except OSError:  # a node that is going away; its counts are back with the next scrape, or gone with it
        return ""


def merged(exports: Iterable[str]) -> str:
    """What is ours in several exports, each metric's lines together as the format asks for."""
    head: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = defaultdict(list)
    for export in exports:
        name = ""
        about: list[str] = []
        for line in export.splitlines():
            if line.startswith("#"):
                word, named = line.split(" ", 3)[1:3]
                about = [line] if word == "HELP" else [*about, line]
                name = named
            elif line.startswith(_OURS):
                head.setdefault(name, about)
                samples[name].append(line)
    lines = [line for name, about in head.items() for line in (*about, *samples[name])]
    return "\n".join([*lines, ""])

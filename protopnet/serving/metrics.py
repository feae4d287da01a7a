"""What is counted, and how it is read: Ray's metrics, which every node exports for all processes on it.

Each replica counts for itself, Ray adds who it was (`deployment`, `replica`). So whichever replica answers
`GET /metrics`, it must not answer for itself alone: it asks the exporters of all nodes and passes on what is this
application's, as Prometheus would find it there. Ray collects every 10 s (`RAY_metrics_report_interval_ms`).
"""

import urllib.request
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import ray
from ray.serve.metrics import Counter, Histogram

_SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30]
_OURS = "ray_protopnet_"
_TIMEOUT_S = 3


class Metrics:
    """Of one ingress replica."""

    def __init__(self) -> None:
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
        self._predictions = Counter(
            "protopnet_predictions", description="Images by the class predicted", tag_keys=("class_name",)
        )
        self._abstentions = Counter("protopnet_abstentions", description="Images abstained from")

    def request(self, route: str, status: int, seconds: float) -> None:
        self._requests.inc(tags={"route": route, "status": str(status)})
        self._seconds.observe(seconds, tags={"route": route})

    def image(self, route: str, class_name: str, abstained: bool) -> None:
        """An image answered: the class with the highest probability, and whether it was withheld."""
        self._images.inc(tags={"route": route})
        self._predictions.inc(tags={"class_name": class_name})
        if abstained:
            self._abstentions.inc()


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

"""What the benchmarks share: taking turns, ratios with their spread, the record, and the photographs they run on."""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch

from protopnet.config import ModelSettings, RunSettings
from protopnet.datasets.folders import scan_folder
from protopnet.datasets.rows import Dataset
from protopnet.imaging import Preprocessing
from protopnet.machine import usable_cpus
from protopnet.model.bundle import Bundle, BundleInfo
from protopnet.model.network import build_network, placed, set_phase
from protopnet.training.step import mixed_precision

RESULTS = Path(__file__).parent / "results"
Times = dict[str, list[float]]
T = TypeVar("T")
R = TypeVar("R")


# ---------------------------------------------------------------------------------------------- timing


# cpu: of all threads of this process. With one thread a ratio of CPU seconds hardly feels what else is running.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def seconds(work: Callable[[], object], clock: str = "wall") -> float:
    """Seconds of one call, to the end of what it started on a GPU."""
    now = CLOCKS[clock]
    started = now()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return now() - started


def decoded_ahead(items: Sequence[T], decode: Callable[[T, Callable], R], threads: int) -> Iterator[R]:
    """`decode(item, map)` of each; with `threads` > 0 the next one is decoded meanwhile, in that many threads."""
    if not threads:
        yield from (decode(item, map) for item in items)
        return
    with ThreadPoolExecutor(threads) as pool, ThreadPoolExecutor(1) as beside:
        waiting = beside.submit(decode, items[0], pool.map)
        for following in [*items[1:], None]:
            done = waiting.result()
            if following is not None:
                waiting = beside.submit(decode, following, pool.map)
            yield done


def take_turns(methods: dict[str, Callable[[], float]], rounds: int, warm_up: int = 1) -> Times:
    """The measurement each method returns, in every round: A B A B …, so that what disturbs the machine meets all.

    Every second round runs backwards (A B, B A), so that none always follows the same other.
    """
    taken: Times = {name: [] for name in methods}
    for turn in range(-warm_up, rounds):
        names = list(methods) if turn % 2 == 0 else list(reversed(methods))
        for name in names:
            value = methods[name]()
            if turn >= 0:
                taken[name].append(value)
    return taken


@dataclass(frozen=True)
class Ratio:
    """Median of the ratios taken within each round, with the smallest and the largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, over: list[float], under: list[float]) -> "Ratio":
        ratios = [a / b for a, b in zip(over, under, strict=True)]
        return cls(statistics.median(ratios), min(ratios), max(ratios))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"

    def as_figures(self) -> dict[str, float]:
        return {"median": round(self.median, 4), "low": round(self.low, 4), "high": round(self.high, 4)}


def rate_ratio(times: Times, name: str, other: str) -> Ratio:
    """How fast `name` is relative to `other`, from seconds for the same work: above 1 is faster."""
    return Ratio.of(times[other], times[name])


# ---------------------------------------------------------------------------------------- command line


def arguments_of(text: str | None, **defaults: Any) -> argparse.Namespace:
    """Options with the types of their defaults, and --record and --threads, which every benchmark has."""
    parser = argparse.ArgumentParser(description=(text or "").split("\n")[0])
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--threads", type=int, default=usable_cpus(), help="of the measured work")
    parser.add_argument("--record", action="store_true", help="write bench/results/<name>.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    return arguments


def conclude(
    name: str, arguments: argparse.Namespace, figures: dict[str, Any], checks: dict[str, tuple[float, float]]
) -> None:
    """Say of each (figure, least) whether it holds, write the record where asked to, exit with 1 where one fails."""
    for what, (value, least) in checks.items():
        print(f"{'ok  ' if value >= least else 'FAIL'} {what}: {value:.2f}, at least {least:.2f} is asked for")
    if arguments.record:
        RESULTS.mkdir(exist_ok=True)
        about = {
            "benchmark": name,
            "date": datetime.now(UTC).date().isoformat(),
            "machine": machine(arguments.threads),
            "options": {key: value for key, value in vars(arguments).items() if key not in ("record", "threads")},
            "figures": figures,
            "checks": {what: {"value": round(v, 4), "least": least} for what, (v, least) in checks.items()},
        }
        (RESULTS / f"{name}.json").write_text(json.dumps(about, indent=1) + "\n")
    sys.exit(any(value < least for value, least in checks.values()))


def machine(threads: int) -> dict[str, Any]:
    """What the figures depend on. No names and no paths."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "cores": usable_cpus(),
        "threads": threads,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "precision_auto": "bf16" if _is_bf16(device) else "float32",
        "load_average": round(os.getloadavg()[0], 1),
    }


def _is_bf16(device: torch.device) -> bool:
    with mixed_precision(RunSettings().train, device):
        return torch.is_autocast_enabled(device.type)


def table(rows: dict[str, dict[str, str]]) -> str:
    """Print named rows of named cells; returns what was printed."""
    columns = list(next(iter(rows.values())))
    first = max(map(len, rows))
    widths = [max(len(c), *(len(row[c]) for row in rows.values())) for c in columns]
    lines = [["".ljust(first), *(c.rjust(w) for c, w in zip(columns, widths, strict=True))]]
    for name, row in rows.items():
        lines.append([name.ljust(first), *(row[c].rjust(w) for c, w in zip(columns, widths, strict=True))])
    text = "\n".join("  ".join(cells).rstrip() for cells in lines)
    print(text)
    return text


# ------------------------------------------------------------------------------------------------ data


def test_data() -> Path:
    """The folder with photographs and weights: PROTOPNET_TEST_DATA, else ../shared/data."""
    folder = Path(os.environ.get("PROTOPNET_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        sys.exit("this benchmark needs real photographs: set PROTOPNET_TEST_DATA to a folder with cub100/ and weights/")
    return folder.resolve()


def photographs(classes: int, validation: float = 0.0, test: float = 0.0) -> Dataset:
    """The first classes of the CUB crops, all of them training images unless shares are cut off."""
    folder = str(test_data() / "cub100" / "train")
    data = {"source": "folder", "path": folder, "classes": classes, "validation": validation, "test": test}
    return scan_folder(folder, RunSettings.model_validate({"data": data}).data, seed=0)


def resnet18_weights() -> str:
    return str(test_data() / "weights" / "resnet18.pth")


def bundle_of(settings: ModelSettings, classes: int, device: str = "cpu") -> Bundle:
    """A network as built; its prototypes are random, which costs what trained ones cost."""
    torch.manual_seed(0)
    network = build_network(settings, classes)
    set_phase(network, "eval")
    info = BundleInfo(
        format_version=1,
        architecture=settings,
        similarity=settings.similarity,
        classes=[str(label) for label in range(classes)],
        prototype_class=None,
        preprocessing=Preprocessing(size=settings.image_size),
        provenance={},
        sha256="",
        prototypes_sha256=None,
    )
    return Bundle(placed(network, torch.device(device)), info, None, "")

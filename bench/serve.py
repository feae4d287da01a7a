"""(f) The service over HTTP against the CPU seconds that its parts need.

    python bench/serve.py [--seconds 20 --rounds 3 --classes 200] [--record]

Three parts are measured apart, in CPU seconds a request: a Serve application that reads the body and answers with a
constant, with Serve's own processes and the client's (they share the machine); decoding and resizing; and the forward
pass of a ResNet-18 at 224 pixels in batches as large as those of the service. Their sum is the budget: cores / budget
requests a second would be the most that this machine could serve if there were nothing else to do. The real service at
32 clients should reach 0.80 of it. Latencies are told for 1, 8 and 32 clients, and what explanations cost beside
predictions: at most 1.3 times as much, by throughput at 32 clients and by the median at one. The member has as many
replicas as there are cores, of one thread each, unless --replicas and --member-threads say otherwise.
"""

import argparse
import asyncio
import itertools
import os
import socket
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import torch
from common import Ratio, arguments_of, conclude, photographs, resnet18_weights, table
from fastapi import FastAPI, Request
from ray import serve

from protopnet import imaging
from protopnet.cluster import connect
from protopnet.config import ComputeSettings, ModelSettings
from protopnet.datasets.reader import ImageReader
from protopnet.machine import usable_cpus
from protopnet.model.bundle import save_bundle
from protopnet.model.network import build_network
from protopnet.predictor import Predictor
from protopnet.serving.app import build
from protopnet.serving.settings import AppSettings

CLIENTS = (1, 8, 32)
LEAST_SHARE, MOST_FOR_EXPLAINING = 0.80, 1.3
PHOTOS = 64


class NoOp:
    """A Serve application that only takes the body in."""

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = FastAPI()

        @app.post("/v1/predict")
        async def predict(request: Request) -> dict[str, int]:
            return {"bytes": len(await request.body())}

        return app


@dataclass(frozen=True)
class Run:
    """Of some clients that each send one request after the other."""

    latencies: list[float]
    wall: float
    cpu: float

    @property
    def rate(self) -> float:
        return len(self.latencies) / self.wall

    @property
    def cpu_a_request(self) -> float:
        return self.cpu / len(self.latencies)

    def percentile(self, percent: float) -> float:
        return float(np.percentile(self.latencies, percent))


def make_bundle(folder: str, classes: int) -> str:
    """ResNet-18 at 224 pixels, ten prototypes a class. Not trained: that changes nothing of what it costs."""
    settings = ModelSettings(backbone="resnet18", weights=resnet18_weights(), image_size=224)
    torch.manual_seed(0)
    network = build_network(settings, classes).eval()
    save_bundle(folder, network, settings, [f"class {n}" for n in range(classes)], {})
    return folder


def decoding(encoded: Sequence[bytes], size: int) -> float:
    """CPU seconds an image, to the pixels of the network's input."""
    started = time.process_time()
    for data in encoded:
        imaging.load(data, size)
    return (time.process_time() - started) / len(encoded)


def forward(predictor: Predictor, pixels_BHWC: np.ndarray, threads: int) -> float:
    """CPU seconds an image, in a batch of these, by as many threads as in the service."""
    torch.set_num_threads(threads)
    started = time.process_time()
    predictor.scores(imaging.normalise(torch.from_numpy(pixels_BHWC), predictor.preprocessing))
    return (time.process_time() - started) / len(pixels_BHWC)


def drive(url: str, bodies: Sequence[bytes], clients: int, seconds: float) -> Run:
    """That many clients for that long, on connections that stay open."""

    async def clients_of() -> list[float]:
        latencies: list[float] = []
        turns = itertools.cycle(bodies)
        connector = aiohttp.TCPConnector(limit=clients)
        async with aiohttp.ClientSession(connector=connector) as session:
            end = time.perf_counter() + seconds

            async def client() -> None:
                while time.perf_counter() < end:
                    started = time.perf_counter()
                    async with session.post(url, data=next(turns)) as answer:
                        await answer.read()
                        assert answer.status == 200, await answer.text()
                    latencies.append(time.perf_counter() - started)

            await asyncio.gather(*(client() for _ in range(clients)))
        return latencies

    cpu, started = cpu_of_tree(), time.perf_counter()
    latencies = asyncio.run(clients_of())
    return Run(latencies, time.perf_counter() - started, cpu_of_tree() - cpu)


def cpu_of_tree() -> float:
    """CPU seconds so far of this process and all below it: the client, Ray and Serve."""
    children: dict[int, list[int]] = defaultdict(list)
    ticks: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        pid = int(stat.parent.name)
        children[int(fields[1])].append(pid)
        ticks[pid] = int(fields[11]) + int(fields[12])
    total, waiting = 0, [os.getpid()]
    while waiting:
        pid = waiting.pop()
        total += ticks.get(pid, 0)
        waiting += children[pid]
    return total / os.sysconf("SC_CLK_TCK")


def start(uri: str, replicas: int, threads: int) -> tuple[str, str, AppSettings]:
    """Serve with the application that does nothing, and the real one: their addresses."""
    member = {"threads": threads, "min_replicas": replicas, "max_replicas": replicas}
    connect(ComputeSettings())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"encoding": "JSON"})
    settings = AppSettings.model_validate({"bundles": [uri], "member": member})
    idle = serve.deployment(
        max_ongoing_requests=100, ray_actor_options={"num_cpus": 0.1}, logging_config={"encoding": "JSON"}
    )(serve.ingress()(NoOp))
    serve.run(idle.bind(), name="noop", route_prefix="/noop")
    serve.run(build(settings), name="real", route_prefix="/")
    return f"http://127.0.0.1:{port}/noop/v1/predict", f"http://127.0.0.1:{port}/v1", settings


def measure(arguments: argparse.Namespace, folder: str) -> tuple[dict[str, Any], dict[str, tuple[float, float]]]:
    rows = photographs(20).split("train").slice(0, PHOTOS)
    encoded = ImageReader().read(rows, range(len(rows)))
    uri = make_bundle(folder, arguments.classes)
    threads = arguments.member_threads
    noop, real, settings = start(uri, arguments.replicas or usable_cpus(), threads)
    predictor = Predictor.load([uri])
    with ThreadPoolExecutor() as pool:
        pixels = np.stack(list(pool.map(lambda data: imaging.load(data, predictor.size), encoded)))
    batch_BHWC = np.resize(pixels, (settings.member.max_batch, *pixels.shape[1:]))

    for url in (noop, f"{real}/predict", f"{real}/explain"):
        drive(url, encoded, 32, 2)  # warm up
    parts: dict[str, list[float]] = defaultdict(list)
    runs: dict[tuple[str, int], list[Run]] = defaultdict(list)
    for _ in range(arguments.rounds):
        runs["noop", 32].append(drive(noop, encoded, 32, arguments.seconds / 2))
        parts["Serve, doing nothing"].append(runs["noop", 32][-1].cpu_a_request)
        parts["decoding"].append(decoding(encoded, predictor.size))
        parts["forward pass"].append(statistics.median(forward(predictor, batch_BHWC, threads) for _ in range(5)))
        for clients in CLIENTS:
            for route in ("predict", "explain"):
                runs[route, clients].append(drive(f"{real}/{route}", encoded, clients, arguments.seconds))
    serve.shutdown()
    return conclusions(parts, runs)


def conclusions(
    parts: dict[str, list[float]], runs: dict[tuple[str, int], list[Run]]
) -> tuple[dict[str, Any], dict[str, tuple[float, float]]]:
    cores = usable_cpus()
    budgets = [sum(values) for values in zip(*parts.values(), strict=True)]
    most = [cores / budget for budget in budgets]
    share = Ratio.of([run.rate for run in runs["predict", 32]], most)
    rates = {route: [run.rate for run in runs[route, 32]] for route in ("predict", "explain")}
    medians = {route: [run.percentile(50) for run in runs[route, 1]] for route in ("predict", "explain")}
    by_rate = Ratio.of(rates["predict"], rates["explain"])
    by_median = Ratio.of(medians["explain"], medians["predict"])

    milliseconds = {name: 1000 * statistics.median(values) for name, values in parts.items()}
    milliseconds["budget"] = 1000 * statistics.median(budgets)
    for name, value in milliseconds.items():
        print(f"{name:<22} {value:6.2f} ms of CPU a request")
    for route in ("predict", "explain"):
        spent = statistics.median(run.cpu_a_request for run in runs[route, 32])
        milliseconds[f"spent by {route}"] = 1000 * spent
        print(f"{'spent by ' + route:<22} {1000 * spent:6.2f} ms")
    told = {
        f"{route}, {clients} client{'s' * (clients > 1)}": {
            "requests/s": f"{statistics.median(run.rate for run in found):.1f}",
            "p50 ms": f"{1000 * statistics.median(run.percentile(50) for run in found):.1f}",
            "p99 ms": f"{1000 * statistics.median(run.percentile(99) for run in found):.1f}",
        }
        for (route, clients), found in runs.items()
    }
    table(told)
    print(f"cores / budget: {statistics.median(most):.1f} requests/s; reached: {share}")
    print(f"explain beside predict: {by_rate} by throughput at 32 clients, {by_median} by the median at one")
    figures = {
        "cpu_milliseconds_a_request": {name: round(value, 3) for name, value in milliseconds.items()},
        "most_requests_a_second": round(statistics.median(most), 2),
        "share_of_it": share.as_figures(),
        "runs": {name: {key: float(value) for key, value in row.items()} for name, row in told.items()},
        "explain_beside_predict": {"throughput": by_rate.as_figures(), "median": by_median.as_figures()},
    }
    checks = {
        "throughput at 32 clients, of cores / budget": (share.median, LEAST_SHARE),
        "1.3 / (explain beside predict, throughput)": (MOST_FOR_EXPLAINING / by_rate.median, 1.0),
        "1.3 / (explain beside predict, median)": (MOST_FOR_EXPLAINING / by_median.median, 1.0),
    }
    return figures, checks


def main() -> None:
    arguments = arguments_of(__doc__, seconds=20.0, rounds=3, classes=200, replicas=0, member_threads=1)
    with tempfile.TemporaryDirectory() as folder:
        figures, checks = measure(arguments, folder)
    conclude("serve", arguments, figures, checks)


if __name__ == "__main__":
    main()

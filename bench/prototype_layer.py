"""The prototype layer, forward and backward: peak extra memory and time.

    python bench/prototype_layer.py [--prototypes 100000] [--batch 64] [--device cpu|cuda] [--threads N]

Three ways, each in a process of its own since the peak of a process never falls again: `ours`
(protopnet.model.prototypes), `plain` (the whole map of distances by autograd, as one would write
it; only where it fits) and `gemm` (the bare matrix products that `plain` can't do without: one
forward, two backward). Extra memory is the peak above what the inputs and their gradients take.
On a machine that others use too, take one thread and compare the CPU seconds. Exits with 1 if ours needs 1 GB or more.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from protopnet.model.prototypes import distance_maps, min_distances, similarity

LIMIT = 1e9
ROUNDS = 3
LIBC = ctypes.CDLL(None)


def ours(z_BDHW: Tensor, prototypes_PDhw: Tensor) -> None:
    distances_BP, _ = min_distances(z_BDHW, prototypes_PDhw, "log")
    similarity(distances_BP, "log").sum().backward()


def plain(z_BDHW: Tensor, prototypes_PDhw: Tensor) -> None:
    distances_BP = distance_maps(z_BDHW, prototypes_PDhw, "log").flatten(2).min(dim=2).values
    similarity(distances_BP, "log").sum().backward()


def gemm(z_BDHW: Tensor, prototypes_PDhw: Tensor) -> None:
    """The same chunks as ours, nothing but products."""
    with torch.no_grad():
        patches_NQ = z_BDHW.permute(0, 2, 3, 1).flatten(0, 2).contiguous()
        z_BDHW.grad = torch.zeros_like(z_BDHW)
        grad_NQ = torch.zeros_like(patches_NQ)
        for prototypes_CQ in prototypes_PDhw.flatten(1).split(512):
            product_NC = patches_NQ @ prototypes_CQ.t()
            grad_NQ.addmm_(product_NC, prototypes_CQ)
            product_NC.t() @ patches_NQ


METHODS: dict[str, Callable[[Tensor, Tensor], None]] = {"ours": ours, "plain": plain, "gemm": gemm}


class PeakMemory:
    """Peak memory of a block above what was in use before, in bytes."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.peak = 0

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        if hasattr(LIBC, "malloc_trim"):
            LIBC.malloc_trim(0)  # what was freed, and would be taken again unseen
        self.start = self._now()
        self.done = threading.Event()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            self.watcher = threading.Thread(target=self._watch)
            self.watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        if self.device == "cuda":
            self.peak = torch.cuda.max_memory_allocated() - self.start
        else:
            self.watcher.join()

    def _now(self) -> int:
        return torch.cuda.memory_allocated() if self.device == "cuda" else resident_bytes()

    def _watch(self) -> None:
        while not self.done.wait(0.002):
            self.peak = max(self.peak, resident_bytes() - self.start)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measure(
    method: str, prototypes: int, depth: int, side: int, batch: int, device: str, threads: int
) -> dict[str, float]:
    """Extra memory in bytes and the best of a few times in seconds."""
    torch.set_num_threads(threads)
    run = METHODS[method]
    run(torch.rand(2, 4, 3, 3, requires_grad=True), torch.rand(5, 4, 1, 1, requires_grad=True))  # loads libraries
    z = torch.rand(batch, depth, side, side, device=device, requires_grad=True)
    p = torch.rand(prototypes, depth, 1, 1, device=device, requires_grad=True)
    # Their gradients are the result, not extra.
    z.grad, p.grad = torch.ones_like(z), torch.ones_like(p)
    seconds, cpu_seconds = [], []
    with PeakMemory(device) as memory:
        for _ in range(ROUNDS):
            start, cpu_start = time.perf_counter(), time.process_time()
            run(z, p)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            cpu_seconds.append(time.process_time() - cpu_start)
    return {"extra_bytes": memory.peak, "seconds": min(seconds), "cpu_seconds": min(cpu_seconds)}


def in_own_process(method: str, arguments: argparse.Namespace) -> dict[str, float]:
    sizes = [f"--{name}={value}" for name, value in vars(arguments).items() if name != "only"]
    done = subprocess.run([sys.executable, __file__, "--only", method, *sizes], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prototypes", type=int, default=100_000)
    parser.add_argument("--depth", type=int, default=128)
    parser.add_argument("--side", type=int, default=7)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", choices=METHODS, help="measure this one, in this process, and print JSON")
    arguments = parser.parse_args()
    sizes = {name: value for name, value in vars(arguments).items() if name != "only"}
    if arguments.only:
        print(json.dumps(measure(arguments.only, **sizes)))
        return

    map_bytes = 4 * arguments.batch * arguments.prototypes * arguments.side**2
    methods = [method for method in METHODS if method != "plain" or map_bytes < 2e9]
    results = {method: in_own_process(method, arguments) for method in methods}
    for method, result in results.items():
        print(
            f"{method:6} {result['seconds'] * 1e3:9.1f} ms {result['cpu_seconds'] * 1e3:9.1f} ms CPU "
            f"{result['extra_bytes'] / 1e6:9.1f} MB extra"
        )
    for other in methods[1:]:
        ratios = [results["ours"][key] / results[other][key] for key in ("seconds", "cpu_seconds")]
        print(f"ours / {other}: time {ratios[0]:.2f}, CPU time {ratios[1]:.2f}")
    print(f"extra memory of ours / limit of 1 GB: {results['ours']['extra_bytes'] / LIMIT:.3f}")
    sys.exit(results["ours"]["extra_bytes"] >= LIMIT)


if __name__ == "__main__":
    main()

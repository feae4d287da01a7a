"""Bulk scoring against a plain loop that only decodes and forwards, and its memory for ten times the images.

    python bench/score.py [--images 2000 --size 224 --rounds 3 --explain 5] [--record]

Over the same photographs, in float32 with the same threads, taking turns:
`score`           the whole job in this process, `protopnet.scoring.job.score`: list, manifest, Ray Data, Parquet;
`score, evidence` the same with the prototypes behind each prediction;
`loop`            decode an image, decode the next, forward the batch: nothing else. `loop, decoding ahead` decodes the
                  next batch in threads meanwhile, which the plain loop doesn't.
The start (actors that load torch and the weights) is a cost of each job that doesn't grow with the images: it is named,
and ratios are without it. `--threads` is for the loop; the job takes all cores, as it does for users.
Memory is the most that all processes of a job of its own share out among them at a time, with a small network, over
generated JPEGs, for `--few` images and for `--many`; `--many 0` leaves it out.
"""

import contextlib
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import count, islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from common import Ratio, arguments_of, conclude, decoded_ahead, resnet18_weights, seconds, table, take_turns, test_data
from PIL import Image

from protopnet import imaging, storage
from protopnet.cluster import connect
from protopnet.config import ComputeSettings, ModelSettings
from protopnet.model.bundle import PROTOTYPE_SCHEMA, save_bundle
from protopnet.model.network import ProtoPNet, build_network, set_phase
from protopnet.predictor import Predictor
from protopnet.progress import Reporter
from protopnet.scoring.job import ScoreSettings, score

ROOT = Path(__file__).parents[1]
BATCH = 64
LIMITS = {"score": 0.85, "score, evidence": 0.75}
MEMORY_LIMIT = 1.2


class Silent(Reporter):
    def begin(self, stage: str, images: int) -> None: ...
    def advance(self, images_done: int) -> None: ...
    def note(self, text: str) -> None: ...
    def end(self, stage: str, seconds: float, text: str) -> None: ...
    def close(self) -> None: ...


# ------------------------------------------------------------------------------------------------ processes


def _family(pid: int) -> list[int]:
    """A process and all below it."""
    children: dict[int, list[int]] = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            children[int(stat.read_text().rpartition(")")[2].split()[1])].append(int(stat.parent.name))
    found = [pid]
    for parent in found:
        found += children[parent]
    return found


def memory(pid: int) -> int:
    """Bytes that a process and all below it hold; what they share is counted once."""
    total = 0
    for member in _family(pid):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{member}/smaps_rollup").read_text().splitlines()
            total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


# ---------------------------------------------------------------------------------------------------- speed


class Subject:
    """A bundle with ImageNet's backbone, photographs, and the ways to score them."""

    def __init__(self, folder: Path, images: int, size: int, explain: int) -> None:
        self.folder, self.explain = folder, explain
        photos = islice(
            (file for file in storage.each_file(str(test_data() / "cub100")) if file.endswith(".jpg")), images
        )
        self.files = list(photos)
        model = ModelSettings.model_validate(
            {"backbone": "resnet18", "weights": resnet18_weights(), "image_size": size, "similarity": "cosine"}
        )
        self.bundle = make_bundle(folder / "bundle", model, classes=20)
        self.predictor = Predictor.load([self.bundle]).to(torch.device("cpu"))
        self.list = folder / "photographs.txt"
        self.list.write_text("\n".join(self.files))
        self.numbers = count()
        self.starts: list[float] = []
        connect(ComputeSettings())

    def score(self, explain: int = 0) -> float:
        """Seconds from when the first actor is ready to the job's end."""
        settings = ScoreSettings(
            bundle=[self.bundle],
            input=str(self.list),
            output=str(self.folder / f"out{next(self.numbers)}"),
            batch_size=BATCH,
            explain=explain,
        )
        began = time.time()
        summary, _ = score(settings, Silent(), began)
        self.starts.append(summary["run"]["seconds"]["start"])
        return time.time() - began - self.starts[-1]

    def loop(self, ahead: int = 0) -> float:
        return seconds(lambda: self._loop(ahead))

    def _loop(self, ahead: int) -> None:
        slices = [self.files[start : start + BATCH] for start in range(0, len(self.files), BATCH)]
        for pixels_BHWC in decoded_ahead(slices, self._decode, ahead):
            self.predictor.scores(imaging.normalise(torch.from_numpy(pixels_BHWC), self.predictor.preprocessing))

    def _decode(self, files: list[str], over: Callable) -> np.ndarray:
        return np.stack(list(over(lambda file: imaging.load(Path(file).read_bytes(), self.predictor.size), files)))


def make_bundle(folder: Path, model: ModelSettings, classes: int) -> str:
    """Random prototypes and connections, which cost what trained ones cost."""
    torch.manual_seed(0)
    network = build_network(model, classes)
    set_phase(network, "eval")
    assert isinstance(network, ProtoPNet)
    rows = pa.Table.from_pylist([{"uri": f"{n}.jpg"} for n in range(len(network.prototypes))], PROTOTYPE_SCHEMA)
    save_bundle(str(folder), network, model, [str(label) for label in range(classes)], {}, rows)
    return str(folder)


# --------------------------------------------------------------------------------------------------- memory


def peak_memory(folder: Path, images: int) -> float:
    """MB of a job over so many generated images, all its processes together."""
    model = ModelSettings(backbone="resnet18", cut="layer1", image_size=64, prototype_depth=16, prototypes=20)
    bundle = make_bundle(folder / "small", model, classes=10)
    made = folder / "made"
    made.mkdir(exist_ok=True)
    for n in range(50):
        (made / f"{n}.jpg").write_bytes(_noise(n))
    source = folder / f"list{images}.txt"
    source.write_text("\n".join(f"made/{n % 50}.jpg" for n in range(images)))
    command = [sys.executable, str(ROOT / "jobs" / "score.py"), "--bundle", bundle, "--input", str(source)]
    job = subprocess.Popen([*command, "--output", str(folder / f"scores{images}")], stdout=subprocess.DEVNULL)
    peak = 0
    while job.poll() is None:
        peak = max(peak, memory(job.pid))
        time.sleep(0.2)
    assert job.returncode == 0
    return peak / 1e6


def _noise(seed: int) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(coarse).resize((320, 240), Image.Resampling.BICUBIC).save(sink, "JPEG")
    return sink.getvalue()


def main() -> None:
    arguments = arguments_of(__doc__, images=2000, size=224, explain=5, rounds=3, few=2000, many=20000)
    # Ray is begun with these threads for its actors too.
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    checks, figures = {}, {"images": arguments.images}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.many:
            peaks = {n: peak_memory(folder, n) for n in (arguments.few, arguments.many)}
            growth = peaks[arguments.many] / peaks[arguments.few]
            print(", ".join(f"{n:,} images: {peak:,.0f} MB at most" for n, peak in peaks.items()), f"({growth:.2f}x)")
            figures["peak_memory_mb"] = {str(n): round(peak) for n, peak in peaks.items()}
            # `conclude` asks for at least so much: the smaller job's memory relative to the larger one's.
            checks["memory of few / many images"] = (1 / growth, 1 / MEMORY_LIMIT)
        subject = Subject(folder, arguments.images, arguments.size, arguments.explain)
        methods: dict[str, Callable[[], float]] = {
            "score": subject.score,
            "score, evidence": lambda: subject.score(arguments.explain),
            "loop": subject.loop,
            "loop, decoding ahead": lambda: subject.loop(ahead=arguments.threads),
        }
        times = take_turns(methods, arguments.rounds, warm_up=0)
    table({name: {"img/s": f"{arguments.images / statistics.median(values):.1f}"} for name, values in times.items()})
    start = statistics.median(subject.starts)
    print(f"start, not in these: {start:.1f} s")
    ratios = {
        f"{name} / {other}": Ratio.of(times[other], times[name])
        for other in ("loop", "loop, decoding ahead")
        for name in LIMITS
    }
    for what, ratio in ratios.items():
        print(f"{what}, images a second: {ratio}")
    figures |= {
        "start_seconds": round(start, 2),
        "images_per_second": {
            name: round(arguments.images / statistics.median(values), 2) for name, values in times.items()
        },
        "ratios": {what: ratio.as_figures() for what, ratio in ratios.items()},
    }
    checks |= {f"{name} / loop": (ratios[f"{name} / loop"].median, least) for name, least in LIMITS.items()}
    conclude("score", arguments, figures, checks)


if __name__ == "__main__":
    main()

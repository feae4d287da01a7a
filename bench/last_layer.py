"""(d) The convex last layer against twenty epochs of it through the whole network, the authors' way.

    python bench/last_layer.py [--classes 20 --size 224 --copies 1] [--record]

`ours` is `protopnet.training.last_layer`: one pass over the rows (an image, or an augmented copy of one) that caches
their similarities, then the solver; with the start of its actors, reading, decoding and augmenting.
`authors` is Adam (rate 1e-4, batches of 80) on the class connections alone, with every batch forwarded through the
network. Its time is EXTRAPOLATED: the median over a few batches, times the batches of 20 epochs over the same rows.
The batches are in memory already, so nothing of reading or decoding is in it: that favours it.

For its objective all 20 epochs are really run, on the cached similarities: the network below is fixed, so it is the
same function of the class connections. Both objectives are cross-entropy + l1 (what the authors minimise), and the
same with the solver's ridge. At least 10x the speed is asked for, at an equal or lower objective.
"""

import argparse
import statistics
import time

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from common import arguments_of, conclude, photographs, resnet18_weights, seconds

from protopnet import imaging
from protopnet.cluster import connect, plan_pass
from protopnet.config import RunSettings
from protopnet.datasets.reader import ImageReader
from protopnet.model.losses import off_class_l1
from protopnet.model.network import ProtoPNet, build_network, placed, set_phase
from protopnet.passes.image_pass import PassOptions, run_pass
from protopnet.passes.push import apply_push, push
from protopnet.training.connections import anchor_KP, off_class_KP
from protopnet.training.last_layer import (
    LastLayerResult,
    SimilarityTask,
    optimise_last_layer,
    with_copies,
)
from protopnet.training.start import sample_patches, start_from_patches

EPOCHS, RATE, BATCH = 20, 1e-4, 80  # as published


class Subject:
    """A pushed ProtoPNet and the rows to fit its last layer on."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        data = photographs(arguments.classes)
        self.rows, self.size = data.split("train"), arguments.size
        self.settings = RunSettings.model_validate(
            {
                "model": {"backbone": "resnet18", "weights": resnet18_weights(), "image_size": arguments.size},
                "compute": {"threads": arguments.threads, "gpu": False},
                "last_layer": {"copies": arguments.copies},
            }
        )
        self.options = self._options()
        torch.manual_seed(0)
        network = build_network(self.settings.model, len(data.classes))
        assert isinstance(network, ProtoPNet)
        self.network = network
        start_from_patches(network, sample_patches(network, self.rows, seed=0, options=self.options), seed=0)
        apply_push(network, push(network, self.rows, distinct=True, options=self.options))

    def _options(self) -> PassOptions:
        connect(self.settings.compute)
        return PassOptions(plan=plan_pass(self.settings.compute), augment=self.settings.augment)

    def ours(self) -> tuple[LastLayerResult, float, float]:
        """The result, the seconds it took, and those of them after the pass."""
        told: list[float] = []
        started = time.perf_counter()
        result = optimise_last_layer(
            self.network,
            self.settings.model.own_connection,
            self.rows,
            settings=self.settings.last_layer,
            options=self.options,
            on_images=lambda images: told.append(time.perf_counter()),
        )
        ended = time.perf_counter()
        return result, ended - started, ended - told[0]

    def similarities(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The same matrix once more, here, with its labels."""
        rows = with_copies(self.rows, self.settings.last_layer.copies)
        outputs = run_pass(rows, SimilarityTask(self.network), self.options)
        table = pa.concat_tables([output for _, output in outputs])
        flat = table["similarities"].combine_chunks().flatten().to_numpy()
        labels = torch.from_numpy(table["label"].to_numpy().astype(np.int64))
        return torch.from_numpy(flat.reshape(len(table), -1).copy()), labels

    def seconds_a_batch(self, batches: int) -> float:
        """Of the authors' way: the whole network forward, the last layer back and one step; median."""
        network = placed(self.network, torch.device("cpu"))
        set_phase(network, "eval")
        network.last_layer.requires_grad_(True)
        optimiser = torch.optim.Adam([network.last_layer.weight], lr=RATE)
        encoded = ImageReader().read(self.rows, range(min(BATCH, len(self.rows))))
        pixels_BHWC = torch.from_numpy(np.stack([imaging.load(data, self.size) for data in encoded]))
        labels_B = torch.from_numpy(self.rows["label"].to_numpy()[: len(encoded)].astype(np.int64))
        before = network.last_layer.weight.detach().clone()

        def step() -> None:
            logits_BK = network(imaging.normalise(pixels_BHWC, network.preprocessing)).logits_BK
            self._loss(logits_BK, labels_B, network.last_layer.weight).backward()
            optimiser.step()
            optimiser.zero_grad()

        step()
        taken = [seconds(step) for _ in range(batches)]
        with torch.no_grad():
            network.last_layer.weight.copy_(before)
        network.last_layer.requires_grad_(False)
        return statistics.median(taken)

    def twenty_epochs(self, similarities_nP: torch.Tensor, labels_n: torch.Tensor) -> np.ndarray:
        """The class connections after the authors' 20 epochs."""
        weight = self.network.last_layer.weight.detach().clone().requires_grad_()
        optimiser = torch.optim.Adam([weight], lr=RATE)
        random = torch.Generator().manual_seed(0)
        for _ in range(EPOCHS):
            for batch in torch.randperm(len(labels_n), generator=random).split(BATCH):
                optimiser.zero_grad()
                self._loss(similarities_nP[batch] @ weight.t(), labels_n[batch], weight).backward()
                optimiser.step()
        return weight.detach().numpy()

    def _loss(self, logits_BK: torch.Tensor, labels_B: torch.Tensor, weight_KP: torch.Tensor) -> torch.Tensor:
        l1 = off_class_l1(weight_KP, self.network.prototype_class)
        return F.cross_entropy(logits_BK, labels_B) + self.settings.last_layer.l1 * l1

    @torch.no_grad()
    def objectives(
        self, weights_KP: np.ndarray, similarities_nP: torch.Tensor, labels_n: torch.Tensor
    ) -> tuple[float, float]:
        """Cross-entropy + l1 over all rows, in float64; and the same with the ridge."""
        weight = torch.from_numpy(np.asarray(weights_KP, np.float64))
        plain = self._loss(similarities_nP.double() @ weight.t(), labels_n, weight)
        off_KP = off_class_KP(self.network.prototype_class.numpy(), len(weight))
        away = weight - torch.from_numpy(anchor_KP(off_KP, self.settings.model.own_connection))
        return float(plain), float(plain + self.settings.last_layer.ridge / 2 * away.square().sum())


def main() -> None:
    arguments = arguments_of(__doc__, classes=20, size=224, copies=1, rounds=2, batches=5)
    subject = Subject(arguments)
    ours, batch_seconds = [], []
    for _ in range(arguments.rounds):
        ours.append(subject.ours())
        batch_seconds.append(subject.seconds_a_batch(arguments.batches))
    similarities_nP, labels_n = subject.similarities()
    rows = len(labels_n)
    epochs_seconds = [EPOCHS * value * rows / min(BATCH, len(subject.rows)) for value in batch_seconds]
    ratios = [theirs / mine for theirs, (_, mine, _) in zip(epochs_seconds, ours, strict=True)]
    result = ours[-1][0]
    mine = subject.objectives(result.solution.weights, similarities_nP, labels_n)
    theirs = subject.objectives(subject.twenty_epochs(similarities_nP, labels_n), similarities_nP, labels_n)
    start = subject.objectives(subject.network.last_layer.weight.detach().numpy(), similarities_nP, labels_n)
    whole, solving = (statistics.median(values) for values in zip(*[run[1:] for run in ours], strict=True))
    speed = statistics.median(ratios)
    print(f"{rows} rows, {similarities_nP.shape[1]} prototypes, {result.solution.iterations} iterations")
    print(f"ours                       {whole:8.1f} s, of it {solving:.1f} s after the pass")
    print(f"20 epochs (extrapolated)   {statistics.median(epochs_seconds):8.1f} s: {speed:.1f}x as long")
    for name, (plain, with_ridge) in {"start": start, "ours": mine, "20 epochs": theirs}.items():
        print(f"objective, {name:10} {plain:10.6f}, with the ridge {with_ridge:10.6f}")
    figures = {
        "rows": rows,
        "seconds": {
            "ours": round(whole, 2),
            "ours_after_the_pass": round(solving, 2),
            "twenty_epochs_extrapolated": round(statistics.median(epochs_seconds), 1),
            "authors_batch_measured": round(statistics.median(batch_seconds), 3),
        },
        "speed": {"median": round(speed, 2), "low": round(min(ratios), 2), "high": round(max(ratios), 2)},
        "objective": {"start": start[0], "ours": mine[0], "twenty_epochs": theirs[0]},
        "objective_with_ridge": {"start": start[1], "ours": mine[1], "twenty_epochs": theirs[1]},
        "kkt_residual": result.solution.residual,
    }
    checks = {
        "speed": (speed, 10.0),
        "objective of 20 epochs - ours": (theirs[0] - mine[0], 0.0),
        "the same with the ridge": (theirs[1] - mine[1], 0.0),
    }
    conclude("last_layer", arguments, figures, checks)


if __name__ == "__main__":
    main()

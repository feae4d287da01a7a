"""The training loop of one worker: plain PyTorch, alone or in a group that averages its gradients. Knows no Ray.

All that is drawn is drawn from (seed, epoch, step, rank): an epoch that is run again is the same epoch, for every
backbone, and so is one that goes on in its middle.

Legend: B images of a batch, K classes.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from protopnet import imaging, storage
from protopnet.config import RunSettings
from protopnet.datasets.feed import manifest_feed
from protopnet.datasets.loader import TrainLoader, changed
from protopnet.datasets.rows import Dataset, as_stored
from protopnet.errors import UserError
from protopnet.model.losses import objective_of
from protopnet.model.network import Phase, build_network, placed, set_phase
from protopnet.training.checkpoint import load_checkpoint, save_checkpoint
from protopnet.training.optimiser import build_optimiser, set_learning_rates
from protopnet.training.schedule import Epochs
from protopnet.training.state import load_state, save_state
from protopnet.training.step import Stepper, mixed_precision

REPORT_SECONDS = 0.5  # between two messages about running steps
CHECK_STEPS = 50  # between two looks at whether the loss is still a number, and whether the node is about to go
ERROR_FILE = "error.txt"  # in a stage's checkpoint folder: why going on makes no sense

State = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where a worker stands.

    tell: takes a message for the driver. going: whether a node of the group is about to be taken away; every worker has
    to ask equally often.
    """

    device: torch.device
    threads: int
    tell: Callable[[dict[str, Any]], None]
    rank: int = 0
    world: int = 1
    going: Callable[[], bool] = field(default=lambda: False)


@dataclass(frozen=True)
class Job:
    """A joint stage. `folder` belongs to it: its checkpoint is there. All of it survives a trip to another process."""

    settings: dict[str, Any]
    dataset: str
    state_in: str
    state_out: str
    epochs: Epochs
    folder: str


def train(job: Job, place: Place) -> dict[str, Any]:
    """Train the epochs of a job from its saved state, or from its checkpoint, to the next state; returns a summary.

    A `UserError` is left in the job's folder, too: whoever started this needn't dig for it, nor try again.
    """
    error_uri = storage.join(job.folder, ERROR_FILE)
    torch.set_num_threads(place.threads)
    try:
        return Worker(job, place).run()
    except UserError as error:
        storage.write_bytes(error_uri, str(error).encode())
        raise


class Worker:
    """What one worker holds between epochs: its network, optimiser, data and place in the group."""

    def __init__(self, job: Job, place: Place) -> None:
        self.job, self.place = job, place
        self.settings = RunSettings.model_validate(job.settings)
        self.train_settings, self.epochs = self.settings.train, job.epochs
        self.dataset = Dataset.load(job.dataset)
        self.rows = self.dataset.split("train")
        num_classes = len(self.dataset.classes)
        network = build_network(self.settings.model, num_classes, start_weights=False)
        network.load_state_dict(load_state(job.state_in))
        if self.train_settings.sync_batchnorm and place.world > 1:
            nn.SyncBatchNorm.convert_sync_batchnorm(network)
        self.network = placed(network, place.device)
        if self.train_settings.compile:
            self.network.backbone.compile()
        labels_n = torch.from_numpy(self.rows["label"].to_numpy().astype(np.int64))
        self.objective = objective_of(self.network, self.train_settings, labels_n, num_classes)
        self.loader = TrainLoader(
            self.rows, self.settings, self.train_settings.batch_size, rank=place.rank, world=place.world
        )
        self.feed = manifest_feed(partial(_pixels, settings=self.settings), place.threads)
        self.summary: State = {"images": 0, "seconds": 0.0, "workers": place.world}
        self.best: State | None = None
        self.phase: Phase = "eval"
        self.stepper: Stepper

    # ------------------------------------------------------------------------------------- epochs

    def run(self) -> dict[str, Any]:
        """All epochs that are left; returns what they took and came to."""
        begin, step = self._restored()
        if (begin, step) == (self.epochs.first, 0):
            self.summary["test_accuracy_before"] = self.accuracy("test")
        for epoch in range(begin, self.epochs.end):
            self._enter(self.epochs.phase(epoch))
            started = time.monotonic()
            means = self.train_epoch(epoch, step)
            self._after(epoch, means, time.monotonic() - started)
            step = 0
        if self.best is not None:
            self.network.load_state_dict(self.best["network"])
            self.summary["validation_accuracy"] = self.best["validation_accuracy"]
        self.summary["test_accuracy"] = self.accuracy("test")
        if self.place.rank == 0:
            save_state(self.job.state_out, self.network.state_dict())
        return self.summary

    def _enter(self, phase: Phase) -> None:
        """Make the network train what this phase trains, with an optimiser of its own."""
        set_phase(self.network, phase)
        if phase == self.phase:
            return
        self.phase = phase
        model: nn.Module = self.network
        if self.place.world > 1:
            # Wrapped anew for each phase: DDP fixes at the start which parameters it averages.
            # Gradients are views of its buckets: one copy of all parameters less a step.
            model = nn.parallel.DistributedDataParallel(self.network, gradient_as_bucket_view=True)
        optimiser = build_optimiser(self.network, self.train_settings, phase)
        self.stepper = Stepper(model, self.network, optimiser, self.objective, self.train_settings)

    def train_epoch(self, epoch: int, first_step: int = 0) -> dict[str, float]:
        """The steps of an epoch from `first_step` on; returns the mean of each loss term over all workers' images."""
        sums: dict[str, torch.Tensor] = {}
        seen, told = 0, time.monotonic()
        joint_epochs = self.epochs.total - self.epochs.warm
        watch = LossWatch(self.place.device)
        for step, (batch, weight) in enumerate(self.loader.steps(epoch, first_step), first_step):
            joint_epoch = epoch - self.epochs.warm + step / len(self.loader)
            set_learning_rates(self.stepper.optimiser, self.train_settings, joint_epoch, joint_epochs)
            _seed(self.settings.seed, epoch, step, self.place.rank)
            means = self.stepper(batch, weight)
            images = len(batch[1])
            seen += images
            for name, value in means.items():
                sums[name] = sums.get(name, torch.zeros((), device=self.place.device)) + value * images
            watch.note(step, means["total"])
            if (step + 1) % CHECK_STEPS == 0:
                self._check(watch, epoch, step)
            if self.place.rank == 0 and time.monotonic() - told > REPORT_SECONDS:
                told = time.monotonic()
                self.place.tell({"kind": "step", "epoch": epoch, "images": seen * self.place.world})
        watch.check(epoch, self.stepper.optimiser)
        return self._means(sums, seen)

    def _check(self, watch: "LossWatch", epoch: int, step: int) -> None:
        watch.check(epoch, self.stepper.optimiser)
        if self.place.going():
            self._save(epoch, step + 1)

    def _means(self, sums: dict[str, torch.Tensor], seen: int) -> dict[str, float]:
        names = sorted(sums)
        totals = torch.stack([*(sums[name].double() for name in names), torch.tensor(seen, device=self.place.device)])
        if self.place.world > 1:
            dist.all_reduce(totals)
        *values, images = totals.tolist()
        return {name: value / max(1, images) for name, value in zip(names, values, strict=True)}

    def _after(self, epoch: int, means: dict[str, float], seconds: float) -> None:
        """Validate, make the epoch last, and say how it went."""
        passes = len(self.rows) * self.settings.augment.copies
        self.summary["images"] += passes
        self.summary["seconds"] += seconds
        validation = self.summary["validation_accuracy"] = self.accuracy("validation")
        better = self.best is None or (validation or 0) >= self.best["validation_accuracy"]
        if self.train_settings.keep == "best" and self.phase == "joint" and validation is not None and better:
            network = {name: tensor.detach().cpu().clone() for name, tensor in self.network.state_dict().items()}
            self.best = {"validation_accuracy": validation, "network": network}
        self._save(epoch + 1, 0)
        if self.place.rank == 0:  # once it lasts: whoever hears of an epoch may count on it
            rate = passes / max(seconds, 1e-9)
            metrics = {**means, "images_per_second": rate, "validation_accuracy": validation}
            self.place.tell({"kind": "epoch", "epoch": epoch, "phase": self.phase, "metrics": metrics})

    # -------------------------------------------------------------------------------- checkpoints

    def _save(self, epoch: int, step: int) -> None:
        """What training goes on with at this step."""
        if self.place.rank == 0:
            state = {"epoch": epoch, "step": step, "phase": self.phase, "summary": self.summary, "best": self.best}
            state |= {"network": self.network.state_dict(), "optimiser": self.stepper.optimiser.state_dict()}
            save_checkpoint(self.job.folder, state | {"scaler": self.stepper.scaler.state_dict()})

    def _restored(self) -> tuple[int, int]:
        """Load the checkpoint of this stage, if there is one; returns the epoch and the step to go on with."""
        state = load_checkpoint(self.job.folder, self.place.device)
        if state is None:
            return self.epochs.first, 0
        epoch, step = int(state["epoch"]), int(state["step"])
        self.network.load_state_dict(state["network"])
        self.summary, self.best = state["summary"] | {"workers": self.place.world}, state["best"]
        if epoch < self.epochs.end and state["phase"] == self.epochs.phase(epoch):
            self._enter(state["phase"])
            self.stepper.optimiser.load_state_dict(state["optimiser"])
            self.stepper.scaler.load_state_dict(state["scaler"])
        return epoch, step

    # ----------------------------------------------------------------------------------- accuracy

    @torch.inference_mode()
    def accuracy(self, split: str) -> float | None:
        """Top-1 accuracy over a split, each worker on its share of the images; None where there are none."""
        rows = as_stored(self.dataset.split(split))
        if not len(rows):
            return None
        rank, world = self.place.rank, self.place.world
        if world > 1:
            for buffer in self.network.buffers():  # BatchNorm's statistics are each worker's own
                dist.broadcast(buffer, 0)
        self.network.eval()
        first, end = rank * len(rows) // world, (rank + 1) * len(rows) // world  # a run: no row group is read twice
        size = self.settings.push.batch_size
        batches = [rows.slice(start, min(size, end - start)) for start in range(first, end, size)]
        hits = torch.zeros(1, device=self.place.device)
        for batch, pixels in self.feed.batches(batches):
            pixels_BHWC = torch.from_numpy(np.stack(pixels)).to(self.place.device, non_blocking=True)
            with mixed_precision(self.train_settings, self.place.device):
                logits_BK = self.network(imaging.normalise(pixels_BHWC, self.network.preprocessing)).logits_BK
            labels_B = torch.from_numpy(batch["label"].to_numpy().copy()).to(self.place.device)
            hits += (logits_BK.argmax(1) == labels_B).sum()
        if world > 1:
            dist.all_reduce(hits)
        return float(hits) / len(rows)


class LossWatch:
    """Notices the first loss that isn't a number, without waiting for the device at every step."""

    def __init__(self, device: torch.device) -> None:
        self.first = torch.full((), -1, dtype=torch.int64, device=device)

    def note(self, step: int, total: torch.Tensor) -> None:
        self.first = torch.where((self.first < 0) & ~total.isfinite(), step, self.first)

    def check(self, epoch: int, optimiser: torch.optim.Optimizer) -> None:
        """`UserError` naming the step, the learning rates and what to lower, if there was such a loss."""
        step = int(self.first)
        if step < 0:
            return
        rates = ", ".join(f"{group['name']} at {group['lr']:.2g}" for group in optimiser.param_groups)
        raise UserError(
            f"the loss is no number any more at step {step + 1} of epoch {epoch + 1} ({rates}); "
            "lower these learning rates, set train.clip (to 1, say), or train.precision to float32"
        )


def _pixels(data: bytes | imaging.BadImage, row: dict[str, Any], settings: RunSettings) -> np.ndarray:
    """An image without augmentation; `UserError` if it can't be read any more."""
    try:
        if isinstance(data, imaging.BadImage):
            raise data
        return imaging.load(data, settings.model.image_size, settings.data.max_pixels, settings.data.intensity)
    except imaging.BadImage as bad:
        raise UserError(changed(row["uri"], bad.reason)) from bad


def _seed(*words: int) -> None:
    """Of dropout and stochastic depth: alike wherever a step is run again, unlike between steps and workers."""
    torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1)[0]))

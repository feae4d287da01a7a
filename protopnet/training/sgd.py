"""The joint stage: data-parallel SGD of everything below the last layer, on Ray Train.

One `fit()` a stage, whatever its number of epochs: entering one costs ten seconds on a small machine. The worker
loop below is plain PyTorch. It checkpoints after every epoch; all that is drawn is drawn from (seed, epoch), so
an epoch that is run again after a failure is the same epoch.

Legend: B images of a batch, K classes.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch import nn

from protopnet import imaging, storage
from protopnet.cluster import TrainPlan
from protopnet.config import RunSettings
from protopnet.datasets.loader import TrainLoader, changed
from protopnet.datasets.reader import ImageReader
from protopnet.datasets.rows import Dataset, as_stored
from protopnet.errors import UserError
from protopnet.model.network import Phase, build_network, placed, set_phase
from protopnet.training.optimiser import build_optimiser, set_learning_rates
from protopnet.training.schedule import Epochs
from protopnet.training.state import load_state, save_state
from protopnet.training.step import mixed_precision, train_step

REPORT_SECONDS = 0.5  # between two messages about running steps
# A group takes new nodes in at most this often: each time it begins its epoch again.
RESIZE_SECONDS = 600


def train_stage(
    settings: RunSettings,
    dataset_uri: str,
    state_in: str,
    state_out: str,
    epochs: Epochs,
    plan: TrainPlan,
    folder: str,
    events: ray.actor.ActorHandle,
) -> dict[str, Any]:
    """Train the epochs of one stage from one saved state to the next; returns rank 0's summary.

    `folder` belongs to this stage: Ray Train keeps its checkpoints there and resumes from them after a failure
    of a worker, or when the same stage is started again after a failure of the driver.
    """
    filesystem, path = storage.arrow_filesystem(folder)
    trainer = TorchTrainer(
        worker_loop,  # type: ignore[arg-type]  # Ray's type wants None, its documentation a result
        train_loop_config={
            "settings": settings.model_dump(mode="json"),
            "dataset": dataset_uri,
            "state_in": state_in,
            "state_out": state_out,
            "epochs": epochs,
            "threads": plan.threads,
            "events": events,
        },
        scaling_config=ScalingConfig(  # type: ignore[call-arg]  # mypy sees the class of Train v1
            num_workers=plan.num_workers,  # type: ignore[arg-type]
            use_gpu=plan.gpu,
            resources_per_worker=plan.resources_per_worker,
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
        ),
        run_config=RunConfig(
            name="sgd",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=settings.compute.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    try:
        result: Any = trainer.fit()
        return result.return_value
    except ray.train.WorkerGroupError as error:
        for failure in error.worker_failures.values():
            cause = getattr(failure, "cause", None) or failure
            if isinstance(cause, UserError):
                raise cause from error
        raise


def worker_loop(config: dict[str, Any]) -> dict[str, Any]:
    """The training loop of one worker (Ray Train calls it; it knows its rank from there)."""
    torch.set_num_threads(config["threads"])
    worker = _Worker(config)
    epochs: Epochs = config["epochs"]
    first = worker.restore(epochs.first)
    if first == epochs.first:
        worker.summary["test_accuracy_before"] = worker.accuracy("test")
    for epoch in range(first, epochs.end):
        worker.enter(epochs.phase(epoch))
        started = time.monotonic()
        steps = worker.train_epoch(epoch)
        seconds = time.monotonic() - started
        worker.summary["images"] += len(worker.train_rows) * worker.settings.augment.copies
        worker.summary["seconds"] += seconds
        worker.summary["validation_accuracy"] = worker.accuracy("validation")
        if epoch + 1 == epochs.end:
            worker.summary["test_accuracy"] = worker.accuracy("test")
            worker.save(config["state_out"])
        worker.report(epoch, steps, seconds)
    return worker.summary


class _Worker:
    """What one worker holds between epochs: its network, optimiser, data and place in the group."""

    def __init__(self, config: dict[str, Any]):
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.settings = RunSettings.model_validate(config["settings"])
        self.epochs: Epochs = config["epochs"]
        self.events = config["events"]
        self.device = ray.train.torch.get_device()
        torch.manual_seed(self.settings.seed + self.epochs.first)
        self.dataset = Dataset.load(config["dataset"])
        self.train_rows = self.dataset.split("train")
        self.network = build_network(self.settings.model, len(self.dataset.classes), start_weights=False)
        self.network.load_state_dict(load_state(config["state_in"]))
        placed(self.network, self.device)
        self.phase: Phase = "eval"
        self.summary: dict[str, Any] = {"images": 0, "seconds": 0.0, "workers": self.world}
        self.loader = TrainLoader(
            self.train_rows,
            self.settings,
            batch_size=self.settings.train.batch_size,
            rank=self.rank,
            world=self.world,
        )
        self._restored_optimiser: dict[str, Any] | None = None

    def restore(self, first: int) -> int:
        """Load the latest checkpoint of this stage, if there is one; returns the epoch to go on with."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return first
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / "state.pt", map_location=self.device, weights_only=True)
        self.network.load_state_dict(state["network"])
        self.summary = state["summary"] | {"workers": self.world}
        self._restored_optimiser = (
            state["optimiser"] if state["phase"] == self.epochs.phase(state["epoch"] + 1) else None
        )
        return int(state["epoch"]) + 1

    def enter(self, phase: Phase) -> None:
        """Make the network train what this phase trains, with an optimiser of its own."""
        if phase != self.phase:
            self.phase = phase
            set_phase(self.network, phase)
            self.optimiser = build_optimiser(self.network, self.settings.train, phase)
            if self._restored_optimiser is not None:
                self.optimiser.load_state_dict(self._restored_optimiser)
                self._restored_optimiser = None
            # Wrapped anew for each phase: DDP fixes at the start which parameters it averages.
            # Gradients are views of its buckets: one copy of all parameters less a step.
            self.model = (
                self.network
                if self.world == 1
                else nn.parallel.DistributedDataParallel(self.network, gradient_as_bucket_view=True)
            )

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """One epoch; returns the mean of each loss term over this worker's images."""
        set_phase(self.network, self.phase)
        sums: dict[str, torch.Tensor] = {}
        seen, told = 0, time.monotonic()
        joint_epochs = self.epochs.total - self.epochs.warm
        batches = zip(self.loader.epoch(epoch), self.loader.weights(), strict=True)
        for step, (batch, weight) in enumerate(batches):
            joint_epoch = epoch - self.epochs.warm + step / len(self.loader)
            set_learning_rates(self.optimiser, self.settings.train, joint_epoch, joint_epochs)
            terms = train_step(self.model, self.network, self.optimiser, batch, self.settings.train, weight)
            images = len(batch[1])
            seen += images
            for name, value in terms.items():
                sums[name] = sums.get(name, torch.zeros((), device=self.device)) + value.detach() * images
            if self.rank == 0 and time.monotonic() - told > REPORT_SECONDS:
                told = time.monotonic()
                self.events.put.remote({"kind": "step", "epoch": epoch, "images": seen * self.world})
        return {name: float(value) / max(1, seen) for name, value in sums.items()}

    @torch.inference_mode()
    def accuracy(self, split: str) -> float | None:
        """Top-1 accuracy over a split, each worker on its share of the images."""
        rows = self.dataset.split(split)
        if not len(rows):
            return None
        self.network.eval()
        first, end = (rank * len(rows) // self.world for rank in (self.rank, self.rank + 1))
        own = as_stored(rows).slice(first, end - first)  # a run of row groups: no two ranks read the same
        hits = torch.zeros(1, device=self.device)
        for start in range(0, len(own), self.settings.push.batch_size):
            batch = own.slice(start, self.settings.push.batch_size)
            with mixed_precision(self.settings.train, self.device):
                logits_BK = self.network(imaging.normalise(self._pixels(batch).to(self.device))).logits_BK
            labels_B = torch.from_numpy(batch["label"].to_numpy().copy()).to(self.device)
            hits += (logits_BK.argmax(1) == labels_B).sum()
        if self.world > 1:
            dist.all_reduce(hits)
        return float(hits) / len(rows)

    def _pixels(self, rows: pa.Table) -> torch.Tensor:
        """The images without augmentation; `UserError` for one that can't be read any more."""
        encoded, uris = ImageReader().read_each(rows, np.arange(len(rows))), rows["uri"].to_pylist()
        return torch.from_numpy(np.stack([self._load(*image) for image in zip(encoded, uris, strict=True)]))

    def _load(self, data: bytes | imaging.BadImage, uri: str) -> np.ndarray:
        try:
            if isinstance(data, imaging.BadImage):
                raise data
            return imaging.load(data, self.settings.model.image_size, self.settings.data.max_pixels)
        except imaging.BadImage as bad:
            raise UserError(changed(uri, bad.reason)) from bad

    def save(self, state_out: str) -> None:
        if self.rank == 0:
            save_state(state_out, self.network.state_dict())

    def report(self, epoch: int, terms: dict[str, float], seconds: float) -> None:
        """Commit the epoch: metrics to the driver, a checkpoint to storage."""
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if self.rank == 0:
                rate = len(self.train_rows) * self.settings.augment.copies / max(seconds, 1e-9)
                validation = self.summary["validation_accuracy"]
                metrics = {**terms, "images_per_second": rate, "validation_accuracy": validation}
                self.events.put.remote({"kind": "epoch", "epoch": epoch, "phase": self.phase, "metrics": metrics})
                torch.save(self._checkpoint(epoch), Path(folder) / "state.pt")
                checkpoint = Checkpoint.from_directory(folder)
            ray.train.report({"epoch": epoch}, checkpoint=checkpoint, checkpoint_dir_name=f"epoch-{epoch:04d}")

    def _checkpoint(self, epoch: int) -> dict[str, Any]:
        return {
            "epoch": epoch,
            "phase": self.phase,
            "network": self.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "summary": self.summary,
        }

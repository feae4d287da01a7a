"""One run: its folder in storage, its settings, and what its stages share.

A run folder belongs to one set of settings. Starting again with the same ones goes on where the run was cut off;
with others it is refused, naming the setting.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import yaml

from protopnet import storage
from protopnet.cli import changed_settings
from protopnet.cluster import plan_pass
from protopnet.config import RunSettings
from protopnet.datasets.rows import Dataset
from protopnet.errors import UserError
from protopnet.lease import Lease
from protopnet.model.network import Baseline, ProtoPNet, build_network
from protopnet.passes.image_pass import PassOptions
from protopnet.progress import Reporter, Stopwatch
from protopnet.training.runlog import RunLog
from protopnet.training.schedule import Stage
from protopnet.training.state import load_state
from protopnet.training.tracking import Tracking

Result = dict[str, Any]
# These say where and on what a run runs, not what it computes: they may change when a run goes on.
FREE_ON_RESUME = ("storage", "compute.", "data.workers", "tracking.")


@dataclass
class Run:
    """A run and its folder. `execute` brings it to its end from wherever it is."""

    settings: RunSettings
    reporter: Reporter
    results: dict[str, Result] = field(default_factory=dict)
    lease: Lease = field(init=False)
    log: RunLog = field(init=False)
    tracking: Tracking = field(init=False)

    def __post_init__(self) -> None:
        self.watch = Stopwatch()
        self.seconds_before = 0.0  # spent on stages that were complete when this process began
        self.uri = storage.located(storage.join(self.settings.storage, self.settings.name))
        storage.check_writable(self.uri)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Nobody else works in the folder while the block runs.

        `UserError` where somebody does already, and where it was begun with other settings.
        """
        with Lease(self.uri, "--name") as self.lease:
            self._check_settings()
            self.log = RunLog(self.uri)
            self.tracking = Tracking(self.settings, self.log, self.uri, self.reporter.note)
            yield

    def flush(self) -> None:
        """Numbers that the log has, to the disk and to the trackers."""
        self.log.flush()
        self.tracking.flush()

    def folder(self, stage: Stage) -> str:
        return storage.join(self.uri, "stages", stage.name)

    def state_uri(self, stage: Stage) -> str:
        return storage.join(self.folder(stage), "network.safetensors")

    def checkpoints(self, stage: Stage) -> str:
        """Where a joint stage keeps what it would go on with."""
        return storage.join(self.folder(stage), "train")

    def _check_settings(self) -> None:
        """Write the resolved settings, or refuse a folder that was begun with others.

        Until the first stage is complete there is nothing to protect, and a setting that was refused can be put right.
        """
        path = storage.join(self.uri, "config.yaml")
        resolved = self.settings.model_dump(mode="json")
        if not storage.exists(path) or not storage.exists(storage.join(self.dataset_uri, "result.json")):
            storage.write_bytes(path, yaml.safe_dump(resolved, sort_keys=False).encode())
            return
        before = yaml.safe_load(storage.read_bytes(path))
        for name, old, new in changed_settings(before, resolved):
            if not name.startswith(FREE_ON_RESUME):
                raise UserError(
                    f"run {self.uri} was begun with {name} = {old}, now it is {new}; "
                    f"set it back to go on, or choose another --name"
                )

    def paths(self) -> dict[str, str]:
        """What every node works with, by setting."""
        data = self.settings.data
        return {"storage": self.uri} | ({"data.path": data.path} if data.path and data.source != "cub" else {})

    # What the stages share.

    @property
    def dataset_uri(self) -> str:
        return self.folder(Stage(0, "data"))

    @cached_property
    def dataset(self) -> Dataset:
        """The manifest that the data stage left; read once."""
        return Dataset.load(self.dataset_uri)

    def options(self) -> PassOptions:
        return PassOptions(
            plan=plan_pass(self.settings.compute),
            batch_size=self.settings.push.batch_size,
            augment=self.settings.augment,
            seed=self.settings.seed,
            max_pixels=self.settings.data.max_pixels,
        )

    def network(self, state_uri: str | None = None) -> ProtoPNet | Baseline:
        """The network with the tensors of a finished stage, or as it is before the first one."""
        torch.manual_seed(self.settings.seed)
        network = build_network(self.settings.model, len(self.dataset.classes), start_weights=state_uri is None)
        backbone = network.backbone
        backbone.preprocessing = backbone.preprocessing.model_copy(update={"intensity": self.settings.data.intensity})
        if state_uri is not None:
            network.load_state_dict(load_state(state_uri))
        return network

    def counter(self) -> Callable[[int], None]:
        """Adds up finished images and shows them."""
        done = 0

        def on_images(images: int) -> None:
            nonlocal done
            done += images
            self.reporter.advance(done)

        return on_images

"""The record of a run's numbers: `metrics.jsonl` and TensorBoard events.

Lines of a stage that is run again (after a kill) replace its earlier ones, so the file never tells two stories.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from protopnet import storage


class RunLog:
    """Metrics of one run; `flush` writes the whole file at once, so that readers never see half a line."""

    def __init__(self, run_uri: str):
        self.uri = storage.join(run_uri, "metrics.jsonl")
        self.tensorboard_uri = storage.join(run_uri, "tensorboard")
        lines = storage.read_bytes(self.uri).decode().splitlines() if storage.exists(self.uri) else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def add(self, stage: str, metrics: dict[str, Any], *, epoch: int | None = None) -> None:
        """Note the numeric metrics of a stage; the same (stage, epoch, name) again replaces the earlier value."""
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        steps = {(row["stage"], row["epoch"]): row["step"] for row in self.rows}
        step = steps.get((stage, epoch), len(steps))
        self.rows = [
            row for row in self.rows if not (row["stage"] == stage and row["epoch"] == epoch and row["name"] in numbers)
        ]
        for name, value in numbers.items():
            self.rows.append(
                {
                    "time": round(time.time(), 3),
                    "stage": stage,
                    "epoch": epoch,
                    "step": step,
                    "name": name,
                    "value": value,
                }
            )
        self.rows.sort(key=lambda row: row["step"])

    def flush(self) -> None:
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        storage.write_bytes(self.uri, text.encode())

    def write_tensorboard(self) -> None:
        """All rows as TensorBoard events, written anew: one file, one story."""
        with tempfile.TemporaryDirectory() as folder:
            with SummaryWriter(folder) as writer:
                for row in self.rows:
                    writer.add_scalar(row["name"], row["value"], row["step"], walltime=row["time"])
            if storage.exists(self.tensorboard_uri):
                storage.delete_tree(self.tensorboard_uri)
            for file in Path(folder).iterdir():
                storage.write_bytes(storage.join(self.tensorboard_uri, file.name), file.read_bytes())

"""What a person sees while a run goes on: a table of stages with bars on a terminal, plain lines in a log.

Training workers can't write to the driver's terminal: they put small messages into an `EventLog` actor, which
the driver empties twice a second.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

POLL_SECONDS = 0.5


class Reporter(Protocol):
    """Shows stages as they begin, advance and end."""

    def begin(self, stage: str, images: int) -> None: ...
    def advance(self, images_done: int) -> None: ...
    def note(self, text: str) -> None: ...
    def end(self, stage: str, seconds: float, text: str) -> None: ...
    def close(self) -> None: ...


def make_reporter() -> Reporter:
    return TerminalReporter() if sys.stdout.isatty() else LineReporter()


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} img/s" if speed else "", style="cyan", justify="right")


class TerminalReporter:
    """A row a stage: name, bar, images a second, time left, and what came of it."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description}", style="bold"),
            BarColumn(bar_width=28),
            _Rate(),
            TimeRemainingColumn(elapsed_when_finished=True, compact=True),
            TextColumn("{task.fields[text]}", style="green"),
            console=Console(),
        )
        self.progress.start()
        self.task: Any = None

    def begin(self, stage: str, images: int) -> None:
        self.task = self.progress.add_task(stage, total=images or None, text="")

    def advance(self, images_done: int) -> None:
        self.progress.update(self.task, completed=images_done)

    def note(self, text: str) -> None:
        self.progress.update(self.task, text=text)

    def end(self, stage: str, seconds: float, text: str) -> None:
        if self.task is None or self.progress.tasks[-1].description != stage:
            self.begin(stage, 1)
        total = self.progress.tasks[-1].total or 1
        self.progress.update(self.task, total=total, completed=total, text=f"{seconds:6.1f} s  {text}")

    def close(self) -> None:
        self.progress.stop()


class LineReporter:
    """One line when a stage ends, and one an epoch: quiet enough for a log file. Each begins with the label."""

    def __init__(self, label: str = "") -> None:
        self.label = label
        self.stage = ""

    def begin(self, stage: str, images: int) -> None:
        self.stage = stage

    def advance(self, images_done: int) -> None:
        pass

    def note(self, text: str) -> None:
        print(f"{self.label}{self.stage:<16} {text}", flush=True)

    def end(self, stage: str, seconds: float, text: str) -> None:
        print(f"{self.label}{stage:<16} {seconds:7.1f} s  {text}", flush=True)

    def close(self) -> None:
        pass


@ray.remote(num_cpus=0, max_restarts=-1)
class EventLog:
    """Messages from workers to the driver, in order. A lost process costs the messages it held, nothing else."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []

    def put(self, message: dict[str, Any]) -> None:
        self.messages.append(message)

    def drain(self) -> list[dict[str, Any]]:
        drained, self.messages = self.messages, []
        return drained


@contextmanager
def listening(on_message: Callable[[dict[str, Any]], None]) -> Iterator[ray.actor.ActorHandle]:
    """An `EventLog` whose messages reach `on_message` in the driver while the block runs, all of them by its end."""
    log = EventLog.remote()  # type: ignore[attr-defined]
    stop = threading.Event()

    def deliver() -> None:
        with suppress(RayActorError):
            for message in ray.get(log.drain.remote()):
                on_message(message)

    def poll() -> None:
        while not stop.wait(POLL_SECONDS):
            deliver()

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield log
    finally:
        stop.set()
        thread.join()
        deliver()
        ray.kill(log)


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

"""Runs in processes of their own, several side by side: a run that is killed costs itself, not those around it.

A process trains one run after the other, so that Python, torch and a local Ray start once.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from protopnet.config import RunSettings
from protopnet.errors import UserError
from protopnet.progress import LineReporter
from protopnet.training.run import Run
from protopnet.training.summary import complete

After = Callable[[Run], None]  # a function of a module: it travels to the process

_SPAWN = multiprocessing.get_context("spawn")
_GRACE_SECONDS = 15.0  # for a process that was told to end


def train_all(runs: Sequence[RunSettings], parallel: int) -> Generator[tuple[int, str | None], None, None]:
    """Bring runs to their ends, so many side by side; yields the place of each when it ended, and why it failed.

    Close it (`contextlib.closing`) to end its processes where it isn't read to its end.
    """
    waiting = deque(enumerate(runs))
    idle = [Worker() for _ in range(min(parallel, len(runs)))]
    workers = list(idle)
    busy: dict[Connection, tuple[int, Worker]] = {}
    try:
        while waiting or busy:
            while waiting and idle:
                place, settings = waiting.popleft()
                worker = idle.pop()
                busy[worker.begin(settings)] = (place, worker)
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                place, worker = busy.pop(connection)
                failure = worker.outcome()
                idle.append(worker)
                yield place, failure
    finally:
        for worker in workers:
            worker.tell_to_end()
        for worker in workers:
            worker.end()


class Worker:
    """A process that trains; another one where it was lost."""

    def __init__(self) -> None:
        self.process: SpawnProcess | None = None
        self.connection: Connection

    def begin(self, settings: RunSettings, then: After | None = None) -> Connection:
        """Start a run, and what follows it in its process; what is returned can be read from when it has ended."""
        if self.process is None:
            self.connection, theirs = _SPAWN.Pipe()
            self.process = _SPAWN.Process(target=_work, args=(theirs,))
            self.process.start()
            theirs.close()  # so that reading here ends when that process does
        self.connection.send((settings.model_dump(mode="json"), then))
        return self.connection

    def outcome(self) -> str | None:
        """Why the run failed; None if it didn't."""
        assert self.process is not None
        try:
            failure: str | None = self.connection.recv()
            return failure
        except (EOFError, OSError):
            self.process.join()
            code, self.process = self.process.exitcode, None
            why = f"was killed by signal {-code}; out of memory?" if code and code < 0 else f"ended with code {code}"
            return f"its process {why}"

    def tell_to_end(self) -> None:
        if self.process is not None:
            self.process.terminate()

    def end(self) -> None:
        if self.process is not None:
            self.process.join(_GRACE_SECONDS)
            self.process.kill()
            self.process.join()


def _work(connection: Connection) -> None:
    """What the process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # from the keyboard all processes get one; who started this ends it
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    threading.Thread(target=_end_with_the_job, daemon=True).start()
    while True:
        try:
            given, then = connection.recv()
        except EOFError:
            return
        connection.send(_trained(RunSettings.model_validate(given), then))


def _trained(settings: RunSettings, then: After | None) -> str | None:
    """None, or why not."""
    try:
        run = Run(settings, LineReporter(f"{settings.name}  "))
        complete(run)
        if then is not None:
            then(run)
        return None
    except UserError as error:
        return " ".join(str(error).split())
    except Exception as error:
        traceback.print_exc()
        return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def _end_with_the_job() -> None:
    """Nobody asks for the run any more when the process that did is gone."""
    job = multiprocessing.parent_process()
    assert job is not None
    wait([job.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_SECONDS)
    os._exit(1)

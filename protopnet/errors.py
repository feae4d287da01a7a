"""How a job ends: what the person at the keyboard reads, and the exit code that tells others.

`UserError` is the one kind of error that is meant for that person. Everything else that escapes is a defect of ours and
shows its traceback.

    0     done
    1     finished, but not fit for use as it is (too many bad images), or a defect
    2     a wrong setting, path or file: one line `error: …`
    130   stopped from the keyboard (SIGINT)
    143   stopped by `ray job stop`, a scheduler or a shutdown (SIGTERM)
"""

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

STOPPED = "stopped; what is finished is kept, the same command goes on from here"


class UserError(Exception):
    """Something the user can put right: a wrong setting, path or file.

    The message is one line: what is wrong, what was expected, which setting to change.
    """


def exit_with_a_sentence(main: Callable[[], None]) -> Callable[[], None]:
    """Decorate a job's main: a `UserError` or a stop becomes one line on stderr and the exit code above."""

    @functools.wraps(main)
    def wrapped() -> None:
        told = threading.Event()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, functools.partial(_stop, told))
        try:
            main()
        except BaseException as error:
            if told.is_set():  # whatever came of it on its way: Ray makes exit code 1 of every other
                sys.exit(128 + signal.SIGTERM)
            if isinstance(error, UserError):
                print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
                sys.exit(2)
            if isinstance(error, KeyboardInterrupt):
                print(STOPPED, file=sys.stderr)
                sys.exit(128 + signal.SIGINT)
            raise

    return wrapped


def _stop(told: threading.Event, number: int, frame: FrameType | None) -> None:
    """End this process in order; at once when it is told a second time.

    The sentence comes first: `ray job stop` leaves a process three seconds.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    told.set()
    os.write(2, f"{STOPPED}\n".encode())  # print would fail where it was interrupted while printing
    raise SystemExit(128 + number)

"""The one kind of error that is meant for the person at the keyboard.

Everything else that escapes is a defect of ours and shows its traceback.
"""

import functools
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can put right: a wrong setting, path or file.

    The message is one line: what is wrong, what was expected, which setting to change.
    """


def exit_with_a_sentence(main: Callable[[], None]) -> Callable[[], None]:
    """Decorate a job's main: a `UserError` becomes one line on stderr and exit code 2."""

    @functools.wraps(main)
    def wrapped() -> None:
        try:
            main()
        except UserError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("stopped; the same command goes on from here", file=sys.stderr)
            sys.exit(130)

    return wrapped

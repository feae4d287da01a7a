"""How a job ends: one line for people, an exit code for everybody else."""

import signal
import subprocess
import sys
import textwrap

import pytest

JOB = """
    import os, signal, sys, time
    from protopnet.errors import UserError, exit_with_a_sentence

    @exit_with_a_sentence
    def main():
        try:
            {body}
        finally:
            print("put away", flush=True)

    main()
    print("done")
"""
# A job in the background of a script is born deaf to Ctrl-C; so is a test of one.
LISTENING = "signal.signal(signal.SIGINT, signal.default_int_handler)"
STOPPED = "stopped; what is finished is kept, the same command goes on from here\n"


@pytest.mark.parametrize(
    ("body", "code", "error"),
    [
        ("pass", 0, ""),
        ("raise UserError('data.path:\\n  no such folder')", 2, "error: data.path: no such folder\n"),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)", 143, STOPPED),
        (f"{LISTENING}; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)", 130, STOPPED),
    ],
)
def test_the_end_of_a_job(body: str, code: int, error: str) -> None:
    program = textwrap.dedent(JOB).format(body=body)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (code, error)
    assert done.stdout.splitlines() == ["put away", "done"][: 1 if code else 2]


def test_a_defect_shows_where_it_is() -> None:
    program = textwrap.dedent(JOB).format(body="1 / 0")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


def test_a_job_told_twice_to_stop_doesn_t_wait() -> None:
    body = "os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)"
    slow = textwrap.dedent(JOB).format(body=body).replace('print("put away", flush=True)', "os.kill(os.getpid(), 15)")
    done = subprocess.run([sys.executable, "-c", slow], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (-signal.SIGTERM, STOPPED)

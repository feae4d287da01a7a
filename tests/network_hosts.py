"""Hosts of a network of their own, on this machine: each has its own network, processes, /tmp, home and sshd.

A host is a set of Linux namespaces (`unshare`), so what runs on it sees and can end nothing of this machine: `ray stop`
there stops the Ray of that host alone. All hosts hang on one switch inside the first one; nothing of this
machine's network is touched. A host ends with the process that started it, and takes all its processes along.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ray_processes import descendants, wait_for

ROOT = Path(__file__).parents[1]
TOOLS = ("ip", "unshare", "nsenter", "setpriv", "ssh", "ssh-keygen", "rsync", "bash", "/usr/sbin/sshd")
SUBNET = "10.77.0"

# Runs as the first process of the host. The folder of the host becomes /mnt, and the home of its root.
BOOT = """
set -e
mount --bind "$1" /mnt
for file in passwd hosts resolv.conf; do mount --bind "/mnt/$file" "/etc/$file"; done
mount --bind /mnt/tmp /tmp
mount -t tmpfs -o size=1g tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir /run/sshd
hostname "$2"
exec /usr/sbin/sshd -D -E /mnt/sshd.log -f /mnt/sshd_config
"""
SSHD = """
HostKey /mnt/.ssh/id_ed25519
AuthorizedKeysFile /mnt/.ssh/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
MaxStartups 100
MaxSessions 100
"""


def reason_to_skip() -> str | None:
    """Why there can't be hosts here, or nothing."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "hosts are Linux namespaces: only root on Linux can make them"
    missing = [Path(tool).name for tool in TOOLS if not shutil.which(tool)]
    if missing:
        return f"{', '.join(missing)} missing; on Debian: apt-get install openssh-server openssh-client rsync iproute2"
    for path in (ROOT, Path(sys.prefix)):
        if path.is_relative_to("/tmp") or path.is_relative_to("/mnt"):
            return f"{path} can't be seen from a host, which has a /tmp and a /mnt of its own"
    trial = subprocess.run([*_unshare(), "ip", "link", "add", "v0", "type", "veth"], capture_output=True, text=True)
    return f"the kernel refuses: {trial.stderr.strip()}" if trial.returncode else None


def _unshare() -> list[str]:
    new = ("--net", "--pid", "--fork", "--kill-child", "--mount", "--uts", "--ipc", "--mount-proc")
    return ["unshare", *new, "--propagation", "private"]


@dataclass
class Host:
    """One host: run commands on it as its root."""

    name: str
    address: str
    folder: Path
    process: subprocess.Popen[bytes]
    pid: int  # of its first process, as this machine counts

    @property
    def home(self) -> Path:
        """The home of its root, which is /mnt there."""
        return self.folder

    def command(self, text: str) -> list[str]:
        """The command line that runs a shell command on this host, in a login shell."""
        inside = ["nsenter", "--target", str(self.pid), "--net", "--pid", "--mount", "--uts", "--ipc"]
        environment = ["env", "-i", "HOME=/mnt", "TERM=dumb", "LANG=C.UTF-8"]
        return [*inside, *environment, "bash", "--login", "-c", f"cd; {text}"]

    def run(self, text: str, timeout: float = 120) -> str:
        """Output of a shell command on this host; AssertionError with all it said if it fails."""
        done = subprocess.run(self.command(text), capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, f"{text}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def start(self, text: str, log: IO[bytes]) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(self.command(text), stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)

    def processes(self, word: str) -> list[str]:
        """Titles of this host's processes that contain the word."""
        return [title for title in descendants(self.process.pid).values() if word in title]


class Hosts:
    """Hosts that reach one another by ssh, as root and with one key. The first carries the switch."""

    def __init__(self, names: tuple[str, ...], folder: Path, profile: str) -> None:
        self.folder = folder
        self.hosts: list[Host] = []
        try:
            for number, name in enumerate(names, start=1):
                self.hosts.append(self._start(name, f"{SUBNET}.{number}", profile))
            self._connect()
        except BaseException:
            self.end()
            raise

    def _start(self, name: str, address: str, profile: str) -> Host:
        home = self.folder / name
        (home / "tmp").mkdir(parents=True)
        (home / "tmp").chmod(0o1777)
        if self.hosts:
            shutil.copytree(self.hosts[0].folder / ".ssh", home / ".ssh")
        else:
            (home / ".ssh").mkdir(mode=0o700)
            key = home / ".ssh/id_ed25519"
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
            shutil.copy(f"{key}.pub", home / ".ssh/authorized_keys")
        others = [line for line in Path("/etc/passwd").read_text().splitlines() if not line.startswith("root:")]
        (home / "passwd").write_text("\n".join(["root:x:0:0:root:/mnt:/bin/bash", *others]) + "\n")
        (home / "hosts").write_text(f"127.0.0.1 localhost\n{address} {name}\n")
        (home / "resolv.conf").write_text("nameserver 127.0.0.1\n")  # nobody there: names are refused at once
        (home / "sshd_config").write_text(SSHD)
        (home / ".bash_profile").write_text(profile)
        (home / ".bashrc").write_text(profile)
        # The host dies with this process, whatever becomes of it.
        command = ["setpriv", "--pdeathsig", "KILL", *_unshare(), "bash", "-c", BOOT, name, str(home), name]
        with open(home / "boot.log", "wb") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        pid = wait_for(lambda: _sshd_below(process), 20)
        return Host(name, address, home, process, pid)

    def _connect(self) -> None:
        switch = self.hosts[0]
        _ip(switch, "link add switch type bridge")
        _ip(switch, f"addr add {switch.address}/24 dev switch")
        _ip(switch, "link set switch up")
        for host in self.hosts:
            _ip(host, "link set lo up")
        _ip(switch, "route add default dev switch")  # leads nowhere, but tells programs which address is theirs
        for host in self.hosts[1:]:
            # The other end is named by a process id of this machine, hence only the network is entered.
            _ip(switch, f"link add {host.name} type veth peer name eth0 netns {host.pid}")
            _ip(switch, f"link set {host.name} master switch up")
            _ip(host, f"addr add {host.address}/24 dev eth0")
            _ip(host, "link set eth0 up")
            _ip(host, f"route add default via {switch.address}")

    def end(self) -> None:
        """End all hosts and everything on them."""
        for host in reversed(self.hosts):
            os.kill(host.pid, signal.SIGKILL)  # the kernel ends all others of the host with its first process
            host.process.wait()


def _sshd_below(process: "subprocess.Popen[bytes]") -> int | None:
    assert process.poll() is None, "the host did not start: see its boot.log"
    return next((pid for pid, title in descendants(process.pid).items() if "sshd" in title), None)


def _ip(host: Host, text: str) -> None:
    for attempt in range(3):
        done = subprocess.run(
            ["nsenter", "--target", str(host.pid), "--net", "ip", *text.split()], capture_output=True, text=True
        )
        if done.returncode == 0:
            return
        time.sleep(0.2 * (attempt + 1))
    raise AssertionError(f"ip {text} on {host.name}: {done.stderr}")

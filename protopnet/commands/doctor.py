"""What this machine has for protopnet, and what is wrong with it. Starts nothing; exit code 1 when something is wrong.

protopnet doctor
protopnet doctor --storage s3://bucket/runs
"""

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from packaging.requirements import Requirement
from pydantic import Field

from protopnet import __version__, storage
from protopnet.cli import parse
from protopnet.cluster import check_temporary_folder, temporary_folder
from protopnet.config import RunSettings, Section
from protopnet.errors import UserError, exit_with_a_sentence
from protopnet.machine import usable_cpus, usable_memory
from protopnet.training.step import has_fast_bf16
from protopnet.words import counted

_LEAST_MEMORY, _LEAST_SHARED, _LEAST_DISK = 3e9, 256e6, 2e9  # bytes
_SHOWN_VERSIONS = ("torch", "torchvision", "timm", "ray")


class DoctorSettings(Section):
    """Settings of `protopnet doctor`."""

    storage: str = Field(
        RunSettings.model_fields["storage"].default, description="where runs would be written: a local path or s3://…"
    )


@dataclass(frozen=True)
class Line:
    """What there is of one thing, and what is wrong with it and what to do; nothing if it is fine."""

    name: str
    value: str
    wrong: str = ""


@exit_with_a_sentence
def main() -> None:
    settings = parse(DoctorSettings, description=__doc__)
    lines = list(examine(settings.storage))
    width = max(len(line.name) for line in lines)
    for line in lines:
        print(f"{line.name:<{width}}  {line.value}")
    wrong = [line for line in lines if line.wrong]
    print("\nnothing is wrong" if not wrong else "")
    for line in wrong:
        print(f"wrong: {line.wrong}")
    if wrong:
        sys.exit(1)


def examine(storage_uri: str) -> Iterator[Line]:
    """What there is, in the order a person reads it."""
    yield Line("protopnet", f"{__version__}, Python {sys.version.split()[0]}")
    yield from versions(requirements("protopnet"), importlib.metadata.version)
    yield Line("CPUs", f"{usable_cpus()} of {os.cpu_count()} usable, {cpu_precision()}")
    yield memory(usable_memory())
    yield gpu()
    yield place("storage", storage_uri, "storage")
    name, folder = temporary_folder()
    yield place("temporary folder", folder, name)
    yield sockets()
    if Path("/dev/shm").is_dir():
        yield shared_memory(shutil.disk_usage("/dev/shm").total)
    if address := os.environ.get("RAY_ADDRESS"):
        yield Line("Ray cluster", f"{address}, which RAY_ADDRESS names: jobs go there")


def requirements(package: str) -> list[str]:
    """What the package asks for; where it isn't installed but a checkout on the path, the names that matter most."""
    try:
        return importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        return list(_SHOWN_VERSIONS)


def versions(wanted: list[str], installed: Callable[[str], str]) -> Iterator[Line]:
    """Of the packages that matter most; and those that don't fit. installed: the version of a package."""
    for text in wanted:
        each = Requirement(text)
        if each.marker is not None and not each.marker.evaluate({"extra": ""}):
            continue
        try:
            version = installed(each.name)
        except importlib.metadata.PackageNotFoundError:
            yield Line(each.name, "not installed", f"{each.name} is missing: pip install '{text}'")
            continue
        if not each.specifier.contains(version, prereleases=True):
            wrong = f"{each.name} {version} doesn't fit {each.specifier}: pip install '{text}'"
            yield Line(each.name, version, wrong)
        elif each.name in _SHOWN_VERSIONS:
            yield Line(each.name, version)


def cpu_precision() -> str:
    """The widest instructions that PyTorch uses here, and whether bfloat16 is among what they multiply."""
    fast = "bf16 is fast" if has_fast_bf16(torch.device("cpu")) else "bf16 isn't: training takes float32"
    return f"{torch.backends.cpu.get_cpu_capability()}, {fast}"


def memory(size: float) -> Line:
    wrong = f"{size / 1e9:.1f} GB of memory: Ray and a job need {_LEAST_MEMORY / 1e9:.0f}; give the machine more"
    return Line("memory", f"{size / 1e9:.1f} GB usable", wrong if size < _LEAST_MEMORY else "")


def gpu() -> Line:
    if not torch.cuda.is_available():
        if not (shutil.which("nvidia-smi") or Path("/proc/driver/nvidia").exists()):
            return Line("GPU", "none: everything is computed on CPUs")
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs only"
        wrong = (
            f"there is an NVIDIA GPU, but PyTorch {torch.__version__} (built {built}) can't use it: install the build for "
            "your driver (pytorch.org/get-started), or a newer driver"
        )
        return Line("GPU", "not usable", wrong)
    try:
        torch.ones(2, device="cuda").sum().item()
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        return Line("GPU", "not usable", f"PyTorch can't compute on the GPU ({first}): is another job on it?")
    devices = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    fast = "bf16 is fast" if has_fast_bf16(torch.device("cuda")) else "bf16 isn't fast"
    return Line("GPU", ", ".join(f"{d.name} ({d.total_memory / 1e9:.0f} GB)" for d in devices) + f", {fast}")


def place(name: str, uri: str, setting: str) -> Line:
    """Whether a folder can be written, and has room. One that isn't there isn't left there."""
    there = storage.is_remote(uri) or Path(storage.located(uri)).exists()
    try:
        storage.check_writable(uri, setting)
    except UserError as error:
        return Line(name, uri, str(error))
    if storage.is_remote(uri):
        return Line(name, f"{uri}, can be written")
    free = shutil.disk_usage(storage.located(uri)).free
    if not there:
        Path(storage.located(uri)).rmdir()
    wrong = f"{uri} has {free / 1e9:.1f} GB free: make room, or set {setting} to another place"
    return Line(name, f"{uri}, {free / 1e9:.0f} GB free", wrong if free < _LEAST_DISK else "")


def sockets() -> Line:
    """Whether Ray's sockets have room for their names."""
    folder = temporary_folder()[1]
    try:
        check_temporary_folder()
    except UserError as error:
        return Line("Ray's sockets", "too long names", str(error))
    return Line("Ray's sockets", f"in {folder}, {counted(len(os.fsencode(folder)), 'character')}")


def shared_memory(size: float) -> Line:
    wrong = (
        f"/dev/shm has {size / 1e6:.0f} MB: Ray would keep its objects on disk, which is slow; start the container with "
        "--shm-size=4g"
    )
    return Line("shared memory", f"{size / 1e9:.1f} GB", wrong if size < _LEAST_SHARED else "")

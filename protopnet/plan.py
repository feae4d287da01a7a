"""What a job would use, before it is started: `--plan` of the jobs prints it and starts nothing.

What jobs share of it; the rest is in their `forecast`s. Numbers come from the settings, the cluster and a forward pass on
meta tensors (shapes without contents); none of them is measured. Hours need a rate, which is asked for:
`bench/joint_step.py` measures it on the device in question.
"""

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import Field

from protopnet.budget import Cluster, Node, PassPlan
from protopnet.cluster import connect, survey
from protopnet.config import ComputeSettings, Section
from protopnet.machine import usable_cpus
from protopnet.memory import Memory
from protopnet.words import counted


class PlanSettings(Section):
    """What the job would use, printed instead of starting it (`--plan`)."""

    show: bool = Field(False, description="print the plan and stop; --plan for short")
    images_per_second: float | None = Field(
        None, gt=0, description="what one worker makes of this network (bench/joint_step.py measures it): gives hours"
    )

    @property
    def wanted(self) -> bool:
        return self.show or self.images_per_second is not None


@dataclass(frozen=True)
class Plan:
    """What a job would use, a line each: what, how much, and how that comes about."""

    title: str
    lines: Sequence[tuple[str, str, str]]

    def __str__(self) -> str:
        names, values = (max(len(line[column]) for line in self.lines) for column in (0, 1))
        rows = (f"  {name:<{names}}  {value:<{values}}  {note}".rstrip() for name, value, note in self.lines)
        return "\n".join([self.title, *rows])


def arguments() -> list[str]:
    """The command line, with `--plan` spelt out."""
    return ["--plan.show" if argument == "--plan" else argument for argument in sys.argv[1:]]


def plan_passes(
    title: str, images: int, unit: str, units: int, passes: PassPlan, memory: Memory, images_per_second: float | None
) -> Plan:
    """What a job of one pass over images would use (scoring, evaluation). unit: what its work is cut into."""
    hours = "give --plan.images_per_second"
    if images_per_second:
        hours = hours_text(images / (images_per_second * passes.actors))
    lines = [
        ("images", f"{images:,}", ""),
        ("actors", actors_text(passes), f"{passes.threads} threads each"),
        (unit, f"{units:,}", "what a lost actor repeats"),
        (
            f"memory a {'GPU' if passes.gpus else 'actor'}",
            size_text(memory.total),
            f"weights {size_text(memory.weights)}",
        ),
        ("time", hours, f"at {images_per_second:g} img/s an actor" if images_per_second else ""),
    ]
    return Plan(title, lines)


def actors_text(passes: PassPlan) -> str:
    what = f"{passes.gpus:g} GPU" if passes.gpus else f"{passes.cpus:g} CPU"
    return f"{counted(passes.actors, 'actor')}, {what} each"


def size_text(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"


def hours_text(seconds: float) -> str:
    if seconds < 3600:
        return f"{max(1, math.ceil(seconds / 60))} min"
    return f"{seconds / 3600:,.1f} h"


def this_cluster(compute: ComputeSettings) -> Cluster:
    """The cluster that the job would run on; without an address what a local Ray would be, which isn't started."""
    if compute.address or os.environ.get("RAY_ADDRESS"):
        connect(compute)
        return survey()
    return Cluster((Node(usable_cpus(), torch.cuda.device_count()),))

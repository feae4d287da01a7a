"""The build of a bird: its joints, the numbers of its parts, its frames of reference.

Lengths are in units of about one body length. The bird looks to the right (x forward, y down), origin in the
middle of the body; the head has its own frame, origin in its middle.
"""

from dataclasses import dataclass

import numpy as np

from .canvas import Frame, points
from .kinds import PARTS
from .plumage import Plumage

# Values on the canvas's map of parts: 0 is everything that isn't bird.
PART_ID: dict[str, int] = {part: index + 1 for index, part in enumerate((*PARTS, "belly"))}
BELLY = PART_ID["belly"]
OUTLINE = 0.022  # width, in body lengths

NECK = points((0.30, -0.22))
HEAD_RADIUS = 0.215
LEG_LENGTH = {"short": 0.21, "stilts": 0.47, "webbed": 0.21, "booted": 0.27}


@dataclass(frozen=True)
class Bird:
    """One bird about to be drawn: what it looks like and where its body and head are."""

    variants: dict[str, str]
    plumage: Plumage
    body: Frame
    head: Frame
    wing: Frame
    tail: Frame

    @property
    def pen(self) -> float:
        """Width of outlines in canvas pixels."""
        return OUTLINE * self.body.scale


def pose(variants: dict[str, str], plumage: Plumage, body: Frame, rng: np.random.Generator) -> Bird:
    """Joints: head raised or lowered, wing and tail slightly moved."""
    nod = rng.uniform(-0.30, 0.18)
    head = Frame.at(0.0, 0.0, nod)
    neck = points((0.11, -0.22 - rng.uniform(0.0, 0.07)))
    centre = NECK[0] + head.place(neck)[0]
    return Bird(
        variants,
        plumage,
        body,
        body.within(Frame.at(centre[0], centre[1], nod)),
        body.within(Frame.at(0, 0, rng.uniform(-0.07, 0.07))),
        body.within(Frame.at(-0.44, -0.01, rng.uniform(-0.18, 0.12))),
    )

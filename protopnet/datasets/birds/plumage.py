"""Colours. Every kind occurs in several morphs, as ruffs do: plumage colour never tells the kind."""

from dataclasses import dataclass

import numpy as np

from .canvas import Colour, mix

INK: Colour = (38, 34, 42)
WHITE: Colour = (248, 246, 238)
RED: Colour = (212, 50, 48)
CORAL: Colour = (238, 88, 62)
ORANGE: Colour = (240, 142, 40)
YELLOW: Colour = (246, 202, 62)
BLUE: Colour = (44, 104, 222)
GREY: Colour = (104, 102, 104)

# Colours of marks; the background uses the same ones, so that a colour found somewhere says little.
ACCENTS: tuple[Colour, ...] = (INK, WHITE, RED, CORAL, ORANGE, YELLOW, BLUE)


@dataclass(frozen=True)
class Plumage:
    """Colours of one bird."""

    back: Colour
    belly: Colour
    wing: Colour

    @property
    def edge(self) -> Colour:
        """Soft outline."""
        return mix(self.wing, INK, 0.55)


MORPHS: tuple[Plumage, ...] = (
    Plumage(back=(106, 126, 150), belly=(222, 224, 222), wing=(70, 84, 106)),  # slate
    Plumage(back=(178, 108, 66), belly=(238, 214, 176), wing=(118, 70, 48)),  # rust
    Plumage(back=(134, 142, 80), belly=(232, 228, 172), wing=(88, 98, 54)),  # olive
    Plumage(back=(198, 168, 124), belly=(244, 232, 208), wing=(138, 108, 76)),  # sand
    Plumage(back=(70, 142, 146), belly=(220, 236, 226), wing=(40, 96, 106)),  # teal
    Plumage(back=(142, 106, 152), belly=(232, 218, 230), wing=(92, 64, 106)),  # plum
)


def jitter(colour: Colour, rng: np.random.Generator, amount: float = 9.0) -> Colour:
    """The colour, slightly off: no two feathers are dyed alike."""
    red, green, blue = np.clip(np.array(colour) + rng.normal(0, amount, 3), 0, 255).astype(int).tolist()
    return red, green, blue


def draw_plumage(rng: np.random.Generator) -> Plumage:
    """The colours of an individual: one of the morphs, varied."""
    morph = MORPHS[rng.integers(len(MORPHS))]
    return Plumage(jitter(morph.back, rng), jitter(morph.belly, rng, 5), jitter(morph.wing, rng))

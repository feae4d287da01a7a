"""Places and observations by hand, for the tests of quality."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from protopnet.quality.key_points import PartPoint
from protopnet.quality.metrics import Observation

NOWHERE = (np.nan, np.nan)
HEAD, TAIL = PartPoint("head", 0.2, 0.2), PartPoint("tail", 0.8, 0.8)
ON_HEAD, ON_TAIL, BETWEEN = (0.25, 0.2), (0.8, 0.7), (0.5, 0.5)


def places(*pairs: tuple[float, float]) -> np.ndarray:
    return np.array(pairs, dtype=np.float64).reshape(-1, 2)


def image(image_id: int = 0, label: int = 0, points: Sequence[PartPoint] = (HEAD, TAIL), **more: Any) -> Observation:
    """An image of class 0 that no prototype has anything to say of, but for what is given."""
    nothing: dict[str, Any] = {"prediction": label, "own": [], "nearest": [], "nearest_similarity": []}
    nothing["own_contrast"] = [0.0] * len(more.get("own", ()))
    nothing |= dict.fromkeys(["own_places", "own_places_noisy", "evidence_places", "nearest_places"], places())
    return Observation(image_id=image_id, label=label, points=points, **nothing | more)


def own(at: Sequence[tuple[float, float]], noisy: Sequence[tuple[float, float]] | None = None) -> dict[str, Any]:
    """Prototypes 0, 1, … of the image's class at these places."""
    return {"own": list(range(len(at))), "own_places": places(*at), "own_places_noisy": places(*(noisy or at))}

"""Which class connections the last layer's problem penalises, and what it pulls them towards."""

import numpy as np


def off_class_KP(prototype_class_P: np.ndarray, num_classes: int) -> np.ndarray:
    """Whether a prototype belongs to another class than the row's."""
    other_KP: np.ndarray = prototype_class_P[None, :] != np.arange(num_classes)[:, None]
    return other_KP


def anchor_KP(off_KP: np.ndarray, connection_scale: float) -> np.ndarray:
    """What the ridge pulls the connections towards: the scale to the own class, nothing to the others.

    Training starts with -scale/2 to the other classes. Pulled back there, an optimum explains a class mostly by what
    the image isn't: of a cosine model every logit was some -480, of which the own prototypes gave +89. From the same
    similarities this anchor gives logits that the own prototypes make up, and as many right answers (docs/results.md).
    """
    return np.where(off_KP, 0.0, connection_scale)

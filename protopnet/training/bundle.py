"""From a trained network to its bundle, which refuses prototypes that aren't the patches they claim to be."""

import pyarrow as pa
import torch

from protopnet import __version__
from protopnet.config import RunSettings
from protopnet.datasets.rows import Dataset
from protopnet.model.bundle import save_bundle
from protopnet.model.network import Baseline, ProtoPNet
from protopnet.passes.describe import describe_prototypes
from protopnet.passes.image_pass import PassOptions
from protopnet.quality.calibration import calibrate


def write_bundle(
    uri: str,
    network: ProtoPNet | Baseline,
    settings: RunSettings,
    dataset: Dataset,
    pushed: pa.Table | None,
    options: PassOptions,
) -> str:
    """Write the bundle and return its hash. `pushed`: where each prototype comes from (not for a baseline)."""
    prototypes = None
    if isinstance(network, ProtoPNet) and pushed is not None:
        places = pushed.select(["prototype", "image_id", "row", "column"])
        prototypes = describe_prototypes(network, dataset, places, options=options)
    provenance = {
        "run": settings.name,
        "protopnet": __version__,
        "torch": torch.__version__,
        "settings": settings.model_dump(mode="json"),
        "data": dataset.source,
        "images": dataset.counts(),
    }
    calibration = calibrate(network, dataset, settings.calibration, options)
    return save_bundle(uri, network, settings.model, dataset.classes, provenance, prototypes, calibration)

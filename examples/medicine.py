"""Medicine: grey images of 16 bits; for each finding how often it is found, and how often it isn't where there is none.

python examples/medicine.py          a minute on two cores; leaves medicine/why.png and a trained run
"""

from pathlib import Path

import numpy as np
from PIL import Image

import protopnet

SIDE = 96
FINDINGS = ("effusion", "nodule", "normal")
SETTINGS = {
    "data": {"source": "folder", "path": "medicine/images", "test": 0.25},
    "model": {"cut": "layer2", "image_size": SIDE, "prototypes": 12, "prototype_depth": 32},
    "train": {"batch_size": 16, "warm_epochs": 0, "joint_epochs": 12, "cycles": 1},
    "augment.copies": 2,
    "last_layer": {"copies": 0, "max_iterations": 200},
    # The backbone learns from scratch. With weights (model.weights) these four are best left out.
    "model.similarity": "cosine",
    "model.start": "random",
    "train.lr_features": 3e-3,
    "train.schedule": "onecycle",
}


def radiograph(finding: str, rng: np.random.Generator) -> np.ndarray:
    """Something like two lungs, with a finding in one of them: SIDE x SIDE of uint16, bright where it is dense."""
    y, x = np.mgrid[0 : 1 : SIDE * 1j, 0 : 1 : SIDE * 1j]
    ribs = 0.03 * np.sin(2 * np.pi * (7 * y + 1.5 * (x - 0.5) ** 2 + rng.uniform()))
    middle = rng.uniform(0.27, 0.31)
    side = middle if rng.random() < 0.5 else 1 - middle
    lung, other = (np.exp(-((((x - at) / 0.17) ** 2 + ((y - 0.5) / 0.36) ** 2) ** 3)) for at in (side, 1 - side))
    density = 0.75 + ribs - 0.5 * (lung + other)
    if finding == "nodule":
        place, width = (side + rng.uniform(-0.06, 0.06), rng.uniform(0.3, 0.65)), rng.uniform(0.05, 0.07)
        density += 0.5 * np.exp(-(((x - place[0]) ** 2 + (y - place[1]) ** 2) / width**2))
    if finding == "effusion":
        level = rng.uniform(0.6, 0.7) + 0.15 * np.abs(x - side)
        density += 0.45 * lung / (1 + np.exp(-(y - level) / 0.015))
    noisy = density + rng.normal(0, 0.02, density.shape)
    return (noisy.clip(0, 1) * 65535).astype(np.uint16)


def main() -> None:
    rng = np.random.default_rng(0)
    for finding in FINDINGS:
        folder = Path("medicine/images") / finding
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(40):
            Image.fromarray(radiograph(finding, rng)).save(folder / f"{number:02}.png")
    run = protopnet.train({"name": "medicine", **SETTINGS})
    print(run)

    model = protopnet.load(run.bundle)
    truth = np.repeat(FINDINGS, 15)
    fresh = [radiograph(finding, rng) for finding in truth]  # arrays of 16 bits, as a reader of DICOM gives them
    found = np.array([prediction.class_name for prediction in model.predict(fresh)])
    for finding in FINDINGS[:2]:
        sensitivity, specificity = (
            np.mean(found[truth == finding] == finding),
            np.mean(found[truth != finding] != finding),
        )
        print(f"{finding}: sensitivity {sensitivity:.2f}, specificity {specificity:.2f}")
    nodule = fresh[int(np.flatnonzero(truth == "nodule")[0])]
    model.explain(nodule, why_not="normal", top_prototypes=3).figure().save("medicine/why.png")


if __name__ == "__main__":
    main()

"""Inspection: which part is faulty, and does the model look at the fault? Makes its own pictures of metal plates.

python examples/inspection.py        a minute on two cores; leaves inspection/report.png and a trained run
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

import protopnet

SIDE = 96
FAULTS = ("none", "scratch", "hole", "rust")
SETTINGS = {
    "data": {"source": "folder", "path": "inspection/plates", "test": 0.25},
    "model": {"cut": "layer2", "image_size": SIDE, "prototypes": 16, "prototype_depth": 32},
    "train": {"batch_size": 16, "warm_epochs": 0, "joint_epochs": 8, "cycles": 1},
    "augment.copies": 2,
    "last_layer": {"copies": 0, "max_iterations": 200},
    # The backbone learns from scratch. With weights (model.weights) these four are best left out.
    "model.similarity": "cosine",
    "model.start": "random",
    "train.lr_features": 3e-3,
    "train.schedule": "onecycle",
}


def plate(fault: str, rng: np.random.Generator) -> tuple[Image.Image, tuple[int, int]]:
    """Brushed metal with a fault, and where it is (row, column)."""
    brushed = rng.normal(150, 18, (SIDE, 1)) + rng.normal(0, 6, (SIDE, SIDE)) + rng.uniform(-20, 20)
    image = Image.fromarray(brushed.clip(0, 255).astype(np.uint8)).convert("RGB")
    draw, (row, column) = ImageDraw.Draw(image), rng.integers(22, SIDE - 22, 2).tolist()
    if fault == "scratch":
        across, down = rng.uniform(-18, 18, 2)
        draw.line([(column - across, row - down), (column + across, row + down)], fill=(235, 235, 240), width=2)
    elif fault == "hole":
        radius = int(rng.integers(4, 8))
        draw.ellipse([column - radius, row - radius, column + radius, row + radius], fill=(12, 12, 15))
    elif fault == "rust":
        for x, y in rng.normal((column, row), 5, (40, 2)):
            draw.ellipse([x - 2, y - 2, x + 2, y + 2], fill=(int(rng.integers(120, 170)), 70, 30))
    return image.filter(ImageFilter.GaussianBlur(0.6)), (row, column)


def main() -> None:
    rng = np.random.default_rng(0)
    for fault in FAULTS:
        folder = Path("inspection/plates") / fault
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(40):
            plate(fault, rng)[0].save(folder / f"{number:02}.png")
    run = protopnet.train({"name": "inspection", **SETTINGS})
    print(run)

    model = protopnet.load(run.bundle)
    fresh = [(fault, *plate(fault, rng)) for fault in FAULTS[1:] for _ in range(10)]
    found = model.explain([image for _, image, _ in fresh], why_not="none", top_prototypes=3)
    right = sum(why.class_name == fault for why, (fault, _, _) in zip(found, fresh, strict=True))
    looked = sum(_holds(why.classes[0].evidence[0].box, place) for why, (_, _, place) in zip(found, fresh, strict=True))
    print(f"{right} of {len(fresh)} faults named rightly; the strongest evidence is on the fault in {looked}")
    found[0].figure().save("inspection/report.png")


def _holds(box: tuple[int, int, int, int], place: tuple[int, int]) -> bool:
    top, left, bottom, right = box
    return top - 6 <= place[0] < bottom + 6 and left - 6 <= place[1] < right + 6


if __name__ == "__main__":
    main()

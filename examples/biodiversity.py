"""Biodiversity: a survey of leaves. Counts species in many photos, and leaves to people what the model isn't sure of.

python examples/biodiversity.py      a minute on two cores; leaves survey/ with the scores and a figure of a doubtful leaf
"""

from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
from PIL import Image, ImageDraw

import protopnet

SIDE = 96
SPECIES = {  # length by width, lobes a side, depth of the lobes
    "Quercus": (0.62, 5, 0.30),
    "Fagus": (0.66, 0, 0.0),
    "Salix": (0.22, 0, 0.0),
    "Acer": (0.95, 3, 0.45),
}
SETTINGS = {
    "data": {"source": "folder", "path": "survey/herbarium", "test": 0.25},
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


def leaf(species: str, rng: np.random.Generator) -> Image.Image:
    """A leaf of this species on the ground, anyhow turned."""
    ratio, lobes, depth = SPECIES[species]
    along = np.linspace(0, 1, 60)
    half = (
        0.5 * ratio * np.sin(np.pi * along) ** 0.8 * (1 - depth * (np.sin(np.pi * lobes * along) ** 2 if lobes else 0))
    )
    outline = np.concatenate([np.stack([along - 0.5, half], 1), np.stack([along - 0.5, -half], 1)[::-1]])
    turn, size, shift = rng.uniform(0, 2 * np.pi), rng.uniform(55, 80), rng.uniform(-8, 8, 2)
    rotate = size * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])

    def on_image(points: np.ndarray) -> list[tuple[float, float]]:
        return [(x, y) for x, y in points @ rotate + SIDE / 2 + shift]

    ground = rng.integers(60, 130, (12, 12, 3), dtype=np.uint8)
    image = Image.fromarray(ground).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    draw, green = ImageDraw.Draw(image), (int(rng.integers(60, 150)), int(rng.integers(120, 190)), 50)
    draw.polygon(on_image(outline), fill=green)
    draw.line(on_image(np.array([[-0.55, 0], [0.5, 0]])), fill=(220, 220, 170), width=1)
    return image


def main() -> None:
    rng = np.random.default_rng(0)
    for species in SPECIES:
        for folder, images in (("herbarium", 40), ("photos", 15)):
            place = Path("survey") / folder / (species if folder == "herbarium" else "")
            place.mkdir(parents=True, exist_ok=True)
            for number in range(images):
                leaf(species, rng).save(place / f"{species if folder == 'photos' else ''}{number:02}.png")
    run = protopnet.train({"name": "survey", **SETTINGS})
    print(run)

    asked = {"bundle": [run.bundle], "input": "survey/photos", "output": "survey/scores", "explain": 3, "abstain": 0.9}
    summary = protopnet.score(asked)
    print(f"species counted: {summary['predictions']}; {summary['abstained']} of {summary['images']} left to people")
    scores = ds.dataset("survey/scores/parts").to_table(columns=["uri", "probability"]).sort_by("probability")
    doubtful = protopnet.load(run.bundle).explain(scores["uri"][0].as_py(), top_classes=2)
    print(doubtful)
    doubtful.figure().save("survey/doubtful.png")


if __name__ == "__main__":
    main()

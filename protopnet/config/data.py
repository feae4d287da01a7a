"""Where images come from, and how they are read."""

from typing import Literal

from pydantic import Field, model_validator

from protopnet.config.section import Section


class IntensitySettings(Section):
    """Which values of grey images of more than 8 bits become black and white; those of 8 bits are as they are.

    Where neither is given: 0 and the largest value of the file's bits (12 bits in a file of 16 are known by their
    values), or a DICOM's own window; of floats and of negative values the file's own range.
    """

    window: tuple[float, float] | None = Field(None, description="the values that become black and white, as 0,4095")
    percentiles: tuple[float, float] | None = Field(
        None, description="the same as percentiles of each image's own values, as 1,99"
    )

    @model_validator(mode="after")
    def _one_that_rises(self) -> "IntensitySettings":
        if self.window is not None and self.percentiles is not None:
            raise ValueError("data.intensity has both window and percentiles: expected one of them")
        for name, pair in (("window", self.window), ("percentiles", self.percentiles)):
            if pair is not None and not pair[0] < pair[1]:
                raise ValueError(
                    f"data.intensity.{name}: {pair[0]:g},{pair[1]:g} is not valid; expected the lower first"
                )
        if self.percentiles is not None and not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise ValueError("data.intensity.percentiles: expected two numbers from 0 to 100")
        return self


class DataSettings(Section):
    """Where the images come from."""

    source: Literal["birds", "folder", "list", "cub", "shards"] = Field(
        "birds",
        description="birds: generated birds; folder: one sub-folder a class (with or without folders "
        "of splits above or below); list: a .csv, .tsv or .parquet file with columns uri, label and, if you like, split; "
        "cub: CUB-200-2011 in its official layout; shards: a folder that jobs/prepare.py wrote",
    )
    path: str | None = Field(
        None,
        description="folder of the images or shards, or the list, a local path or s3://…; not used by generated birds",
    )
    classes: int | list[str] | None = Field(
        None, description="only the first N classes, or only the classes named; all when left out"
    )
    crop: Literal["boxes", "none"] = Field(
        "boxes", description="for cub: crop each image to its bounding box, or keep the full image"
    )
    masks: str | None = Field(
        None,
        description="folder, a local path or s3://…, with a mask of the object an image, at the image's own path (folder: "
        "below data.path, cub: below images/); lists have a column mask or box",
    )
    validation: float = Field(
        0.1, ge=0, lt=1, description="share of each class's training images that is kept for validation"
    )
    test: float = Field(
        0.2, ge=0, lt=1, description="share of each class cut off for testing when the source has no test split"
    )
    hide_test: bool = Field(
        False,
        description="leave the test images out of a run, neither trained on nor looked at: what jobs/tune.py does to its "
        "trials",
    )
    max_bad: float = Field(
        0.05, ge=0, le=1, description="largest share of images that can't be read before the job gives up"
    )
    max_pixels: int = Field(
        50_000_000, ge=1, description="images with more pixels than this are refused (decompression bombs)"
    )
    intensity: IntensitySettings = Field(
        IntensitySettings(), description="which values become black and white in grey images of more than 8 bits"
    )
    duplicates: Literal["warn", "refuse", "drop"] = Field(
        "warn",
        description="validation and test images that are, to the byte, training images too: name them, end the job, or "
        "drop them from training",
    )
    workers: int | None = Field(
        None,
        ge=1,
        description="threads that decode images beside each training worker; the machine's cores shared out when left out",
    )

    @model_validator(mode="after")
    def _masks_of_files(self) -> "DataSettings":
        if self.masks is not None and self.source not in ("folder", "cub"):
            raise ValueError(
                f"data.masks is for data.source folder or cub, not {self.source}: a list has a column mask or box, "
                "shards have what they were prepared with"
            )
        return self


class BirdSettings(Section):
    """The generated birds (used when data.source is birds)."""

    classes: int = Field(12, ge=2, le=200, description="number of kinds of bird")
    train_per_class: int = Field(60, ge=2, description="training images a class")
    test_per_class: int = Field(20, ge=1, description="test images a class")
    size: int = Field(128, ge=32, le=1024, description="width and height in pixels")
    seed: int = Field(0, ge=0, description="another seed draws other kinds and other birds")

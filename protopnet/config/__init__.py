"""Every setting of a training run, documented and bounded field by field.

The models here are at once the YAML file (`configs/*.yaml`), the command line
(`--model.backbone vgg19`, see `protopnet.cli`) and the record kept in the run folder.
"""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from protopnet.config.data import BirdSettings, DataSettings, IntensitySettings
from protopnet.config.model import ModelSettings
from protopnet.config.section import Section
from protopnet.config.tracking import TrackingSettings

__all__ = [
    "AugmentSettings",
    "BirdSettings",
    "CalibrationSettings",
    "ComputeSettings",
    "DataSettings",
    "IntensitySettings",
    "LastLayerSettings",
    "ModelSettings",
    "PrepareSettings",
    "PushSettings",
    "RunSettings",
    "Section",
    "Threshold",
    "TrackingSettings",
    "TrainSettings",
]

# A probability below which not to answer; bundle: the one that the bundle keeps.
Threshold = Annotated[float, Field(ge=0, le=1)] | Literal["bundle"]


class AugmentSettings(Section):
    """Augmentation of training images, on the fly."""

    recipe: Literal["paper", "flip", "none"] = Field(
        "paper", description="paper: rotate, skew or shear, each with a flip, as published; flip: only that; none"
    )
    copies: int = Field(1, ge=1, description="augmented passes over the training images an epoch (published: 30)")
    rotate: float = Field(15, ge=0, le=45, description="largest rotation in degrees")
    skew: float = Field(0.2, ge=0, le=0.5, description="largest skew as a share of the longer side")
    shear: float = Field(10, ge=0, le=45, description="largest shear in degrees")
    keep_object: float = Field(
        0,
        ge=0,
        le=1,
        description="where an image has a mask or box: draw until this share of the object is seen (10 times at most); "
        "0 is the published recipe",
    )


class TrainSettings(Section):
    """Joint SGD of everything below the last layer, and the schedule of the stages."""

    batch_size: int = Field(80, ge=1, description="images a step, over all workers together")
    warm_epochs: int = Field(5, ge=0, description="epochs that train only add-on layers and prototypes")
    joint_epochs: int = Field(6, ge=0, description="joint epochs before the first push")
    next_joint_epochs: int = Field(10, ge=1, description="joint epochs between one push and the next")
    cycles: int = Field(1, ge=1, description="how many times joint training, push and last layer are run at most")
    patience: int = Field(
        1, ge=1, description="stop after this many cycles in a row without a better validation accuracy"
    )
    lr_features: float = Field(1e-4, gt=0, description="Adam learning rate of the backbone")
    lr_add_on: float = Field(3e-3, gt=0, description="Adam learning rate of the add-on layers")
    lr_prototypes: float = Field(3e-3, gt=0, description="Adam learning rate of the prototypes")
    lr_head: float = Field(1e-3, gt=0, description="Adam learning rate of the baseline's linear head")
    weight_decay: float = Field(1e-3, ge=0, description="Adam L2 penalty of backbone, add-on layers and head")
    decay_epochs: int = Field(5, ge=1, description="joint epochs after which learning rates are multiplied by decay")
    decay: float = Field(0.1, gt=0, le=1, description="factor of the step decay")
    schedule: Literal["step", "onecycle", "cosine"] = Field(
        "step",
        description="step: decay as published; onecycle: learning rates rise over the first 30 % of the joint "
        "steps and fall to nothing over the rest (Smith 2018); cosine: the same with warm_up in place of the 30 %",
    )
    warm_up: float = Field(
        0.05, ge=0, lt=1, description="share of the joint steps over which the learning rates of schedule cosine rise"
    )
    keep: Literal["last", "best"] = Field(
        "last", description="which epoch a joint stage hands on: the last, or the best joint one on validation images"
    )
    cross_entropy: float = Field(1.0, description="weight of the cross-entropy")
    cluster: float = Field(0.8, description="weight of the cluster cost: own-class prototypes near some patch")
    separation: float = Field(-0.08, description="weight of the separation cost: other classes' prototypes far away")
    l1: float = Field(1e-4, ge=0, description="weight of the L1 norm of connections to other classes")
    label_smoothing: float = Field(0, ge=0, lt=1, description="of the cross-entropy")
    balance: bool = Field(
        False, description="weigh the cross-entropy of each image by how rare its class is among the training images"
    )
    clip: float | None = Field(
        None, gt=0, description="largest norm of a step's gradients together; no limit when left out"
    )
    accumulate: int = Field(
        1,
        ge=1,
        description="pieces that each worker's part of a batch is computed in, one after the other: less memory",
    )
    precision: Literal["auto", "float32", "tf32", "bf16", "fp16"] = Field(
        "auto",
        description="of the backbone in training; distances are always float32; auto: bf16 where the hardware has it, "
        "on older GPUs fp16, else float32; tf32: float32 rounded to 10 bits by the GPU where it multiplies",
    )
    sync_batchnorm: bool = Field(
        False, description="BatchNorm over the whole batch rather than each worker's part; on GPUs only"
    )
    compile: bool = Field(False, description="torch.compile the backbone: a minute at the start, faster steps on GPUs")


class PushSettings(Section):
    """Projection of each prototype onto the nearest latent patch of its class."""

    distinct: bool = Field(True, description="no two prototypes of a class on the same patch: take the next nearest")
    batch_size: int = Field(64, ge=1, description="images a forward pass, in every pass without gradients")


class LastLayerSettings(Section):
    """The convex optimisation of the class connections."""

    l1: float = Field(1e-4, ge=0, description="weight of the L1 norm of connections to other classes")
    ridge: float = Field(
        1e-4,
        gt=0,
        description="weight of half the squared distance from model.connection_scale to the own class, 0 to the others",
    )
    copies: int = Field(
        1, ge=0, description="augmented copies of each training image beside the plain one, in the cached similarities"
    )
    precision: Literal["float32", "float16"] = Field(
        "float32",
        description="of the cached similarities where they are solved: float16 halves them; the optimum is then certified "
        "for similarities rounded to 11 bits",
    )
    tolerance: float = Field(1e-5, gt=0, description="stop when the optimality (KKT) residual falls below this")
    max_iterations: int = Field(2000, ge=1, description="stop after this many iterations all the same, and say so")


class CalibrationSettings(Section):
    """What the bundle says of its own answers, fitted on validation images."""

    accuracy: float = Field(
        0.95,
        gt=0,
        le=1,
        description="share of right answers wanted: the bundle keeps the probability from which on so many are, for "
        "scoring's abstain and the service's abstain_below",
    )
    unknown: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="share of the validation images that would be flagged as looking like nothing known: those whose best "
        "similarity is lowest",
    )


class ComputeSettings(Section):
    """What of the cluster a run uses."""

    address: str | None = Field(
        None, description="Ray cluster to connect to (`auto` for the one on this machine); a local Ray when left out"
    )
    workers: int | tuple[int, int] | None = Field(
        None,
        description="data-parallel training workers, or the fewest and the most (2,8): then training goes on with what "
        "is left when nodes go, and takes in new ones; one a GPU, or one on a machine without, when left out",
    )
    threads: int | None = Field(
        None, ge=1, description="CPU threads of each training worker; shared out evenly when left out"
    )
    pass_workers: int | None = Field(
        None, ge=1, description="actors of passes without gradients (push, evaluation); chosen when left out"
    )
    gpu: bool | None = Field(None, description="train on GPUs; where the cluster has any when left out")
    gpu_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of a GPU that a worker or actor takes: 0.5 leaves room for another beside it",
    )
    nodes: str | None = Field(
        None,
        description="only nodes with this custom resource, e.g. on_demand, spot or cpu of cluster.yaml; any when left out",
    )
    shared_storage: bool = Field(
        False, description="local paths are on a disk that every node sees at the same place (NFS, say)"
    )
    patience: int = Field(
        60, ge=1, description="minutes without a finished block, or waiting for nodes, after which a pass gives up"
    )
    max_failures: int = Field(3, ge=0, description="how often a training stage may be restarted after a lost worker")

    @field_validator("workers")
    @classmethod
    def _some_workers(cls, value: int | tuple[int, int] | None) -> int | tuple[int, int] | None:
        fewest, most = value if isinstance(value, tuple) else (value, value)
        if fewest is not None and fewest < 1:
            raise ValueError(f"compute.workers: {fewest} is not valid; training needs at least 1 worker")
        if fewest is not None and most is not None and fewest > most:
            raise ValueError(
                f"compute.workers: {fewest},{most} is not valid; expected the fewest first, then the most: {most},{fewest}"
            )
        return value


class RunSettings(Section):
    """Settings of `jobs/train.py`."""

    name: str = Field("quickstart", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the run")
    storage: str = Field("runs", description="where run folders go: a local path or s3://bucket/prefix")
    seed: int = Field(0, ge=0, description="seed of everything that is drawn")
    data: DataSettings = DataSettings()
    birds: BirdSettings = BirdSettings()
    model: ModelSettings = ModelSettings()
    augment: AugmentSettings = AugmentSettings()
    train: TrainSettings = TrainSettings()
    push: PushSettings = PushSettings()
    last_layer: LastLayerSettings = LastLayerSettings()
    calibration: CalibrationSettings = CalibrationSettings()
    compute: ComputeSettings = ComputeSettings()
    tracking: TrackingSettings = TrackingSettings()

    @model_validator(mode="after")
    def _source_has_a_path(self) -> "RunSettings":
        if self.data.source != "birds" and not self.data.path:
            raise ValueError(f"data.path is missing: where are the images of data.source {self.data.source}?")
        return self


class PrepareSettings(Section):
    """Settings of `jobs/prepare.py`: turn any source of images into shards."""

    output: str = Field("shards", description="folder the shards are written to: a local path or s3://bucket/prefix")
    overwrite: bool = Field(False, description="replace a dataset that is already there")
    report: str | None = Field(
        None, description="also write a page (.html) of what the data are: classes, sizes, samples, copies, suspects"
    )
    seed: int = Field(0, ge=0, description="seed of the validation and test splits cut from a folder")
    data: DataSettings = DataSettings()
    birds: BirdSettings = BirdSettings()
    compute: ComputeSettings = ComputeSettings()

"""Every setting of a training run, documented and bounded field by field.

The models here are at once the YAML file (`configs/*.yaml`), the command line
(`--model.backbone vgg19`, see `protopnet.cli`) and the record kept in the run folder.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

# A probability below which not to answer; bundle: the one that the bundle keeps.
Threshold = Annotated[float, Field(ge=0, le=1)] | Literal["bundle"]


class Section(BaseModel):
    """A group of settings. Unknown keys are refused, values can't be changed once checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


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
    validation: float = Field(
        0.1, ge=0, lt=1, description="share of each class's training images that is kept for validation"
    )
    test: float = Field(
        0.2, ge=0, lt=1, description="share of each class cut off for testing when the source has no test split"
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


class BirdSettings(Section):
    """The generated birds (used when data.source is birds)."""

    classes: int = Field(12, ge=2, le=200, description="number of kinds of bird")
    train_per_class: int = Field(60, ge=2, description="training images a class")
    test_per_class: int = Field(20, ge=1, description="test images a class")
    size: int = Field(128, ge=32, le=1024, description="width and height in pixels")
    seed: int = Field(0, ge=0, description="another seed draws other kinds and other birds")


class ModelSettings(Section):
    """The network."""

    kind: Literal["protopnet", "baseline"] = Field(
        "protopnet", description="protopnet, or its black-box counterpart: the same backbone with a linear head"
    )
    backbone: str = Field(
        "resnet18",
        description="a torchvision classification network by name (vgg16, densenet121, …), or one of timm's: "
        "timm/convnext_tiny, timm/vit_small_patch14_dinov2.lvd142m, …",
    )
    cut: str | None = Field(
        None,
        description="name of the module whose output is the feature map, e.g. layer2 (torchvision) or one of timm's own "
        "feature maps, e.g. blocks.7 or stages.2; the authors' place, or the last map, when left out",
    )
    weights: str | None = Field(
        None,
        description="weights the backbone starts with: a .pth or .safetensors file (local or s3://), "
        "`imagenet` to download torchvision's, `pretrained` to download timm's, or nothing: from scratch; with model.start "
        "bundle the folder of a bundle",
    )
    image_size: int = Field(
        224,
        ge=32,
        le=2048,
        description="images are resized to this many pixels on each side; "
        "for timm's networks the size their weights were trained for when left out",
    )
    pool: int = Field(
        1, ge=1, le=15, description="each cell of the backbone's map becomes the mean of a square of so many; odd"
    )
    add_on: Literal["regular", "bottleneck", "linear"] = Field(
        "regular",
        description="layers between backbone and prototypes: regular and bottleneck as published; linear: one "
        "convolution, and no sigmoid",
    )
    prototype_depth: int = Field(128, ge=2, le=4096, description="channels of the latent map and of each prototype")
    prototypes: int | None = Field(
        None, ge=1, description="number of prototypes over all classes; 10 a class when left out"
    )
    prototype_shape: tuple[int, int] = Field((1, 1), description="height and width of a prototype in latent cells")
    similarity: Literal["log", "linear", "cosine"] = Field(
        "log", description="log((d+1)/(d+epsilon)) and -d of the squared distance d, or the cosine"
    )
    epsilon: float = Field(1e-4, gt=0, description="epsilon of the log similarity")
    connection_scale: float | None = Field(
        None,
        gt=0,
        description="class connections start at +scale for the own class and -scale/2 for others; "
        "1 for log and linear, 10 for cosine when left out",
    )
    start: Literal["data", "parts", "random", "bundle"] = Field(
        "data",
        description="data: add-on layers from the principal directions of the backbone's patches, prototypes from "
        "k-means of each class's patches; parts: prototype g of every class is part g, found over all classes on the "
        "foreground; random: as published; bundle: go on with all of the bundle that model.weights names, classes matched "
        "by name",
    )

    @model_validator(mode="before")
    @classmethod
    def _size_as_trained(cls, given: Any) -> Any:
        """timm knows the size of image that each of its networks was trained for."""
        backbone = given.get("backbone") if isinstance(given, dict) else None
        if not isinstance(backbone, str) or not backbone.startswith("timm/") or "image_size" in given:
            return given
        import timm  # only where it is asked for: importing it takes seconds

        trained: Any = timm.get_pretrained_cfg(backbone.removeprefix("timm/"), allow_unregistered=True)
        return given if trained is None else {**given, "image_size": max(trained.input_size[1:])}

    @field_validator("pool")
    @classmethod
    def _has_a_middle(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError(f"model.pool: {value} is not valid; expected an odd number: 1, 3, 5, …")
        return value

    @model_validator(mode="after")
    def _start_fits(self) -> "ModelSettings":
        fits = (self.add_on, self.similarity, self.prototype_shape) == ("linear", "cosine", (1, 1))
        if self.start == "parts" and not fits:
            raise ValueError(
                "model.start parts needs model.add_on linear, model.similarity cosine and model.prototype_shape 1,1"
            )
        if self.start == "data" and self.add_on == "linear":
            raise ValueError("model.start data has nothing to set in model.add_on linear: set model.start to parts")
        if self.start == "bundle" and (self.weights is None or self.kind == "baseline"):
            raise ValueError("model.start bundle needs model.weights, the folder of a bundle, and model.kind protopnet")
        return self

    @property
    def own_connection(self) -> float:
        """Class connection of a prototype to its own class before the last layer is optimised."""
        if self.connection_scale is not None:
            return self.connection_scale
        return 10.0 if self.similarity == "cosine" else 1.0


class AugmentSettings(Section):
    """Augmentation of training images, on the fly."""

    recipe: Literal["paper", "flip", "none"] = Field(
        "paper", description="paper: rotate, skew or shear, each with a flip, as published; flip: only that; none"
    )
    copies: int = Field(1, ge=1, description="augmented passes over the training images an epoch (published: 30)")
    rotate: float = Field(15, ge=0, le=45, description="largest rotation in degrees")
    skew: float = Field(0.2, ge=0, le=0.5, description="largest skew as a share of the longer side")
    shear: float = Field(10, ge=0, le=45, description="largest shear in degrees")


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

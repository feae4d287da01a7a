"""Where a run's figures go beside its own folder."""

from typing import Literal

from pydantic import Field

from protopnet.config.section import Section


class TrackingSettings(Section):
    """Where figures, report and bundle go beside the run's folder."""

    to: list[Literal["tensorboard", "mlflow", "wandb"]] = Field(
        ["tensorboard"],
        description="tensorboard: events in the run's folder; mlflow: the server of MLFLOW_TRACKING_URI; wandb: Weights & "
        "Biases, as its own variables say (WANDB_MODE=offline)",
    )
    project: str = Field("protopnet", min_length=1, description="MLflow's experiment, W&B's project")
    register_as: str | None = Field(
        None, description="name in MLflow's registry under which the bundle becomes a version of a model"
    )

"""The joint stage: data-parallel SGD of everything below the last layer (`worker`), on Ray Train.

One `fit()` a stage, whatever its number of epochs: entering one costs ten seconds on a small machine. One worker on
the machine of the driver needs no group: it runs in Ray Train's local mode, in this process.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import ray
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from protopnet import storage
from protopnet.cluster import TrainPlan
from protopnet.config import RunSettings
from protopnet.errors import UserError
from protopnet.progress import listening
from protopnet.training.schedule import Epochs
from protopnet.training.worker import ERROR_FILE, Job, Place, train

# A group takes new nodes in at most this often: each time it begins its epoch again.
RESIZE_SECONDS = 600


def train_stage(
    settings: RunSettings,
    dataset_uri: str,
    state_in: str,
    state_out: str,
    epochs: Epochs,
    plan: TrainPlan,
    folder: str,
    on_message: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Train the epochs of one stage from one saved state to the next; returns rank 0's summary.

    `folder` belongs to this stage: its checkpoint is there, from which it goes on after a failure of a worker, or
    when the same stage is started again after a failure of the driver. `on_message` hears of steps and epochs.
    """
    job = Job(settings.model_dump(mode="json"), dataset_uri, state_in, state_out, epochs, folder)
    error_uri = storage.join(folder, ERROR_FILE)
    storage.delete_file(error_uri)  # of an earlier attempt: it may have been put right
    if plan.in_driver:
        return _in_this_process(job, plan, on_message)
    try:
        with listening(on_message) as events:
            summary = _in_a_group(job, plan, settings.compute.max_failures, events)
    except ray.train.TrainingFailedError:
        if not storage.exists(error_uri):
            raise
    if storage.exists(error_uri):
        raise UserError(storage.read_bytes(error_uri).decode())
    return summary


def _in_this_process(job: Job, plan: TrainPlan, tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    device = torch.device("cuda" if plan.gpu else "cpu")
    threads = torch.get_num_threads()
    try:
        trainer = TorchTrainer(
            lambda: train(job, Place(device, plan.threads, tell)),  # type: ignore[arg-type,return-value]
            scaling_config=ScalingConfig(num_workers=0),
        )
        result: Any = trainer.fit()
        return result.return_value
    finally:
        torch.set_num_threads(threads)


def _in_a_group(job: Job, plan: TrainPlan, max_failures: int, events: ray.actor.ActorHandle) -> dict[str, Any]:
    filesystem, path = storage.arrow_filesystem(job.folder)
    trainer = TorchTrainer(
        _worker_loop,  # type: ignore[arg-type]  # Ray's type wants None, its documentation a result
        train_loop_config={"job": job, "threads": plan.threads, "events": events},
        scaling_config=ScalingConfig(  # type: ignore[call-arg]  # mypy sees the class of Train v1
            num_workers=plan.num_workers,  # type: ignore[arg-type]
            use_gpu=plan.gpu,
            resources_per_worker=plan.resources_per_worker,
            placement_strategy="SPREAD",  # each worker decodes for itself: packed, they share one node's cores
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
        ),
        run_config=RunConfig(
            name="sgd",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=max_failures),  # a node that is reclaimed isn't counted
        ),
    )
    result: Any = trainer.fit()
    return result.return_value


def _worker_loop(config: dict[str, Any]) -> dict[str, Any]:
    """What Ray Train runs in each worker; the worker knows its rank from there.

    A group that is started again after a `UserError` ends at once, rather than fail as often as failures are allowed.
    """
    if storage.exists(storage.join(config["job"].folder, ERROR_FILE)):
        return {}
    context = ray.train.get_context()
    place = Place(
        ray.train.torch.get_device(),
        config["threads"],
        partial(_put, config["events"]),
        context.get_world_rank(),
        context.get_world_size(),
        lambda: ray.train.get_preemption_info() is not None,
    )
    return train(config["job"], place)


def _put(events: ray.actor.ActorHandle, message: dict[str, Any]) -> None:
    events.put.remote(message)

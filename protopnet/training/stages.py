"""What each stage of a run does: it reads what an earlier one left in storage and writes its own folder.

The math is elsewhere: this module knows the files between the stages and what is said of each. Which stage is next,
and what happens when one is cut off, is in `execute`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from protopnet import storage
from protopnet.budget import check_batch
from protopnet.cluster import plan_training
from protopnet.config import RunSettings
from protopnet.datasets.duplicates import duplicates_across, duplicates_text, settled
from protopnet.datasets.near_duplicates import near_duplicates_across, near_duplicates_text
from protopnet.datasets.open import mixed, open_dataset
from protopnet.datasets.validate import check_dataset
from protopnet.model.bundle import load_bundle
from protopnet.model.network import ProtoPNet, build_network, whole_image_text
from protopnet.passes import push as push_step
from protopnet.predictor import Predictor
from protopnet.quality.evaluate import evaluate
from protopnet.quality.quality_pass import QualityOptions
from protopnet.tables import read_table, write_table
from protopnet.training.bundle import write_bundle
from protopnet.training.imported import run_import
from protopnet.training.last_layer import optimise_last_layer
from protopnet.training.parts import check_parts, sample_maps, start_from_parts
from protopnet.training.run import Result, Run
from protopnet.training.schedule import Stage, training_cycles
from protopnet.training.sgd import train_stage
from protopnet.training.start import PatchSample, check_directions, sample_patches, start_from_patches
from protopnet.training.state import save_state
from protopnet.training.warm import check_warm_start, start_from_bundle
from protopnet.words import percent

# Test images of a run that deletion and insertion are measured on; `jobs/evaluate.py --quality` takes more.
CURVE_IMAGES = 24


def run_data(run: Run, stage: Stage, state_in: str | None) -> Result:
    """List, check and split the images; lay down the network that training starts from."""
    run.reporter.begin(stage.name, 0)
    # Refuses a model that can't be built, before the images are read. One class shares any number of prototypes.
    network = build_network(run.settings.model, _classes_expected(run.settings) or 1)
    if isinstance(network, ProtoPNet) and run.settings.model.start == "data":
        check_directions(network.add_on)
    if isinstance(network, ProtoPNet) and run.settings.model.start == "parts":
        check_parts(network)
    if run.settings.model.start == "bundle":
        _given(run)
    dataset = open_dataset(run.settings, run.folder(stage))
    dataset, repeated = settled(dataset, run.settings.data.duplicates)
    if run.settings.data.hide_test:
        dataset = dataset.without("test")
    check_dataset(dataset, run.settings.data.max_bad)
    dataset = mixed(dataset, run.folder(stage))
    dataset.save(run.folder(stage))
    write_table(storage.join(run.folder(stage), "duplicates.parquet"), repeated)
    near = near_duplicates_across(dataset.table, run.settings.data.max_pixels, run.settings.data.intensity)
    write_table(storage.join(run.folder(stage), "near_duplicates.parquet"), near)
    leaks = (duplicates_text(duplicates_across(dataset.table)), near_duplicates_text(near))
    save_state(run.state_uri(stage), run.network().state_dict())
    counts = dataset.counts()
    bad = f", {len(dataset.errors)} unreadable (see errors.parquet)" if len(dataset.errors) else ""
    further = "".join(
        f"; {text}" for text in (dataset.source.get("passed_over"), *leaks, whole_image_text(network)) if text
    )
    says = f"{counts['train']} training, {counts['validation']} validation, {counts['test']} test images, "
    return {
        "classes": len(dataset.classes),
        "counts": counts,
        "says": f"{says}{len(dataset.classes)} classes{bad}{further}",
    }


def _classes_expected(settings: RunSettings) -> int | None:
    """How many classes there will be, where the settings say so."""
    chosen = settings.data.classes
    if chosen is None:
        return settings.birds.classes if settings.data.source == "birds" else None
    return chosen if isinstance(chosen, int) else len(chosen)


def run_start(run: Run, stage: Stage, state_in: str | None) -> Result:
    """Add-on layers and prototypes from the training images, where the settings ask for it."""
    assert state_in is not None
    network, seed = _protopnet(run, state_in), run.settings.seed
    start, rows = run.settings.model.start, run.dataset.split("train")

    def patches() -> PatchSample:
        run.reporter.begin(stage.name, len(rows))
        return sample_patches(network, rows, seed=seed, options=run.options(), on_images=run.counter())

    images, says = 0, "random, as published"
    if start == "data":
        sample = patches()
        start_from_patches(network, sample, seed)
        images = sample.images
    elif start == "parts":
        run.reporter.begin(stage.name, len(rows))
        maps = sample_maps(network, rows, seed=seed, options=run.options(), on_images=run.counter())
        start_from_parts(network, maps, seed)
        images = 2 * len(maps.labels_N)  # plain, and with noise
    elif start == "bundle":
        given, names = _given(run)
        warm = start_from_bundle(network, run.dataset.classes, given, names, patches, seed)
        images, says = warm.images, f"{warm.prototypes} of {len(network.prototypes)} prototypes go on from the bundle"
    if images and start != "bundle":
        says = f"from {images} image passes"
    save_state(run.state_uri(stage), network.state_dict())
    return {"image_passes": images, "says": says}


def _given(run: Run) -> tuple[ProtoPNet, list[str]]:
    """Network and classes of the bundle that this run goes on from."""
    model = run.settings.model
    assert model.weights is not None
    bundle = load_bundle(model.weights)
    return check_warm_start(bundle, model, model.weights), bundle.classes


def run_joint(run: Run, stage: Stage, state_in: str | None) -> Result:
    """Warm and joint epochs on the training workers."""
    assert state_in is not None
    assert stage.epochs is not None
    epochs, per_epoch = stage.epochs, len(run.dataset.split("train")) * run.settings.augment.copies
    run.reporter.begin(stage.name, (epochs.end - epochs.first) * per_epoch)

    def on_message(message: dict[str, Any]) -> None:
        done = (message["epoch"] - epochs.first) * per_epoch
        if message["kind"] == "step":
            run.reporter.advance(done + message["images"])
            return
        run.reporter.advance(done + per_epoch)
        metrics = message["metrics"]
        run.log.add(stage.name, metrics, epoch=message["epoch"])
        run.flush()
        validation = metrics["validation_accuracy"]
        shown = f", validation {percent(validation)}" if validation is not None else ""
        run.reporter.note(
            f"epoch {message['epoch'] + 1}/{epochs.end} {message['phase']:<5} loss {metrics['total']:.3f}, "
            f"training {percent(metrics['accuracy'])}{shown}, {metrics['images_per_second']:.0f} img/s"
        )

    plan = plan_training(run.settings.compute)
    check_batch(plan, run.settings.train)
    folder = run.checkpoints(stage)
    summary = train_stage(
        run.settings, run.dataset_uri, state_in, run.state_uri(stage), epochs, plan, folder, on_message
    )
    rate = summary["images"] / max(summary["seconds"], 1e-9)
    return {
        "validation_accuracy": summary["validation_accuracy"],
        "test_accuracy": summary["test_accuracy"],
        "test_accuracy_before": summary["test_accuracy_before"],
        "image_passes": summary["images"],
        "images_per_second": round(rate, 1),
        "workers": summary["workers"],
        "says": f"{summary['images']:,} image passes, {rate:.0f} img/s",
    }


def run_push(run: Run, stage: Stage, state_in: str | None) -> Result:
    """Every prototype onto the nearest patch of its class; `push.parquet` records where each went."""
    assert state_in is not None
    network, rows = _protopnet(run, state_in), run.dataset.split("train")
    run.reporter.begin(stage.name, len(rows))
    settings = run.settings
    result = push_step.push(
        network,
        rows,
        distinct=settings.push.distinct,
        options=run.options(),
        on_images=run.counter(),
    )
    push_step.apply_push(network, result)
    write_table(storage.join(run.folder(stage), "push.parquet"), result.chosen)
    save_state(run.state_uri(stage), network.state_dict())
    distance = result.chosen["distance"].to_numpy()
    says = f"{len(distance)} prototypes moved by {np.median(distance):.3f} in the median (squared distance)"
    return {
        "image_passes": len(rows),
        "distance_median": float(np.median(distance)),
        "distance_max": float(distance.max()),
        "reencoded_images": result.refined,
        "says": says,
    }


def run_last_layer(run: Run, stage: Stage, state_in: str | None) -> Result:
    """The convex optimum of the class connections."""
    assert state_in is not None
    network, settings, dataset = _protopnet(run, state_in), run.settings, run.dataset
    rows = pa.concat_tables([dataset.split(split) for split in ("train", "validation", "test")])
    run.reporter.begin(stage.name, len(rows))
    result = optimise_last_layer(
        network,
        settings.model.own_connection,
        rows,
        settings=settings.last_layer,
        options=run.options(),
        on_images=run.counter(),
    )
    with torch.no_grad():
        network.last_layer.weight.copy_(torch.from_numpy(result.solution.weights).float())
    save_state(run.state_uri(stage), network.state_dict())
    solution = result.solution
    state = "optimal" if solution.converged else "not yet optimal"
    return {
        "validation_accuracy": result.after.get("validation"),
        "test_accuracy": result.after.get("test"),
        "validation_accuracy_before": result.before.get("validation"),
        "test_accuracy_before": result.before.get("test"),
        "objective": solution.objective,
        "kkt_residual": solution.residual,
        "iterations": solution.iterations,
        "image_passes": len(dataset.split("train")) * (1 + settings.last_layer.copies),
        "says": f"{state} after {solution.iterations} iterations, residual {solution.residual:.1e}",
    }


def run_bundle(run: Run, stage: Stage, state_in: str | None) -> Result:
    """The trained model as a folder that needs nothing else, from the best cycle."""
    assert state_in is not None
    run.reporter.begin(stage.name, 0)
    pushes = [s for s in training_cycles(run.settings)[stage.cycle] if s.kind == "push"]
    pushed = read_table(storage.join(run.folder(pushes[0]), "push.parquet")) if pushes else None
    uri = storage.join(run.uri, "bundle")
    write_bundle(uri, run.network(state_in), run.settings, run.dataset, pushed, run.options())
    return {"bundle": uri, "says": f"from cycle {stage.cycle + 1}"}


def run_evaluate(run: Run, stage: Stage, state_in: str | None) -> Result:
    """The bundle, loaded anew, on the test images: how often it is right, and how good its explanations are."""
    rows = run.dataset.split("test")
    if not len(rows):
        return {"test_accuracy": None, "says": "there are no test images"}
    run.reporter.begin(stage.name, len(rows))
    predictor = Predictor.load([storage.join(run.uri, "bundle")])
    explains = run.settings.model.kind == "protopnet"
    metrics = evaluate(
        predictor,
        rows,
        run.folder(stage),
        options=run.options(),
        quality=QualityOptions(CURVE_IMAGES, run.settings.seed) if explains else None,
        source=run.dataset.source,
        on_images=run.counter(),
    )
    return {
        "test_accuracy": metrics["top1"],
        "test_top5": metrics["top5"],
        "calibration_error": metrics["calibration_error"],
        "calibration_error_before": metrics["calibration_error_before"],
        "temperature": metrics["temperature"],
    }


STAGES: dict[str, Callable[[Run, Stage, str | None], Result]] = {
    "data": run_data,
    "start": run_start,
    "import": run_import,
    "joint": run_joint,
    "push": run_push,
    "last-layer": run_last_layer,
    "bundle": run_bundle,
    "evaluate": run_evaluate,
}


def _protopnet(run: Run, state_uri: str) -> ProtoPNet:
    network = run.network(state_uri)
    assert isinstance(network, ProtoPNet), "a baseline has no prototypes"
    return network

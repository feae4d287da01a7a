"""Correct a trained bundle without training it again: drop, merge or move prototypes, and solve the last layer anew.

python jobs/prune.py runs/quickstart/bundle runs/quickstart/stages/00-data --rule --merge --output pruned
python jobs/prune.py runs/cub/bundle my-images --remove 12,45 --forbid jay/7.jpg:0,0,90,120 --output corrected
python jobs/prune.py runs/cub/bundle my-images --config corrections.yaml --output corrected

The data is what the bundle was trained on: class folders, CUB-200-2011, shards of jobs/prepare.py, or the stage
00-data of its run. Steps are taken in the order remove, merge, forbid, rule, last layer; prototypes are named by their
numbers in the bundle given. That bundle stays as it is. What people decided about single prototypes is in a
corrections.yaml.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from protopnet import storage
from protopnet.auditing.draft import Draft
from protopnet.auditing.prune import Corrections, Corrector
from protopnet.auditing.rewrite import Rewritten, resolve, source_network, write_corrected
from protopnet.auditing.settling import Prototypes, patch_grid
from protopnet.cli import Positional, checked, parse
from protopnet.cluster import connect, plan_pass
from protopnet.config import ComputeSettings
from protopnet.datasets.trained import open_training_data, trained_with, training_images_of
from protopnet.errors import UserError, exit_with_a_sentence
from protopnet.model.bundle import INFO, load_bundle
from protopnet.passes.image_pass import PassOptions
from protopnet.progress import Stopwatch, make_reporter
from protopnet.words import percent


class PruneSettings(Corrections):
    """Settings of `jobs/prune.py`."""

    bundle: Positional[str] = Field(description="folder of the bundle to correct: a local path or s3://…")
    data: Positional[str] = Field(description="the data it was trained on: a local path or s3://…")
    output: str = Field(description="folder of the new bundle")
    overwrite: bool = Field(False, description="replace a bundle that is already there")
    keep_connections: bool = Field(False, description="keep the class connections: don't solve the last layer again")
    batch_size: int = Field(64, ge=1, description="images a forward pass")
    compute: ComputeSettings = ComputeSettings()

    def corrections(self) -> Corrections:
        return Corrections(**{name: getattr(self, name) for name in Corrections.model_fields})


def prune(settings: PruneSettings | Mapping[str, Any]) -> Rewritten:
    """Correct a bundle into another one, in `output`; returns its network and accuracies. `UserError` for corrections
    that can't be made."""
    settings = checked(PruneSettings, settings)
    _check(settings)
    bundle = load_bundle(settings.bundle)
    network, prototypes = source_network(bundle, settings.bundle)
    trained = trained_with(bundle.info.provenance, settings.bundle)
    dataset = open_training_data(settings.data, bundle.classes, trained, f"{settings.output.rstrip('/')}-data")
    images = training_images_of(prototypes, dataset, settings.data)
    cells = zip(images, prototypes["row"].to_pylist(), prototypes["column"].to_pylist(), strict=True)
    corrector = Corrector(
        network=network,
        start=Draft.of(network, list(cells)),
        dataset=dataset,
        trained=trained,
        model=bundle.info.architecture,
        corrections=settings.corrections(),
        known=Prototypes(prototypes, patch_grid(network, bundle.info.architecture), bundle.hash),
        history=bundle.info.provenance.get("history", []),
    )
    corrector.check()
    _tell_lapsed(corrector)
    connect(settings.compute, {"DATA": settings.data, "output": settings.output})
    options = PassOptions(
        plan=plan_pass(settings.compute),
        batch_size=settings.batch_size,
        augment=trained.augment,
        seed=trained.seed,
        max_pixels=trained.data.max_pixels,
    )
    reporter = make_reporter()
    try:
        correction = corrector.run(options, reporter)
        watch = Stopwatch()
        reporter.begin("last layer", 0)
        rewritten = resolve(corrector, correction, options, keep_connections=settings.keep_connections)
        reporter.end("last layer", watch.seconds, _solved(rewritten))
        watch = Stopwatch()
        reporter.begin("bundle", 0)
        write_corrected(settings.output, bundle, corrector, correction, rewritten, options)
        reporter.end("bundle", watch.seconds, f"{len(correction.draft)} of {len(corrector.start)} prototypes")
    finally:
        reporter.close()
    return rewritten


@exit_with_a_sentence
def main() -> None:
    settings = parse(PruneSettings, description=__doc__)
    _print_accuracies(prune(settings))
    print(f"bundle: {storage.located(settings.output)}")


def _check(settings: PruneSettings) -> None:
    """Refuse what needs no look at the bundle."""
    if settings.nothing():
        raise UserError(
            "nothing to do: give one or more of --rule, --remove, --forbid, --merge, or decisions in a --config file"
        )
    if storage.located(settings.output) == storage.located(settings.bundle):
        raise UserError(f"--output {settings.output} is the bundle that is read: choose another folder")
    if storage.exists(storage.join(settings.output, INFO)) and not settings.overwrite:
        raise UserError(f"{settings.output} already holds a bundle; pass --overwrite, or choose another --output")
    storage.check_writable(settings.output, "output")


def _tell_lapsed(corrector: Corrector) -> None:
    """Say which decisions no longer apply; `UserError` where none is left and nothing else is to be done."""
    decisions, lapsed = corrector.corrections.decisions, corrector.settled.lapsed
    for each in lapsed:
        print(f"decision {each.decision} ({decisions[each.decision - 1].decide}) doesn't apply: {each.reason}")
    without = corrector.corrections.model_copy(update={"decisions": decisions[len(lapsed) :]})
    if without.nothing():
        raise UserError(f"none of the {len(lapsed)} decisions applies to this bundle; the first: {lapsed[0].reason}")


def _solved(rewritten: Rewritten) -> str:
    if rewritten.last_layer is None:
        return "class connections kept"
    state = "optimal" if rewritten.last_layer["converged"] else "not yet optimal"
    return f"{state} after {rewritten.last_layer['iterations']} iterations"


def _print_accuracies(rewritten: Rewritten) -> None:
    """A row a split: of the bundle as it was, with the prototypes corrected, and with its last layer solved again."""
    if not rewritten.before:
        print("the data has neither validation nor test images to measure accuracy on")
        return
    print(f"{'accuracy':<12}{'before':>10}{'corrected':>12}{'last layer':>12}")
    for split in sorted(rewritten.before, reverse=True):
        values = [of[split] for of in (rewritten.before, rewritten.corrected, rewritten.after)]
        before, corrected, after = map(percent, values)
        print(f"{split:<12}{before:>10}{corrected:>12}{after if rewritten.last_layer else '–':>12}")

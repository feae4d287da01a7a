"""A scoring job from its settings to `scores.json`: what `jobs/score.py` calls."""

import dataclasses
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pyarrow as pa
import ray
from pydantic import Field, field_validator
from ray.exceptions import RayError, RayTaskError

from protopnet import __version__, storage
from protopnet.cli import Repeated
from protopnet.cluster import PassPlan, connect, plan_pass
from protopnet.config import ComputeSettings, Section, Threshold
from protopnet.errors import UserError
from protopnet.evidence.sources import Named, Shown
from protopnet.imaging import MAX_PIXELS
from protopnet.lease import Lease
from protopnet.passes.image_pass import over_blocks
from protopnet.predictor import Precision, Predictor
from protopnet.progress import Reporter, listening
from protopnet.quality.watch import report
from protopnet.scoring.actor import ScoreActor, Work
from protopnet.scoring.arrays import NAMES, Format, rows_at_most
from protopnet.scoring.delta import check_installed, commit
from protopnet.scoring.inputs import Input, open_input
from protopnet.scoring.output import clear_unfinished, score_schema, take_stock
from protopnet.scoring.progress import ChunkProgress
from protopnet.scoring.record import JOB, JobRecord, begin, resume
from protopnet.scoring.tally import Tally
from protopnet.scoring.task import ScoreOptions

SUMMARY = "scores.json"
_MOST_BLOCKS = 2000  # units that Ray Data keeps book of; each is one or more chunks
_NO_PROGRESS_SECONDS = 24 * 3600  # Ray Data hears of a block when it is done, which may take hours
ON_CPU, ON_GPU = 64, 128  # images a forward pass


class ScoreSettings(Section):
    """Settings of `jobs/score.py`."""

    bundle: Annotated[list[str], Repeated("FOLDER")] = Field(
        min_length=1,
        description="folder of a bundle, a local path or s3://…; given again for each member of an ensemble",
    )
    input: str = Field(
        description="folder or s3://bucket/prefix of images; list of them (.txt, .csv, .tsv, .parquet); shards"
    )
    carry: list[str] | None = Field(
        None, description="columns of a list (.csv, .tsv, .parquet) that go with its images into the scores, as text"
    )
    output: str = Field(description="folder for scores.json and parts/: a local path or s3://…")
    format: Format = Field(
        "parquet", description="delta: the parts are a table of Delta Lake, too, once all of them are there"
    )
    explain: Annotated[int, Field(ge=0, le=1000)] | Literal["all"] = Field(
        0,
        description="prototypes to list as evidence for each prediction; all: similarity, points, place, box and map of "
        "every prototype, as arrays",
    )
    explain_classes: Annotated[list[str] | None, Repeated("CLASS")] = Field(
        None, description="with --explain all: of the prototypes of this class; given again for each"
    )
    explain_prototypes: list[int] | None = Field(
        None, description="with --explain all: of the prototypes of these numbers, in each member"
    )
    sources: Named = Field(
        "names",
        description="what evidence says of training images: full: their locations; names: relative to the data's root",
    )
    top: int = Field(5, ge=1, le=1000, description="classes to list for each image")
    abstain: Threshold | None = Field(
        None,
        description="no prediction where the probability (see abstain_by) is below this; bundle: below what the bundle "
        "keeps for the accuracy that was wanted of it",
    )
    abstain_by: Literal["probability", "margin"] = Field(
        "probability",
        description="what abstain is compared with: the first class's probability, or its lead over the second",
    )
    partition_by: Literal["class_name", "prediction", "label", "label_name"] | None = Field(
        None, description="a sub-folder for each value of this column"
    )
    precision: Precision = Field(
        "float32", description="of the backbone; with bf16 scores.json says how far the first images are from float32"
    )
    batch_size: int | None = Field(
        None, ge=1, description=f"images a forward pass; {ON_CPU}, or {ON_GPU} on GPUs, when left out"
    )
    chunk_rows: int | None = Field(
        None, ge=1, description="images a part, which is what a killed job loses; 256 to 4096 when left out"
    )
    incremental: bool = Field(
        False,
        description="where the output is there already, add the images that are new in the input, and score them alone",
    )
    max_bad: float = Field(0.05, ge=0, le=1, description="exit code 1 if more than this share couldn't be scored")
    max_pixels: int = Field(MAX_PIXELS, ge=1, description="images with more pixels than this aren't decoded")
    compute: ComputeSettings = ComputeSettings()

    @field_validator("carry")
    @classmethod
    def _no_name_twice(cls, value: list[str] | None) -> list[str] | None:
        taken = [*score_schema(True).names, *NAMES]
        for name in value or []:
            if name in taken or (value or []).count(name) > 1:
                raise ValueError(f"carry: {name} is a column of the scores already; rename it in the list")
        return value

    @property
    def options(self) -> ScoreOptions:
        """What is said of an image. The size of a batch is the job's record's to say."""
        given = self.of_rows | {"batch_size": self.batch_size or ON_CPU}
        return ScoreOptions(**{name: given[name] for name in ScoreOptions.__dataclass_fields__})

    @property
    def of_rows(self) -> dict[str, Any]:
        """The settings that a row depends on."""
        return self.model_dump(exclude={"bundle", "input", "output", "incremental", "max_bad", "compute"})


@dataclass(frozen=True)
class ThisCall:
    """What this call did. Start: all before an actor was ready to score; scoring: from then to the last part."""

    images: int
    start_seconds: float
    scoring_seconds: float
    device: str

    @property
    def images_per_second(self) -> float | None:
        return self.images / self.scoring_seconds if self.images and self.scoring_seconds else None


def score(settings: ScoreSettings, reporter: Reporter, started: float) -> tuple[dict[str, Any], Tally]:
    """Score what isn't scored yet; returns the content of `scores.json` and the counts in it.

    started: `time.time()` at the job's beginning. `UserError` as `record.begin`, where a bundle or the input can't be
    read, and where another job scores into the same folder.
    """
    storage.check_writable(settings.output, "--output")
    if settings.format == "delta":
        check_installed()
    with Lease(settings.output, "--output") as lease:
        return _score(settings, reporter, started, lease)


def _score(settings: ScoreSettings, reporter: Reporter, started: float, lease: Lease) -> tuple[dict[str, Any], Tally]:
    predictor = Predictor.load(settings.bundle, Shown(settings.sources))
    if settings.explain:
        _ = predictor.explainer  # a baseline can't: say so before anything is begun
    asked_for = settings.options.asked(predictor)
    most_rows = rows_at_most(asked_for, settings.format) if asked_for else None
    predictor.trust.threshold(settings.abstain, "--abstain")
    if settings.abstain == "bundle" and settings.abstain_by == "margin":
        raise UserError("--abstain bundle is a probability: leave --abstain_by out, or give a margin from 0 to 1")
    source = open_input(settings.input, settings.carry or ())
    asked: dict[str, Any] = {
        "bundles": [bundle.hash for bundle in predictor.bundles],
        "settings": settings.of_rows,
    }
    found = resume(settings.output, source, **asked, growing=predictor.classes if settings.incremental else None)
    record, note = found or (_begin(settings, source, predictor.classes, most_rows, asked), None)
    clear_unfinished(settings.output)
    done, _ = take_stock(settings.output)
    todo = [chunk for chunk in range(record.chunks) if chunk not in done]
    progress = ChunkProgress(reporter, sum(map(record.rows_in, todo)))
    for said in filter(None, (source.passed.text(), note)):
        reporter.note(said)
    if done:
        reporter.note(f"{sum(map(record.rows_in, done)):,} of {record.images:,} images done before")
    run = _score_chunks(todo, predictor, record, settings, progress, started)
    lease.check()
    _, tally = take_stock(settings.output)
    if tally.images != record.images:
        raise UserError(f"{settings.output} was changed by somebody else meanwhile; run the same command again")
    if settings.format == "delta":
        commit(settings.output)
    summary = _summary(settings, predictor, record, tally, run, note)
    storage.write_json(storage.join(settings.output, SUMMARY), summary)
    reporter.end("score", run.scoring_seconds, f"{tally.images:,} images")
    return summary, tally


def _begin(
    settings: ScoreSettings, source: Input, classes: list[str], most_rows: int | None, asked: dict[str, Any]
) -> JobRecord:
    plan = _plan(settings)
    batch_size = settings.batch_size or (ON_GPU if plan.gpus else ON_CPU)
    return begin(
        settings.output,
        source,
        **asked,
        classes=classes,
        batch_size=batch_size,
        actors=plan.actors,
        most_rows=most_rows,
    )


def _plan(settings: ScoreSettings) -> PassPlan:
    connect(settings.compute, {"--input": settings.input, "--output": settings.output})
    return plan_pass(settings.compute)


def _score_chunks(
    todo: list[int],
    predictor: Predictor,
    record: JobRecord,
    settings: ScoreSettings,
    progress: ChunkProgress,
    started: float,
) -> ThisCall:
    if not todo:
        return ThisCall(0, time.time() - started, 0.0, "")
    plan = _plan(settings)
    options = dataclasses.replace(settings.options, batch_size=record.batch_size)
    work = Work(
        output_uri=storage.located(settings.output),
        job_uri=storage.located(storage.join(settings.output, JOB)),
        record=record,
        options=options,
        partition_by=settings.partition_by,
        about={"bundles": record.bundles, "settings": record.settings} | _arrays(options, predictor),
    )
    size = -(-len(todo) // _MOST_BLOCKS)
    blocks = [pa.table({"chunk": todo[start : start + size]}) for start in range(0, len(todo), size)]
    with _ray_may_be_lost(), listening(progress.on_message) as log:
        results: Any = over_blocks(blocks, ScoreActor, (ray.put(predictor), work, plan, log), plan)
        results.context.execution_no_progress_timeout_s = _NO_PROGRESS_SECONDS
        for block in results.iter_batches(batch_size=None, batch_format="pyarrow"):
            for error in block["error"].drop_null().to_pylist():
                raise UserError(error)
    ended = time.time()
    ready = progress.ready or started
    return ThisCall(progress.images, ready - started, ended - ready, "GPU" if plan.gpus else "CPU")


@contextmanager
def _ray_may_be_lost() -> Iterator[None]:
    try:
        yield
    except RayTaskError:
        raise  # of our own code
    except RayError as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"Ray was lost ({reason or type(error).__name__}); the same command goes on from here"
        ) from error


def _summary(
    settings: ScoreSettings, predictor: Predictor, record: JobRecord, tally: Tally, run: ThisCall, note: str | None
) -> dict[str, Any]:
    """The content of `scores.json`. Rates are of the last run that scored anything."""
    uri = storage.join(settings.output, SUMMARY)
    rates = {
        "images": run.images,
        "images_per_second": run.images_per_second and round(run.images_per_second, 2),
        "seconds": {"start": round(run.start_seconds, 2), "scoring": round(run.scoring_seconds, 2)},
        "device": run.device,
    }
    if not run.images and storage.exists(uri):
        rates = storage.read_json(uri)["run"]
    return {
        "format": record.format,
        "version": record.version,
        "images": tally.images,
        "scored": tally.images - tally.bad,
        "bad": tally.bad,
        "errors": dict(sorted(tally.errors.items(), key=lambda item: -item[1])),
        "abstained": tally.abstained,
        "labelled": tally.labelled,
        "correct": tally.correct,
        "accuracy": tally.accuracy,
        "predictions": dict(sorted(tally.predictions.items(), key=lambda item: -item[1])),
        "watch": report(tally.watched, predictor.trust).model_dump(),
        "images_per_second": rates["images_per_second"],
        "run": rates,
        "precision": {"used": settings.precision}
        | ({"against_float32": tally.agreement.model_dump()} if tally.agreement.images else {}),
        "bundles": [
            {"uri": storage.located(given), "sha256": bundle.hash}
            for given, bundle in zip(settings.bundle, predictor.bundles, strict=True)
        ],
        "classes": predictor.classes,
        "input": {"uri": record.input, "kind": record.kind, "changed": note},
        "parts": record.chunks,
        "chunk_rows": record.chunk_rows,
        "batch_size": record.batch_size,
        "settings": json.loads(settings.model_dump_json()),
        "versions": {"protopnet": __version__},
    } | _arrays(settings.options, predictor)


def _arrays(options: ScoreOptions, predictor: Predictor) -> dict[str, Any]:
    """What is where in the arrays of a row, where there are any."""
    asked_for = options.asked(predictor)
    return {"arrays": asked_for.described()} if asked_for else {}

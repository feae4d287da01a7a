"""What a folder of scores was begun with, so that going on with anything else is refused.

<output>/job/job.json    written when the manifest is complete, before the first image is scored
"""

import bisect
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError

from protopnet import storage
from protopnet.errors import UserError
from protopnet.scoring.inputs import Input
from protopnet.scoring.manifest import contents_of, known_images, read_chunk, without, write_manifest
from protopnet.scoring.output import FORMAT, PARTS, VERSION

JOB = "job"
_BEFORE = {"format": "parquet"}  # settings that records of older versions don't have
_ANEW = "give what it was begun with to go on, or another --output to start anew"


class Batch(BaseModel):
    """Images that came together: at the job's beginning, or later as those that were new."""

    model_config = ConfigDict(frozen=True)

    images: int
    first_chunk: int


class JobRecord(BaseModel):
    """The content of job.json."""

    model_config = ConfigDict(frozen=True)

    format: str = FORMAT
    version: int = VERSION
    bundles: list[str]  # hashes, in the order of the members
    input: str
    kind: str
    batches: list[Batch]
    digest: str  # of the locations of all images that the input had when it was last listed, in order
    chunk_rows: int
    batch_size: int
    settings: dict[str, Any]  # as given, those on which a row depends

    @property
    def images(self) -> int:
        return sum(batch.images for batch in self.batches)

    @property
    def chunks(self) -> int:
        last = self.batches[-1]
        return last.first_chunk - (-last.images // self.chunk_rows)

    def rows_in(self, chunk: int) -> int:
        batch = self.batches[self._batch_of(chunk)]
        return min(self.chunk_rows, batch.images - (chunk - batch.first_chunk) * self.chunk_rows)

    def rows(self, job_uri: str, chunk: int) -> pa.Table:
        """Of the manifest: the images of a chunk."""
        number = self._batch_of(chunk)
        return read_chunk(_folder(job_uri, number), chunk - self.batches[number].first_chunk, self.chunk_rows)

    def _batch_of(self, chunk: int) -> int:
        return bisect.bisect_right([batch.first_chunk for batch in self.batches], chunk) - 1


def resume(
    output_uri: str, source: Input, *, bundles: list[str], settings: dict[str, Any], growing: list[str] | None = None
) -> tuple[JobRecord, str | None] | None:
    """The record of the job that a folder was begun with, and a note where the input has changed meanwhile; or None.

    growing: classes of the bundle, where images that are new in the input are to be added to the job.
    settings: those on which a row depends, among them `chunk_rows` and `batch_size`, None where it is left to the job.
    `UserError` where the folder was begun with something else, or holds somebody else's files.
    """
    found = _found(storage.join(output_uri, JOB))
    if found is not None:
        _check_same(found, output_uri, source, bundles, settings)
        return _grown(found, output_uri, source, growing) if growing is not None else (found, _changed(found, source))
    if storage.exists(storage.join(output_uri, PARTS)):
        raise UserError(f"{output_uri} holds scores without their {JOB}/job.json; choose another --output")
    return None


def begin(
    output_uri: str,
    source: Input,
    *,
    bundles: list[str],
    settings: dict[str, Any],
    classes: list[str],
    batch_size: int,
    actors: int,
    most_rows: int | None = None,
) -> JobRecord:
    """Write the manifest and the record of a new job; `UserError` if there is nothing to score. most_rows: of a chunk,
    where it isn't left to the settings."""
    job_uri = storage.join(output_uri, JOB)

    def chunk_rows_for(images: int) -> int:
        return settings["chunk_rows"] or default_chunk_rows(images, actors, batch_size, most_rows)

    contents, chunk_rows = write_manifest(source.tables(), job_uri, classes, chunk_rows_for)
    if not contents.images:
        raise UserError(f"{source.uri} holds no images (--input); {source.passed.instead_of_images()}")
    record = JobRecord(
        bundles=bundles,
        input=source.uri,
        kind=source.kind,
        batches=[Batch(images=contents.images, first_chunk=0)],
        digest=contents.digest,
        chunk_rows=chunk_rows,
        batch_size=batch_size,
        settings=settings,
    )
    storage.write_json(storage.join(job_uri, "job.json"), record.model_dump())
    return record


def _grown(found: JobRecord, output_uri: str, source: Input, classes: list[str]) -> tuple[JobRecord, str]:
    """The job with a batch more, of the images that it hasn't had; the record is written when their manifest is."""
    if source.kind == "shards":
        raise UserError(
            f"{source.uri} are shards, which don't grow (--incremental): score new ones to another --output"
        )
    job_uri, number = storage.join(output_uri, JOB), len(found.batches)
    last = [batch.first_chunk for batch in found.batches[1:]] + [found.chunks]
    known = pa.concat_arrays(
        [
            piece
            for n, (batch, end) in enumerate(zip(found.batches, last, strict=True))
            for piece in known_images(_folder(job_uri, n), end - batch.first_chunk, found.chunk_rows)
        ]
    )
    listed = contents_of(source.tables())
    new, _ = write_manifest(
        without(source.tables(), known), _folder(job_uri, number), classes, lambda _: found.chunk_rows, found.images
    )
    if not new.images:
        return found, "no new images"
    batch = Batch(images=new.images, first_chunk=found.chunks)
    record = found.model_copy(update={"batches": [*found.batches, batch], "digest": listed.digest})
    storage.write_json(storage.join(job_uri, "job.json"), record.model_dump())
    return record, f"{new.images:,} new images"


def _folder(job_uri: str, batch: int) -> str:
    return storage.join(job_uri, f"batch-{batch:05d}") if batch else job_uri


# A chunk is what a killed process loses, and a file that analysts open: not too large and not too small.
_LEAST_ROWS, _MOST_ROWS, _CHUNKS_AN_ACTOR = 256, 4096, 8


def default_chunk_rows(images: int, actors: int, batch_size: int, most: int | None = None) -> int:
    """Rows of a chunk, in whole batches: several chunks for every actor where there are enough images. Not above
    `most`, or one batch."""
    wanted = min(most or _MOST_ROWS, _MOST_ROWS, max(_LEAST_ROWS, -(-images // (_CHUNKS_AN_ACTOR * actors))))
    if most is not None:
        return max(1, wanted // batch_size) * batch_size
    return -(-wanted // batch_size) * batch_size


def _found(job_uri: str) -> JobRecord | None:
    uri = storage.join(job_uri, "job.json")
    try:
        return JobRecord.model_validate(storage.read_json(uri))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise UserError(f"{uri} isn't the record of a scoring job ({error.errors()[0]['msg']})") from error


def _check_same(
    found: JobRecord, output_uri: str, source: Input, bundles: Sequence[str], settings: dict[str, Any]
) -> None:
    if (found.format, found.version) != (FORMAT, VERSION):
        raise UserError(f"{output_uri} holds scores of version {found.version}; this program writes {VERSION}")
    if found.bundles != list(bundles):
        raise UserError(
            f"{output_uri} was begun with other bundles (--bundle), {_hashes(found.bundles, bundles)}; {_ANEW}"
        )
    if found.input != source.uri:
        raise UserError(f"{output_uri} was begun with --input {found.input}, not {source.uri}; {_ANEW}")
    for name, value in settings.items():
        before = found.settings.get(name, _BEFORE.get(name))
        chosen = {"chunk_rows": found.chunk_rows, "batch_size": found.batch_size}
        if value != before and value != chosen.get(name, before):
            raise UserError(f"{output_uri} was begun with --{name} {_text(before)}, not {_text(value)}; {_ANEW}")


def _changed(found: JobRecord, source: Input) -> str | None:
    contents = contents_of(source.tables())
    if contents.digest == found.digest:
        return None
    counts = f"{contents.images:,} images now, {found.images:,} when this job began"
    if source.kind != "folder":
        raise UserError(
            f"{source.uri} has changed (--input): {counts}; put it back, or start anew with another --output"
        )
    return f"{source.uri} has changed: {counts}; those of then are scored, another --output scores it as it is now"


def _hashes(before: Sequence[str], now: Sequence[str]) -> str:
    return f"sha256 {', '.join(h[:12] for h in before)}, not {', '.join(h[:12] for h in now)}"


def _text(value: Any) -> str:
    return "null" if value is None else str(value)

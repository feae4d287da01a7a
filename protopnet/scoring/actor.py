"""Ray Data actor that scores chunks: reads, decodes, forwards and writes them. Nothing but counts travels."""

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import ray
import torch

from protopnet.cluster import PassPlan
from protopnet.datasets.feed import manifest_feed
from protopnet.errors import UserError
from protopnet.passes.image_pass import in_batches
from protopnet.predictor import Predictor
from protopnet.scoring.output import is_done, write_chunk
from protopnet.scoring.record import JobRecord
from protopnet.scoring.tally import Tally
from protopnet.scoring.task import ScoreOptions, Scorer, look

_REPORT_SECONDS = 0.5


@dataclass(frozen=True)
class Work:
    """What every actor needs to know; the predictor is sent beside it, once a node."""

    output_uri: str
    job_uri: str
    record: JobRecord
    options: ScoreOptions
    partition_by: str | None
    about: dict[str, Any]


class ScoreActor:
    """Takes a block of chunk numbers; gives back what went wrong, if anything.

    A chunk that is done already is passed over: the actor that began this block may have been lost.
    """

    def __init__(self, predictor_ref: ray.ObjectRef, work: Work, plan: PassPlan, log: ray.actor.ActorHandle):
        torch.set_num_threads(plan.threads)
        device = torch.device("cuda" if plan.gpus else "cpu")
        predictor: Predictor = ray.get(predictor_ref).to(device)
        self.work, self.log = work, log
        self.scorer = Scorer(predictor, work.options, device)
        decode = partial(look, sizes=predictor.sizes, max_pixels=work.options.max_pixels, intensity=predictor.intensity)
        self.feed = manifest_feed(decode, max(2, plan.threads))
        self.reported = 0.0
        log.put.remote({"ready": time.time()})

    def __call__(self, block: pa.Table) -> pa.Table:
        error = None
        try:
            for chunk in block["chunk"].to_pylist():
                if not is_done(self.work.output_uri, chunk):
                    self._score(chunk)
        except UserError as caught:  # goes back as a value: Ray would wrap an exception in stories of its own
            error = str(caught)
        return pa.table({"error": pa.array([error], pa.string())})

    def _score(self, chunk: int) -> None:
        work, done = self.work, 0
        rows = work.record.rows(work.job_uri, chunk)
        tables, tally = [], Tally()
        for batch, pictures in self.feed.batches(in_batches(rows, work.options.batch_size)):
            table, counts = self.scorer(batch, pictures)
            tables.append(table)
            tally = tally.plus(counts)
            done += len(batch)
            self._report(chunk, done)
        table = pa.concat_tables(tables).combine_chunks()
        write_chunk(work.output_uri, chunk, table, tally, partition_by=work.partition_by, about=work.about)
        self.log.put.remote({"written": chunk, "images": done})

    def _report(self, chunk: int, done: int) -> None:
        if time.monotonic() - self.reported > _REPORT_SECONDS:
            self.reported = time.monotonic()
            self.log.put.remote({"chunk": chunk, "done": done})

"""Whole folders and lists over the API: each batch is `jobs/score.py` in a process of its own on the cluster.

    <batch.output>/<id>/batch.json       what was asked
    <batch.output>/<id>/scores/          what the job writes: parts/, and scores.json when it is finished
    <batch.output>/<id>/failure.json     what the job said when it gave up

Its state is read from these files and from whether its process lives, so every replica answers, also a new one. What is
asked again has the same id, and goes on where it was.
"""

import contextlib
import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import ray

from protopnet import storage
from protopnet.serving.refusals import Refusal, overloaded
from protopnet.serving.schemas import Batch, BatchOptions
from protopnet.serving.settings import BatchSettings

_NAMESPACE = "protopnet-batches"
_SUMMARY, _FAILURE = "scores/scores.json", "failure.json"  # either of them ends a batch
_SAID = 2000  # characters of what a failed job said last
_WAIT_S = 30


class Batches:
    """Of an application. Its methods wait for storage and for Ray. model: hash of the bundles at `uris`."""

    def __init__(self, settings: BatchSettings, uris: Sequence[str], model: str) -> None:
        self._settings, self._uris, self._model = settings, list(uris), model
        self._inputs = [_real(uri) for uri in settings.inputs]

    def begin(self, options: BatchOptions) -> Batch:
        """Start it, unless it runs or is finished. `Refusal` for an input from elsewhere, and where too many run."""
        given = _real(options.input)
        if not any(given == place or given.startswith(f"{place}/") for place in self._inputs) or "/../" in f"{given}/":
            raise Refusal("not_allowed", "the input isn't below a place that this service may score (`batch.inputs`)")
        asked = {"input": given, "explain": options.explain, "model": self._model}
        number = hashlib.sha256(repr(sorted(asked.items())).encode()).hexdigest()[:24]
        folder = self._folder(number)
        if not storage.exists(storage.join(folder, "batch.json")):
            storage.write_json(storage.join(folder, "batch.json"), asked)
        found = self.find(number)
        if found.state in ("running", "finished"):
            return found
        if (running := self._running()) >= self._settings.at_once:
            raise overloaded(f"{running} run already, as many as may (`batch.at_once`); try again", _WAIT_S)
        storage.delete_file(storage.join(folder, _FAILURE))
        command = [sys.executable, "-m", "protopnet", "score", "--input", given, "--explain", str(options.explain)]
        command += ["--output", storage.join(folder, "scores")]
        command += [word for uri in self._uris for word in ("--bundle", uri)]
        command += ["--compute.address", ray.get_runtime_context().gcs_address]
        with contextlib.suppress(ValueError):  # another replica was asked the same a moment ago
            kept: Any = ray.remote(_Runner)
            runner = kept.options(num_cpus=0, name=number, namespace=_NAMESPACE, lifetime="detached").remote()
            runner.run.remote(command, folder)
        return self.find(number)

    def _running(self) -> int:
        """Of all applications on the cluster. A job's process outlives its last file by a moment: that doesn't count."""
        named = ray.util.list_named_actors(all_namespaces=True)
        return sum(not self._has_ended(each["name"]) for each in named if each["namespace"] == _NAMESPACE)

    def _has_ended(self, number: str) -> bool:
        ends = (storage.join(self._folder(number), file) for file in (_SUMMARY, _FAILURE))
        return any(map(storage.exists, ends))

    def find(self, number: str) -> Batch:
        """How far it is. `Refusal` where there is none of this id."""
        folder = self._folder(number)
        try:
            asked = storage.read_json(storage.join(folder, "batch.json"))
        except FileNotFoundError:
            raise Refusal("unknown_batch", "there is no batch of this id") from None
        about: dict[str, Any] = {"id": number, **asked, "output": storage.join(folder, "scores")}
        for state, file in (("finished", _SUMMARY), ("failed", _FAILURE)):
            with contextlib.suppress(FileNotFoundError):
                said = storage.read_json(storage.join(folder, file))
                if state == "failed":
                    return Batch(**about, state="failed", problem=said["said"])
                counts = {name: said[name] for name in ("images", "scored", "bad")}
                return Batch(**about, **counts, state="finished", watch=said["watch"], parts=self._parts(folder))
        return Batch(**about, state="running" if _lives(number) else "stopped")

    def part(self, number: str, name: str) -> bytes:
        """A Parquet file of a finished batch."""
        if name not in (self.find(number).parts or []):
            raise Refusal("unknown_batch", "there is no such part of this batch, or it isn't finished")
        return storage.read_bytes(storage.join(self._folder(number), "scores", "parts", name))

    def _folder(self, number: str) -> str:
        return storage.join(storage.located(self._settings.output), number)

    @staticmethod
    def _parts(folder: str) -> list[str]:
        return [
            uri.rsplit("/", 1)[1] for uri in storage.list_files(storage.join(folder, "scores", "parts"), ".parquet")
        ]


def _real(uri: str) -> str:
    """The location without links, so that what is said to be below a place is there."""
    return storage.located(uri) if storage.is_remote(uri) else os.path.realpath(storage.located(uri))


def _lives(number: str) -> bool:
    try:
        ray.get_actor(number, namespace=_NAMESPACE)
    except ValueError:
        return False
    return True


class _Runner:
    """Waits for a job; the job's own work is done by the cluster."""

    def run(self, command: list[str], folder: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 1):  # 1: it is finished, with more bad images than it should have
            said = f"{done.stderr}\n{done.stdout}".strip()
            lines = [line for line in said.splitlines() if line.startswith("error: ")]
            storage.write_json(storage.join(folder, _FAILURE), {"said": (lines or [said])[-1][-_SAID:]})
        ray.actor.exit_actor()

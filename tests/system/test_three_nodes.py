"""A cluster of three nodes on this machine: the whole way from images to scores, while nodes go and others come."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from ray.cluster_utils import Cluster
from ray_processes import descendants, kill_all, wait_for
from running_jobs import ROOT, Jobs, TrainedRun
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
NODE = {"num_cpus": 2, "object_store_memory": 200 << 20, "include_dashboard": False}
SHARED = ("--compute.shared_storage", "true")  # the nodes are processes of one machine


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head without work of its own, and three nodes of two CPUs."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    before = set(descendants(os.getpid()))
    made = Cluster(initialize_head=True, head_node_args=NODE | {"num_cpus": 0})
    for _ in range(3):
        made.add_node(**NODE)
    yield made
    mine = set(descendants(os.getpid())) - before
    made.shutdown()
    kill_all(list(mine))


def start(job: str, cluster: Cluster, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "RAY_ADDRESS": cluster.address, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def worker_node(cluster: Cluster, name: str) -> object:
    """The node on which a process of this title runs, once there is one."""

    def found() -> object:
        for node in cluster.worker_nodes:
            raylet = node.all_processes["raylet"][0].process.pid
            if any(title.startswith(name) for title in descendants(raylet).values()):
                return node
        return None

    return wait_for(found, timeout=120)


def exchange(cluster: Cluster, name: str) -> None:
    """Take away the node where a process of this title runs, without warning, and add another."""
    cluster.remove_node(worker_node(cluster, name), allow_graceful=False)
    cluster.add_node(**NODE)


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, (out, err)
    return out


def test_nodes_may_go_in_the_middle_of_every_stage(
    cluster: Cluster, trained: TrainedRun, jobs: Jobs, tmp_path: Path
) -> None:
    """Train, push, last layer, evaluate, score: as if nothing had happened."""
    training = start("train", cluster, "--storage", str(tmp_path), *SHARED, *jobs.options(name="lossy"))
    assert training.stdout
    said: list[str] = []
    taken: set[str] = set()
    for line in training.stdout:
        said.append(line)
        for moment, process in (
            ("epoch 1/2", "ray::RayTrainWorker"),
            ("02-joint  ", "ray::MapWorker"),  # the push
            ("03-push", "ray::"),  # the last layer: pass or store
            ("05-bundle", "ray::MapWorker"),  # the evaluation
        ):
            if moment in line and "epoch 2" not in line and moment not in taken:
                taken.add(moment)
                exchange(cluster, process)
    assert training.wait(300) == 0, (said, training.stderr.read() if training.stderr else "")
    assert len(taken) == 4, said
    run = tmp_path / "lossy"
    network, expected = (load_file(f / "stages/04-last-layer/network.safetensors") for f in (run, trained.folder))
    below = [name for name in expected if name != "last_layer.weight"]
    assert all(torch.equal(network[name], expected[name]) for name in below)
    torch.testing.assert_close(network["last_layer.weight"], expected["last_layer.weight"], atol=5e-3, rtol=0)
    pushed, chosen = (pq.read_table(f / "stages/03-push/push.parquet") for f in (run, trained.folder))
    assert pushed == chosen
    accuracy, undisturbed = (
        json.loads((f / "summary.json").read_text())["test_accuracy"] for f in (run, trained.folder)
    )
    assert accuracy == pytest.approx(undisturbed, abs=1e-9)

    shards = str(next((run / "stages/00-data").glob("birds-*")))
    scoring = start(
        "score",
        cluster,
        *SHARED,
        *("--bundle", str(run / "bundle"), "--input", shards, "--output", str(tmp_path / "scores")),
        *("--chunk_rows", "4", "--batch_size", "4", "--explain", "2"),
    )
    exchange(cluster, "ray::MapWorker")
    finish(scoring)
    rows = pq.read_table(tmp_path / "scores/parts").to_pylist()
    assert len(rows) == len({row["uri"] for row in rows}) == 52
    evaluated = pq.read_table(trained.folder / "stages/06-evaluate/predictions.parquet").to_pylist()
    by_uri = {row["uri"]: row for row in rows}
    for row in evaluated:
        assert by_uri[row["uri"]]["prediction"] == row["prediction"]
        assert by_uri[row["uri"]]["probability"] == pytest.approx(row["probability"], abs=1e-4)

"""A finished run at a real MLflow server, and at W&B offline: what is there, and that the model there explains.

MLflow's client is in the development environment, its server isn't, for it wants older packages than are locked there:
install mlflow in an environment of its own, and name its Python in MLFLOW_SERVER_PYTHON. W&B: pip install wandb.
"""

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from serving import CLASSES, make_bundle, photo

import protopnet
from protopnet.cli import checked
from protopnet.config import RunSettings
from protopnet.errors import UserError
from protopnet.training.runlog import RunLog
from protopnet.training.tracking import Tracking


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("mlflow")
    if (python := os.environ.get("MLFLOW_SERVER_PYTHON")) is None:
        pytest.skip("no MLflow server here: MLFLOW_SERVER_PYTHON")
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/db.sqlite",
        "--artifacts-destination",
        str(folder / "files"),
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 120
    while True:
        try:
            urlopen(f"{url}/health", timeout=2)
            break
        except (URLError, OSError):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.5)
    yield url
    process.terminate()
    process.wait(30)


def track(folder: Path, to: str, **settings: Any) -> tuple[Tracking, list[str]]:
    """A run of three epochs that was killed after the second, and its end; what was said of trackers that failed."""
    run = checked(
        RunSettings, {"name": "birds", "tracking.to": [to], **{f"tracking.{k}": v for k, v in settings.items()}}
    )
    said: list[str] = []
    log = RunLog(str(folder))
    tracking = Tracking(run, log, str(folder), said.append)
    for epoch in range(2):
        log.add("02-joint", {"total": 1.0 / (epoch + 1), "validation_accuracy": 0.4 + epoch / 10}, epoch=epoch)
        log.flush()
        tracking.flush()
    log = RunLog(str(folder))
    tracking = Tracking(run, log, str(folder), said.append)
    log.add("02-joint", {"total": 0.1, "validation_accuracy": 0.75}, epoch=2)
    log.flush()
    tracking.flush()
    (folder / "report.html").write_text("<h1>birds</h1>")
    tracking.finish({"name": "birds"}, str(folder / "report.html"), make_bundle(folder / "bundle", 0))
    return tracking, said


def test_mlflow_has_the_run_and_a_model_that_explains(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    mlflow.set_tracking_uri(server)
    _, said = track(tmp_path, "mlflow", register_as="birds", project="ornithology")
    assert said == []
    client = mlflow.MlflowClient(server)
    [run] = client.search_runs([client.get_experiment_by_name("ornithology").experiment_id])
    assert run.info.run_id == json.loads((tmp_path / "tracking.json").read_text())["mlflow"]["id"]
    assert (run.info.run_name, run.info.status) == ("birds", "FINISHED")
    assert run.data.params["train.lr_features"] == "0.0001"
    history = client.get_metric_history(run.info.run_id, "validation_accuracy")
    assert [(each.step, each.value) for each in history] == [(0, 0.4), (1, 0.5), (2, 0.75)]
    assert "report.html" in {file.path for file in client.list_artifacts(run.info.run_id)}
    [version] = client.search_model_versions("name='birds'")
    assert version.run_id == run.info.run_id

    model = mlflow.pyfunc.load_model("models:/birds/1")
    (tmp_path / "bird.jpg").write_bytes(photo(0))
    found = model.predict([str(tmp_path / "bird.jpg"), photo(1)])
    ours = protopnet.load(str(tmp_path / "bundle")).explain([photo(0), photo(1)])
    assert list(found["class_name"]) == [why.class_name for why in ours]
    assert set(found["class_name"]) <= set(CLASSES)
    assert list(found["probability"]) == pytest.approx([why.probability for why in ours], abs=1e-6)
    assert [row["prototype"] for row in found["evidence"][0]] == [row["prototype"] for row in ours[0].rows()]


def test_a_server_that_isnt_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    import mlflow

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    with pytest.raises(UserError, match="tracking.to: mlflow can't be reached .*; start it, or leave it out"):
        track(tmp_path, "mlflow")


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="W&B isn't installed")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path))
    _, said = track(tmp_path, "wandb")
    assert said == []
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    content = b"".join(file.read_bytes() for file in files)
    assert json.loads((tmp_path / "tracking.json").read_text())["wandb"]["id"] in files[0].name
    for expected in (b"validation_accuracy", b"0.75", b"lr_features", b"model.safetensors", b"report.html"):
        assert expected in content, expected
    assert os.listdir(tmp_path / "wandb")

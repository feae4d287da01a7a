"""jobs/evaluate.py --quality: what it prints and what it leaves."""

import json
from pathlib import Path

import pyarrow.parquet as pq
from running_jobs import Jobs, TrainedRun


def test_the_quality_of_a_run_s_bundle(jobs: Jobs, trained: TrainedRun, tmp_path: Path) -> None:
    shards = next((trained.folder / "stages/00-data").glob("birds-*"))
    arguments = ["--output", str(tmp_path), "--quality", "true", "--curve_images", "2", "--compute.threads", "1"]
    job = jobs.run("evaluate", str(trained.folder / "bundle"), str(shards), *arguments)
    assert (job.code, job.err) == (0, ""), job
    quality = json.loads((tmp_path / "metrics.json").read_text())["quality"]
    for name in ("truth", "on_bird", "prototypes_on_bird", "consistency", "stability", "purity", "pointing"):
        assert 0 <= quality[name]["value"] <= 1, name
    assert quality["prototypes_on_bird"]["prototypes"] == 8
    assert quality["on_bird"]["places"] == quality["pointing"]["places"] > 12  # every test image was drawn again
    assert quality["deletion"]["images"] == 2
    assert pq.read_table(tmp_path / "prototype_quality.parquet").num_rows == 8
    lines = {line.split("  ")[0]: line for line in job.out.splitlines()}
    assert f"{100 * quality['consistency']['value']:.1f} %" in lines["consistency"]
    assert "8 prototypes" in lines["consistency"]
    assert "chance" in lines["truth"]

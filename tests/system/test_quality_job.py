"""jobs/evaluate.py --quality: what it prints and what it leaves."""

import json

import pyarrow.parquet as pq
from running_jobs import Left


def test_the_quality_of_a_run_s_bundle(evaluated: Left) -> None:
    job = evaluated.job
    assert (job.code, job.err) == (0, ""), job
    quality = json.loads((evaluated.folder / "metrics.json").read_text())["quality"]
    for name in ("truth", "on_bird", "prototypes_on_bird", "consistency", "stability", "purity", "pointing"):
        assert 0 <= quality[name]["value"] <= 1, name
    assert quality["prototypes_on_bird"]["prototypes"] == 8
    assert quality["on_bird"]["places"] == quality["pointing"]["places"] > 12  # every test image was drawn again
    assert quality["deletion"]["images"] == 2
    assert pq.read_table(evaluated.folder / "prototype_quality.parquet").num_rows == 8
    lines = {line.split("  ")[0]: line for line in job.out.splitlines()}
    assert f"{100 * quality['consistency']['value']:.1f} %" in lines["consistency"]
    assert "8 prototypes" in lines["consistency"]
    assert "chance" in lines["truth"]

"""jobs/audit.py: its pages say what its tables say, and the tables fit the bundle."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from browsing import chromium, watched
from running_jobs import Jobs, Left, TrainedRun

from protopnet.auditing.audit_pages import class_path
from protopnet.auditing.findings import KINDS
from protopnet.auditing.judgement import FINDING_SCHEMA
from protopnet.auditing.patch_table import NEAREST_SCHEMA
from protopnet.model.bundle import load_bundle


def test_the_audit_of_a_trained_bundle(trained: TrainedRun, audited: Left) -> None:
    job, folder = audited.job, audited.folder
    assert job.code == 0, job
    assert job.err == ""
    assert job.out.splitlines()[-1].split()[-1] == str(folder / "index.html")
    names = ("prototypes", "nearest", "pairs", "classes", "findings")
    tables = {name: pq.read_table(folder / f"{name}.parquet") for name in names}
    about = json.loads((folder / "audit.json").read_text())

    bundle = load_bundle(str(trained.folder / "bundle"))
    assert about["bundle_hash"] == bundle.hash
    assert about["images"] == {"train": 36, "validation": 4}
    assert about["settings"]["train_patches"] == 4
    summary = json.loads((trained.folder / "summary.json").read_text())
    assert about["use_split"] == "validation"
    solved = [stage["validation_accuracy"] for stage in summary["stages"] if stage["name"].endswith("last-layer")]
    assert about["accuracy"] in solved
    assert about["counts"]["findings"] == len(tables["findings"]) == sum(about["counts"]["by_kind"].values())

    nearest = tables["nearest"]
    assert nearest.schema == NEAREST_SCHEMA
    assert len(nearest) == 8 * (4 + 4)
    assert tables["findings"].schema == FINDING_SCHEMA
    sources = nearest.filter(nearest["is_source"])
    assert sources["prototype"].to_pylist() == list(range(8))  # a prototype is nearest to its own patch
    assert set(sources["rank"].to_pylist()) == {1}
    assert bundle.prototypes is not None
    for name in ("row", "column", "box", "uri"):
        assert sources[name].to_pylist() == bundle.prototypes[name].to_pylist()
    assert pc.max(sources["distance"]).as_py() < 1e-4  # a cosine is kept from dividing by 0
    assert nearest["on_object"].null_count == 0

    own = nearest.filter(pc.and_(nearest["own_class"], pc.equal(nearest["split"], "train")))
    counted = [sum(p == prototype for p in own["prototype"].to_pylist()) for prototype in range(8)]
    assert tables["prototypes"]["nearest_own"].to_pylist() == counted
    flagged = {p for row in tables["findings"].to_pylist() for p in row["prototypes"][:1] if row["kind"] != "confused"}
    assert flagged <= {row["prototype"] for row in tables["prototypes"].to_pylist() if row["flags"]}
    assert sum(tables["classes"]["images"].to_pylist()) == 4
    manifest = pq.read_table(trained.data / "manifest.parquet")
    tested = manifest.filter(pc.equal(manifest["split"], "test"))["image_id"]
    assert not set(tested.to_pylist()) & set(nearest["image_id"].to_pylist())


def test_the_pages_say_what_the_tables_say(audited: Left) -> None:
    assert audited.job.code == 0
    folder = audited.folder
    index = (folder / "index.html").read_text()
    findings = pq.read_table(folder / "findings.parquet").to_pylist()
    assert re.findall(r'data-kind="([\w-]+)"', index) == [row["kind"] for row in findings]
    assert {row["kind"] for row in findings} <= set(KINDS)
    nearest = pq.read_table(folder / "nearest.parquet").to_pylist()
    numbers = pq.read_table(folder / "prototypes.parquet").to_pylist()
    for row in pq.read_table(folder / "classes.parquet").to_pylist():
        page = (folder / class_path(row["class"])).read_text()
        assert f"<b>{row['right']}</b> of {row['images']} validation images right" in page
        for prototype in (each for each in numbers if each["class"] == row["class"]):
            p = prototype["prototype"]
            card = page[page.index(f'id="p{p}"') :].split("</article>")[0]
            assert f"top evidence for <b>{prototype['top']}</b>" in card
            own = [each for each in nearest if each["prototype"] == p]
            shown = re.findall(r'<span class="keep">([\d.-]+)</span>', card)
            assert shown == [f"{each['similarity']:.2f}" for each in own]
            assert card.count('class="other"') == sum(not each["own_class"] for each in own)


def test_what_cannot_be_audited_is_said_in_one_line(trained: TrainedRun, jobs: Jobs, tmp_path: Path) -> None:
    wrong = jobs.run_here(
        "audit", str(trained.folder), str(trained.folder / "stages/00-data"), "--output", str(tmp_path)
    )
    assert "there is no complete bundle" in wrong.error


def test_the_pages_in_a_browser(audited: Left) -> None:
    assert audited.job.code == 0
    folder = audited.folder
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright (pip install playwright)")
    path = chromium()
    findings = pq.read_table(folder / "findings.parquet").to_pylist()
    with playwright.sync_playwright() as starter:
        browser = starter.chromium.launch(executable_path=path)
        page = browser.new_page(viewport={"width": 390, "height": 800})
        watch = watched(page)
        page.goto((folder / "index.html").as_uri())
        shown = page.locator("#list > li:visible")
        for kind in {row["kind"] for row in findings}:
            page.select_option("#kind", kind)
            count = sum(row["kind"] == kind for row in findings)
            assert shown.count() == count
            assert page.locator("#count").inner_text() == f"{count} of {len(findings)} shown"
        page.select_option("#kind", "")
        page.select_option("#severity", "3")
        assert shown.count() == sum(row["severity"] == 3 for row in findings)
        page.select_option("#severity", "1")
        page.fill("#words", "nothing that is there")
        assert shown.count() == 0
        assert fits(page)

        page.locator("table a").first.click()
        page.locator("h3").first.wait_for()
        patch = page.locator(".near .picture").first
        whole = patch.get_attribute("viewBox")
        for view, seen in (("cut", patch.get_attribute("data-cut")), ("box", whole), ("image", whole), ("heat", whole)):
            page.check(f"input[value={view}]")
            assert patch.get_attribute("viewBox") == seen
            assert page.locator(".near .heat").first.is_visible() == (view == "heat")
            assert page.locator(".near rect.box").first.is_visible() == (view in ("heat", "box"))
        assert fits(page)
        browser.close()
    assert not watch.complaints
    assert all(asked.startswith(("file:", "data:")) for asked in watch.requests)


def fits(page: Any) -> bool:
    """Nothing is wider than the screen."""
    return bool(page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"))

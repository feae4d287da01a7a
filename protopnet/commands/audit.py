"""What each prototype of a bundle means, and which are worth a look.

python jobs/audit.py runs/quickstart/bundle runs/quickstart/stages/00-data
python jobs/audit.py s3://bucket/runs/cub/bundle s3://bucket/shards/cub --output s3://bucket/audits/cub

The data are those the bundle was trained on: class folders, CUB-200-2011, shards of jobs/prepare.py, or the folder
stages/00-data of the run. Open index.html of the output in a browser.
"""

import shlex
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from protopnet import storage
from protopnet.auditing.audit import AuditResult, audit_bundle
from protopnet.auditing.audit_pages import AuditPages
from protopnet.auditing.findings import AuditSettings
from protopnet.cli import Positional, checked, parse
from protopnet.cluster import connect, plan_pass
from protopnet.config import ComputeSettings
from protopnet.datasets.trained import open_training_data, trained_with
from protopnet.errors import exit_with_a_sentence
from protopnet.evidence.explanation import explaining
from protopnet.model.bundle import Bundle, load_bundle
from protopnet.passes.image_pass import PassOptions
from protopnet.tables import write_table
from protopnet.words import percent


class AuditJobSettings(AuditSettings):
    """Settings of `jobs/audit.py`."""

    bundle: Positional[str] = Field(description="folder of the bundle: a local path or s3://…")
    data: Positional[str] = Field(description="the data it was trained on: a local path or s3://…")
    output: str = Field("audit", description="folder for index.html and the tables")
    batch_size: int = Field(64, ge=1, description="images a forward pass")
    compute: ComputeSettings = ComputeSettings()

    def thresholds(self) -> AuditSettings:
        return AuditSettings(**self.model_dump(include=set(AuditSettings.model_fields)))


def audit(settings: AuditJobSettings | Mapping[str, Any]) -> AuditResult:
    """What each prototype means, and which are worth a look; pages and tables are in `output`. `UserError` for what is
    wrong with the settings, the bundle or the data."""
    settings = checked(AuditJobSettings, settings)
    storage.check_writable(settings.output, "output")
    bundle = load_bundle(settings.bundle)
    explaining(bundle)  # before anything that takes time
    trained = trained_with(bundle.info.provenance, settings.bundle)
    dataset = open_training_data(settings.data, bundle.classes, trained, settings.output)
    connect(settings.compute, {"DATA": settings.data, "output": settings.output})
    options = PassOptions(
        plan=plan_pass(settings.compute), batch_size=settings.batch_size, max_pixels=trained.data.max_pixels
    )
    result = audit_bundle(bundle, dataset, settings.thresholds(), options)
    write(result, bundle, settings)
    return result


@exit_with_a_sentence
def main() -> None:
    settings = parse(AuditJobSettings, description=__doc__)
    result = audit(settings)
    counts, images = result.audit.counts(), f"{result.use.images:,} {result.use_split} images"
    print(f"{counts['prototypes']:,} prototypes, {counts['classes']:,} classes, {images}")
    for severity, count in counts["by_severity"].items():
        print(f"{severity:<14} {count:,}")
    print(f"pages and tables: {storage.join(storage.located(settings.output), 'index.html')}")


def write(result: AuditResult, bundle: Bundle, settings: AuditJobSettings) -> None:
    """All files of the audit, index.html last."""
    found, thresholds = result.audit, settings.thresholds().model_dump()
    tables = {
        "prototypes": found.prototypes,
        "nearest": found.nearest,
        "pairs": found.pairs,
        "classes": found.classes,
        "findings": found.findings_table(),
    }
    for name, table in tables.items():
        write_table(storage.join(settings.output, f"{name}.parquet"), table)
    about = {
        "format": "protopnet-audit",
        "version": 1,
        "bundle": storage.located(settings.bundle),
        "bundle_hash": bundle.hash,
        "data": storage.located(settings.data),
        "images": result.images,
        "use_split": result.use_split,
        "accuracy": result.accuracy,
        "counts": found.counts(),
        "settings": thresholds,
    }
    storage.write_json(storage.join(settings.output, "audit.json"), about)
    assert bundle.prototypes is not None
    pages = AuditPages(
        title=str(bundle.info.provenance.get("run") or "a bundle"),
        audit=found,
        prototypes=bundle.prototypes,
        thumbnails=result.thumbnails,
        facts=_facts(result),
        settings=[*thresholds.items(), ("bundle", about["bundle"]), ("sha256 of the bundle", bundle.hash)],
        use_split=result.use_split,
        command=shlex.join(["python", "jobs/prune.py", settings.bundle, settings.data]),
    )
    for path, page in pages:
        storage.write_bytes(storage.join(settings.output, path), page.encode())


def _facts(result: AuditResult) -> list[tuple[str, str]]:
    """Label and value of each figure in the headline."""
    counts: dict[str, Any] = result.audit.counts()
    return [
        (f"{result.use_split} accuracy", percent(result.accuracy)),
        ("prototypes", f"{counts['prototypes']:,}"),
        ("of them with findings", f"{counts['prototypes_with_findings']:,}"),
        ("classes", f"{counts['classes']:,}"),
        *((f"{split} images", f"{images:,}") for split, images in result.images.items()),
    ]

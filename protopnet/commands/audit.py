"""What each prototype of a bundle means, and which are worth a look.

python jobs/audit.py runs/quickstart/bundle runs/quickstart/stages/00-data
python jobs/audit.py s3://bucket/runs/cub/bundle s3://bucket/shards/cub --output s3://bucket/audits/cub

The data are those the bundle was trained on: class folders, CUB-200-2011, shards of jobs/prepare.py, or the folder
stages/00-data of the run. Open index.html of the output in a browser.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from protopnet import storage
from protopnet.auditing.audit import AuditResult, audit_bundle
from protopnet.auditing.audit_files import write_audit
from protopnet.auditing.findings import AuditSettings
from protopnet.cli import Positional, checked, parse
from protopnet.cluster import connect, plan_pass
from protopnet.config import ComputeSettings
from protopnet.datasets.trained import open_training_data, trained_with
from protopnet.errors import exit_with_a_sentence
from protopnet.evidence.explanation import explaining
from protopnet.model.bundle import load_bundle
from protopnet.passes.image_pass import PassOptions


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
    write_audit(settings.output, result, bundle, settings.thresholds(), settings.bundle, settings.data)
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

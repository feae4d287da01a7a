"""An audit as files: five tables, `audit.json` and the pages."""

import shlex
from typing import Any

from protopnet import storage
from protopnet.auditing.audit import AuditResult
from protopnet.auditing.audit_pages import AuditPages
from protopnet.auditing.findings import AuditSettings
from protopnet.model.bundle import Bundle
from protopnet.tables import write_table
from protopnet.words import percent


def write_audit(
    output: str, result: AuditResult, bundle: Bundle, settings: AuditSettings, bundle_uri: str, data_uri: str
) -> None:
    """All files of an audit, index.html last."""
    found, thresholds = result.audit, settings.model_dump()
    tables = {
        "prototypes": found.prototypes,
        "nearest": found.nearest,
        "pairs": found.pairs,
        "classes": found.classes,
        "findings": found.findings_table(),
    }
    for name, table in tables.items():
        write_table(storage.join(output, f"{name}.parquet"), table)
    about = {
        "format": "protopnet-audit",
        "version": 1,
        "bundle": storage.located(bundle_uri),
        "bundle_hash": bundle.hash,
        "data": storage.located(data_uri),
        "images": result.images,
        "use_split": result.use_split,
        "accuracy": result.accuracy,
        "counts": found.counts(),
        "settings": thresholds,
    }
    storage.write_json(storage.join(output, "audit.json"), about)
    assert bundle.prototypes is not None
    pages = AuditPages(
        title=str(bundle.info.provenance.get("run") or "a bundle"),
        audit=found,
        prototypes=bundle.prototypes,
        thumbnails=result.thumbnails,
        facts=_facts(result),
        settings=[*thresholds.items(), ("bundle", about["bundle"]), ("sha256 of the bundle", bundle.hash)],
        use_split=result.use_split,
        command=shlex.join(["python", "jobs/prune.py", bundle_uri, data_uri]),
    )
    for path, page in pages:
        storage.write_bytes(storage.join(output, path), page.encode())


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

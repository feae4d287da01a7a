"""Correct a bundle by looking: a page with what an audit finds, decisions by key or button, and at once what each costs.

python jobs/workbench.py runs/quickstart/bundle runs/quickstart/stages/00-data
python jobs/workbench.py s3://bucket/runs/cub/bundle s3://bucket/shards/cub --folder cub-workbench --port 8090

The data is what the bundle was trained on, as for jobs/prune.py. The images are looked at once; after that everything is
answered from the session's folder, on a local disk, where the decisions are kept as well: the same command goes on with
them, and with a bundle trained anew they carry over by image and patch; what no longer applies is listed. The page saves
corrections.yaml, for jobs/prune.py --config, and the new bundle. Test images are never looked at.
"""

import signal
import threading
import time
from pathlib import Path
from types import FrameType

import uvicorn
from pydantic import Field

from protopnet import storage
from protopnet.auditing.audit import audit_bundle
from protopnet.auditing.audit_files import write_audit
from protopnet.auditing.draft import Draft
from protopnet.auditing.findings import AuditSettings
from protopnet.auditing.prune import Corrections, Corrector
from protopnet.auditing.rewrite import resolve, source_network, write_corrected
from protopnet.auditing.settling import Prototypes, patch_grid
from protopnet.cli import Positional, parse
from protopnet.cluster import connect, plan_pass
from protopnet.commands.serve import check_free
from protopnet.config import ComputeSettings
from protopnet.datasets.rows import Dataset
from protopnet.datasets.trained import open_training_data, trained_with, training_images_of
from protopnet.errors import UserError, exit_with_a_sentence
from protopnet.lease import Lease
from protopnet.model.bundle import Bundle, load_bundle
from protopnet.passes.image_pass import PassOptions
from protopnet.progress import LineReporter, Stopwatch, make_reporter
from protopnet.serving.keys import Keys
from protopnet.workbench.app import create_app
from protopnet.workbench.bench import Workbench
from protopnet.workbench.cache import Cache, write_cache
from protopnet.workbench.catalogue import Catalogue
from protopnet.workbench.desk import Desk
from protopnet.workbench.log import DecisionLog
from protopnet.workbench.session import Session

_STOPS_WITHIN_S, _LOOKS_EVERY_S = 5, 0.02


class WorkbenchSettings(AuditSettings):
    """Settings of `jobs/workbench.py`."""

    bundle: Positional[str] = Field(description="folder of the bundle: a local path or s3://…")
    data: Positional[str] = Field(description="the data it was trained on: a local path or s3://…")
    folder: str = Field("workbench", description="local folder of the session: cache, decisions and what is saved")
    host: str = Field("127.0.0.1", description="address to listen at; 0.0.0.0: reachable from elsewhere")
    port: int = Field(8050, ge=1, le=65535, description="port to listen at")
    token_file: str | None = Field(
        None, description="file with the bearer tokens that open the page's data, one a line; open to all when left out"
    )
    batch_size: int = Field(64, ge=1, description="images a forward pass")
    compute: ComputeSettings = ComputeSettings()

    def thresholds(self) -> AuditSettings:
        return AuditSettings(**self.model_dump(include=set(AuditSettings.model_fields)))


@exit_with_a_sentence
def main() -> None:
    settings = parse(WorkbenchSettings, description=__doc__)
    if storage.is_remote(settings.folder):
        raise UserError(f"folder {settings.folder}: expected a local folder, for files that grow; change --folder")
    keys = Keys(settings.token_file)
    storage.check_writable(settings.folder, "folder")
    check_free(settings.host, settings.port)
    bundle = load_bundle(settings.bundle)
    corrector = corrector_of(bundle, settings)
    with Lease(settings.folder, "folder"):
        log = DecisionLog(Path(settings.folder) / "decisions.jsonl")
        connect(settings.compute, {"DATA": settings.data})
        bench = prepare(bundle, corrector, log, settings)
        serve(bench, keys, settings)
        bench.session.close()


def corrector_of(bundle: Bundle, settings: WorkbenchSettings) -> Corrector:
    """What `jobs/prune.py` corrects this bundle with, and nothing to correct yet."""
    network, prototypes = source_network(bundle, settings.bundle)
    trained = trained_with(bundle.info.provenance, settings.bundle)
    work = storage.join(settings.folder, "data")
    dataset = open_training_data(settings.data, bundle.classes, trained, work)
    images = training_images_of(prototypes, dataset, settings.data)
    cells = zip(images, prototypes["row"].to_pylist(), prototypes["column"].to_pylist(), strict=True)
    known = Prototypes(prototypes, patch_grid(network, bundle.info.architecture), bundle.hash)
    return Corrector(
        network=network,
        start=Draft.of(network, list(cells)),
        dataset=dataset,
        trained=trained,
        model=bundle.info.architecture,
        corrections=Corrections(),
        known=known,
        history=bundle.info.provenance.get("history", []),
    )


def prepare(bundle: Bundle, corrector: Corrector, log: DecisionLog, settings: WorkbenchSettings) -> Workbench:
    """Look at the images, unless that has been done, and open the session."""
    folder, trained, dataset = Path(settings.folder), corrector.trained, corrector.dataset
    options = PassOptions(
        plan=plan_pass(settings.compute),
        batch_size=settings.batch_size,
        augment=trained.augment,
        seed=trained.seed,
        max_pixels=trained.data.max_pixels,
    )
    cache = _cached(bundle, corrector, folder / "cache", options)
    _audited(bundle, dataset, folder / "audit", settings, options)
    session = Session(corrector, cache, log, options)
    if log.torn:
        print("the last decision was cut off while it was written down, and was not taken", flush=True)
    if log.done:
        print(f"goes on with {len(log.done)} decisions from before", flush=True)
    for decision, reason in session.lapsed():
        print(f"{decision.decide} ({decision.who}) doesn't apply any more: {reason}", flush=True)
    catalogue = Catalogue(folder / "audit", dataset, corrector.known.grid, trained.data)

    def make_bundle() -> str:
        output = str(folder / "bundle")
        asked = session.corrector()
        correction = asked.run(options, LineReporter())
        write_corrected(
            output, bundle, asked, correction, resolve(asked, correction, options, keep_connections=False), options
        )
        return storage.located(output)

    return Workbench(session, catalogue, Desk(), folder, make_bundle)


def _cached(bundle: Bundle, corrector: Corrector, folder: Path, options: PassOptions) -> Cache:
    last_layer, dataset = corrector.trained.last_layer, corrector.dataset
    cache = Cache.load(folder, bundle.hash, dataset, last_layer)
    if cache is None:
        reporter, watch = make_reporter(), Stopwatch()
        reporter.begin("similarities", 0)
        write_cache(
            folder, corrector.network, corrector.model, dataset, bundle.hash, last_layer, options, reporter.advance
        )
        reporter.end("similarities", watch.seconds, "of the training and validation images")
        reporter.close()
        cache = Cache.load(folder, bundle.hash, dataset, last_layer)
        assert cache is not None
    return cache


def _audited(bundle: Bundle, dataset: Dataset, folder: Path, settings: WorkbenchSettings, options: PassOptions) -> None:
    """The audit of this bundle, with these settings, as pages and tables."""
    about, thresholds = folder / "audit.json", settings.thresholds()
    if about.exists():
        found = storage.read_json(str(about))
        if (found["bundle_hash"], found["settings"]) == (bundle.hash, thresholds.model_dump()):
            return
        about.unlink()
    reporter, watch = make_reporter(), Stopwatch()
    reporter.begin("audit", 0)
    result = audit_bundle(bundle, dataset, thresholds, options)
    write_audit(str(folder), result, bundle, thresholds, settings.bundle, settings.data)
    reporter.end("audit", watch.seconds, f"{len(result.audit.findings):,} findings")
    reporter.close()


def serve(bench: Workbench, keys: Keys, settings: WorkbenchSettings) -> None:
    """Until the process is told to stop."""
    app = create_app(bench, keys)
    config = uvicorn.Config(
        app, settings.host, settings.port, log_level="warning", timeout_graceful_shutdown=_STOPS_WITHIN_S
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    stop = threading.Event()

    def told(number: int, frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, told)
    thread.start()
    while thread.is_alive() and not server.started:
        time.sleep(_LOOKS_EVERY_S)
    print(f"workbench  http://{settings.host}:{settings.port}/", flush=True)  # from now on it answers
    stop.wait()
    server.should_exit = True
    thread.join()

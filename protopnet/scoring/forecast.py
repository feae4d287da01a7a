"""What scoring would use, before it is begun: `jobs/score.py --plan`."""

from protopnet.budget import Cluster, pass_plan
from protopnet.memory import pass_memory
from protopnet.model.bundle import load_bundle
from protopnet.plan import Plan, plan_passes
from protopnet.predictor import Predictor
from protopnet.scoring.arrays import rows_at_most
from protopnet.scoring.inputs import open_input
from protopnet.scoring.job import ON_CPU, ON_GPU, ScoreSettings
from protopnet.scoring.manifest import contents_of
from protopnet.scoring.record import default_chunk_rows


def plan_scoring(settings: ScoreSettings, cluster: Cluster, images_per_second: float | None = None) -> Plan:
    """Counts the images (their names are listed, none is read) and shares them out. Memory is that of the largest
    member. `UserError` for what would be refused when it starts."""
    bundles = [load_bundle(uri) for uri in settings.bundle]
    asked_for = settings.options.asked(Predictor(bundles))
    most_rows = rows_at_most(asked_for, settings.format) if asked_for else None
    images = contents_of(open_input(settings.input, settings.carry or ()).tables()).images
    passes = pass_plan(settings.compute, cluster)
    batch = settings.batch_size or (ON_GPU if passes.gpus else ON_CPU)
    rows = settings.chunk_rows or default_chunk_rows(images, passes.actors, batch, most_rows)
    needs = [pass_memory(bundle.network, bundle.info.preprocessing.size, batch) for bundle in bundles]
    memory = max(needs, key=lambda need: need.total)
    return plan_passes(
        "score: what it would use", images, "parts", -(-images // rows), passes, memory, images_per_second
    )

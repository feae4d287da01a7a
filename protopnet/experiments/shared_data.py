"""Images that several runs of a table train on, prepared once for all of them."""

import hashlib
import json

from protopnet import storage
from protopnet.config import PrepareSettings, RunSettings
from protopnet.datasets.open import open_source
from protopnet.datasets.shards import is_complete, write_source


def on_shared_data(settings: RunSettings, folder: str, seed: int = 0) -> RunSettings:
    """The same run on shards below `folder`, written now if they aren't there. `UserError` where they can't be.

    All seeds have the same test images: a test split that the source lacks is cut here, by `seed`. Validation images are
    cut from the training ones by each run. Shards are read where they are.
    """
    data = settings.data
    if data.source == "shards":
        return settings
    asked = PrepareSettings(
        data=data.model_copy(update={"validation": 0.0, "workers": None, "hide_test": False}),
        birds=settings.birds,
        seed=seed,
    )
    relevant = asked.model_dump(mode="json", exclude=None if data.source == "birds" else {"birds"})
    digest = hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:10]
    uri = storage.join(folder, f"{data.source}-{digest}")
    if not is_complete(uri):
        write_source(open_source(asked), uri, max_bad=data.max_bad)
    prepared = data.model_copy(update={"source": "shards", "path": uri, "classes": None})
    return settings.model_copy(update={"data": prepared})

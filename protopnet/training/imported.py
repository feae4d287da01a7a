"""The stage that takes in a network trained elsewhere, in the place of start, training and last layer."""

from protopnet.model.legacy import import_authors_state
from protopnet.model.network import ProtoPNet
from protopnet.model.weights import read_state
from protopnet.training.run import Result, Run
from protopnet.training.schedule import Stage
from protopnet.training.state import save_state


def run_import(run: Run, stage: Stage, state_in: str | None) -> Result:
    """The network of the authors' code that `model.weights` holds, class connections and all."""
    run.reporter.begin(stage.name, 0)
    network, weights = run.network(state_in), run.settings.model.weights
    assert isinstance(network, ProtoPNet)
    assert weights is not None
    import_authors_state(read_state(weights), network)
    save_state(run.state_uri(stage), network.state_dict())
    return {"says": f"{len(network.prototypes)} prototypes from {weights}"}

"""The last layer: a convex problem on cached similarities.

With everything below fixed, the similarities of the training images are a matrix that never changes. One pass
computes it; its rows stay in the object store of the node that computed them and are read there by one `RowStore`
a node. If that is one store, it solves the problem itself (`training.newton`); of several an iteration of the solver
(`training.solver`) moves only weights out and gradients back.

Legend: n rows (an image, or one augmented copy of it), P prototypes, K classes.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from protopnet.budget import PassPlan
from protopnet.config import LastLayerSettings
from protopnet.model.network import ProtoPNet
from protopnet.passes.image_pass import PLAIN, NetworkTask, PassOptions, run_pass_in_place, unpack
from protopnet.training.connections import anchor_KP, off_class_KP
from protopnet.training.newton import solve_here
from protopnet.training.proximal import metric_of
from protopnet.training.similarity_rows import Rows, rows_by_split
from protopnet.training.solver import RowBlock, Solution, add_up, solve

_ROWS = 2048  # classified at a time


@dataclass
class SimilarityTask(NetworkTask):
    """`ImageTask`: the similarity of each image to each prototype."""

    def __call__(self, images_B3HW: torch.Tensor, rows: pa.Table) -> pa.Table:
        similarities_BP = self.network(images_B3HW).similarities_BP.cpu().numpy()
        flat = pa.array(similarities_BP.reshape(-1), pa.float32())
        column = pa.FixedSizeListArray.from_arrays(flat, similarities_BP.shape[1])
        return rows.select(["image_id", "copy", "label", "split"]).append_column("similarities", column)


@ray.remote(max_restarts=3, max_task_retries=3)
class RowStore:
    """The similarity rows of one node: training rows as a `RowBlock`, the others for evaluation.

    `columns`: the prototypes that count, in this order; all when None. half: training rows are kept in float16. Its
    methods change nothing, so a lost process is replaced and asked again.
    """

    def __init__(
        self, blocks: list[ray.ObjectRef], num_classes: int, columns: np.ndarray | None = None, half: bool = False
    ):
        self.others = rows_by_split([partial(_unpacked, block) for block in blocks], columns, half)
        training = self.others.pop("train")
        self.block = RowBlock(*training, num_classes, device=_device(training.similarities_nP.nbytes))

    def size(self) -> int:
        return len(self.block)

    def loss_and_gradient(self, weights_KP: np.ndarray) -> tuple[float, np.ndarray]:
        return self.block.loss_and_gradient(weights_KP)

    def second_moment(self, vector_P: np.ndarray) -> np.ndarray:
        return self.block.second_moment(vector_P)

    def solve(self, prototype_class_P: np.ndarray, connection_scale: float, **options: Any) -> Solution:
        """`solve_here` of these rows."""
        off_KP = off_class_KP(prototype_class_P, self.block.num_classes)
        return solve_here(self.block, anchor_KP(off_KP, connection_scale), off_KP, **options)

    def hits(self, weights_KP: np.ndarray) -> dict[str, tuple[int, int]]:
        """For each split but training: how many rows are classified correctly, and how many there are."""
        return {
            split: (sum(map(partial(_hits, weights_KP), *_pieces(rows))), len(rows.labels_n))
            for split, rows in self.others.items()
        }


def _device(size: int) -> torch.device:
    """The GPU that this process was given, if it has room for the rows and half as much beside them."""
    room = torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 1.5 * size
    return torch.device("cuda" if room else "cpu")


def _unpacked(block: ray.ObjectRef) -> pa.Table:
    return unpack(ray.get(block))


def _pieces(rows: Rows) -> Iterable[list[np.ndarray]]:
    """Few rows at a time: of these there is a number for each class."""
    pieces = max(1, len(rows.labels_n) // _ROWS)
    return (np.array_split(part, pieces) for part in rows)


def _hits(weights_KP: np.ndarray, similarities_mP: np.ndarray, labels_m: np.ndarray) -> int:
    return int(((similarities_mP @ weights_KP.T).argmax(1) == labels_m).sum())


@dataclass(frozen=True)
class LastLayerResult:
    """The solution, and the accuracies on each split but training before and after it."""

    solution: Solution
    before: dict[str, float]
    after: dict[str, float]


def optimise_last_layer(
    network: ProtoPNet,
    connection_scale: float,
    rows: pa.Table,
    *,
    settings: LastLayerSettings,
    options: PassOptions,
    on_images: Callable[[int], None] = lambda images: None,
) -> LastLayerResult:
    """Optimise the class connections on the training rows; the network is left as it is.

    `rows`: manifest rows of all splits. The ridge pulls towards `anchor_KP`.
    """
    blocks = cache_similarities(network, rows, copies=settings.copies, options=options)
    on_images(len(rows))
    return solve_last_layer(network, connection_scale, blocks, settings=settings, plan=options.plan)


def cache_similarities(network: ProtoPNet, rows: pa.Table, *, copies: int, options: PassOptions) -> list[ray.ObjectRef]:
    """The similarities of the rows, and of so many augmented copies of each training row, left where they were
    computed. `rows`: manifest rows of any splits."""
    return run_pass_in_place(with_copies(rows, copies), SimilarityTask(network), options)


def solve_last_layer(
    network: ProtoPNet,
    connection_scale: float,
    blocks: list[ray.ObjectRef],
    *,
    settings: LastLayerSettings,
    plan: PassPlan,
    columns: np.ndarray | None = None,
    floor_KP: np.ndarray | None = None,
) -> LastLayerResult:
    """Optimise the class connections on cached similarities; the network is left as it is.

    columns: where its prototypes are among those of the cached similarities, if these are of other ones too. floor_KP: what
    connections may not fall below.
    """
    num_classes = network.last_layer.out_features
    of_P = network.prototype_class.cpu().numpy()
    current_KP = network.last_layer.weight.detach().cpu().numpy()
    with _stores(blocks, num_classes, plan, columns, settings.precision == "float16") as stores:
        wanted = settings.model_dump(include={"l1", "ridge", "tolerance", "max_iterations"})
        wanted |= {"initial": current_KP, "floor": floor_KP}
        solution: Solution
        if len(stores) == 1:
            (solution,) = ray.get([stores[0].solve.remote(of_P, connection_scale, **wanted)])
            solution = replace(solution, weights=solution.weights.copy())  # Ray's are read-only
        else:
            off_KP = off_class_KP(of_P, num_classes)
            solution = solve_over(stores, (anchor_KP(off_KP, connection_scale), off_KP), wanted)
        before, after = _accuracies(stores, current_KP), _accuracies(stores, solution.weights.astype(np.float32))
    return LastLayerResult(solution, before, after)


def solve_over(
    stores: list[ray.actor.ActorHandle], places_KP: tuple[np.ndarray, np.ndarray], wanted: dict[str, Any]
) -> Solution:
    """`solve` of the rows of these stores."""
    total = sum(ray.get([store.size.remote() for store in stores]))

    def everywhere(method: str, argument: np.ndarray) -> list[Any]:
        reference = ray.put(argument)
        return ray.get([getattr(store, method).remote(reference) for store in stores])

    def second_moment(vector_P: np.ndarray) -> np.ndarray:
        return np.sum(everywhere("second_moment", vector_P), axis=0)

    return solve(
        lambda weights_KP: add_up(everywhere("loss_and_gradient", weights_KP), total),
        *places_KP,
        **wanted,
        metric=metric_of(second_moment, places_KP[0].shape[1]),
    )


def cached_accuracies(
    connections_KP: np.ndarray, blocks: list[ray.ObjectRef], *, plan: PassPlan, columns: np.ndarray | None = None
) -> dict[str, float]:
    """Accuracy that these connections have on each split but training; `columns` as for `solve_last_layer`."""
    with _stores(blocks, len(connections_KP), plan, columns) as stores:
        return _accuracies(stores, connections_KP)


def with_copies(rows: pa.Table, copies: int) -> pa.Table:
    """The rows with a column `copy`: PLAIN for each image, and 0 … copies-1 for each training image again."""
    plain = rows.append_column("copy", pa.array(np.full(len(rows), PLAIN, np.int32)))
    training = rows.filter(pc.equal(rows["split"], "train"))
    augmented = [
        training.append_column("copy", pa.array(np.full(len(training), copy, np.int32))) for copy in range(copies)
    ]
    return pa.concat_tables([plain, *augmented])


@contextmanager
def _stores(
    blocks: list[ray.ObjectRef], num_classes: int, plan: PassPlan, columns: np.ndarray | None, half: bool = False
) -> Iterator[list[ray.actor.ActorHandle]]:
    """A `RowStore` on each node that holds blocks; they end with the block of code."""
    places = ray.experimental.get_object_locations(blocks)
    by_node: dict[str, list[ray.ObjectRef]] = {}
    here = ray.get_runtime_context().get_node_id()
    for block in blocks:
        nodes = places[block]["node_ids"]
        by_node.setdefault(nodes[0] if nodes else here, []).append(block)
    stores = [
        RowStore.options(  # type: ignore[attr-defined]
            num_gpus=plan.gpus,  # what an actor of the pass had
            num_cpus=1,  # not all that it computes with: beside a service or another job it would wait for ever
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(plan.threads)}},
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True),
        ).remote(own, num_classes, columns, half)
        for node, own in sorted(by_node.items())
    ]
    yield stores
    for store in stores:
        ray.kill(store)


def _accuracies(stores: list[ray.actor.ActorHandle], weights_KP: np.ndarray) -> dict[str, float]:
    counts: dict[str, np.ndarray] = {}
    per_store: list[dict[str, tuple[int, int]]] = ray.get([store.hits.remote(weights_KP) for store in stores])
    for hits in per_store:
        for split, pair in hits.items():
            counts[split] = counts.get(split, np.zeros(2)) + np.array(pair)
    return {split: float(hit / all_) for split, (hit, all_) in counts.items()}

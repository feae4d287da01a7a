"""The solver of the last layer by itself, at growing sizes, beside the one it replaced where all rows are in one process.

    python bench/last_layer_size.py [--rows 12000 --prototypes 2000 --classes 200] [--baseline 0] [--file rows.npz]

`newton` is `protopnet.training.newton`; `fista` is `solver.py` and `proximal.py` as they were at commit BASELINE, read from
git, with their metric. Both go to the same residual from the same start: -1/2 to other classes, as after training. Rows are
made up (cosines; a class is a direction, its images and prototypes are near it) or a file's (`similarities`, `labels`).
`again` solves once more from the solution when five prototypes have gone. Peak memory is what the process took
for the rows and for `newton` beside its arguments, over the size of the rows.
"""

import argparse
import importlib.util
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from common import arguments_of, conclude, seconds, table

from protopnet.training.connections import anchor_KP, off_class_KP
from protopnet.training.newton import solve_here
from protopnet.training.solver import RowBlock

BASELINE = "fa828f4"
L1 = RIDGE = 1e-4
TOLERANCE, DROPPED = 1e-5, 5
MEMORY = 1.3  # times the rows, with them


def main() -> None:
    arguments = arguments_of(
        __doc__, rows=12_000, prototypes=2_000, classes=200, seed=0, spread=1.4, baseline=1, file=""
    )
    similarities_nP, labels_n = loaded(arguments) if arguments.file else made_up(arguments)
    rows, prototypes = similarities_nP.shape
    classes = arguments.classes
    off_KP = off_class_KP(np.arange(prototypes) * classes // prototypes, classes)
    anchor, start = anchor_KP(off_KP, 1.0), np.where(off_KP, -0.5, 1.0)
    load_what_loads_late()
    before = peak_bytes() - similarities_nP.nbytes
    how: dict[str, Any] = {"l1": L1, "ridge": RIDGE, "tolerance": TOLERANCE}
    block, found = RowBlock(similarities_nP, labels_n, classes), []
    spent = seconds(lambda: found.append(solve_here(block, anchor, off_KP, initial=start, **how)))
    peak = (peak_bytes() - before) / similarities_nP.nbytes
    shown = {"newton": figures_of(found[0], spent, off_KP)}

    gone = np.random.default_rng(arguments.seed).choice(prototypes, DROPPED, replace=False)
    kept, weights_KP, anchor_left = similarities_nP[:, gone].copy(), found[0].weights.copy(), anchor.copy()
    for matrix in (similarities_nP, weights_KP, anchor_left):
        matrix[:, gone] = 0
    spent_again = seconds(lambda: found.append(solve_here(block, anchor_left, off_KP, initial=weights_KP, **how)))
    shown["again"] = figures_of(found[1], spent_again, off_KP)
    similarities_nP[:, gone] = kept
    if arguments.baseline:
        old = baseline()
        old_block = old.RowBlock(np.ascontiguousarray(similarities_nP), labels_n, classes)

        def solve_as_before() -> Any:
            metric = old.metric_over([old_block])
            return old.solve(old.mean_over([old_block]), anchor, off_KP, metric=metric, initial=start, **how)

        spent_before = seconds(lambda: found.append(solve_as_before()))
        shown["fista"] = figures_of(found[2], spent_before, off_KP)
    print(f"{rows:,} rows, {prototypes:,} prototypes, {classes:,} classes; peak memory {peak:.2f} times the rows")
    table({name: {column: f"{value:,}" for column, value in row.items()} for name, row in shown.items()})
    figures = {"peak memory over rows": round(peak, 2), **shown}
    checks = {"residual allowed / newton's": (TOLERANCE / found[0].residual, 1.0)}
    checks["memory allowed / peak"] = (MEMORY / peak, 1.0)
    if arguments.baseline:
        checks["speed"] = (spent_before / spent, 4.0)
        checks["objective: fista - newton"] = (found[2].objective - found[0].objective, -1e-6)
    conclude("last_layer_size", arguments, figures, checks)


def load_what_loads_late() -> None:
    """Libraries and their buffers, which don't grow with the rows."""
    labels_n, off_KP = np.arange(4096) % 40, off_class_KP(np.arange(300) % 40, 40)
    rows = np.random.default_rng(0).random((4096, 300), dtype=np.float32)
    solve_here(RowBlock(rows, labels_n, 40), anchor_KP(off_KP, 1.0), off_KP, l1=1e-2, ridge=1e-2, max_iterations=1)


def made_up(arguments: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Cosines (n×P, a column after another in memory, as a `RowStore` has them) and labels."""
    random, depth = np.random.default_rng(arguments.seed), 128
    labels_n = np.arange(arguments.rows) % arguments.classes
    class_P = np.arange(arguments.prototypes) * arguments.classes // arguments.prototypes
    centres_KD = random.standard_normal((arguments.classes, depth), dtype=np.float32)
    around = [centres_KD[of] for of in (labels_n, class_P)]
    rows_nD, prototypes_PD = (x + arguments.spread * random.standard_normal(x.shape, dtype=np.float32) for x in around)
    rows_nD /= np.linalg.norm(rows_nD, axis=1, keepdims=True)
    prototypes_PD /= np.linalg.norm(prototypes_PD, axis=1, keepdims=True)
    return (prototypes_PD @ rows_nD.T).T, labels_n


def loaded(arguments: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    with np.load(arguments.file) as file:
        return np.asfortranarray(file["similarities"]), file["labels"].astype(np.int64)


def figures_of(solution: Any, spent: float, off_KP: np.ndarray) -> dict[str, Any]:
    others = np.count_nonzero(solution.weights * off_KP) / np.count_nonzero(off_KP)
    return {
        "seconds": round(spent, 2),
        "iterations": solution.iterations,
        "objective": round(solution.objective, 8),
        "KKT residual": float(f"{solution.residual:.1e}"),
        "other-class connections %": round(100 * others, 2),
    }


def baseline() -> ModuleType:
    """The solver as it was, with its metric."""
    folder = Path(tempfile.mkdtemp())
    for name in ("proximal", "solver"):
        source = subprocess.check_output(["git", "show", f"{BASELINE}:protopnet/training/{name}.py"], text=True)
        (folder / f"{name}.py").write_text(source.replace("protopnet.training.proximal", "old_proximal"))
        spec = importlib.util.spec_from_file_location(f"old_{name}", folder / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[f"old_{name}"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()

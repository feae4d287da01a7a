"""Held-out images that are nearly training images: saved anew, made smaller or darker, cropped a little.

Two images are nearly the same where their smallest copies, 16 x 16 pixels, correlate. On CUB-200-2011 pairs so near were
the same photos, and the next pair was at 0.87 (docs/results.md). Flips and crops of a tenth aren't found.

Legend: N images, H held out, T in training.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from protopnet import imaging
from protopnet.config import IntensitySettings
from protopnet.datasets.reader import ImageReader
from protopnet.imaging import BadImage
from protopnet.machine import usable_cpus
from protopnet.tables import evenly
from protopnet.words import counted, first_few

NEAR = 0.93  # correlation
MOST = 20_000  # images looked at, evenly spaced: a millisecond each
_SIDE, _AT_A_TIME, _NAMED = 16, 512, 3
_EVEN = 2.0  # deviation of the colours, of 255, below which there is nothing to compare


def near_duplicates_across(
    table: pa.Table,
    max_pixels: int = imaging.MAX_PIXELS,
    intensity: IntensitySettings = imaging.AS_THE_FILE_SAYS,
) -> pa.Table:
    """A row a validation or test image that is nearly a training image, and not one to the byte (manifest rows given).

    Columns: split, uri, class_name of the held-out image; train_uri, train_class_name of the nearest in training, and
    their correlation.
    """
    rows = evenly(table, MOST)
    is_training = pc.equal(rows["split"], "train").to_numpy()
    nearest: list[tuple[int, int, float]] = []
    if is_training.any() and not is_training.all():
        print_NQ = _prints(rows, max_pixels, intensity)
        training, held_out = np.flatnonzero(is_training), np.flatnonzero(~is_training)
        hashes = rows["sha256"].to_numpy(zero_copy_only=False)
        for start in range(0, len(held_out), _AT_A_TIME):
            some = held_out[start : start + _AT_A_TIME]
            like_HT = print_NQ[some] @ print_NQ[training].T
            best_H = like_HT.argmax(1)
            nearest += [
                (h, t, float(like))
                for h, t, like in zip(some, training[best_H], like_HT[np.arange(len(some)), best_H], strict=True)
                if like >= NEAR and hashes[h] != hashes[t]
            ]
    held = rows.select(["split", "uri", "class_name"]).take([h for h, _, _ in nearest] or pa.array([], pa.int64()))
    near = rows.select(["uri", "class_name"]).take([t for _, t, _ in nearest] or pa.array([], pa.int64()))
    return (
        held.append_column("train_uri", near["uri"])
        .append_column("train_class_name", near["class_name"])
        .append_column("correlation", pa.array([like for *_, like in nearest], pa.float64()))
        .combine_chunks()
    )


def near_duplicates_text(pairs: pa.Table) -> str | None:
    """The rows of `near_duplicates_across` in one line for people; None if there are none."""
    if not len(pairs):
        return None
    splits = " and ".join(sorted(pairs["split"].unique().to_pylist()))
    named = [f"{row['uri']} is like {row['train_uri']}" for row in pairs.to_pylist()]
    number = counted(len(pairs), f"{splits} image")
    return f"{number} {'is' if len(pairs) == 1 else 'are'} nearly in training too: {first_few(named, _NAMED)}"


def _prints(rows: pa.Table, max_pixels: int, intensity: IntensitySettings) -> np.ndarray:
    """The smallest copy of each image with mean 0 and length 1: N x Q; all 0 of what can't be read or is even."""
    reader, chunks = ImageReader(), range(0, len(rows), _AT_A_TIME)

    def of(data: bytes | BadImage) -> np.ndarray:
        nothing = np.zeros(3 * _SIDE**2, dtype=np.float32)
        try:
            if isinstance(data, BadImage):
                return nothing
            image = imaging.decode(data, max_pixels=max_pixels, at_least=_SIDE, intensity=intensity)
        except BadImage:
            return nothing
        small = np.asarray(image.resize((_SIDE, _SIDE), Image.Resampling.BOX), dtype=np.float32).ravel()
        small -= small.mean()
        return small / np.linalg.norm(small) if small.std() > _EVEN else nothing

    with ThreadPoolExecutor(usable_cpus()) as pool:
        found = [
            print_Q
            for start in chunks
            for print_Q in pool.map(of, reader.read_each(rows, range(start, min(start + _AT_A_TIME, len(rows)))))
        ]
    return np.stack(found)

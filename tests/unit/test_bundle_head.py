"""What a service opens of a bundle: the same as the whole bundle holds, without the networks, and read when asked for."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from serving import make_bundle

from protopnet.errors import UserError
from protopnet.evidence.ranking import _highest
from protopnet.model.bundle import load_bundle
from protopnet.model.bundle_head import open_head
from protopnet.model.network import ProtoPNet
from protopnet.model.prototype_table import PrototypeTable


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_bundle(tmp_path_factory.mktemp("head") / "bundle", 0)


def test_it_is_what_the_bundle_holds(bundle: str) -> None:
    whole, head = load_bundle(bundle), open_head(bundle)
    assert isinstance(whole.network, ProtoPNet)
    assert (head.hash, head.info) == (whole.hash, whole.info)
    assert head.prototypes_PDhw is not None
    assert head.weights_KP is not None
    assert head.table is not None
    assert torch.equal(head.prototypes_PDhw, whole.network.prototypes)
    assert torch.equal(head.weights_KP, whole.network.last_layer.weight)
    _, rows, columns = whole.network.backbone.map_shape(whole.info.preprocessing.size)
    assert head.map_cells() == rows * columns
    assert whole.prototypes is not None
    for p in range(len(whole.prototypes)):
        assert head.table.picture(p) == whole.prototypes["thumbnail"][p].as_py()
        assert head.table.activation_map(p) == whole.prototypes["activation_map"][p].as_py()
        assert head.table.is_pictured(p) == (p > 0)


def test_a_baseline_has_none(tmp_path: Path) -> None:
    head = open_head(make_bundle(tmp_path / "baseline", 1, kind="baseline"))
    assert head.prototypes_PDhw is None
    assert head.table is None


@pytest.mark.parametrize(
    ("file", "message"),
    [("model.safetensors", "damaged: model.safetensors"), ("prototypes.parquet", "damaged: prototypes.parquet")],
)
def test_what_is_damaged_is_refused(tmp_path: Path, file: str, message: str) -> None:
    uri = make_bundle(tmp_path / "bundle", 0)
    path = tmp_path / "bundle" / file
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=message):
        open_head(uri)
    path.unlink()
    with pytest.raises(UserError, match="incomplete"):
        open_head(uri)


def rows(count: int) -> pa.Table:
    pictures = [None if n % 7 == 3 or n >= 20 else bytes([n]) for n in range(count)]
    maps = [[[float(n)]] for n in range(count)]
    return pa.table({"uri": [str(n) for n in range(count)], "activation_map": maps, "thumbnail": pictures})


@pytest.mark.parametrize("group", [1, 5, 10, 1000])
def test_pictures_come_from_whatever_row_group_they_are_in(tmp_path: Path, group: int) -> None:
    table = rows(33)
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=group)
    opened, kept = PrototypeTable.opened(pa.memory_map(str(tmp_path / "t.parquet"))), PrototypeTable.of(table)
    assert opened.small.equals(kept.small)
    for n in np.random.default_rng(0).permutation(33).tolist():
        assert opened.picture(n) == kept.picture(n) == table["thumbnail"][n].as_py()
        assert opened.activation_map(n) == kept.activation_map(n) == [[float(n)]]
        assert opened.is_pictured(n) == kept.is_pictured(n) == (opened.picture(n) is not None)


@given(
    st.lists(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=6, max_size=6), min_size=1), st.integers(1, 9)
)
def test_of_equal_values_the_first_is_listed_first(values: list[list[float]], count: int) -> None:
    values_RS = torch.tensor(values)
    expected = values_RS.sort(dim=1, descending=True, stable=True).indices[:, :count]
    assert torch.equal(_highest(values_RS, count), expected)

"""What an audit advises: which prototypes to drop, to merge or to move."""

import shlex

import pyarrow as pa
from made_prototypes import prototypes

from protopnet.auditing.findings import Finding
from protopnet.auditing.remedies import remedies


def flagging(kind: str, *prototypes: int) -> Finding:
    return Finding(1, kind, 0, prototypes, "")


def test_of_repeated_prototypes_the_first_stays() -> None:
    [remedy] = remedies([flagging("repeated", 0, 1), flagging("borrowed")], prototypes())
    assert (remedy.kind, remedy.says, remedy.options) == ("repeated", "drops 1 prototype", "--remove 1")


def test_no_class_is_left_without_a_prototype() -> None:
    assert prototypes()["class"].to_pylist() == [0, 0, 1, 1]
    [remedy] = remedies([flagging("unused", 1), flagging("unused", 0), flagging("unused", 3)], prototypes())
    assert remedy.options == "--remove 1,3"
    assert remedies([flagging("unused", 2)], prototypes().filter(pa.array([True, True, True, False]))) == []


def test_what_looks_at_the_background_is_moved_and_the_command_can_be_typed() -> None:
    named = prototypes()
    uris = pa.array(["a/b c's.jpg", *named["uri"].to_pylist()[1:]])
    named = named.set_column(named.column_names.index("uri"), "uri", uris)
    [remedy] = remedies([flagging("background", 0)], named)
    box = ",".join(map(str, named["box"].to_pylist()[0]))
    assert shlex.split(remedy.options) == ["--forbid", f"a/b c's.jpg:{box}"]

"""Looking through classes and prototypes: searched, paged, and sent once."""

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import CLASSES, Client, local_app, make_bundle

from protopnet.evidence.sources import Shown
from protopnet.serving.app import references
from protopnet.serving.catalogue import Catalogue
from protopnet.serving.ensemble import Ensemble
from protopnet.serving.schemas import PrototypeOptions
from protopnet.serving.settings import AppSettings, MemberSettings


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("catalogue")
    return [make_bundle(folder / str(seed), seed) for seed in range(2)]


@pytest.fixture(scope="module")
def service(bundles: list[str]) -> Iterator[Client]:
    with local_app(bundles) as client:
        yield client


def test_classes_are_searched_for(service: Client) -> None:
    def names(query: str) -> tuple[int, list[str]]:
        page = service.get(f"/v1/classes?{query}").json
        return page["total"], [entry["class_name"] for entry in page["classes"]]

    assert names("") == (4, CLASSES)
    assert names("search=NORTH") == (1, [CLASSES[1]])
    assert names("search=w") == (1, [CLASSES[2]])
    assert names("search=blue_jay") == names("search=Blue%20Jay") == (1, [CLASSES[0]])
    assert names("search=00") == (3, CLASSES[:3])
    assert names("search=nothing") == (0, [])
    assert names("limit=1&offset=1") == (4, [CLASSES[1]])
    assert service.get("/v1/classes?limit=1&offset=2").json["next"] == 3
    assert service.get("/v1/classes?limit=500").status == 422
    assert names("search=n") == (2, [CLASSES[1], CLASSES[2]])  # begins with it, then has it somewhere


def test_the_model_is_sent_once(service: Client) -> None:
    first = service.get("/v1/model")
    assert service.get("/v1/model", **{"If-None-Match": first.headers["ETag"]}).status == 304


@pytest.fixture(scope="module")
def catalogue(bundles: list[str]) -> Catalogue:
    ensemble = Ensemble(references(bundles), [None, None], MemberSettings(), Shown())  # type: ignore[list-item]
    return Catalogue(ensemble, AppSettings(bundles=bundles))


@given(
    label=st.none() | st.integers(0, 3),
    member=st.none() | st.integers(0, 1),
    offset=st.integers(0, 30),
    limit=st.integers(1, 30),
)
def test_a_page_is_a_stretch_of_all_that_are_meant(
    catalogue: Catalogue, label: int | None, member: int | None, offset: int, limit: int
) -> None:
    every = sorted((p // 3, m, p) for m in range(2) for p in range(12))
    expected = [place for place in every if label in (None, place[0]) and member in (None, place[1])]
    of_class = None if label is None else CLASSES[label]
    options = PrototypeOptions(of_class=of_class, member=member, offset=offset, limit=limit)
    page = asyncio.run(catalogue.page(options))
    assert [(p.class_, p.member, p.prototype) for p in page.prototypes] == expected[offset : offset + limit]
    assert page.total == len(expected)
    assert page.next == (offset + limit if offset + limit < len(expected) else None)
    assert all(isinstance(p.class_, int) and not isinstance(p.class_, np.integer) for p in page.prototypes)

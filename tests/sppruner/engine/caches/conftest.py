"""An engine of every family, with caches."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sppruner.engine import ContinuousEngine
from sppruner.models.loading import LoadedModel, load_model
from tests.sppruner.families import FAMILIES
from tests.sppruner.families.folders import write_folder


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(write_folder(request.param, tmp_path_factory.mktemp(request.param))))


@pytest.fixture
def engine(loaded: LoadedModel) -> Iterator[ContinuousEngine]:
    made = ContinuousEngine(loaded, slots=4)
    yield made
    made.close()

"""A run, a replica without a model, and what replicas log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from making.serving_local import Local
from making.serving_stub import LIMITS, Stub
from making.tiny_run import make_run

from retrikt_ray.serving.api.routes import build_api


@pytest.fixture
def run(tmp_path: Path) -> str:
    """A run of its own for each test, to be edited."""
    return str(make_run(tmp_path / "run"))


@pytest.fixture(scope="module")
def stub() -> Stub:
    return Stub(**LIMITS)


@pytest.fixture(scope="module")
def api(stub: Stub) -> Local:
    return Local(build_api(stub))


@pytest.fixture(scope="module")
def pairs() -> Local:
    return Local(build_api(Stub(pair=True)))


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the logger of Serve is told; Serve keeps it from the root logger."""
    logger = logging.getLogger("ray.serve")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)

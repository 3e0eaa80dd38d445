"""Whatever the API's description allows, and what it does not, is answered with a status and a body that the description has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from making.serving_local import listening, replica
from making.tiny_run import make_run
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from retrikt_ray.serving.api.routes import build_api

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
OPERATIONS = 13
WITHOUT_INPUT = {"/info", "/health", "/ready", "/metrics"}  # of which nothing can be wrong


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    run = Path(make_run(tmp_path_factory.mktemp("runs") / "run").uri)
    with replica(str(run)) as opened, listening(build_api(opened.endpoint)) as url:
        yield url


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(130, id="short"),
        pytest.param(int(os.environ.get("FUZZ_CASES", "10000")), id="long", marks=[pytest.mark.bench, pytest.mark.timeout(0)]),
    ],
)
def test_no_case_fails_and_no_status_is_undocumented(url: str, cases: int) -> None:
    operations: list[Any] = [found.ok() for found in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations()]
    assert len(operations) == OPERATIONS
    count, statuses = 0, dict[int, int]()
    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            if mode is GenerationMode.NEGATIVE and operation.path in WITHOUT_INPUT:
                continue

            @settings(
                max_examples=-(-cases // (2 * OPERATIONS - 2 * len(WITHOUT_INPUT))),  # those without input take one case
                derandomize=cases < 1000,
                database=None,
                deadline=None,
                phases=[Phase.explicit, Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def one(case: Any) -> None:
                nonlocal count
                count += 1
                answer = case.call()
                statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
                case.validate_response(answer, checks=CHECKS)

            one()
    print(f"\n{count:,} cases: {dict(sorted(statuses.items()))}")

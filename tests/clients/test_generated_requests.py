"""Requests generated from the served OpenAPI document: whatever is asked, nothing fails inside."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(1800)
CASES = int(os.environ.get("SPPRUNER_GENERATED_CASES", "300"))
"""Of each operation."""


def test_no_generated_request_ends_in_a_server_error(endpoint: str) -> None:
    import schemathesis
    from hypothesis import HealthCheck, given, settings

    schema = schemathesis.openapi.from_url(f"{endpoint}/openapi.json")
    statuses: Counter[int] = Counter()
    for result in schema.get_all_operations():
        operation = result.ok()

        @given(case=operation.as_strategy())
        @settings(
            max_examples=CASES,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        def ask(case: Any) -> None:
            if isinstance(case.body, dict) and "model" in case.body:
                case.body["model"] = "served"  # else all that follows is never reached
            response = case.call(base_url=endpoint, timeout=60)
            statuses[response.status_code] += 1
            assert response.status_code < 500, response.text
            if response.status_code >= 400:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}

        ask()
    assert statuses.total() >= CASES
    assert statuses[200], "some are answered"
    assert statuses[400], "and some refused"
    print(dict(statuses))

"""Fuzzes the server: its responses conform to its OpenAPI schema for valid and invalid requests."""

import hypothesis
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from avg_llava.inference.pipeline import Pipeline
from tests.serving.running import CHAT, MINI, running

pytestmark = pytest.mark.xdist_group("serving")
EXAMPLES = 40
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


@pytest.fixture(scope="module")
def api_schema():
    with running(Pipeline.load(MINI).predictor, max_tokens=4) as server:
        yield schemathesis.openapi.from_url(f"{server.address}/openapi.json")


def fuzz(operation, mode):
    """Sends requests that the schema allows or forbids, depending on `mode`; returns the statuses of the responses.

    Uses Hypothesis directly, since schemathesis' pytest plug-in does not support all versions of pytest.
    """
    statuses = set()

    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    @hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    def check(case):
        statuses.add(case.call_and_validate(checks=CHECKS).status_code)

    check()
    return statuses


def test_valid_requests(api_schema):
    operations = [operation.ok() for operation in api_schema.get_all_operations()]
    statuses_by_operation = {operation.label: fuzz(operation, GenerationMode.POSITIVE) for operation in operations}
    assert statuses_by_operation.pop(f"POST {CHAT}") == {200, 400}  # 400: invalid images and budgets
    assert set(map(frozenset, statuses_by_operation.values())) == {frozenset({200})}
    assert set(statuses_by_operation) == {"GET /v1/models", "GET /health", "GET /metrics"}


def test_invalid_requests(api_schema):
    assert 400 in fuzz(api_schema[CHAT]["POST"], GenerationMode.NEGATIVE)


def test_schema_has_this_servers_model_and_limits(api_schema):
    raw = api_schema.raw_schema
    operation = raw["paths"][CHAT]["post"]
    assert set(operation["responses"]) == {"200", "400", "401", "404", "408", "413", "429", "500", "503", "504"}
    assert set(operation["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    fields = raw["components"]["schemas"]["ChatRequest"]["properties"]
    assert fields["model"]["enum"] == ["mini"]
    assert fields["granularity"]["anyOf"][0]["enum"] == [4, 8, 16, 32, 64]
    assert fields["max_tokens"]["anyOf"][0]["maximum"] == 4

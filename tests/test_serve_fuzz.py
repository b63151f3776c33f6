"""Requests made from the port's own OpenAPI description: none gets a status or a form that it does not name."""

from __future__ import annotations

import hypothesis
import pytest
import schemathesis
from conftest import enliven, make_tiny
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance
from served import CHAT, serving

CHECKS = [not_a_server_error, status_code_conformance, response_schema_conformance]
SETTINGS = hypothesis.settings(
    max_examples=15,
    phases=[hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
    derandomize=True,
    database=None,
)


@pytest.mark.slow
def test_the_port_keeps_to_its_description(tiny_settings, tokenizer):
    asked = set()

    def ask(case):
        bodies = [case.body]
        if isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = "embervlm"  # any other gets 404
            bodies.append({**case.body, "messages": [{"role": "user", "content": "Fly?"}]})  # its options alone
        for body in bodies:
            case.body = body
            reply = case.call(base_url=str(client.base_url))
            case.validate_response(reply, checks=CHECKS)
            asked.add((case.path, reply.status_code))

    with serving(enliven(make_tiny(tiny_settings, tokenizer)), max_new_tokens=8) as client:
        schema = schemathesis.openapi.from_url(f"{client.base_url}/openapi.json")
        for operation in schema.get_all_operations():
            for mode in GenerationMode.POSITIVE, GenerationMode.NEGATIVE:
                if operation.ok().path == CHAT or mode is GenerationMode.POSITIVE:
                    cases = operation.ok().as_strategy(generation_mode=mode)
                    SETTINGS(hypothesis.given(cases)(ask))()
        assert client.get("/health").status_code == 200
    assert asked >= {(CHAT, 200), (CHAT, 400), ("/v1/models", 200), ("/health", 200)}

"""Bodies that no client in its right mind would send: 400 and the field, never an error of ours."""

import http.client
import json
import os
import random
import typing
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionParams

from ee_tuning.serve.bodies import ChatBody, CompletionBody

# More of both: FUZZED_BODIES=10000 SCHEMA_EXAMPLES=50 pytest tests/serve/test_bodies.py
FUZZED = int(os.environ.get("FUZZED_BODIES", "1000"))
EXAMPLES = int(os.environ.get("SCHEMA_EXAMPLES", "10"))
ROUTES = "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/lens"
GOOD = {
    "/v1/completions": {"prompt": "a", "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [5]},
    "/lens": {"tokens": [5, 6], "first": 1},
}
FIELDS = sorted({*CompletionBody.model_fields, *ChatBody.model_fields, "tokens", "first", "tools"})
VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 10**6, 2**31, 2**63, 10**400, -(2**64), 0.5, -0.0, 1e-320,
    1e308, float("nan"), float("inf"), -float("inf"), "", "a", "\0", "\ud800", "é🎉", "x" * 5000,
    "1/3", "every:2", "calibrated", "8:0.5", [], [0], [[]], [[0]], [0, "a"], ["a", "\0b"], [None],
    [1.5], [-1], [10**30], {}, {"a": 1}, {"1": 0.5}, {"\ud800": 1}, {"type": "text"}, [{}],
    [{"role": "user"}], [{"role": "user", "content": "\udfff"}], [{"role": 5, "content": None}],
]  # fmt: skip


def fuzzed(rng):
    """A route, a body and its type."""
    route = rng.choice(ROUTES)
    body = dict(GOOD[route])
    for _ in range(rng.randint(0, 3)):
        body[rng.choice(FIELDS)] = rng.choice(VALUES)
    if rng.random() < 0.2:
        body.pop(rng.choice([*body]))
    kind = "application/json"
    text = json.dumps(body).encode()
    match rng.randint(0, 15):
        case 0:
            text = text[: rng.randint(0, len(text))]
        case 1:
            text = b"[" * rng.choice([10, 5000]) + text
        case 2:
            text = b'{"prompt": ' * 3000 + b"1"
        case 3:
            text = bytes(rng.randbytes(rng.randint(0, 60)))
        case 4:
            text = text.replace(b"a", b"\xff\xc0\x00")
        case 5:
            kind = rng.choice(["text/plain", "", "application/xml", "multipart/form-data"])
        case 6:
            text = json.dumps(rng.choice(VALUES)).encode()
    return route, text, kind


def test_fuzzed_bodies_are_answered(tiny_server):
    rng = random.Random(0)
    address, statuses = urlsplit(tiny_server.url), {}
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
    for _ in range(FUZZED):
        route, text, kind = fuzzed(rng)
        connection.request("POST", route, text, {"content-type": kind})
        reply = connection.getresponse()
        said = reply.read()
        statuses[reply.status] = statuses.get(reply.status, 0) + 1
        assert reply.status < 500, (route, text, said)
        if reply.status >= 400:
            error = json.loads(said)["error"]
            assert error["message"]
            assert "Traceback" not in error["message"]
    assert statuses.keys() <= {200, 400, 404}
    assert min(statuses[200], statuses[400]) > FUZZED // 50
    assert not [line for line in tiny_server.log if line["event"] == "error"]
    assert tiny_server.ask("/health") == {"status": "ready"}
    assert tiny_server.complete(prompt="a", max_tokens=2, ignore_eos=True)["choices"]


@pytest.mark.parametrize(
    ("params", "body"), [(CompletionParams, CompletionBody), (ChatParams, ChatBody)]
)
def test_every_field_of_openai_is_done_or_refused_by_its_name(tiny_server, params, body):
    route = "/v1/completions" if body is CompletionBody else "/v1/chat/completions"
    missing = typing.get_type_hints(params).keys() - body.model_fields.keys()
    assert "store" in missing or "suffix" in missing
    for name in sorted(missing):
        with pytest.raises(Exception, match="400") as refused:
            tiny_server.ask(route, GOOD[route] | {name: "x"})
        assert json.load(refused.value)["error"]["param"] == name
        assert tiny_server.ask(route, GOOD[route] | {name: None})["choices"]


def test_what_the_schema_allows_is_answered(tiny_server):
    """Every route of /openapi.json."""
    schema, asked = schemathesis.openapi.from_url(f"{tiny_server.url}/openapi.json"), set()
    for found in schema.get_all_operations():
        operation = found.ok()

        @settings(
            max_examples=EXAMPLES, phases=[Phase.generate], suppress_health_check=[*HealthCheck]
        )
        @given(case=operation.as_strategy())
        def ask(case):
            asked.add(case.operation.path)
            assert case.call(timeout=60).status_code < 500

        ask()
    assert asked >= {*ROUTES, "/health", "/metrics", "/v1/models", "/version", "/"}
    assert tiny_server.ask("/health") == {"status": "ready"}


@pytest.mark.parametrize(
    ("path", "kind", "status", "said"),
    [
        ("/v1/completions", "application/x-www-form-urlencoded", 400, "content-type: application/"),
        ("/health", "application/json", 405, "Method Not Allowed"),
    ],
)
def test_what_is_sent_in_another_way_is_told_how(tiny_server, path, kind, status, said):
    """`curl -d` alone sends a form."""
    request = Request(tiny_server.url + path, b'{"prompt": "x"}', {"content-type": kind})
    with pytest.raises(HTTPError) as refused:
        urlopen(request)
    assert refused.value.code == status
    assert said in json.load(refused.value)["error"]["message"]
    assert refused.value.headers["Allow"] == ("GET" if status == 405 else None)

"""What a body may look like and how it is refused: the routes over a replica without a model, in this process."""

from __future__ import annotations

import bisect
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from making.serving_local import Local
from making.serving_stub import ANSWER, Stub

from retrikt_ray.serving.api.routes import build_api

# shapes


def test_one_text_is_answered_by_one_answer_and_a_list_by_a_list(api: Local) -> None:
    for one in ("a text", {"text": "a text"}, {"text": "a text", "text_pair": None}):
        assert api.post("predict", {"inputs": one}).json() == ANSWER
        assert api.post("predict", {"inputs": [one]}).json() == [ANSWER]
        assert api.post("explain", {"inputs": one}).json() == {"prediction": ANSWER}
        assert api.post("explain", {"inputs": [one, one]}).json() == [{"prediction": ANSWER}] * 2
    assert api.post("predict", {"inputs": ["a", {"text": "b"}, "c"]}).json() == [ANSWER] * 3


def test_top_k_cuts(api: Local) -> None:
    assert api.post("predict", {"inputs": "a", "top_k": 1}).json() == ANSWER[:1]
    assert api.post("predict", {"inputs": ["a", "b"], "top_k": 1}).json() == [ANSWER[:1]] * 2
    for more in (2, 9, None):
        assert api.post("predict", {"inputs": "a", "top_k": more}).json() == ANSWER


def test_retrieve_is_asked_what_the_body_says(api: Local) -> None:
    given = {"k": 100, "mode": "hybrid", "label": "x", "source": "y"}
    assert api.post("retrieve", {"inputs": "a"}).json() == [{"text": "a", "k": 8, "mode": "dense", "label": None, "source": None}]
    assert api.post("retrieve", {"inputs": ["a", "b"], **given}).json() == [[{"text": t, **given}] for t in "ab"]


@pytest.mark.parametrize(
    ("pair", "inputs", "texts"),
    [
        (False, "  a fine\n\tfilm ", [("a fine film", None)]),
        (True, [{"text": "a\nb", "text_pair": " c  d"}], [("a b", "c d")]),
    ],
)
def test_spaces_and_newlines_are_those_of_the_task_rows(pair: bool, inputs: Any, texts: list[Any]) -> None:
    stub = Stub(pair)
    assert Local(build_api(stub)).post("predict", {"inputs": inputs}).status_code == 200
    assert stub.seen == texts


# refusals


@pytest.mark.parametrize(
    ("route", "body", "status", "error"),
    [
        ("predict", {"inputs": ""}, 422, "inputs is empty"),
        ("predict", {"inputs": ["a", " \n"]}, 422, "inputs[1] is empty"),
        ("predict", {"inputs": []}, 422, "inputs is an empty list"),
        ("predict", {"input": "a"}, 422, "inputs is missing"),
        ("predict", {"inputs": "a", "topk": 1}, 422, 'there is no field "topk"'),
        ("predict", {"inputs": 3}, 422, "inputs: found 3"),
        ("predict", {"inputs": True}, 422, "inputs: found true"),
        ("predict", {"inputs": None}, 422, "inputs: found null"),
        ("predict", {"inputs": ["a", None]}, 422, "inputs[1]: found null"),
        ("predict", {"inputs": ["a", ["b", "c", "d"]]}, 422, 'inputs[1]: found ["b", "c", "d"]'),
        ("predict", {"inputs": ["a", ["b", "c"]]}, 422, "inputs[1].text_pair is given, but this task takes single texts"),
        ("predict", {"inputs": ["a", [["b"]]]}, 422, 'inputs[1]: found [["b"]]'),
        ("predict", {"inputs": {"txt": "a"}}, 422, 'inputs has the unknown field "txt"'),
        ("predict", {"inputs": [{"text": "a", "label": "b"}]}, 422, 'inputs[0] has the unknown field "label"'),
        ("predict", {"inputs": {}}, 422, "inputs.text is missing"),
        ("predict", {"inputs": {"text": 1}}, 422, "inputs.text: found 1"),
        ("predict", {"inputs": {"text": "a", "text_pair": "b"}}, 422, "inputs.text_pair is given, but this task takes single texts"),
        ("predict", ["a"], 422, 'the body: found ["a"]'),
        ("predict", "a", 422, 'the body: found "a"'),
        ("predict", None, 422, "the body: found null"),
        ("predict", {"inputs": "a", "top_k": 0}, 422, "top_k: found 0"),
        ("predict", {"inputs": "a", "top_k": "1"}, 422, 'top_k: found "1"'),
        ("predict", {"inputs": "a", "top_k": True}, 422, "top_k: found true"),
        ("retrieve", {"inputs": "a", "k": 0}, 422, "k: found 0"),
        ("retrieve", {"inputs": "a", "k": 101}, 422, "k: found 101"),
        ("retrieve", {"inputs": "a", "k": 2.5}, 422, "k: found 2.5"),
        ("retrieve", {"inputs": "a", "k": None}, 422, "k: found null"),
        ("retrieve", {"inputs": "a", "k": "8"}, 422, 'k: found "8"'),
        ("retrieve", {"inputs": "a", "k": float("inf")}, 422, "k: found Infinity"),
        ("retrieve", {"inputs": "a", "mode": "fuzzy"}, 422, 'mode: found "fuzzy"'),
        ("retrieve", {"inputs": "a", "mode": "\ud800"}, 422, 'mode: found "\\ud800"'),
        ("retrieve", {"inputs": "a", "mode": None}, 422, "mode: found null"),
        ("retrieve", {"inputs": "a", "label": 1}, 422, "label: found 1"),
        ("retrieve", {"inputs": "a", "source": ["task"]}, 422, 'source: found ["task"]'),
        ("retrieve", {"inputs": "a", "where": {}}, 422, 'there is no field "where"'),
        ("retrieve", {"inputs": "a", "top_k": 1}, 422, 'there is no field "top_k"'),
        ("explain", {"inputs": "a", "k": 1}, 422, 'there is no field "k"'),
        ("predict", {"inputs": "a", "mode": "dense"}, 422, 'there is no field "mode"'),
        ("predict", {"inputs": ["a"] * 6}, 413, "inputs holds 6 texts"),
        ("predict", {"inputs": [None] * 6}, 413, "inputs holds 6 texts"),
        ("predict", {"inputs": "a" * 201}, 413, "inputs has 201 characters"),
        ("predict", {"inputs": ["a", "a" * 201]}, 413, "inputs[1] has 201 characters"),
        ("predict", {"inputs": [{"text": "a" * 201}]}, 413, "inputs[0].text has 201 characters"),
        ("explain", {"inputs": "a" * 5000}, 413, "the body has 5"),
        ("predict/", {"inputs": "a"}, 404, "Not Found"),
        ("nowhere", {"inputs": "a"}, 404, "Not Found"),
        ("info", {"inputs": "a"}, 405, "Method Not Allowed"),
    ],
)
def test_refusal_says_why(api: Local, stub: Stub, route: str, body: Any, status: int, error: str) -> None:
    stub.seen.clear()
    answer = api.post(route, body)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/json")
    assert answer.json()["error"].startswith(error)
    assert answer.json()["expected"]
    assert not stub.seen


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        ({"inputs": "a"}, 422, "inputs.text_pair is missing: this task compares two texts"),
        ({"inputs": [{"text": "a"}]}, 422, "inputs[0].text_pair is missing"),
        ({"inputs": {"text": "a", "text_pair": None}}, 422, "inputs.text_pair is missing"),
        ({"inputs": {"text": "a", "text_pair": ""}}, 422, "inputs.text_pair is empty"),
        ({"inputs": {"text": "a", "text_pair": 2}}, 422, "inputs.text_pair: found 2"),
        ({"inputs": ["a", "b", "c"]}, 422, "inputs[0].text_pair is missing"),
        ({"inputs": [["a"]]}, 422, "inputs[0].text_pair is missing"),
        ({"inputs": [["a", 1]]}, 422, 'inputs[0]: found ["a", 1]'),
        ({"inputs": {"text": "a", "text_pair": "b" * 20_001}}, 413, "inputs.text_pair has 20001 characters"),
    ],
)
def test_refusal_of_a_pair_says_why(pairs: Local, body: Any, status: int, error: str) -> None:
    answer = pairs.post("predict", body)
    assert (answer.status_code, answer.json()["error"][: len(error)]) == (status, error)
    assert ("pair" in answer.json()["expected"]) == (status == 422)


@pytest.mark.parametrize(
    ("route", "body", "expected"),
    [
        ("predict", {"inputs": 3}, "a text, or a list of such"),
        ("predict", {"inputs": ["a"] * 6}, "at most 5 texts a request"),
        ("predict", {"inputs": "a" * 201}, 'at most 200 characters a text, or "truncate": true'),
        ("predict", {"inputs": "a" * 5000}, "at most 4000 bytes a request"),
        ("predict", {}, 'a JSON object such as {"inputs": "a text"}'),
        ("predict", {"inputs": "a", "top_k": 0}, "greater than or equal to 1"),
        ("retrieve", {"inputs": "a", "mode": "fuzzy"}, "'dense', 'lexical' or 'hybrid'"),
        ("retrieve", {"inputs": "a", "n": 1}, "inputs, truncate, truncation_direction, k, mode, label, source"),
        ("nowhere", {"inputs": "a"}, "a route and method of /openapi.json"),
    ],
)
def test_refusal_says_what_was_expected(api: Local, route: str, body: Any, expected: str) -> None:
    assert api.post(route, body).json()["expected"] == expected


@pytest.mark.parametrize(
    ("content", "status", "error"),
    [
        (b"{bad", 400, "the body is not JSON: Expecting property name enclosed in double quotes at character 1"),
        (b"", 422, "the body is empty"),
        (b'{"inputs": "\xff"}', 400, "the body cannot be parsed"),
        (b"[" * 3900, 400, "the body cannot be parsed"),
        (b"\x1f\x8b\x08\x00", 400, "the body cannot be parsed"),  # gzip
        (b'{"inputs": ' + b"9" * 3900 + b"}", 422, "inputs: found 9999"),
        (b'{"inputs": "\\ud800"}', 422, 'inputs holds half of a surrogate pair: "\\ud800"'),
        (b'{"inputs": {"\\ud800": "a"}}', 422, 'inputs has the unknown field "\\ud800"'),
        (b'{"inputs": {"\\ud800": "' + b"a" * 201 + b'"}}', 422, 'inputs has the unknown field "\\ud800"'),
        (b'{"inputs": "a", "\\ud800": 1}', 422, "the body: found"),
        (b'{"inputs": NaN}', 422, "inputs: found NaN"),
        (b'{"inputs": 1e999}', 422, "inputs: found Infinity"),
    ],
)
def test_body_that_is_no_json_or_no_text(api: Local, content: bytes, status: int, error: str) -> None:
    answer = api.send(content)
    assert (answer.status_code, answer.json()["error"][: len(error)]) == (status, error)
    assert answer.json()["expected"]


@pytest.mark.parametrize("head", [b"", b'{"inputs": ', b'{"inputs": "a", "top_k": '])
@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"text":', b"}")])
def test_json_of_any_depth_is_refused(head: bytes, opening: bytes, closing: bytes) -> None:
    """Nothing behind the parser fails at the depths that the parser can just follow."""
    server = Local(build_api(Stub()))

    def status(depth: int) -> int:
        return server.send(head + opening * depth + b"1" + closing * depth + b"}" * bool(head)).status_code

    limit = bisect.bisect_left(range(1000), True, key=lambda depth: status(depth) == 400)
    assert 100 < limit < 1000
    assert {status(depth) for depth in (1, 2, 30, *range(limit - 30, limit + 10))} == {400, 422}


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["text", "text_pair", "inputs", "k"]) | st.text(max_size=5), inner),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(
    route=st.sampled_from(["predict", "retrieve", "explain"]),
    pair=st.booleans(),
    inputs=JSON_VALUES,
    other=st.dictionaries(st.sampled_from(["k", "mode", "label", "source", "top_k"]), JSON_VALUES, max_size=1),
)
def test_any_json_is_answered_or_refused(api: Local, pairs: Local, route: str, pair: bool, inputs: Any, other: dict[str, Any]) -> None:
    answer = (pairs if pair else api).post(route, {"inputs": inputs, **other})
    assert answer.status_code in (200, 413, 422)
    assert answer.status_code == 200 or set(answer.json()) == {"error", "code", "expected"}

"""Keys, limits of time, CORS and headers: routes over a replica without a model, in this process; and which servers are refused a start."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from making.serving_local import JSON, Local
from making.serving_stub import Stub
from making.tiny_run import make_run

from retrikt_ray.runtime.settings import ConfigError
from retrikt_ray.serving.api.guard import Keys
from retrikt_ray.serving.api.routes import build_api
from retrikt_ray.serving.app import build_app
from retrikt_ray.serving.args import ServeArgs
from retrikt_ray.serving.server import serve_run

READ, WRITE = "read-key-of-20-chars", "write-key-of-20-chars"
BODY = b'{"inputs": "a"}'
PUBLIC = ("/", "/docs", "/health", "/openapi.json")


@pytest.fixture(autouse=True)
def without_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RETRIKT_READ_KEYS", "RETRIKT_WRITE_KEYS"):
        monkeypatch.delenv(name, raising=False)


def keyed(monkeypatch: pytest.MonkeyPatch, **args: Any) -> Local:
    monkeypatch.setenv("RETRIKT_READ_KEYS", f"another-key-that-reads {READ}")
    monkeypatch.setenv("RETRIKT_WRITE_KEYS", WRITE)
    return Local(build_api(Stub(**{"open": None, **args})))


def status(api: Local, method: str, path: str, key: str | None) -> int:
    headers = {**JSON, **({} if key is None else {"Authorization": f"Bearer {key}"})}
    return api.request(method, path, content=BODY if method != "GET" else None, headers=headers).status_code


def test_a_read_key_reads_and_a_write_key_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    api = keyed(monkeypatch)
    for method, path in (("POST", "/predict"), ("POST", "/"), ("POST", "/embed"), ("GET", "/info"), ("GET", "/metrics")):
        assert [status(api, method, path, key) for key in (None, "", "wrong", READ + "x", READ[:-1], READ, WRITE)] == [401] * 5 + [200] * 2
    assert [status(api, "POST", "/knowledge/preview", key) for key in (None, "wrong", READ)] == [401, 401, 403]
    for method, path in (("PUT", "/knowledge"), ("DELETE", "/knowledge")):
        found = [status(api, method, path, key) for key in (None, "wrong", READ, WRITE)]
        assert found == [401, 401, 403, 422]  # 422: it was let through, and the body is one of /predict
    assert status(api, "GET", "/nowhere", None) == 401 and status(api, "GET", "/nowhere", READ) == 404
    assert {status(api, "GET", path, None) for path in PUBLIC} == {200}


def test_a_refused_key_says_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    api = keyed(monkeypatch)
    answer = api.send(BODY)
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json() == {"error": "there is no key", "code": "wrong_key", "expected": "Authorization: Bearer, and a key"}
    answer = api.send(BODY, headers={**JSON, "Authorization": f"Basic {READ}"})
    assert (answer.status_code, answer.json()["error"]) == (401, "the key is not known")
    answer = api.request("PUT", "/knowledge", content=BODY, headers={**JSON, "Authorization": f"Bearer {READ}"})
    assert answer.json() == {"error": "this key may read, and not write", "code": "not_allowed", "expected": "a write key"}
    assert api.send(BODY, headers={**JSON, "Authorization": "Bearer \udcff\u00e9".encode("utf-8", "surrogateescape")}).status_code == 401


def test_what_is_open_needs_no_key_and_other_peoples_tokens_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    api = keyed(monkeypatch, open="read")
    assert [status(api, "POST", "/predict", key) for key in (None, "hf_of_somebody_else", READ)] == [200] * 3
    assert [status(api, "PUT", "/knowledge", key) for key in (None, "wrong", READ, WRITE)] == [401, 401, 401, 422]
    assert [status(Local(build_api(Stub(open="write"))), "PUT", "/knowledge", key) for key in (None, "wrong")] == [422] * 2


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when an earlier one was right: how long it takes tells nothing."""
    monkeypatch.setenv("RETRIKT_READ_KEYS", f"{READ}, second-key-that-reads third-key-that-reads-")
    keys, compared = Keys.load(ServeArgs(run="x")), 0

    def compare(a: bytes, b: bytes) -> bool:
        nonlocal compared
        compared += 1
        assert len(a) == len(b) == 32
        return a == b

    monkeypatch.setattr("hmac.compare_digest", compare)
    keys.check(f"Bearer {READ}", 1)
    assert compared == 3


def test_keys_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# ours\nread {READ}  # of the shop\n\nwrite {WRITE}\n")
    api = Local(build_api(Stub(open=None, keys_file=str(path))))
    assert [status(api, "POST", "/predict", key) for key in (None, READ, WRITE)] == [401, 200, 200]
    for text, error in (
        (f"admin {WRITE}\n", "keys, line 1: expected `read KEY` or `write KEY`"),
        ("\nread\n", "keys, line 2: expected"),
        ("read short\n", "a read key is shorter than 16 characters"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=error):
            build_app({"run": "x", "keys_file": str(path)})
    with pytest.raises(ConfigError, match=r"keys_file: .*nowhere cannot be read: No such file"):
        build_app({"run": "x", "keys_file": str(tmp_path / "nowhere")})


def test_a_server_that_others_reach_needs_keys(tmp_path: Path) -> None:
    run = str(make_run(tmp_path / "run"))
    for start in (lambda: serve_run(run, "0.0.0.0", 8000, {}), lambda: build_app({"run": run})):
        with pytest.raises(
            ConfigError, match=r"there are no keys: give RETRIKT_READ_KEYS and RETRIKT_WRITE_KEYS, or keys_file=FILE; or say"
        ):
            start()


# time


def test_an_answer_that_takes_too_long_is_504_and_its_place_is_free_again() -> None:
    stub = Stub(deadline_s=0.05)
    stub.open.clear()
    api = Local(build_api(stub))
    answer = api.send(BODY)
    assert answer.json() == {
        "error": "there was no answer within 0.05 s",
        "code": "deadline",
        "expected": "fewer texts, or a time of less load",
    }
    assert (answer.status_code, stub.active) == (504, 0)
    stub.open.set()
    assert api.send(BODY).status_code == 200


def test_a_slow_sender_is_408() -> None:
    async def slowly() -> AsyncIterator[bytes]:
        yield b'{"inputs": '
        await asyncio.sleep(5)
        yield b'"a"}'

    answer = Local(build_api(Stub(deadline_s=0.05))).send(slowly())
    assert (answer.status_code, answer.json()["code"]) == (408, "slow_request")
    assert answer.json()["error"] == "the body has not come within 0.05 s"


# headers


def test_headers_of_every_answer() -> None:
    api = Local(build_api(Stub()))
    for answer in (api.send(BODY), api.get("/"), api.get("/docs"), api.get("/nowhere"), api.send(b"{"), api.request("PUT", "/predict")):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"
        assert "access-control-allow-origin" not in answer.headers
    assert api.send(BODY, headers={**JSON, "X-Request-ID": "mine-1"}).headers["x-request-id"] == "mine-1"
    ids = {api.send(BODY, headers={**JSON, "X-Request-ID": bad}).headers["x-request-id"] for bad in ("", "a b", "x" * 200)}
    assert len(ids) == 3 and all(len(i) == 32 for i in ids)


def test_pages_of_other_origins_may_call_only_where_that_was_said() -> None:
    asked = {"Origin": "https://a.org", "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    assert Local(build_api(Stub())).request("OPTIONS", "/predict", headers=asked).status_code == 405
    api = Local(build_api(Stub(cors_origins=("https://a.org",))))
    assert api.request("OPTIONS", "/predict", headers=asked).headers["access-control-allow-origin"] == "https://a.org"
    assert api.request("OPTIONS", "/predict", headers={**asked, "Origin": "https://b.org"}).status_code == 400
    answer = api.send(BODY, headers={**JSON, "Origin": "https://a.org"})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://a.org")

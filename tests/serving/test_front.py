"""What stands between the network and the replicas, without Ray: HAProxy with what is made of Ray's configuration, and what goes around Ray's proxy."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, RemoteDisconnected
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from making.serving_local import Local

from retrikt_ray.serving.front import Front, middlewares
from retrikt_ray.serving.server import address_of, environment, free_port

CONFIG = """global
    maxconn 100
    tune.bufsize 16384
    log 127.0.0.1:5140 local0 info
defaults
    mode http
    timeout connect 1s
    timeout client 10s
    timeout server 1s
    errorfile 502 /nowhere
    errorfile 503 /nowhere
    balance leastconn
    http-reuse always
    option redispatch 1
    retry-on {retry_on}
    retries {retries}
frontend prometheus
    bind :9101
    mode http
frontend http_frontend
    bind 127.0.0.1:{port}
    use_backend lost if {{ path /lost }}
    use_backend late if {{ path /late }}
    use_backend tires if {{ path /tires }}
    default_backend none
backend none
    server gone 127.0.0.1:{closed}
backend lost
    server ends 127.0.0.1:{ends}
backend tires
    server tires 127.0.0.1:{tires}
backend late
    server sleeps 127.0.0.1:{sleeps}
listen stats
    bind *:8404
    stats enable
"""


TIRED: list[str] = []  # methods of the requests at which a connection ended


@contextmanager
def tiring() -> Iterator[int]:
    """A server that answers one request a connection, and ends it at the second without a word, as one does that is killed. Its port."""

    class Tires(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        answered = 0

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            if self.answered:
                TIRED.append(self.command)
                self.close_connection = True
                return
            self.answered += 1
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        do_PUT = do_POST

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Tires) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[psutil.Process, int]]:
    """Its process and port. Behind it: a server that ends every connection, one that never answers, one that ends a connection at its second
    request, and a port where nobody listens."""
    home, port = tmp_path_factory.mktemp("front"), free_port()
    settings = environment(home, address_of("127.0.0.1", port), 1.0)
    with socket.create_server(("127.0.0.1", 0)) as sleeps, socket.create_server(("127.0.0.1", 0)) as ends, tiring() as tires:
        text = CONFIG.format(
            port=port,
            closed=free_port(),
            sleeps=sleeps.getsockname()[1],
            ends=ends.getsockname()[1],
            tires=tires,
            retry_on=settings["RAY_SERVE_HAPROXY_RETRY_ON"],
            retries=settings["RAY_SERVE_HAPROXY_RETRIES"],
        )
        (home / "haproxy.cfg").write_text(text)
        started = subprocess.Popen(
            [settings["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", str(home / "haproxy.cfg")], stderr=subprocess.DEVNULL
        )

        def end() -> None:
            while True:
                try:
                    one, _ = ends.accept()
                except OSError:
                    return
                one.recv(100)
                one.close()

        threading.Thread(target=end, daemon=True).start()
        try:
            for _ in range(100):
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except OSError:
                    time.sleep(0.05)
            yield psutil.Process(started.pid), port
        finally:
            started.terminate()
            started.wait(10)
            ends.shutdown(socket.SHUT_RDWR)


def told(port: int, *pieces: bytes) -> tuple[int, dict[str, str], str]:
    """Status, headers and body of what is answered to some bytes."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sender:
        for piece in pieces:
            sender.sendall(piece)
        answer = b""
        try:
            while piece := sender.recv(65536):
                answer += piece
        except ConnectionResetError:
            pass
    head, _, body = answer.decode().partition("\r\n\r\n")
    return int(head.split()[1]), dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:]), body


@pytest.mark.parametrize(
    ("pieces", "status", "code"),
    [
        ((b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",), 503, "overloaded"),
        ((b"GET /lost HTTP/1.1\r\nHost: a\r\n\r\n",), 503, "interrupted"),
        ((b"GET /late HTTP/1.1\r\nHost: a\r\n\r\n",), 503, "interrupted"),
    ],
)
def test_what_no_replica_answers_is_json_too(front: tuple[psutil.Process, int], pieces: tuple[bytes, ...], status: int, code: str) -> None:
    found, headers, body = told(front[1], *pieces)
    problem = json.loads(body)
    assert (found, problem["code"]) == (status, code) and problem.keys() == {"error", "code", "expected"}
    assert (headers["content-type"], headers["retry-after"]) == ("application/json", "1")


@pytest.mark.parametrize(
    ("pieces", "status"),
    [
        ((b"GET / HTTP/1.1\r\n", b"X: " + b"a" * 20_000 + b"\r\n\r\n"), 400),
        ((b"GET / HTTP/1.1\r\n", *(b"X-%d: a\r\n" % i for i in range(1000)), b"\r\n"), 400),
        ((b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",), 400),
        ((b"GET / HTTP/1.1\r\n",), 408),
    ],
)
def test_a_head_that_is_no_request_is_refused_in_time(front: tuple[psutil.Process, int], pieces: tuple[bytes, ...], status: int) -> None:
    """In HAProxy's words: what is no request yet has no other page."""
    began = time.monotonic()
    assert told(front[1], *pieces)[0] == status and time.monotonic() - began < 3


def test_what_a_replica_was_asked_that_ended_is_asked_again_but_for_edits(front: tuple[psutil.Process, int]) -> None:
    TIRED.clear()
    asking = HTTPConnection("127.0.0.1", front[1], timeout=10)
    for _ in range(4):
        asking.request("POST", "/tires", b"x")
        answer = asking.getresponse()
        assert (answer.status, answer.read()) == (200, b"")
    assert TIRED == ["POST"] * 3
    asking.request("PUT", "/tires", b"x")
    with pytest.raises(RemoteDisconnected):
        asking.getresponse()
    assert TIRED[3:] == ["PUT"]


def test_statistics_and_figures_are_not_there(front: tuple[psutil.Process, int]) -> None:
    every = [front[0], *front[0].children(recursive=True)]
    found = {(c.laddr.ip, c.laddr.port) for p in every for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    assert found == {("127.0.0.1", front[1])}


def said(*messages: Any) -> httpx.Response:
    """What comes through where Ray's proxy says so much."""

    async def proxy(scope: Any, receive: Any, send: Any) -> None:
        for message in messages:
            await send(message)

    return Local(Front(proxy)).get("/")


def head(status: int, kind: bytes) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", kind), (b"x-request-id", b"7")]}


BODY = {"type": "http.response.body", "body": b'{"code": "its own"}'}
PLAIN, JSON = b"text/plain; charset=utf-8", b"application/json"


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ((), "interrupted"),  # the replica was lost
        ((head(200, JSON),), "interrupted"),  # between head and body
        ((head(503, PLAIN), BODY), "overloaded"),
        ((head(408, PLAIN), BODY), "interrupted"),
    ],
)
def test_what_rays_proxy_says_by_itself_is_a_503_that_says_when_to_come_again(messages: tuple[Any, ...], code: str) -> None:
    answer = said(*messages)
    assert (answer.status_code, answer.json()["code"], answer.headers["retry-after"]) == (503, code, "1")


@pytest.mark.parametrize(("status", "kind"), [(200, JSON), (200, PLAIN), (503, JSON), (408, JSON), (404, PLAIN)])
def test_what_a_replica_answers_comes_through_as_it_is(status: int, kind: bytes) -> None:
    answer = said(head(status, kind), BODY)
    assert (answer.status_code, answer.headers["x-request-id"], answer.content) == (status, "7", BODY["body"])
    assert "retry-after" not in answer.headers


def test_a_body_in_pieces_comes_through() -> None:
    assert said(head(200, JSON), BODY | {"more_body": True}, BODY).content == BODY["body"] * 2


def test_the_image_has_rays_proxy_take_it() -> None:
    from ray.serve._private.http_util import validate_http_proxy_callback_return
    from ray.serve._private.utils import call_function_from_import_path

    dockerfile = (Path(__file__).parents[2] / "cluster" / "Dockerfile").read_text()
    (named,) = re.findall(r"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=(\S+)", dockerfile)
    assert validate_http_proxy_callback_return(call_function_from_import_path(named))[0].cls is middlewares()[0].cls is Front

"""`retrikt serve` with two replicas, keys and an address that others reach: what HAProxy in front makes of it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from making.tiny_run import make_run

from retrikt_ray.serving.server import free_port

ROOT = Path(__file__).parents[2]
READ, WRITE = "read-key-of-20-chars", "write-key-of-20-chars"
pytestmark = pytest.mark.slow


@dataclass
class Server:
    process: psutil.Process
    port: int
    run: Path

    def ask(self, method: str, path: str, key: str | None = READ, **more: object) -> httpx.Response:
        """On a connection of its own, so that HAProxy chooses a replica anew."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.request(method, f"http://127.0.0.1:{self.port}{path}", headers=headers, timeout=30, **more)  # type: ignore[arg-type]

    def replicas(self) -> list[psutil.Process]:
        return [p for p in self.process.children(recursive=True) if " ".join(p.cmdline()).startswith("ray::ServeReplica")]


def answering(replica: psutil.Process) -> psutil.Process:
    """The process beside a replica that answers for it."""
    (found,) = (p for p in replica.children() if "retrikt_ray.serving.answering.process" in p.cmdline())
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    run, port = tmp_path_factory.mktemp("runs") / "run", free_port()
    make_run(run)
    home = tempfile.mkdtemp(prefix="serving-")
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    env |= {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": home, "RETRIKT_READ_KEYS": READ, "RETRIKT_WRITE_KEYS": WRITE}
    command = [sys.executable, "-m", "retrikt_ray", "serve", str(run), "--host", "0.0.0.0", "--port", str(port), "replicas=2"]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, start_new_session=True)
    try:
        assert started.stdout is not None
        said = started.stdout.readline() + started.stdout.readline()
        assert "Authorization: Bearer KEY" in said
        yield Server(psutil.Process(started.pid), port, run)
    finally:
        if started.poll() is None:
            started.send_signal(signal.SIGINT)
            started.communicate(timeout=60)
        shutil.rmtree(home, ignore_errors=True)


def test_only_the_asked_address_is_open_to_others(server: Server) -> None:
    every = [server.process, *server.process.children(recursive=True)]
    sockets = {c.laddr for p in every for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN or c.type == socket.SOCK_DGRAM}
    beyond = {(a.ip, a.port) for a in sockets if a.ip.removeprefix("::ffff:") != "127.0.0.1"}
    assert beyond == {("0.0.0.0", server.port)}


def test_an_edit_is_there_on_every_replica_at_once_and_all_are_counted(server: Server) -> None:
    assert server.ask("POST", "/predict", None, json={"inputs": "a"}).status_code == 401
    row = {"id": "new", "text": "a zebra film", "label": "negative"}
    assert server.ask("PUT", "/knowledge", READ, json={"rows": [row]}).status_code == 403
    release = server.ask("GET", "/info").json()["release"]
    for version in range(1, 7):
        method, body = ("PUT", {"rows": [row]}) if version % 2 else ("DELETE", {"ids": ["new"]})
        assert server.ask(method, "/knowledge", WRITE, json=body).json()["version"] == f"{release}.{version}"
        answers = [server.ask("POST", "/retrieve", json={"inputs": "a zebra film", "k": 1}) for _ in range(10)]
        assert {a.headers["x-knowledge-version"] for a in answers} == {f"{release}.{version}"}
        assert {a.json()[0]["id"] == "new" for a in answers} == {bool(version % 2)}
    assert len(server.replicas()) == 2
    cpu = [sum(p.cpu_times()[:2]) for p in map(answering, server.replicas())]
    assert min(cpu) > 0
    counted = 'retrikt_requests_total{route="POST /retrieve",status="200"} 60.0'
    assert all(counted in server.ask("GET", "/metrics").text for _ in range(6))  # whichever is asked answers for both


@pytest.mark.parametrize("what", ["replica", "process"])
def test_what_is_killed_fails_no_request_but_with_503(server: Server, what: str) -> None:
    """The replica, and the process that answers for it: the one ends with the other."""
    until(lambda: len(server.replicas()) == 2 and all(p.children() for p in server.replicas()))
    victim = server.replicas()[0]
    process = answering(victim)
    found = []
    for i in range(150):
        if i == 20:
            (victim if what == "replica" else process).kill()
        try:
            answer = server.ask("POST", "/predict", json={"inputs": "a film"})
        except (
            httpx.RemoteProtocolError
        ):  # HAProxy gives up a connection without a word when it learns of other replicas; it is asked again
            continue
        found.append(answer.status_code)
        if answer.status_code == 503:
            assert answer.headers["retry-after"] == "1" and answer.json()["code"] == "overloaded"
    assert set(found) <= {200, 503} and found.count(200) > 120
    until(lambda: not {victim.pid, process.pid} & {p.pid for p in server.process.children(recursive=True)})


def until(done: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.1)

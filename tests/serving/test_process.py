"""Runs that are open in a process beside a replica's: the same answers and errors as here, and an end that all see."""

from __future__ import annotations

import asyncio
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from making.serving_local import Replica, close_to, named, scores
from making.tiny_run import TEXTS, make_run

from retrikt_ray.knowledge.edit import UnknownRow
from retrikt_ray.knowledge.knowledge import VersionError
from retrikt_ray.predictor import Predictor
from retrikt_ray.runtime.folders import ArtifactError
from retrikt_ray.runtime.leases.lease import LeaseHeld, LeaseLost
from retrikt_ray.runtime.settings import ConfigError
from retrikt_ray.serving.answering.process import Ended, Process
from retrikt_ray.serving.api.reading import Refusal
from retrikt_ray.serving.args import ServeArgs
from retrikt_ray.serving.replica import Endpoint
from retrikt_ray.serving.server import free_port
from retrikt_ray.task.texts import TextError


def until(done: Callable[[], Any], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    home = tmp_path_factory.mktemp("runs")
    return str(make_run(home / "first")), str(make_run(home / "second", seed=1))


@pytest.fixture
def ended() -> threading.Event:
    return threading.Event()


@pytest.fixture
def process(ended: threading.Event) -> Iterator[Process]:
    found = Process(ended.set)
    yield found
    found.close()
    assert found.process.returncode == 0


def args_of(run: str) -> dict[str, Any]:
    return {"run": run, "open": "write", "max_batch": 4}


def test_answers_are_those_of_the_same_process(runs: tuple[str, str], process: Process, ended: threading.Event) -> None:
    here, there = Replica(Endpoint(args_of(runs[0]))), Replica(Endpoint(args_of(runs[0]), process=process))
    assert isinstance(there.endpoint.process, Process)
    bodies: list[Any] = [
        *(("predict", {"inputs": text, "top_k": 1 + i % 2, "raw_scores": i % 3 == 0}) for i, text in enumerate(TEXTS)),
        *((route, {"inputs": TEXTS[:3]}) for route in ("explain", "embed", "retrieve")),
        ("retrieve", {"inputs": "a film", "label": "no such"}),
        ("predict", {"inputs": ["a film", 3]}),
    ]
    for one, other in zip(here.together(bodies), there.together(bodies), strict=True):
        assert (one.status_code, one.json()) == (other.status_code, other.json())
        assert one.headers.get("x-knowledge-version") == other.headers.get("x-knowledge-version")
    row = {"id": "new", "text": "a zebra film", "label": "negative"}
    edits: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", "/knowledge/preview", {"json": {"rows": [row], "inputs": row["text"]}}),
        ("PUT", "/knowledge", {"json": {"rows": [{**row, "label": "no such"}]}}),
        ("PUT", "/knowledge", {"json": {"rows": [{**row, "text": " "}]}}),
        ("DELETE", "/knowledge?id=unknown", {}),
        ("GET", "/knowledge?q=film&limit=3", {}),
        ("GET", "/knowledge?label=unknown", {}),
        ("GET", "/info", {}),
    ]
    for method, path, more in edits:
        one, other = (replica.request(method, path, **more) for replica in (here, there))
        assert (one.status_code, one.json()) == (other.status_code, other.json())
    assert there.request("PUT", "/knowledge", json={"rows": [row]}).json()["ids"] == ["new"]
    stale = there.request("DELETE", "/knowledge?id=new", headers={"If-Match": f'"{there.endpoint.opened.facts.release}.0"'})
    assert stale.status_code == 412
    told = [replica.post("predict", {"inputs": row["text"]}) for replica in (here, there)]
    assert told[0].json() == told[1].json() and told[0].json()[0] == {"label": "negative", "score": 1.0}
    assert told[1].headers["x-knowledge-version"].endswith(".1")
    there.loop.run(there.endpoint.answers())
    figures = [
        line for line in there.get("/metrics").text.splitlines() if line.startswith(("retrikt_texts_total", "retrikt_batch_requests_count"))
    ]
    assert [float(line.split()[-1]) for line in figures] == [5, 23]
    assert not ended.is_set()


def test_another_run_takes_over_and_one_that_cannot_be_opened_does_not(runs: tuple[str, str], process: Process, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nowhere"):
        process.open(str(tmp_path / "nowhere"), ServeArgs(run="x"))
    one = Replica(Endpoint(args_of(runs[0]), process=process))

    async def swapped(run: str) -> bool:
        await one.endpoint.asked(one.endpoint.opened, "well")  # from here on a loop asks
        return await asyncio.to_thread(one.endpoint.swap, run)

    before = one.endpoint.opened
    assert not one.loop.run(swapped(str(tmp_path / "nowhere"))) and "no config.yaml" in str(one.endpoint.refused)
    assert not one.loop.run(swapped(str(make_run(tmp_path / "pair", pair=True)))) and "another kind" in str(one.endpoint.refused)
    assert one.endpoint.opened is before and one.post("predict", {"inputs": "a film"}).status_code == 200
    assert one.loop.run(swapped(runs[1])) and one.endpoint.refused is None
    assert one.post("predict", {"inputs": "a film"}).headers["x-knowledge-version"].startswith(one.endpoint.opened.facts.release)
    assert one.endpoint.opened.facts.release != before.facts.release


def test_a_run_that_was_given_up_answers_what_it_was_asked_and_no_more(runs: tuple[str, str], process: Process) -> None:
    first, other = (process.open(run, ServeArgs(run=run)) for run in runs)

    async def ask() -> None:
        await first.ask("well")
        last = first.ask("info")
        await asyncio.to_thread(first.close)
        assert (await last)["release"] == first.facts.release
        with pytest.raises(RuntimeError, match="not open any more"):
            await first.ask("info")
        assert (await other.ask("info"))["release"] == other.facts.release

    asyncio.run(ask())


def test_whoever_asks_first_and_gives_up_keeps_nobody_from_an_answer(runs: tuple[str, str], process: Process) -> None:
    """Also while another run is opened, which no loop has anything to do with yet."""
    opened = process.open(runs[0], ServeArgs(run=runs[0]))

    async def ask() -> None:
        opening = asyncio.ensure_future(asyncio.to_thread(process.open, runs[1], ServeArgs(run=runs[1])))
        await asyncio.sleep(0.05)
        first = asyncio.ensure_future(opened.ask("info"))
        await asyncio.sleep(0)
        first.cancel()
        found = await asyncio.wait_for(opened.ask("info"), 20)
        other = await opening
        assert found["release"] == opened.facts.release != other.facts.release
        assert (await other.ask("info"))["release"] == other.facts.release

    asyncio.run(ask())


def test_its_end_is_told(runs: tuple[str, str]) -> None:
    ended = threading.Event()
    process = Process(ended.set)
    opened = process.open(runs[0], ServeArgs(run=runs[0]))

    async def ask() -> None:
        await opened.ask("well")
        waits = opened.ask("info")
        process.process.send_signal(signal.SIGKILL)
        with pytest.raises(Ended):
            await waits
            await opened.ask("info")
        assert ended.is_set()
        with pytest.raises(Ended):
            await asyncio.wait_for(opened.ask("info"), 5)

    asyncio.run(ask())
    process.close()


def test_it_ends_with_its_replica(runs: tuple[str, str]) -> None:
    code = f"""
import time
from retrikt_ray.serving.args import ServeArgs
from retrikt_ray.serving.answering.process import Ended, Process
process = Process(lambda: None)
process.open({runs[0]!r}, ServeArgs(run="x"))
print(process.process.pid, flush=True)
time.sleep(60)
"""
    replica = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert replica.stdout
    own = psutil.Process(int(replica.stdout.readline()))
    assert own.is_running() and own.ppid() == replica.pid
    own.send_signal(signal.SIGINT)  # of a terminal, which sends it to all
    replica.kill()
    replica.wait()
    until(lambda: not own.is_running() or own.status() == psutil.STATUS_ZOMBIE)


def test_a_server_answers_from_such_a_process_and_survives_its_end(runs: tuple[str, str], tmp_path: Path) -> None:
    predictor, port, home = Predictor.open(runs[0]), free_port(), tempfile.mkdtemp(prefix="serving-")
    want = named(predictor.predict("a film", evidence=False).answers[0])
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"RAY_TMPDIR": home}
    command = [sys.executable, "-m", "retrikt_ray", "serve", runs[0], "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, start_new_session=True) as server:
        try:
            assert server.stdout and "serving" in server.stdout.readline()

            def answer() -> dict[str, float] | None:
                try:
                    found = httpx.post(f"http://127.0.0.1:{port}/predict", json={"inputs": "a film"}, timeout=30)
                except httpx.TransportError:
                    return None
                assert (found.status_code, found.headers.get("retry-after")) in ((200, None), (503, "1"))
                return scores(found.json()) if found.status_code == 200 else None

            def processes() -> list[psutil.Process]:
                every = psutil.Process(server.pid).children(recursive=True)
                return [p for p in every if p.is_running() and "retrikt_ray.serving.answering.process" in p.cmdline()]

            until(lambda: answer() == close_to(want), 60)
            (before,) = processes()
            before.kill()
            until(lambda: not before.is_running() or before.status() == psutil.STATUS_ZOMBIE)
            until(lambda: answer() == close_to(want) and [p for p in processes() if p.pid != before.pid], 60)
        finally:
            server.send_signal(signal.SIGINT)
            server.communicate(timeout=60)
            shutil.rmtree(home, ignore_errors=True)
    assert server.returncode == 0 and not before.is_running()


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("a"),
        ArtifactError("b"),
        VersionError("c"),
        UnknownRow("d"),
        LeaseHeld("e"),
        LeaseLost("f"),
        TextError("found", "expected"),
        Refusal(422, "error", "expected", {"Retry-After": "1"}),
    ],
)
def test_errors_go_from_one_process_to_another(error: Any) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error) and vars(again) == vars(error)


def test_a_module_that_is_found_by_the_replica_is_found_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, process: Process) -> None:
    """Ray puts a job's working directory on the path of its workers, and nowhere else."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    other = Process(lambda: None)
    until(lambda: str(tmp_path) in psutil.Process(other.process.pid).environ().get("PYTHONPATH", "").split(os.pathsep))
    other.close()
    assert str(tmp_path) not in psutil.Process(process.process.pid).environ()["PYTHONPATH"].split(os.pathsep)

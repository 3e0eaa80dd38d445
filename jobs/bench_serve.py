"""What an answer over HTTP costs beside what Ray Serve costs anyway: requests a second at 32 connections, latency at one.

    python -m jobs.bench_serve runs/quickstart

Each server is started anew in each of five rounds, alone on the machine, and loaded from another process; medians are told. `retrikt serve`, and
with two replicas; a bare Serve ingress with the same settings, whose answer is a constant of the same size; that constant behind our routes,
keys, limits and counting, which is the part that is not the answer; the same routes and predictor in plain uvicorn, without Ray; and the teacher
behind our routes, which answers what has come meanwhile in one pass, too.
"""

from __future__ import annotations

import asyncio
import json
import os
import selectors
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROUNDS, SECONDS, WARM_S, CONNECTIONS = 5, 6.0, 3.0, 32
SYSTEMS = ("retrikt", "two replicas", "bare", "routes", "uvicorn", "teacher")


def serving(port: int, deployment: Callable[[], Any]) -> None:
    """A Serve app with the settings of `retrikt serve`, until the end of the input. deployment: made once Ray may be imported."""
    from retrikt_ray.serving.server import address_of, environment

    home = Path(tempfile.mkdtemp(prefix="bench-", dir="/tmp"))
    os.environ.update(environment(home, address_of("127.0.0.1", port), 10))
    from ray import serve

    from retrikt_ray.runtime import cluster

    cluster.connect()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    options = {"max_ongoing_requests": 400, "logging_config": {"enable_access_log": False}}
    serve.run(serve.deployment(**options)(deployment()).bind(), name="bench")
    try:
        sys.stdin.read()
    finally:
        shutil.rmtree(home, ignore_errors=True)


def bare(run: str, port: int, size: int) -> None:
    """An ingress that answers a constant of `size` bytes."""

    def deployment() -> Any:
        from fastapi import FastAPI
        from ray import serve
        from starlette.responses import Response

        api, body = FastAPI(), b"x" * size

        @serve.ingress(api)
        class Bare:
            @api.post("/predict")
            async def predict(self) -> Response:
                return Response(body, media_type="application/json")

        return Bare

    serving(port, deployment)


def routes(run: str, port: int, size: int) -> None:
    """Our routes over nothing: requests are read and checked, counted and answered with a constant of `size` bytes."""

    def deployment() -> Any:
        from types import SimpleNamespace

        from ray import serve

        from retrikt_ray.serving.answering.job import Answers, Job
        from retrikt_ray.serving.api.routes import build_api
        from retrikt_ray.serving.args import ServeArgs
        from retrikt_ray.serving.metrics import Metrics
        from retrikt_ray.serving.replica import Endpoint

        class Constant(Endpoint):
            def __init__(self) -> None:
                self.args, self.metrics, self.active = ServeArgs(run=run, open="write"), Metrics(), 0
                self.opened: Any = SimpleNamespace(facts=SimpleNamespace(pair=False))

            async def ask(self, job: Job) -> Answers:
                return Answers([f'"{"x" * (size - 2)}"'] * len(job.texts), "x.0")

            def __serve_build_asgi_app__(self) -> Any:
                return build_api(self, echo=False)

        return serve.ingress()(Constant)

    serving(port, deployment)


def teacher(run: str, port: int, size: int) -> None:
    """Our routes over the annotator, which a thread asks about all that waits."""

    def deployment() -> Any:
        from concurrent.futures import ThreadPoolExecutor
        from types import SimpleNamespace

        from ray import serve

        from retrikt_ray.serving.answering.job import Answers, Counted, Job, as_json
        from retrikt_ray.serving.api.routes import build_api
        from retrikt_ray.serving.args import ServeArgs
        from retrikt_ray.serving.metrics import Metrics
        from retrikt_ray.serving.replica import Batcher, Endpoint

        class Taught(Endpoint):
            def __init__(self) -> None:
                from retrikt_ray.runtime.folders import Folder
                from retrikt_ray.task.card import Task
                from retrikt_ray.teacher.annotator import Annotator

                folder = Folder.at(run)
                self.args, self.metrics, self.active = ServeArgs(run=run, open="write"), Metrics(), 0
                self.labels, self.teacher = Task.read(folder / "task").labels, Annotator.load(folder / "teacher")
                self.thread = ThreadPoolExecutor(1)
                self.opened: Any = SimpleNamespace(facts=SimpleNamespace(pair=False), ask=self.asked_of)
                self.batcher = Batcher(lambda: self.opened, self.args.max_batch, self.metrics.count)

            def asked_of(self, name: str, jobs: list[Job], since: float) -> Any:
                return asyncio.get_running_loop().run_in_executor(self.thread, self.work, jobs, since)

            def work(self, jobs: list[Job], since: float) -> tuple[list[Answers], Counted]:
                found = self.teacher.annotate([job.texts[0] for job in jobs])[0].tolist()
                scores = [[{"label": label, "score": score} for label, score in zip(self.labels, row, strict=True)] for row in found]
                return [Answers([as_json(row)], "x.0") for row in scores], Counted(len(jobs), since)

            def __serve_build_asgi_app__(self) -> Any:
                return build_api(self, echo=False)

        return serve.ingress()(Taught)

    serving(port, deployment)


def plain(run: str, port: int, size: int) -> None:
    """The routes of `retrikt serve` in uvicorn."""
    import uvicorn

    from retrikt_ray.serving.api.routes import build_api
    from retrikt_ray.serving.replica import Endpoint

    uvicorn.run(build_api(Endpoint({"run": run, "open": "write"})), host="127.0.0.1", port=port, log_level="error", access_log=False)


@contextmanager
def running(system: str, run: str, port: int, size: int) -> Iterator[None]:
    """A server, until it answers; ended by its end of input, or a signal."""
    ours = {"retrikt": [], "two replicas": ["replicas=2"]}
    command = (
        ["-m", "retrikt_ray", "serve", run, "--port", str(port), *ours[system]]
        if system in ours
        else ["-m", "jobs.bench_serve", system, run, str(port), str(size)]
    )
    process = subprocess.Popen([sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 180
        while not load(port, [request("a text")], 1, 0.01):
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"the {system} server did not start")
            time.sleep(0.5)
        yield
    finally:
        if process.stdin:
            process.stdin.close()
        process.send_signal(2)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def request(text: str) -> bytes:
    body = json.dumps({"inputs": text}).encode()
    return b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (
        len(body),
        body,
    )


def answer_size(head: bytes) -> int:
    """Content-Length of a head. Raises where it is no 200."""
    if not head.startswith(b"HTTP/1.1 200"):
        raise SystemExit(f"a server answered {head[:200]!r}")
    return next(int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))


def load(port: int, requests: list[bytes], connections: int, seconds: float) -> list[float]:
    """Seconds of each answer, `connections` asking at a time, each again as soon as it is answered; empty where nobody listens."""
    selector = selectors.DefaultSelector()
    try:
        sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(connections)]
    except OSError:
        return []
    state: dict[socket.socket, tuple[float, bytes]] = {}
    asked, taken, until = 0, [], time.perf_counter() + seconds

    def ask(one: socket.socket) -> None:
        nonlocal asked
        state[one] = (time.perf_counter(), b"")
        one.sendall(requests[asked % len(requests)])
        asked += 1

    for one in sockets:
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        selector.register(one, selectors.EVENT_READ)
        ask(one)
    while state:
        for key, _ in selector.select(10):
            one: Any = key.fileobj
            began, data = state[one]
            piece = one.recv(65536)
            data += piece
            head, gap, body = data.partition(b"\r\n\r\n")
            if not piece and not gap:
                return []  # the server is just starting, and its front has nobody behind it yet
            if gap and not head.startswith(b"HTTP/1.1 200") and len(requests) == 1:
                return []
            if not gap or len(body) < answer_size(head):
                state[one] = (began, data)
                continue
            now = time.perf_counter()
            taken.append(now - began)
            del state[one]
            if now < until:
                ask(one)
    for one in sockets:
        one.close()
    return taken


def apart(port: int, run: str, connections: int, seconds: float) -> list[float]:
    """`load` in another process."""
    command = [sys.executable, "-m", "jobs.bench_serve", "load", run, str(port), f"{connections}:{seconds}"]
    return list(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def texts_of(run: str) -> list[str]:
    """Texts of the task's validation rows."""
    import pyarrow.parquet as pq

    return list(pq.read_table(f"{run}/task/validation.parquet")["text"].to_pylist())[:500]


def main(run: str) -> None:
    from retrikt_ray.predictor import Predictor
    from retrikt_ray.serving.server import free_port

    predictor = Predictor.open(run)
    found = predictor.predict("a text").view.task.labels
    size = len(json.dumps([{"label": label, "score": 0.12345678901234567} for label in found] or [0]))
    rows = predictor.knowledge.count
    qps: dict[str, list[float]] = {system: [] for system in SYSTEMS}
    p50: dict[str, list[float]] = {system: [] for system in SYSTEMS}
    for _ in range(ROUNDS):
        for system in SYSTEMS:
            port = free_port()
            with running(system, run, port, size):
                apart(port, run, CONNECTIONS, WARM_S)
                qps[system].append(len(apart(port, run, CONNECTIONS, SECONDS)) / SECONDS)
                p50[system].append(1000 * statistics.median(apart(port, run, 1, SECONDS / 2)))
    print(
        f"{rows:,} rows, {os.cpu_count()} CPUs, load of {os.getloadavg()[0]:.1f} at the end; medians of {ROUNDS}, lowest and highest in brackets"
    )
    print(f"{'':14}{f'requests/s at {CONNECTIONS} connections':>40}{'p50 at one, ms':>30}")
    for system in SYSTEMS:
        told = [f"{statistics.median(x):.{d}f} ({min(x):.{d}f}-{max(x):.{d}f})" for x, d in ((qps[system], 0), (p50[system], 2))]
        print(f"{system:14}{told[0]:>40}{told[1]:>30}")
    for system in SYSTEMS:
        ratios = [a / b for a, b in zip(qps[system], qps["bare"], strict=True)]
        more = statistics.median(p50[system]) - statistics.median(p50["bare"])
        print(
            f"{system:14} of the bare ingress: {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) of its requests/s, {more:+.2f} ms"
        )


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(sys.argv[1])
    else:
        what, run_path, port_text, last = sys.argv[1:]
        if what == "load":
            many, length = last.split(":")
            print(json.dumps(load(int(port_text), [request(t) for t in texts_of(run_path)], int(many), float(length))))
        else:
            serve_it: Callable[[str, int, int], None] = {"bare": bare, "routes": routes, "uvicorn": plain, "teacher": teacher}[what]
            serve_it(run_path, int(port_text), int(last))

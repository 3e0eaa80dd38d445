"""A server under mixed load and, in turn, everything that happens to servers; and what was answered meanwhile, compared with what it should be."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from making.tiny_run import LABELS, TEXTS, make_run
from retrikt_ray.predictor import Predictor
from retrikt_ray.serving.server import free_port

ROOT = Path(__file__).parents[2]
PROBE = "a zebra film"  # whose label is set anew by every write
ARGS = {"replicas": 2, "max_batch": 8, "max_queued": 16}
CAPACITY = ARGS["replicas"] * (2 * ARGS["max_batch"] + ARGS["max_queued"])
CLIENTS = 6


@dataclass
class Soak:
    """A server, the link that its run is reached by, and what was seen."""

    process: psutil.Process
    url: str
    link: Path
    runs: dict[str, Path]  # good ones by their release
    told: dict[str, str | None] = field(default_factory=dict)  # label of the probe by version; None: nobody has said
    seen: list[tuple[str, str, str, Any]] = field(default_factory=list)  # version, route, text, answer
    statuses: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    memory: dict[int, list[float]] = field(default_factory=dict)  # MB of each replica and of the process that answers for it, by process
    done: list[str] = field(default_factory=list)

    def replicas(self) -> list[psutil.Process]:
        return [p for p in self.process.children(recursive=True) if p.name().startswith("ray::ServeRepl")]

    async def ask(
        self, http: httpx.AsyncClient, method: str, path: str, body: Any = None, version: str | None = None
    ) -> httpx.Response | None:
        """An answer that is 200, or 412 where an edit is meant for a version; else None. Anything but a 429 or 503 that says when to come again is
        a failure."""
        headers = {"If-Match": f'"{version}"'} if version else {}
        try:
            answer = await http.request(method, path, json=body, headers=headers)
        except httpx.HTTPError as error:
            self.failures.append(f"{method} {path}: {error!r}")
            return None
        self.statuses[f"{answer.status_code}"] += 1
        if answer.status_code == 200 or (version and answer.status_code == 412):
            return answer
        if answer.status_code not in (429, 503) or "retry-after" not in answer.headers:
            self.failures.append(f"{method} {path}: {answer.status_code} {answer.text[:200]}")
        return None

    async def version(self, http: httpx.AsyncClient) -> str:
        """Of the knowledge, now."""
        while (info := await self.ask(http, "GET", "/info")) is None:
            await asyncio.sleep(1)
        return f"{info.json()['release']}.{info.json()['store']['version']}"

    async def load(self, http: httpx.AsyncClient, end: Callable[[], bool]) -> None:
        """One client: all routes, one after the other, and a moment's rest."""
        rng = random.Random(os.urandom(8))
        while not end():
            route, text = rng.choice(["predict"] * 4 + ["explain", "retrieve", "embed"]), rng.choice([PROBE, *TEXTS])
            answer = await self.ask(http, "POST", f"/{route}", {"inputs": text})
            if answer is not None:
                self.seen.append((answer.headers["x-knowledge-version"], route, text, answer.json()))
            if rng.random() < 0.05:
                await self.ask(http, "GET", rng.choice(["/info", "/metrics", "/knowledge?q=film", "/ready"]))
            await asyncio.sleep(0.01)

    # what happens

    async def kill(self, http: httpx.AsyncClient) -> None:
        """A replica, or the process that answers for it, is ended without warning; another comes in its place."""
        victim = random.choice(self.replicas())
        random.choice([victim, *victim.children()]).kill()
        await self.until(lambda: len([p for p in self.replicas() if p.pid != victim.pid]) == ARGS["replicas"])

    async def swap(self, http: httpx.AsyncClient) -> None:
        """Store and student are other ones."""
        now = self.link.resolve()
        await self.offer(http, next(run for run in self.runs.values() if run.resolve() != now))

    async def offer(self, http: httpx.AsyncClient, run: Path) -> None:
        aside = self.link.with_name("aside")
        aside.symlink_to(run)
        aside.replace(self.link)
        release = next((name for name, known in self.runs.items() if known == run), None)
        if release:
            await self.agreed(http, lambda info: info["release"] == release and info["refused"] is None)

    async def damaged(self, http: httpx.AsyncClient) -> None:
        """A run with a file that was altered is offered, refused by every replica, and taken back."""
        now = self.link.resolve()
        broken = Path(tempfile.mkdtemp(dir=now.parent)) / "run"
        shutil.copytree(now, broken)
        weights = broken / "index" / "shard-0000.faiss"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        await self.offer(http, broken)
        await self.agreed(http, lambda info: "was altered" in (info["refused"] or ""))
        await self.offer(http, now)
        shutil.rmtree(broken.parent)

    async def write(self, http: httpx.AsyncClient, count: int) -> None:
        """The probe gets one label and the other, and is now and then deleted."""
        version = await self.version(http)
        for i in range(count):
            label = None if i % 5 == 4 else LABELS[i % 2]
            edit: tuple[Any, ...] = ("PUT", "/knowledge", {"rows": [{"id": "probe", "text": PROBE, "label": label}]})
            if label is None:
                edit = ("DELETE", "/knowledge?id=probe", None)
            while (answer := await self.ask(http, *edit, version)) is None:  # it may have been made all the same, or be made yet
                await asyncio.sleep(1)
            version = answer.json()["version"] if answer.status_code == 200 else await self.version(http)
            self.told[version] = label

    async def burst(self, http: httpx.AsyncClient) -> None:
        """Five times as many requests at once as the replicas take."""
        async with httpx.AsyncClient(base_url=self.url, timeout=60, limits=httpx.Limits(max_connections=None)) as many:
            body = {"inputs": TEXTS * 2}
            answers = await asyncio.gather(*(self.ask(many, "POST", "/explain", body) for _ in range(5 * CAPACITY)))
        refused = sum(answer is None for answer in answers)
        assert 0 < refused < len(answers), f"{refused} of {len(answers)} were refused"

    async def until(self, check: Callable[[], bool], seconds: float = 90) -> None:
        end = time.monotonic() + seconds
        while not check():
            assert time.monotonic() < end, "it did not come to that"
            await asyncio.sleep(0.1)

    async def agreed(self, http: httpx.AsyncClient, check: Callable[[Any], bool]) -> None:
        """Wait until both replicas say so: twenty answers in turn, each on a connection of its own."""
        end, row = time.monotonic() + 90, 0
        while row < 20:
            async with httpx.AsyncClient(base_url=self.url, timeout=30) as fresh:
                answer = await self.ask(fresh, "GET", "/info")
            row = row + 1 if answer is not None and check(answer.json()) else 0
            assert time.monotonic() < end, f"it did not come to that: {answer and answer.json()}"
            await asyncio.sleep(0.02)

    async def watch_memory(self, end: Callable[[], bool]) -> None:
        while not end():
            for replica in self.replicas():
                try:
                    for process in (replica, *replica.children()):
                        self.memory.setdefault(process.pid, []).append(process.memory_info().rss / 2**20)
                except psutil.NoSuchProcess:
                    continue
            await asyncio.sleep(1)

    async def run(self, seconds: float, every: float, writes: int) -> None:
        """Load for so many seconds, and every so many of them something that happens."""
        stop = time.monotonic() + seconds
        ended = False
        happenings: list[Callable[[httpx.AsyncClient], Awaitable[None]]] = [
            self.kill,
            self.swap,
            lambda http: self.write(http, writes),
            self.burst,
            self.damaged,
        ]
        async with httpx.AsyncClient(base_url=self.url, timeout=60) as http:
            tasks = [asyncio.create_task(self.load(http, lambda: ended)) for _ in range(CLIENTS)]
            tasks.append(asyncio.create_task(self.watch_memory(lambda: ended)))
            try:
                for number, happens in enumerate(itertools.cycle(happenings)):
                    began = time.monotonic()
                    if began > stop and number >= len(happenings):
                        break
                    await happens(http)
                    self.done.append(f"{getattr(happens, '__name__', 'write').strip('<>')} {time.monotonic() - began:.0f} s")
                    await asyncio.sleep(max(0.5, every - (time.monotonic() - began)))
            finally:
                ended = True
                await asyncio.gather(*tasks)

    # what it should have been

    def check(self) -> None:
        """Every answer is that of exactly one version."""
        assert not self.failures, f"{len(self.failures)} failures: {self.failures[:5]}"
        opened = {release: Predictor.open(run, edited=False) for release, run in self.runs.items()}
        known = dict.fromkeys((f"{release}.0" for release in self.runs), None) | self.told
        assert not (unknown := {version for version, *_ in self.seen} - known.keys()), unknown
        first: dict[tuple[str, str, str], Any] = {}
        for version, route, text, answer in self.seen:
            assert near(answer, first.setdefault((version, route, text), answer)), (version, route, text)
            if route == "predict" and text == PROBE and known[version]:
                assert answer[0]["label"] == known[version] and answer[0]["score"] == 1, (version, answer)
        for release, predictor in opened.items():
            for text in TEXTS:
                answer = first.get((f"{release}.0", "predict", text))
                want = dict(zip(LABELS, predictor.predict(text).answers[0].tolist(), strict=True))
                assert answer is None or all(abs(a["score"] - want[a["label"]]) < 1e-5 for a in answer)

    def growth(self) -> dict[int, tuple[float, float]]:
        """MB of each process of a replica that was seen often: when it had settled, and at its end."""
        return {
            pid: (statistics.median(mb[len(mb) // 4 : len(mb) // 2]), statistics.median(mb[-10:]))
            for pid, mb in self.memory.items()
            if len(mb) >= 20
        }


def near(one: Any, other: Any) -> bool:
    """Equal but for the last digits, which depend on the batch."""
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) < 1e-4
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(near(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(near, one, other))
    return bool(one == other)


@contextmanager
def soaking(home: Path) -> Iterator[Soak]:
    """`retrikt serve --reload` over a link that leads to one of two runs."""
    runs = [Path(make_run(home / name, seed=seed).uri) for seed, name in enumerate(("first", "second"))]
    link, port = home / "run", free_port()
    link.symlink_to(runs[0])
    ray = tempfile.mkdtemp(prefix="soak-")
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": ray}
    command = ["serve", str(link), "--port", str(port), "--reload", *(f"{key}={value}" for key, value in ARGS.items())]
    with open(home / "server.log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "retrikt_ray", *command], stdout=subprocess.PIPE, stderr=log, text=True, env=env, start_new_session=True
        )
    try:
        assert server.stdout is not None and "serving" in server.stdout.readline()
        url = f"http://127.0.0.1:{port}"
        yield Soak(psutil.Process(server.pid), url, link, {Predictor.open(run).release: run for run in runs})
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGINT)
            server.communicate(timeout=60)
        shutil.rmtree(ray, ignore_errors=True)

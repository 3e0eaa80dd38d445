"""Progress of long work: a live bar on a terminal, one line that changes in place in a notebook, a line every few seconds in a log.

Workers run in other processes; they tell a small Ray actor how far they are, and the driver draws what it says.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(highlight=False, soft_wrap=True)
LOG_EVERY_S = 10.0
NOTEBOOK_EVERY_S = 0.5


@dataclass
class Tracker:
    """One piece of work with a known size: `advance` it, or `set` it with a note such as "loss 1.23"."""

    label: str
    total: float
    unit: str
    bar: Progress | None = None  # of a terminal
    line: Any = None  # IPython's handle of a line in a notebook
    done: float = 0.0
    note: str = ""
    began: float = field(default_factory=time.monotonic)
    points: list[tuple[float, float]] = field(default_factory=list)  # (seconds since it began, done), as long as somebody listens
    _first: tuple[float, float] | None = None  # when the first progress came, and how much: workers take a while to start
    _last_line: float = field(default_factory=time.monotonic)
    _task: Any = None

    def advance(self, by: float = 1, note: str = "") -> None:
        self.set(self.done + by, note)

    def set(self, done: float, note: str = "", total: float | None = None) -> None:
        self.done, self.note = done, note or self.note
        if self._first is None and done > 0:
            self._first = (time.monotonic(), done)
        self.total = total or self.total
        if _heard:
            self.points.append((time.monotonic() - self.began, done))
        if self.bar is not None:
            self.bar.update(self._task, completed=done, total=self.total, note=f"{self.rate():.3g} {self.unit}/s  {self.note}")
        elif time.monotonic() - self._last_line > (LOG_EVERY_S if self.line is None else NOTEBOOK_EVERY_S):
            self._last_line = time.monotonic()
            if self.line is None:
                console.print(self.sentence())
            else:
                self.line.update({"text/plain": self.sentence()}, raw=True)

    def sentence(self) -> str:
        """How far it is, on one line."""
        left = (self.total - self.done) / self.rate() if self.rate() else 0
        return f"{self.label}: {self.done:g}/{self.total:g} {self.unit}, {self.rate():.3g}/s, {left:.0f} s left  {self.note}"

    def rate(self) -> float:
        """Units per second since the first progress."""
        since, already = self._first or (self.began, 0.0)
        if self.done > already:
            return (self.done - already) / max(1e-6, time.monotonic() - since)
        return self.done / max(1e-6, time.monotonic() - self.began)


_heard: list[list[Tracker]] = []  # by who listens


@contextmanager
def listening() -> Iterator[list[Tracker]]:
    """Collects the trackers of the block, with when they moved."""
    found: list[Tracker] = []
    _heard.append(found)
    try:
        yield found
    finally:
        _heard.remove(found)


@contextmanager
def track(label: str, total: float, unit: str) -> Iterator[Tracker]:
    """Show progress while the block runs."""
    with shown(label, total, unit) as tracker:
        for found in _heard:
            found.append(tracker)
        yield tracker


@contextmanager
def shown(label: str, total: float, unit: str) -> Iterator[Tracker]:
    """A tracker that is drawn as fits the place: a notebook, a log, a terminal."""
    if console.is_jupyter:
        from IPython.display import display

        tracker = Tracker(label, total, unit, line=display({"text/plain": f"{label} ..."}, raw=True, display_id=True))
        yield tracker
        tracker.line.update({"text/plain": f"{label}: {tracker.done:g} {unit}, {time.monotonic() - tracker.began:.0f} s"}, raw=True)
        return
    if not console.is_terminal:
        yield Tracker(label, total, unit)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description:<22}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console, transient=True) as bar:
        tracker = Tracker(label, total, unit, bar)
        tracker._task = bar.add_task(label, total=total, note="")
        yield tracker


class Board:
    """Body of the Ray actor that workers report to: the last word wins."""

    def __init__(self) -> None:
        self.state: tuple[float, float, str] = (0.0, 0.0, "")
        self.points: list[tuple[float, float]] = []  # (seconds since it began, done): short work is over between two looks at the state
        self.began = time.monotonic()

    def post(self, done: float, total: float, note: str) -> None:
        self.state = (done, total, note)
        self.points.append((time.monotonic() - self.began, done))

    def heard(self) -> list[tuple[float, float]]:
        return self.points

    def read(self) -> tuple[float, float, str]:
        return self.state


@contextmanager
def follow(label: str, unit: str) -> Iterator[Any]:
    """Show what workers post on a board while the block (which blocks the driver) runs. Yields the board's actor handle."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # On the driver's node: a worker's may vanish, and the board with it.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor: Any = ray.remote(num_cpus=0)(Board)
    board: Any = actor.options(scheduling_strategy=here).remote()
    stop = threading.Event()

    def poll(tracker: Tracker) -> None:
        while not stop.wait(0.5):
            try:
                done, total, note = ray.get(board.read.remote(), timeout=5)
            except ray.exceptions.RayError:  # the board is only a view: the work itself reports its own failure
                continue
            if total:
                tracker.set(done, note, total)

    with track(label, 0, unit) as tracker:
        thread = threading.Thread(target=poll, args=(tracker,), daemon=True)
        thread.start()
        try:
            yield board
        finally:
            stop.set()
            thread.join(timeout=6)
            if _heard:
                tracker.points = ray.get(board.heard.remote())
            ray.kill(board)

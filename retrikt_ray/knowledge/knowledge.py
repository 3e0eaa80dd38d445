"""The knowledge of a run: what its student retrieves from. It is searched through a view, and edited without training.

    knowledge = Knowledge.open("runs/mine")
    ids = knowledge.add([{"text": "Gas smell on floor 3", "label": "safety"}])   # or without a label: the teacher gives it
    knowledge.delete(ids)

Each call is one edit: all of it is there when it returns, or none of it (`log.py`). The id of an added row, where none is given, follows from
its text, so that a call that is repeated after a crash does not add a row twice.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from retrikt_ray.index.search import Searcher
from retrikt_ray.knowledge import edit
from retrikt_ray.knowledge.base import Base, Opener, Places, open_base
from retrikt_ray.knowledge.compact import compact
from retrikt_ray.knowledge.log import Log, read_log, writing
from retrikt_ray.knowledge.rows import checked
from retrikt_ray.knowledge.view import View
from retrikt_ray.runtime.artifacts import check
from retrikt_ray.runtime.cluster import Workers
from retrikt_ray.runtime.folders import MANIFEST, ArtifactError, Folder
from retrikt_ray.runtime.leases.lease import Right
from retrikt_ray.runtime.settings import ConfigError
from retrikt_ray.task.card import Task

TRIES = 5  # to read a log that others go on changing
REMOTE_PAUSE_S = 2.0  # between two looks at the log of a run that is not on a local disk


class VersionError(ConfigError):
    """The knowledge is not of the version that an edit was made for."""


class Knowledge:
    """`view` is the state that searches are answered from; `refresh` swaps it, at once, for the newest. Threads may share it."""

    view: View

    def __init__(self, places: Places, threads: int = 1, opener: Opener | None = None) -> None:
        """Open and verify. threads: of FAISS; opener: who answers dense queries, default: this process.

        Raises ArtifactError that names the file that is missing, altered, or does not belong to the others.
        """
        self.places, self.threads, self.opener = places, threads, opener or Searcher.unsealed
        check(places.task, deep=True)
        self.task = Task.read(places.task)
        self.student = check(places.student, deep=True).content
        self.base: Base | None = None  # of the next view; None: to be opened
        self.edits: dict[str, Any] = {}  # that were read for the view, by SHA-256
        self.signature: Any = None  # of the log that the view was read from
        self.current = False  # the view is of that log; else reading it failed, and the next look tries again
        self.looked = 0.0
        self.lock = threading.RLock()  # held by who reads the log; hold it where several answers must be from one view
        self.follow()

    @staticmethod
    def open(run: str | os.PathLike[str] | Folder, threads: int = 1, *, edited: bool = True, opener: Opener | None = None) -> Knowledge:
        """The knowledge of a run directory. edited=False: as the run made it."""
        return Knowledge(Places.of(run if isinstance(run, Folder) else Folder.at(run), edited), threads, opener)

    def __repr__(self) -> str:
        return f"Knowledge({str(self.places.run or self.places.store)!r}: {self.count:,} rows, version {self.view.version})"

    def __len__(self) -> int:
        return self.count

    @property
    def count(self) -> int:
        """Rows that can be found."""
        return self.view.count

    # following what is edited

    def now(self) -> Any:
        """Changes with every edit."""
        return self.places.log and self.places.log.signature(MANIFEST)

    def refresh(self, at_once: bool = False) -> bool:
        """Take over what was edited since, by this process or another; True when there was something.

        A run that is not on a local disk is looked at every two seconds, unless at_once.
        """
        run = self.places.run
        if run is None:
            return False
        if self.current and not at_once and not run.is_local and time.monotonic() - self.looked < REMOTE_PAUSE_S:
            return False
        self.looked = time.monotonic()
        if self.current and self.now() == self.signature:
            return False
        with self.lock:
            if self.current and self.now() == self.signature:  # another thread was first
                return True
            self.current = False
            self.follow()
        return True

    def follow(self) -> None:
        """Swap the view for one of the log as it is now."""
        for attempt in range(TRIES):
            signature = self.now()
            try:
                log = read_log(self.places.log) if self.places.log else None
                if self.base is None or self.base.name != (log and log.base) or (log and log.contents != self.base.contents):
                    self.open_base(log)
                assert self.base is not None
                self.view = View.over(self.task, self.base, log, self.places, self.threads, read=self.edits)
                self.edits = self.view.edits
                self.signature, self.current = signature, True  # last: a thread that finds it asks for no lock, and takes the view as it is
                return
            except (ArtifactError, FileNotFoundError):  # a file of a state that was replaced while we read it
                if attempt == TRIES - 1 or self.now() == signature:
                    raise

    def open_base(self, log: Log | None) -> None:
        self.base = None  # where this fails, the next look tries again
        self.base = open_base(self.places, log, self.student, self.threads, self.opener)

    # editing

    def add(self, rows: Any) -> list[str]:
        """Add rows {text, text_pair?, label? | teacher_probs?, id?} and return their ids; what has no label gets the teacher's.

        One row or a list of them; a row may be a text alone, or a pair ("a", "b"). Raises ConfigError that names the row.
        """
        fresh = checked(edit.listed(rows), self.task)
        if not fresh:
            raise ConfigError("no rows to add")
        with self.editing() as right:
            edit.refuse_known(self.view, fresh, self.editable())
            self.write(fresh, [], right)
        return [str(r["id"]) for r in fresh]

    def put(self, rows: Any, version: int | None = None) -> edit.Change:
        """Add rows as `add` does, in place of those that have their ids. version: the one that this is meant for, else VersionError."""
        fresh = checked(edit.listed(rows), self.task)
        if not fresh:
            raise ConfigError("no rows to put")
        with self.editing(version) as right:
            change = edit.replacement(self.view, fresh)
            self.write(fresh, change.positions, right)
            return change.at(self.view.version)

    def update(self, rows: Any) -> list[str]:
        """Change rows {id, text?, text_pair?, label? | teacher_probs?}; a changed text without a label gets the teacher's. Ids stay."""
        rows = edit.listed(rows)
        for i, row in enumerate(rows):
            if not isinstance(row, dict) or not isinstance(row.get("id"), str):
                raise ConfigError(f"row {i + 1}: found no id; update takes rows with the id of what they change")
        if not rows:
            raise ConfigError("no rows to update")
        with self.editing() as right:
            positions = edit.positions_of(self.view, [r["id"] for r in rows], self.editable())
            fresh = checked(rows, self.task, [self.view.row(p) for p in positions])
            self.write(fresh, positions, right)
        return [str(r["id"]) for r in fresh]

    def delete(self, ids: str | list[str], version: int | None = None) -> edit.Change:
        """Delete rows by id, all or none. version: as for `put`."""
        ids = [ids] if isinstance(ids, str) else ids
        if not ids:
            raise ConfigError("no ids to delete")
        with self.editing(version) as right:
            positions = edit.positions_of(self.view, list(dict.fromkeys(ids)), self.editable())
            if len(positions) == self.count:
                raise ConfigError(f"this would delete all {self.count} rows of {self.places.run}; a store keeps one at least")
            change = edit.removal(self.view, positions)
            self.write([], positions, right)
            return change.at(self.view.version)

    def preview(self, rows: Any, ids: list[str]) -> tuple[View, View]:
        """The view as it is, and as it would be with these rows put and these ids deleted. Nothing is written."""
        with self.editing():  # the files of the log stay while they are read
            view, fresh = self.view, checked(edit.listed(rows), self.task)
            positions = edit.positions_of(view, list(dict.fromkeys(ids)), self.editable()) if ids else []
            gone = sorted({*positions, *edit.replacement(view, fresh).positions})
            if len(gone) == view.count and not fresh:
                raise ConfigError(f"this would delete all {view.count} rows of {self.places.run}; a store keeps one at least")
            more = edit.table(view, self.editable(), self.student, self.threads, fresh, gone)
            return view, View.over(self.task, view.base, view.log, self.places, self.threads, more, view.edits)

    def compact(self, workers: Workers | None = None) -> bool:
        """Fold the edits into a new base; answers stay the same. True when there was something to fold. workers None: in this process."""
        after = compact(self.editable(), workers)
        self.refresh(at_once=True)
        return after is not None

    @contextmanager
    def editing(self, version: int | None = None) -> Iterator[Right]:
        """Hold the right to edit, with the view being the newest. Raises VersionError where that is not of the version."""
        with writing(self.editable()) as right:
            self.refresh(at_once=True)
            if version is not None and version != self.view.version:
                raise VersionError(f"the knowledge is of version {self.view.version}, the edit was made for {version}")
            yield right

    def editable(self) -> Folder:
        """The run directory. Raises ConfigError where this knowledge was opened without its edits."""
        if self.places.run is None:
            raise ConfigError("this knowledge was opened as the run made it: open it with its edits to change it")
        return self.places.run

    def write(self, fresh: list[dict[str, Any]], gone: list[int], right: Right) -> None:
        """Log rows and deletions, and take over the result. right: from `editing`."""
        edit.write(self.view, self.editable(), self.student, self.threads, fresh, gone, right)
        self.refresh(at_once=True)

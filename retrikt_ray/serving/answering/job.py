"""What requests want of an open run, and what comes back."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

from retrikt_ray.runtime.folders import MANIFEST, Folder
from retrikt_ray.task.texts import Text

UNKNOWN = 0.5  # cosine to the nearest row below which a text is like nothing in the store
as_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode  # made once


@dataclass(frozen=True)
class Job:
    """What one request wants."""

    kind: str  # predict | explain | retrieve | embed
    texts: list[Text]
    asked: Any = None  # predict: (labels per text, whether raw); retrieve: its body


@dataclass(frozen=True)
class Answers:
    """One answer per text, as JSON, and the version of the knowledge that all of them are from."""

    items: list[str]
    version: str
    missing: int = 0  # groups of shards that were not asked, or have not answered


@dataclass
class Counted:
    """What is to be counted of a batch; called at the end of a phase with its name."""

    requests: int
    since: float  # when the phase that goes on began, on the clock of `perf_counter`
    texts: int = 0
    version: int = 0  # of the knowledge
    rows: int = 0  # of it
    phases: list[tuple[str, float]] = field(default_factory=list)  # and how long each took, s
    searched: int = 0  # texts whose nearest rows were looked up
    unlike: int = 0  # those of them whose nearest row is far
    sampled: int = 0  # texts of which it is told which voice decided
    decided: dict[str, int] = field(default_factory=dict)  # of them, by the voice without which the label would be another one

    def __call__(self, phase: str) -> None:
        now = time.perf_counter()
        self.phases.append((phase, now - self.since))
        self.since = now


@dataclass(frozen=True)
class Facts:
    """What a replica knows of a run that is open."""

    release: str  # as `predictor.release_of` has it
    pair: bool
    problem: str
    place: str  # which is nobody's business
    seals: list[Any]  # of what the stages made: changes when it is made anew


def seals(run: str) -> list[Any]:
    """Of what the stages made: changes when it is made anew. None for what is not complete."""
    return [(Folder.at(run) / name).signature(MANIFEST) for name in ("task", "student", "store", "index")]

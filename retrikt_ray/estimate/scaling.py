"""From what a small run took to what a large one will take. Pure functions.

A stage's time is a fixed part (starting workers, loading models) and parts that are proportional to their work. The rate of such a part is the slope of
its progress over time, so that how long its workers took to start does not count as work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

FEW_POINTS = 0.5  # relative uncertainty of a rate from one or two points


@dataclass(frozen=True)
class Part:
    """A piece of work that was watched."""

    label: str
    units: float
    rate: float  # units a second
    doubt: float  # relative uncertainty of the rate

    @property
    def seconds(self) -> float:
        return self.units / self.rate


def part(label: str, points: list[tuple[float, float]]) -> Part | None:
    """The rate of a piece of work by its progress: points (seconds since its beginning, units done). None where nothing was done."""
    if not points or points[-1][1] <= 0 or points[-1][0] <= 0:
        return None
    t, done = np.array(points).T
    units = float(done[-1])
    if len(points) < 6 or t[-1] == t[0] or units == done[0]:
        moved = (units - done[0]) / (t[-1] - t[0]) if t[-1] > t[0] else 0.0  # without the start of its workers, where two points tell
        return Part(label, units, float(moved) or units / t[-1], FEW_POINTS)
    t, done = t[len(points) // 3 :], done[len(points) // 3 :]  # the first steps are slow: caches, lazy imports
    half = len(t) // 2
    slopes = [slope(t[i], done[i]) for i in (slice(None), slice(0, half + 1), slice(half, None))]
    rate = slopes[0] if slopes[0] > 0 else units / points[-1][0]
    halves = [s for s in slopes[1:] if s > 0]
    doubt = abs(halves[0] - halves[1]) / sum(halves) if len(halves) == 2 else FEW_POINTS
    return Part(label, units, float(rate), float(doubt))


def slope(t: np.ndarray, done: np.ndarray) -> float:
    """Least squares: workers side by side finish in waves, which the ends alone would misjudge."""
    spread = ((t - t.mean()) ** 2).sum()
    return float(((t - t.mean()) * (done - done.mean())).sum() / spread) if spread > 0 else 0.0


def stretched(seconds: float, parts: list[Part], ratios: dict[str, float]) -> tuple[float, float]:
    """Seconds of a stage of which each part has `ratios[label]` times the work (1 where it is not named), and their uncertainty.

    seconds: what the stage took in the small run.
    """
    fixed = max(0.0, seconds - sum(p.seconds for p in parts))
    scaled = [(p.seconds * ratios.get(p.label, 1.0), p.doubt) for p in parts]
    # A part that is no larger than it was is as sure as the fixed ones.
    doubts = [(after * doubt) ** 2 for (after, doubt), p in zip(scaled, parts, strict=True) if ratios.get(p.label, 1.0) > 1]
    return fixed + sum(after for after, _ in scaled), math.sqrt(sum(doubts))


def amounts(config: Any, train: int, unlabelled: int, megabytes: float, most_times: int, enough: int) -> dict[str, float]:
    """What each piece of work is proportional to, by its label.

    config: a RunConfig; megabytes: of the corpus that are read; most_times: how often distillation repeats a row at most; enough: unlabelled texts,
    from which on it is tried on the domain's own rows alone, too (not in a small run, so that the second start of its workers is not counted).
    """
    rows = config.generate.rows + (config.harvest.rows if megabytes else 0)
    domain = train + unlabelled
    learnt = rows + (
        min(rows, domain * most_times) if rows > domain else domain
    )  # rows of the domain are repeated up to half of what is learnt
    again = domain if rows and unlabelled >= enough else 0
    return {
        "teach: prompt": train * config.teach.prompt_epochs,
        "teach: annotator": train * config.teach.annotator_epochs,
        "reinforce: prompt": config.reinforce.steps,
        "generate": config.generate.rows,
        "harvest: passages": megabytes,
        "harvest: candidates": config.harvest.candidates,
        "annotate": domain + rows,
        "distill: student": (learnt + again) * config.distill.epochs,
        "index: shards": domain + rows,
        "index: n-grams": domain + rows,
        "index: n-gram weights": domain + rows + again,
    }


def ratios(full: dict[str, float], small: dict[str, float]) -> dict[str, float]:
    return {label: full[label] / small[label] if small[label] else 1.0 for label in full}

"""What a reinforcement remembers from one iteration to the next: figures, the best look, and why it ended."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np


@dataclass(kw_only=True)
class History:
    """What a run remembers: kept in its checkpoints, and at the end, as curves.json, in its folder."""

    curve: list[dict[str, float]] = field(default_factory=list)  # figures of each iteration's roll out
    watch: list[dict[str, float]] = field(default_factory=list)  # figures of the held-out texts, the first of the supervised prompt
    best_step: int = 0  # iterations behind the best prompt
    collapse: str | None = None  # why the run ended early
    kl_weight: float  # of the next iteration
    best_rewards: list[float] = field(default_factory=list)  # of each held-out text under the best prompt
    scale: dict[str, Any] | None = None  # of the reward's terms
    reservoir: list[str] = field(default_factory=list)  # earlier texts, which new ones are compared with

    @staticmethod
    def from_json(value: dict[str, Any]) -> History:
        return History(**value)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def curves(self) -> dict[str, Any]:
        """All but what only a resumed run needs."""
        return {key: value for key, value in self.to_json().items() if key not in ("best_rewards", "scale", "reservoir")}

    def add_watch(self, figures: dict[str, float], rewards: list[float], collapse: str | None) -> bool:
        """Take in figures and rewards of the held-out texts. Returns whether their prompt is the best so far, which that of a collapse never is.

        The same conditions and seeds are drawn at every look, so rewards are compared text by text; better means by two standard errors.
        """
        gain = np.array(rewards) - np.array(self.best_rewards or rewards)
        best = not self.watch or (collapse is None and gain.mean() > 2 * gain.std(ddof=1) / math.sqrt(len(gain)))
        if best:
            self.best_step, self.best_rewards = int(figures["step"]), rewards
        self.watch.append(figures)
        self.collapse = collapse
        return best


def collapse_reason(figures: dict[str, float], first: dict[str, float], kl_limit: float, distinct_share: float, count: int) -> str | None:
    """Why these figures of `count` held-out texts count as a collapse, or None. first: those of the supervised prompt."""
    if figures["kl"] > kl_limit:
        return f"step {figures['step']}: KL {figures['kl']:.1f} nats a text, limit {kl_limit:g}"
    if figures["distinct_2"] < distinct_share * first["distinct_2"]:
        return f"step {figures['step']}: distinct-2 {figures['distinct_2']:.2f}, began at {first['distinct_2']:.2f}"
    now, then = figures["terminated"], first["terminated"]
    noise = math.sqrt((now * (1 - now) + then * (1 - then)) / count)
    if now < 0.5 * then and then - now > 2 * noise:
        return f"step {figures['step']}: only {now:.0%} of the texts end, began at {then:.0%}"
    return None

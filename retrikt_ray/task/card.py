"""The task: what `task/task.json` says, as every later stage reads it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

from retrikt_ray.runtime.folders import ArtifactError, Folder

if TYPE_CHECKING:
    import numpy as np

CARD = "task.json"


@dataclass(frozen=True)
class Task:
    """One task. A generated text is asked to be of one of its conditions: a class, or in regression a bin of the values."""

    name: str
    problem: str  # classification | regression
    labels: tuple[str, ...]  # class names by class id; none in regression
    conditions: tuple[str, ...]  # readable names, as they stand in the template
    template: str  # readable start of every generated text, with {label}
    pair: bool  # whether a text has a second text
    metric: str

    @staticmethod
    def read(folder: Folder) -> Task:
        """The task of a `task/` artifact. Raises ArtifactError where it is not of this version."""
        card = folder.read_json(CARD)
        expected = {f.name for f in fields(Task)}
        if not isinstance(card, dict) or card.keys() != expected:
            raise ArtifactError(f"{folder}/{CARD} is not of this version: expected the keys {', '.join(sorted(expected))}")
        return Task(**card | {key: tuple(card[key]) for key in ("labels", "conditions")})

    def write(self, folder: Folder) -> None:
        folder.write_json(CARD, asdict(self))

    @property
    def regression(self) -> bool:
        return self.problem == "regression"

    @property
    def outputs(self) -> int:
        """Numbers in an answer: one a class, or the value."""
        return len(self.labels) or 1

    @property
    def prefixes(self) -> list[str]:
        """The readable start of a generated text, by condition."""
        return [self.template.format(label=name) for name in self.conditions]

    @property
    def lines(self) -> int:
        """Lines of a generated text."""
        return 2 if self.pair else 1

    def named(self, answer: np.ndarray) -> tuple[str, float]:
        """The label of an answer (outputs,) and its probability; in regression the value as text and as number."""
        if self.regression:
            return f"{answer[0]:.3g}", float(answer[0])
        best = int(answer.argmax())
        return self.labels[best], float(answer[best])

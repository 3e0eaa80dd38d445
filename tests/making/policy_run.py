"""What PPO needs, without training and without Ray: a task and a teacher with random weights, a session of one worker, scripted rewards."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from retrikt_ray.policy.reward_model import Rewards
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.training import Session, Solo, load_optimizer_state, optimizer_state
from retrikt_ray.task.card import Task
from retrikt_ray.task.texts import Text
from retrikt_ray.teacher import lm, prompts
from retrikt_ray.teacher.annotator import Annotator

TEXTS = [
    "a fine film with a warm heart",
    "the play is dull",
    "never was a plot so brave and so sharp",
    "a cold and slow film",
    "the music warm",
    "a brave play",
]
MAX_TOKENS = 8
SEED = 0  # of runs; with it no held-out text of the supervised prompt ends by itself, so that fewer that end never tell a collapse


def make_task(pair: bool = False, regression: bool = False) -> Task:
    """Two classes; in regression three bins of values, the last without rows."""
    return Task(
        name="tiny",
        problem="regression" if regression else "classification",
        labels=() if regression else ("bad", "good"),
        conditions=("low", "high", "top") if regression else ("bad", "good"),
        template="{label}: ",
        pair=pair,
        metric="spearman" if regression else "accuracy",
    )


def make_rows(task: Task, texts: list[str] = TEXTS) -> pa.Table:
    """Rows of condition 0 and 1 in turn; in regression their values are 1, 2, 3, ..."""
    count = len(texts)
    return pa.table(
        {
            "text": texts,
            "text_pair": pa.array([texts[-1 - i] if task.pair else None for i in range(count)], pa.string()),
            "value": [float(i + 1 if task.regression else i % 2) for i in range(count)],
            "condition": [i % 2 for i in range(count)],
        }
    )


def make_teacher(root: Folder, base_path: str) -> None:
    """`task/` and `teacher/` below root: what the reinforce stage reads."""
    task, base = make_task(), lm.Base.load(base_path)
    task.write(root / "task")
    (root / "task").write_table("train.parquet", make_rows(task))
    teacher = root / "teacher"
    prompts.save_prompts(teacher, prompts.from_texts(base, [TEXTS[::2], TEXTS[1::2]], 2, 2, seed=0)(), base_path)
    torch.manual_seed(0)
    annotator = Annotator.start("prompt", base_path, "auto", task.outputs, 3, MAX_TOKENS)
    torch.nn.init.normal_(annotator.head.weight, std=0.3)
    annotator.save(teacher, "prompt", base_path, "auto")
    teacher.write_json("teacher.json", {"base": base_path, "dtype": "auto", "chat": False, "max_tokens": MAX_TOKENS})


@dataclass
class Checkpoint:
    """What `Session.save` writes."""

    step: int
    tensors: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    notes: str


class LoneSession(Session):
    """A session without Ray: rank 0 of one worker, with every checkpoint in memory."""

    def __init__(
        self, config: dict[str, Any], optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], total: int, world: int = 1
    ) -> None:
        Solo.__init__(self, optimizer, total, config["seed"])
        self.rank, self.world, self.tensors, self.notes = 0, world, tensors, {}
        self.updates = 0
        self.progress: list[str] = []
        self.checkpoints: list[Checkpoint] = []

    def update(self, weight: float = 1.0, clip: float = 1.0) -> None:
        super().update(weight, clip)
        self.updates += 1

    def done(self, step: int, note: str = "") -> None:
        self.progress.append(note)
        tensors = {k: v.detach().clone() for k, v in self.tensors.items()}
        self.checkpoints.append(Checkpoint(step, tensors, optimizer_state(self.optimizer), json.dumps(self.notes)))

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint, as a worker does that Ray started again."""
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(checkpoint.tensors[name])
        load_optimizer_state(self.optimizer, checkpoint.optimizer)
        self.start, self.notes = checkpoint.step, json.loads(checkpoint.notes)


class FixedAnnotator:
    """Answers and embeddings that were fixed beforehand, by the first word of a text; keeps what it was asked."""

    def __init__(self, answers: dict[str, list[float]], embeddings: dict[str, list[float]]) -> None:
        self.answers, self.embeddings = answers, embeddings
        self.asked: list[Text] = []

    def annotate(self, texts: list[Text]) -> tuple[Tensor, Tensor]:
        self.asked = texts
        words = [(text.split() or [""])[0] for text, _ in texts]
        answer, embedding = next(iter(self.answers.values())), next(iter(self.embeddings.values()))
        return (
            torch.tensor([self.answers.get(word, answer) for word in words], dtype=torch.float64),
            torch.tensor([self.embeddings.get(word, embedding) for word in words], dtype=torch.float64),
        )


class Written(NamedTuple):
    """What is read of a text: nothing but itself."""

    text: str


class ScriptedRewards:
    """A reward model whose held-out texts get one scripted reward after the other, and whose other texts are better the longer they are."""

    def __init__(self, held_out: list[float]) -> None:
        self.held_out = list(held_out)
        self.reservoir: list[str] = []
        self.scale = None

    def read(self, texts: list[str], conditions: Tensor, ids: Tensor, mask: Tensor) -> list[Written]:
        return [Written(text) for text in texts]

    def judge(self, read: list[Written], *, held_out: bool = False) -> Rewards:
        total = np.full(len(read), self.held_out.pop(0)) if held_out else np.array([float(len(r.text.encode())) for r in read])
        return Rewards(total, {"fidelity": total})

    def remember(self, texts: list[str]) -> None:
        self.reservoir = self.reservoir + texts

    def restore(self, scale: None, reservoir: list[str]) -> None:
        self.reservoir = reservoir

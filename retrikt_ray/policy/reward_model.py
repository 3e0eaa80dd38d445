"""The reward model of PPO: annotator, base LM and task rows, put together into the reward terms of a batch of texts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from retrikt_ray.policy import rewards
from retrikt_ray.policy.rewards import RewardWeights, TaskRows
from retrikt_ray.task.card import Task
from retrikt_ray.task.texts import joined, split_pair, texts_of
from retrikt_ray.task.words import bigrams
from retrikt_ray.teacher import lm
from retrikt_ray.teacher.annotator import Annotator
from retrikt_ray.teacher.base import Base
from retrikt_ray.teacher.prefix import Prefix, run_prefix

RESERVOIR_TEXTS = 512  # earlier texts that novelty is measured against, beside the task rows


class Rewards(NamedTuple):
    """Rewards of N texts."""

    total: np.ndarray  # (N,) the weighted sum of the terms
    terms: dict[str, np.ndarray]  # by name, (N,) each, without weights


class RewardModel:
    """Calling it gives the rewards of generated texts."""

    def __init__(
        self, base: Base, annotator: Annotator, task: Task, rows: pa.Table, weights: RewardWeights, custom: dict[str, float]
    ) -> None:
        """rows: the labelled rows of the task. custom: weights of further terms, by `package.module:function`."""
        self.base, self.annotator, self.task = base, annotator, task
        self.weights = weights.model_dump() | custom
        self.custom = {path: rewards.custom_term(path) for path in custom}
        self.rows = task_rows(base, annotator, task, rows)
        self.bare = bare_prefix(base)
        self.reservoir: list[str] = []

    def __call__(self, texts: list[str], conditions: Tensor, ids: Tensor, mask: Tensor) -> Rewards:
        """texts: N; conditions (N,); ids, mask (N, T)."""
        batch = self._batch(texts, conditions, ids, mask)
        terms = {name: term(batch) for name, term in rewards.TERMS.items()}
        names = [self.task.conditions[i] for i in batch.asked]
        for path, function in self.custom.items():
            terms[path] = np.asarray(function(texts, names), dtype=float)
            if terms[path].shape != (len(texts),):
                raise ValueError(f"{path} returned shape {terms[path].shape} for {len(texts)} texts; expected ({len(texts)},)")
        return Rewards(sum(self.weights[name] * term for name, term in terms.items()), terms)

    def remember(self, texts: list[str]) -> None:
        """Later texts have to differ from these."""
        self.reservoir = (self.reservoir + texts)[-RESERVOIR_TEXTS:]

    def _batch(self, texts: list[str], conditions: Tensor, ids: Tensor, mask: Tensor) -> rewards.Batch:
        answers, embeddings = (x.numpy() for x in self.annotator.annotate([split_pair(t, self.task.pair) for t in texts]))
        with torch.no_grad():
            logits, _ = lm.score(self.base, self.bare, torch.zeros_like(conditions), ids, mask)
            likelihood = (lm.log_probs_of(logits, ids) * mask).sum(1) / mask.sum(1)
        return rewards.Batch(
            texts=texts,
            asked=conditions.cpu().numpy(),
            answers=answers,
            embeddings=embeddings,
            likelihood=likelihood.cpu().numpy(),
            tokens=mask.sum(1).cpu().numpy(),
            ended=np.array(self.base.ended(ids, mask, self.task.lines)),
            seen=self.rows.bigrams | bigrams(self.reservoir),
            rows=self.rows,
        )


def task_rows(base: Base, annotator: Annotator, task: Task, table: pa.Table) -> TaskRows:
    """What the terms read of the labelled rows."""
    texts = texts_of(table)
    sequences = [joined(t) for t in texts]
    lengths = np.array([len(ids) + 1 for ids in base.tokenizer(sequences, add_special_tokens=False)["input_ids"]])
    low, high = np.percentile(lengths, [5, 95])
    values, conditions = np.array(table["value"].to_pylist()), np.array(table["condition"].to_pylist())
    groups = [values[conditions == i] for i in range(len(task.conditions))]
    return TaskRows(
        embeddings=annotator.annotate(texts)[1].numpy(),
        bigrams=bigrams(sequences),
        low=low,
        high=high,
        values=np.array([(group if len(group) else values).mean() for group in groups]),
        spread=float(values.std()) or 1.0,
        regression=task.regression,
    )


def bare_prefix(base: Base) -> Prefix:
    """The LM without a prompt: <bos> alone, or <eos> (which ends the document before) for tokenizers without <bos>."""
    nothing = torch.zeros((1, 0, base.dim), device=base.device)
    end = base.embed(torch.tensor([[base.eos]], device=base.device))
    return run_prefix(base, end if base.tokenizer.bos_token_id is None else nothing, [""])

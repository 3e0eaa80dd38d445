"""The reward model: annotator, base LM, task rows and earlier texts, put together into the reward terms of a batch of texts.

`read` asks the models about some texts, `judge` makes rewards of what was read of all: workers read their own texts and judge everybody's, so that a reward
does not depend on the number of workers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from retrikt_ray.policy import rewards
from retrikt_ray.policy.rewards import RewardWeights, Scale, Seen, TaskRows
from retrikt_ray.task.card import Task
from retrikt_ray.task.texts import joined, split_pair, texts_of
from retrikt_ray.task.words import WORD, bigrams
from retrikt_ray.teacher import lm
from retrikt_ray.teacher.annotator import Annotator
from retrikt_ray.teacher.base import Base
from retrikt_ray.teacher.prefix import Prefix, run_prefix

ROW_TOKENS = 512  # of a labelled row; what is beyond them says little of its length
RESERVOIR_TEXTS = 512  # earlier texts that new ones are compared with, beside the task rows


class Read(NamedTuple):
    """What the models say of one text."""

    text: str
    asked: int  # its condition
    answer: np.ndarray  # (C,) the annotator's class probabilities; in regression (1,) a value
    embedding: np.ndarray  # (d,) the annotator's
    likelihood: float  # mean log-likelihood of a token under the bare base LM, in nats
    tokens: int
    ended: bool


class Rewards(NamedTuple):
    """Rewards of N texts."""

    total: np.ndarray  # (N,) the weighted sum of the scaled terms
    terms: dict[str, np.ndarray]  # by name, (N,) each, without weights and scale


class RewardModel:
    """Reads generated texts, and judges what was read."""

    def __init__(
        self, base: Base, annotator: Annotator, task: Task, rows: pa.Table, weights: RewardWeights, custom: dict[str, float]
    ) -> None:
        """rows: the labelled rows of the task. custom: weights of further terms, by `package.module:function`."""
        self.base, self.annotator, self.task = base, annotator, task
        self.weights = weights.model_dump() | custom
        self.custom = {path: rewards.custom_term(path) for path in custom}
        self.bare = bare_prefix(base)
        self.texts, self.labels = [joined(t) for t in texts_of(rows)], np.array(rows["condition"].to_pylist())
        self.rows = task_rows(self, rows)
        self.scale: Scale | None = None  # fitted to the first texts that are judged
        self.reservoir: list[str] = []
        self.first = self.seen = self._compare([], np.zeros((0, self.rows.embeddings.shape[1])), np.zeros(0, dtype=int))

    def read(self, texts: list[str], conditions: Tensor, ids: Tensor, mask: Tensor) -> list[Read]:
        """texts: N; conditions (N,); ids, mask (N, T)."""
        answers, embeddings = (x.numpy() for x in self.annotator.annotate([split_pair(t, self.task.pair) for t in texts]))
        columns = (self.likelihood(ids, mask).tolist(), mask.sum(1).tolist(), self.base.ended(ids, mask, self.task.lines))
        return [Read(*row) for row in zip(texts, conditions.tolist(), answers, embeddings, *columns, strict=True)]

    def judge(self, read: list[Read], *, held_out: bool = False) -> Rewards:
        """Rewards of all texts of a batch. held_out: compared with the task rows alone, so that looks at different times can be compared."""
        asked = np.array([r.asked for r in read])
        terms = self._terms(read, asked, self.first if held_out else self.seen)
        if self.scale is None:
            self.scale = Scale.of(terms, asked, len(self.task.conditions))
        scale = self.scale
        return Rewards(sum(self.weights[name] * scale(name, term, asked) for name, term in terms.items()), terms)

    def remember(self, texts: list[str]) -> None:
        """Later texts have to differ from these. What the annotator says of them is asked again, so that a resumed run knows it from the texts alone."""
        self.reservoir = (self.reservoir + texts)[-RESERVOIR_TEXTS:]
        answers, embeddings = (x.numpy() for x in self.annotator.annotate([split_pair(t, self.task.pair) for t in self.reservoir]))
        self.seen = self._compare(self.reservoir, embeddings, answers.argmax(1))

    def restore(self, scale: dict[str, Any] | None, reservoir: list[str]) -> None:
        """Go on where a run was cut off."""
        self.scale = None if scale is None else Scale(**scale)
        if reservoir:
            self.remember(reservoir)

    def likelihood(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Mean log-likelihood of a token under the bare base LM. ids, mask: (N, T) -> (N,)"""
        lengths, found = mask.sum(1).tolist(), torch.zeros(len(ids))
        for part in lm.micro_batches(self.base, list(range(len(ids))), lengths, 1):
            width = max(lengths[row] for row in part)
            own, seen = ids[part, :width], mask[part, :width]
            with torch.no_grad():
                log_probs, _, _ = lm.score_tokens(self.base, self.bare, torch.zeros_like(own[:, 0]), own, seen, 1.0)
            found[part] = ((log_probs * seen).sum(1) / seen.sum(1)).cpu()
        return found

    def _terms(self, read: list[Read], asked: np.ndarray, seen: Seen) -> dict[str, np.ndarray]:
        texts = [r.text for r in read]
        batch = rewards.Batch(
            texts=texts,
            asked=asked,
            answers=np.stack([r.answer for r in read]),
            embeddings=np.stack([r.embedding for r in read]),
            likelihood=np.array([r.likelihood for r in read]),
            tokens=np.array([r.tokens for r in read]),
            ended=np.array([r.ended for r in read]),
            seen=seen,
            rows=self.rows,
        )
        terms = {name: term(batch) for name, term in rewards.TERMS.items()}
        names = [self.task.conditions[i] for i in asked]
        for path, function in self.custom.items():
            terms[path] = np.asarray(function(texts, names), dtype=float)
            if terms[path].shape != (len(texts),):
                raise ValueError(f"{path} returned shape {terms[path].shape} for {len(texts)} texts; expected ({len(texts)},)")
        return terms

    def _compare(self, texts: list[str], embeddings: np.ndarray, labels: np.ndarray) -> Seen:
        """The task rows and these texts. embeddings (K, d), labels (K,)"""
        proxy = None if self.task.regression else fit_proxy(self.texts + texts, np.concatenate([self.labels, labels]), self.task.outputs)
        return Seen(self.rows.bigrams | bigrams(texts), np.concatenate([self.rows.embeddings, embeddings]), proxy)


def fit_proxy(texts: list[str], labels: np.ndarray, outputs: int) -> Callable[[list[str]], np.ndarray]:
    """The cheapest student there is, of these texts: TF-IDF of words and logistic regression. Gives class probabilities (N, outputs)."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    if len(set(labels.tolist())) == 1:
        return lambda asked: np.eye(outputs)[[int(labels[0])] * len(asked)]
    vectorizer = TfidfVectorizer(token_pattern=WORD, sublinear_tf=True)
    model = LogisticRegression(max_iter=200).fit(vectorizer.fit_transform(texts), labels)

    def answer(asked: list[str]) -> np.ndarray:
        probs = np.zeros((len(asked), outputs))
        probs[:, model.classes_] = model.predict_proba(vectorizer.transform(asked))
        return probs

    return answer


def task_rows(model: RewardModel, table: pa.Table) -> TaskRows:
    """What the terms read of the labelled rows."""
    base, task, sequences = model.base, model.task, model.texts
    ids, mask = base.encode(sequences, ROW_TOKENS)
    lengths = mask.sum(1).numpy(force=True)
    embeddings = model.annotator.annotate(texts_of(table))[1].numpy()
    usual = np.percentile(model.likelihood(ids, mask).numpy(), [5, 95])
    low, high = np.percentile(lengths, [5, 95])
    values, conditions = np.array(table["value"].to_pylist()), np.array(table["condition"].to_pylist())
    groups = [values[conditions == i] for i in range(len(task.conditions))]
    return TaskRows(
        embeddings=embeddings,
        bigrams=bigrams(sequences),
        near=rewards.among(embeddings),
        low=low,
        high=high,
        likelihood=(float(usual[0]), float(usual[1])),
        values=np.array([(group if len(group) else values).mean() for group in groups]),
        spread=float(values.std()) or 1.0,
        regression=task.regression,
    )


def bare_prefix(base: Base) -> Prefix:
    """The LM without a prompt: <bos> alone, or <eos> (which ends the document before) for tokenizers without <bos>."""
    nothing = torch.zeros((1, 0, base.dim), device=base.device)
    end = base.embed(torch.tensor([[base.eos]], device=base.device))
    return run_prefix(base, end if base.tokenizer.bos_token_id is None else nothing, [""])

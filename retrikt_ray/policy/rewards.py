"""The terms of a generated text's reward. Pure functions of strings and arrays.

The paper (RetriKT, arXiv 2310.15594) does not publish its reward; these terms and their weights are our own design. Each term is
logged on its own. A new term is a function here, its line in TERMS and its weight in RewardWeights; where it reads what `Batch` does not have
yet, `reward_model.py` fills that in. Without any change here, terms come by import path: `package.module:function(texts, labels) -> (N,)`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field

from retrikt_ray.runtime.settings import ConfigError, Section
from retrikt_ray.task.words import Ngram, ngrams, self_bleu, words


class RewardWeights(Section):
    """Weight of each term in the reward of a text."""

    fidelity: float = Field(1.0, description="log p(asked label | text) by the annotator; in regression the distance to the asked value.")
    diversity: float = Field(1.0, description="1 - self-BLEU inside the batch.")
    novelty: float = Field(1.0, description="Share of the text's word bigrams that neither the task rows nor earlier texts have.")
    domain: float = Field(4.0, description="Cosine similarity of the text's embedding to its 5 nearest task rows.")
    fluency: float = Field(0.3, description="Mean log-likelihood of a token under the bare base LM.")
    length: float = Field(1.0, description="Ended by itself, within the lengths of the task rows.")


@dataclass(frozen=True)
class TaskRows:
    """The labelled rows of the task, as far as the terms compare generated texts with them."""

    embeddings: np.ndarray  # (M, d) the annotator's
    bigrams: set[Ngram]  # of their words
    low: float  # 5th percentile of their lengths in tokens, <eos> included
    high: float  # 95th percentile
    values: np.ndarray  # (C,) mean value of each condition's rows
    spread: float  # standard deviation of the values
    regression: bool


@dataclass(frozen=True)
class Batch:
    """N generated texts, and what the annotator and the base LM say of them: all that a term may read."""

    texts: list[str]
    asked: np.ndarray  # (N,) the condition that each was asked for
    answers: np.ndarray  # (N, C) the annotator's class probabilities; in regression (N, 1) values
    embeddings: np.ndarray  # (N, d) the annotator's
    likelihood: np.ndarray  # (N,) mean log-likelihood of a token under the bare base LM, in nats
    tokens: np.ndarray  # (N,) number of tokens, <eos> included
    ended: np.ndarray  # (N,) whether it has an <eos>
    seen: set[Ngram]  # word bigrams of the task rows and of earlier texts
    rows: TaskRows


def fidelity(probs: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """log p_teacher(asked class | text), floored at log 1e-4. probs (N, C), asked (N,) -> (N,)"""
    return np.log(np.clip(probs[np.arange(len(asked)), asked], 1e-4, 1.0))


def closeness(values: np.ndarray, asked: np.ndarray, scale: float) -> np.ndarray:
    """Regression's fidelity: -|value - asked value| / scale. (N,)"""
    return -np.abs(values - asked) / scale


def novelty(texts: Sequence[str], seen: set[Ngram]) -> np.ndarray:
    """Share of each text's word bigrams that are not in `seen` (those of the task rows and of a reservoir of earlier texts). (N,)"""
    out = np.zeros(len(texts))
    for i, text in enumerate(texts):
        grams = ngrams(words(text), 2)
        out[i] = sum(g not in seen for g in grams) / len(grams) if grams else 0.0
    return out


def domain(embeddings: np.ndarray, task_embeddings: np.ndarray, k: int = 5) -> np.ndarray:
    """Mean cosine similarity to the k nearest task rows. (N, d), (M, d) -> (N,)"""
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True).clip(1e-9)
    task = task_embeddings / np.linalg.norm(task_embeddings, axis=1, keepdims=True).clip(1e-9)
    similar = unit @ task.T
    k = min(k, similar.shape[1])
    return np.sort(similar, axis=1)[:, -k:].mean(1)


def length(counts: np.ndarray, ended: np.ndarray, low: float, high: float) -> np.ndarray:
    """1 for a text that ended itself within [low, high] tokens, else less the further it is away; a cut text loses 1. (N,)"""
    short = np.clip((low - counts) / max(low, 1), 0, 1)
    long = np.clip((counts - high) / max(high, 1), 0, 1)
    return 1.0 - short - long - (~ended.astype(bool)).astype(float)


TERMS: dict[str, Callable[[Batch], np.ndarray]] = {  # each (N,); the order is that of the sum and of the curves
    "fidelity": lambda b: (
        closeness(b.answers[:, 0], b.rows.values[b.asked], b.rows.spread) if b.rows.regression else fidelity(b.answers, b.asked)
    ),
    "diversity": lambda b: 1.0 - self_bleu(b.texts),
    "novelty": lambda b: novelty(b.texts, b.seen),
    "domain": lambda b: domain(b.embeddings, b.rows.embeddings),
    "fluency": lambda b: b.likelihood,
    "length": lambda b: length(b.tokens, b.ended, b.rows.low, b.rows.high),
}


def custom_term(path: str) -> Callable[[list[str], list[str]], Any]:
    """The function behind `package.module:function`. Raises ConfigError when there is none."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"reinforce.custom_rewards: {path!r} cannot be imported ({error}); expected package.module:function") from None

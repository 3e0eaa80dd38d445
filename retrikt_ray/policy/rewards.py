"""The terms of a generated text's reward. Pure functions of strings and arrays.

The paper (RetriKT, arXiv 2310.15594) does not publish its reward; these terms and their weights are our own design. Each term is
logged on its own, and counts in the reward in units of its own spread over the texts of the supervised prompt (`Scale`), so that no term is the whole
reward because its numbers are large. A new term is a function here, its line in TERMS and its weight in RewardWeights; where it reads what `Batch` does
not have yet, `reward_model.py` fills that in. Without any change here, terms come by import path: `package.module:function(texts, labels) -> (N,)`.
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

MARGIN = 0.8  # of the asked label's probability: surer than that, the teacher teaches no more
FEW = 4  # texts of a condition count as much as that many of all
CAP = 3.0  # spreads that one term can add or take


class RewardWeights(Section):
    """Weight of each term in the reward of a text; a term counts in units of its spread over the supervised prompt's texts."""

    fidelity: float = Field(
        1.0, description="log p(asked label | text) by the annotator, up to a margin; in regression the distance to the asked value."
    )
    diversity: float = Field(0.25, description="1 - self-BLEU inside the batch.")
    novelty: float = Field(0.25, description="Share of the text's word bigrams that neither the task rows nor earlier texts have.")
    domain: float = Field(1.0, description="Cosine similarity of the text's embedding to its 5 nearest task rows.")
    coverage: float = Field(0.5, description="Distance of the text's embedding from the nearest earlier text or task row.")
    disagreement: float = Field(
        0.5,
        description="KL from the annotator's answer to that of a cheap student of the texts so far, times the chance of being in the domain.",
    )
    fluency: float = Field(
        0.5, description="Mean log-likelihood of a token under the bare base LM: less by what it is outside the task rows' band."
    )
    length: float = Field(0.5, description="Ended by itself, within the lengths of the task rows.")


@dataclass(frozen=True)
class TaskRows:
    """The labelled rows of the task, as far as the terms compare generated texts with them."""

    embeddings: np.ndarray  # (M, d) the annotator's
    bigrams: set[Ngram]  # of their words
    near: tuple[float, float]  # mean and standard deviation of their `domain` among each other
    low: float  # 5th percentile of their lengths in tokens, <eos> included
    high: float  # 95th percentile
    likelihood: tuple[float, float]  # 5th and 95th percentile of their mean log-likelihood of a token under the bare base LM
    values: np.ndarray  # (C,) mean value of each condition's rows
    spread: float  # standard deviation of the values
    regression: bool


@dataclass(frozen=True)
class Seen:
    """What a text is compared with to tell what is new: the task rows, and texts drawn earlier."""

    bigrams: set[Ngram]
    embeddings: np.ndarray  # (K, d)
    proxy: Callable[[list[str]], np.ndarray] | None  # a cheap student of them: class probabilities (N, C); None in regression


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
    seen: Seen
    rows: TaskRows


def fidelity(probs: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """log p_teacher(asked class | text), floored at log 1e-4 and capped at the margin. probs (N, C), asked (N,) -> (N,)"""
    return np.log(np.clip(probs[np.arange(len(asked)), asked], 1e-4, MARGIN))


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


def cosines(embeddings: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(N, d), (M, d) -> (N, M)"""
    one, other = (x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-9) for x in (embeddings, others))
    return one @ other.T


def nearest(similar: np.ndarray, k: int = 5) -> np.ndarray:
    """Mean of the k largest of each row. (N, M) -> (N,)"""
    k = min(k, similar.shape[1])
    return np.sort(similar, axis=1)[:, -k:].mean(1)


def domain(embeddings: np.ndarray, task_embeddings: np.ndarray) -> np.ndarray:
    """Mean cosine similarity to the 5 nearest task rows. (N, d), (M, d) -> (N,)"""
    return nearest(cosines(embeddings, task_embeddings))


def among(embeddings: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of rows' `domain` among the other rows. (M, d)"""
    similar = cosines(embeddings, embeddings)
    np.fill_diagonal(similar, -np.inf)
    found = nearest(similar, min(5, len(similar) - 1)) if len(similar) > 1 else np.ones(1)
    return float(found.mean()), float(found.std()) or 1.0


def coverage(embeddings: np.ndarray, earlier: np.ndarray) -> np.ndarray:
    """1 - cosine similarity to the nearest earlier row. (N, d), (K, d) -> (N,)"""
    return 1.0 - cosines(embeddings, earlier).max(1)


def disagreement(teacher: np.ndarray, student: np.ndarray, similar: np.ndarray, near: tuple[float, float]) -> np.ndarray:
    """KL(teacher || student) of each text in nats, times a logistic chance of being in the domain. (N, C), (N, C), `domain` (N,) -> (N,)"""
    p, q = np.clip(teacher, 1e-6, 1.0), np.clip(student, 1e-6, 1.0)
    return (p * np.log(p / q)).sum(1) / (1.0 + np.exp(-(similar - near[0]) / near[1]))


def outside(x: np.ndarray, band: tuple[float, float]) -> np.ndarray:
    """0 inside the band, else less by the distance from it. (N,)"""
    return -np.clip(band[0] - x, 0, None) - np.clip(x - band[1], 0, None)


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
    "novelty": lambda b: novelty(b.texts, b.seen.bigrams),
    "domain": lambda b: domain(b.embeddings, b.rows.embeddings),
    "coverage": lambda b: coverage(b.embeddings, b.seen.embeddings),
    "disagreement": lambda b: (
        np.zeros(len(b.texts))
        if b.seen.proxy is None
        else disagreement(b.answers, b.seen.proxy(b.texts), domain(b.embeddings, b.rows.embeddings), b.rows.near)
    ),
    "fluency": lambda b: outside(b.likelihood, b.rows.likelihood),
    "length": lambda b: length(b.tokens, b.ended, b.rows.low, b.rows.high),
}


@dataclass(frozen=True)
class Scale:
    """Where each term stood for the supervised prompt: a reward is made of differences from there, in units of the spread.

    The middles are each condition's own (a label that is hard to hit is not a bad text), drawn to that of all where a condition has few texts. They stay as
    they were at the start, so that rewards of different times can be compared.
    """

    middles: dict[str, list[float]]  # by term, (C,)
    spreads: dict[str, float]

    @staticmethod
    def of(terms: dict[str, np.ndarray], asked: np.ndarray, conditions: int) -> Scale:
        """terms: (N,) each, of texts that were asked for these conditions (N,)."""
        counts = np.bincount(asked, minlength=conditions)
        middles, spreads = {}, {}
        for name, term in terms.items():
            sums = np.bincount(asked, weights=term, minlength=conditions)
            middles[name] = ((sums + FEW * term.mean()) / (counts + FEW)).tolist()
            spreads[name] = float((term - np.array(middles[name])[asked]).std())
        return Scale(middles, spreads)

    def __call__(self, name: str, term: np.ndarray, asked: np.ndarray) -> np.ndarray:
        """A term in spreads from the middle, capped. A term without spread, which all texts had alike, counts as it is."""
        return np.clip((term - np.array(self.middles[name])[asked]) / (self.spreads[name] or 1.0), -CAP, CAP)


def custom_term(path: str) -> Callable[[list[str], list[str]], Any]:
    """The function behind `package.module:function`. Raises ConfigError when there is none."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"reinforce.custom_rewards: {path!r} cannot be imported ({error}); expected package.module:function") from None

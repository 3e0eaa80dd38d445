"""Learning the n-gram memory from a store, and following the edits of its rows.

min over W, b of 1/2 |W|^2 + penalty sum over rows of CE(teacher's label, softmax(W x + b)), by L-BFGS; squared error of standardised
values in regression. x has idf / (4 sqrt(n)) for each of a text's n distinct n-grams. At the minimum W = penalty sum (label - answer) x over
the rows: a row's part in the weights is known, and goes with the row when it is deleted. Added rows are learnt with the weights so far as
prior, so that what they say is kept beside what the store says.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from retrikt_ray.index.ngrams import Memory, keys_of, merged
from retrikt_ray.runtime.cluster import Workers, each
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.tables import Source, matrix
from retrikt_ray.task.metrics import answers_of
from retrikt_ray.task.texts import TEXT_COLUMNS, Text, texts_of

PENALTY = 30.0
MOST_ROWS = 100_000  # that are learnt from, drawn from a larger store: bounds memory and time
MOST_NUMBERS = 2_000_000  # n-grams x classes that are learnt
STEPS, EDIT_STEPS = 120, 20  # of L-BFGS
TASK_ROWS = 10_000  # that a task counts


def learn(
    store: Folder, seed: int, workers: Workers | None, wanted: Sequence[np.ndarray] = (), own: np.ndarray | None = None
) -> list[Memory]:
    """The memory of the rows of each mask in `wanted`; without any, that of all rows. workers None: in this process.

    wanted: (N,) bool each. own: (N,) bool, the rows of the domain; of a store that is too large up to half of what is learnt from are of these.
    """
    source = Source.of(store)
    if source.rows > MOST_ROWS:
        draw = random.Random(f"{seed}:n-grams")  # whose sample of a range costs what is drawn, not what is drawn from
        first = np.zeros(0, np.int64) if own is None else np.flatnonzero(own)
        first = first[sorted(draw.sample(range(len(first)), min(len(first), MOST_ROWS // 2)))]
        rest = np.array(sorted(draw.sample(range(source.rows - len(first)), MOST_ROWS - len(first))), np.int64)
        rest += np.searchsorted(first - np.arange(len(first)), rest, "right")  # the n-th row that is not among the first
        positions = np.sort(np.concatenate([first, rest]))
    else:
        positions = np.arange(source.rows)
    calls = [(source, positions[low : low + TASK_ROWS]) for low in range(0, len(positions), TASK_ROWS)]
    parts = each(counted, calls, workers, "index: n-grams", by_reference=True)
    rows = [mask[positions] for mask in wanted] or [np.ones(len(positions), bool)]
    return each(learnt, [(parts, some) for some in rows], workers, "index: n-gram weights")


def counted(source: Source, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """n-grams and labels of the rows at sorted positions: keys (G,), rows (G,) ascending from 0, labels (n, C) (a Ray task)."""
    keys, rows, labels, done = [], [], [], 0
    for first, table in source.read(int(positions[0]), int(positions[-1]) + 1, (*TEXT_COLUMNS, "teacher_probs")):
        wanted = positions[(positions >= first) & (positions < first + len(table))] - first
        table = table.take(wanted)
        found, row = keys_of(texts_of(table))
        keys.append(found)
        rows.append(row + done)
        labels.append(matrix(table["teacher_probs"]))
        done += len(table)
    return np.concatenate(keys), np.concatenate(rows), np.concatenate(labels)


def learnt(parts: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]], some: np.ndarray) -> Memory:
    """The memory of some of the rows that were counted, (n,) bool (a Ray task)."""
    found, numbers, taught = zip(*parts, strict=True)
    keys, labels = np.concatenate(found), np.concatenate(taught)
    firsts = np.cumsum([0, *map(len, taught)])[:-1]
    rows = np.concatenate([row + first for row, first in zip(numbers, firsts, strict=True)])
    held = some[rows]
    return of_rows(keys[held], (np.cumsum(some) - 1)[rows[held]], labels[some])


def of_texts(texts: list[Text], labels: np.ndarray) -> Memory:
    """The memory of texts and their labels (n, C), in this process."""
    return of_rows(*keys_of(texts), labels)


def of_rows(keys: np.ndarray, rows: np.ndarray, labels: np.ndarray) -> Memory:
    count, classes = labels.shape
    known, frequency = np.unique(keys, return_counts=True)
    if len(known) > MOST_NUMBERS // classes:
        often = np.sort(np.lexsort((known, -frequency))[: MOST_NUMBERS // classes])
        known, frequency = known[often], frequency[often]
    idf = np.log((1 + count) / (1 + frequency)) + 1
    empty = Memory.of(known, idf, np.zeros((len(known), classes)), np.zeros(classes), count)
    features = features_of(empty, keys, rows, count)
    if classes == 1:
        shift, scale = labels.mean(), max(float(labels.std()), 1e-6)
        weights, bias = fitted(features, (labels - shift) / scale, np.zeros_like(labels), True, STEPS)
        weights, bias = weights * scale, bias * scale + shift
    else:
        weights, bias = fitted(features, labels, np.zeros_like(labels), True, STEPS)
    return Memory.of(known, idf, weights * idf[:, None] / 4, bias, count)


def features_of(memory: Memory, keys: np.ndarray, rows: np.ndarray, count: int) -> Any:
    """The matrix (count, G) of the n-grams that a memory knows."""
    from scipy import sparse

    places = memory.find(keys)
    rows, places = rows[places >= 0], places[places >= 0]
    found = np.bincount(rows, minlength=count)
    values = memory.idf[places].astype(np.float64) / (4 * np.sqrt(found[rows]))
    return sparse.csr_matrix((values, (rows, places)), shape=(count, len(memory.keys)))


def fitted(
    features: Any, labels: np.ndarray, base: np.ndarray, with_bias: bool, steps: int, penalty: float = PENALTY
) -> tuple[np.ndarray, np.ndarray]:
    """Weights (G, C) and bias (C,) of the minimum, on top of the log-odds or values `base` (n, C). Without bias it is 0."""
    from scipy.optimize import minimize
    from scipy.special import log_softmax

    size, classes = features.shape[1], labels.shape[1]
    turned = features.T.tocsr() if hasattr(features, "tocsr") else features.T

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights, bias = flat[: size * classes].reshape(size, classes), flat[size * classes :]
        out = base + features @ weights + bias
        missing = answers_of(out) - labels
        own = float((missing**2).sum()) / 2 if classes == 1 else -float((labels * log_softmax(out, 1)).sum())
        gradient = [(penalty * (turned @ missing) + weights).ravel(), penalty * missing.sum(0) if with_bias else np.zeros(classes)]
        return penalty * own + float((weights**2).sum()) / 2, np.concatenate(gradient)

    found = minimize(loss, np.zeros((size + 1) * classes), jac=True, method="L-BFGS-B", options={"maxiter": steps, "maxcor": 5}).x
    return found[: size * classes].reshape(size, classes), found[size * classes :]


def edited(memory: Memory, added: tuple[list[Text], np.ndarray], deleted: tuple[list[Text], np.ndarray]) -> Memory:
    """The memory after rows were added and others deleted, each (texts, labels (n, C)). It follows from what was there and what is now."""
    after = memory
    if deleted[0]:
        texts, labels = deleted
        after = moved(after, texts, False, lambda features, logits: -PENALTY * (features.T @ (labels - answers_of(logits))))
    if added[0]:
        texts, wanted = added[0], added[1].astype(np.float64)
        after = moved(after, texts, True, lambda features, logits: fitted(features, wanted, logits, False, EDIT_STEPS)[0])
    return after


def moved(memory: Memory, texts: list[Text], new: bool, by: Callable[[Any, np.ndarray], Any]) -> Memory:
    """The memory with the weights of the texts' n-grams moved by `by` (features (n, G), the memory's log-odds (n, C)) -> (G, C).

    new: take in n-grams that the memory does not know; to begin with they say nothing.
    """
    keys, rows = keys_of(texts)
    known, frequency = np.unique(keys, return_counts=True)
    places = memory.find(known)
    touched = memory.part(places[places >= 0])
    if new:
        fresh, idf = known[places < 0], np.log((1 + memory.rows) / (1 + frequency[places < 0])).clip(0) + 1
        touched = merged([touched, Memory.of(fresh, idf, np.zeros((len(fresh), len(memory.bias))), memory.bias, memory.rows)])
    features = features_of(touched, keys, rows, len(texts))
    more = np.asarray(by(features, touched.logits(texts)[0]))
    return memory.changed(touched.keys, touched.idf, more * touched.idf[:, None] / 4)

"""Stage 8, index: the student's vectors of the store in FAISS shards, its words in postings, its n-gram memory, and the mixture of their voices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from retrikt_ray.index.build import IndexConfig, build_index
from retrikt_ray.index.learning import learn
from retrikt_ray.index.mixture import MOST, NAMES, Mixture, Votes, fit_mixture, mix, voices_of
from retrikt_ray.index.ngrams import Memory
from retrikt_ray.index.search import Searcher
from retrikt_ray.index.vectors import StudentVectors, validation_vectors
from retrikt_ray.index.words.lexical import Lexical
from retrikt_ray.runtime.cluster import Workers, each, plan
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.tables import Source, matrix
from retrikt_ray.task.metrics import losses, one_hot
from retrikt_ray.task.texts import TEXT_COLUMNS, Text, texts_of

VERSION = 10


def index(config: IndexConfig, inputs: dict[str, Folder], out: dict[str, Folder], *, seed: int) -> dict[str, Any]:
    """Write `index/`: shard-NNNN.faiss, words-NNNN.arrow, ngrams.arrow, index.json, mixture.json, unseen.json.

    1. Learn the n-grams, with and without the held-out rows, from those sources that do best on them.  2. Build over the store.  3. Fit the mixture
    on what nothing has learnt from.
    """
    workers, folder = plan(config, "index"), out["index"]
    # 1. n-grams
    found = learnt_best(inputs, seed, workers)
    # 2. build
    queries = each(validation_vectors, [(inputs["task"], inputs["student"], workers.threads)], workers, "index: validation")[0]
    rest: Any = {"seed": seed, "workers": workers, "memory": found.memory, "sources": found.sources}
    card = build_index(config, inputs["store"], inputs["student"], folder, queries, **rest)
    # 3. the mixture
    call = (inputs, folder, found.held, found.without, config.voices, workers.threads)
    mixture, unseen = each(fit_on_unseen, [call], workers, "index: mixture")[0]
    folder.write_json("mixture.json", asdict(mixture))
    folder.write_json("unseen.json", unseen)
    measured = {"recall_at_10": card["recall"]["value"]} if card["recall"] else {}
    shown = {k: getattr(mixture, k) for k in NAMES}
    return {"rows": card["rows"], "chosen": card["why"], "shards": len(card["shards"])} | measured | shown


class Learnt(NamedTuple):
    """The n-gram memory of a store."""

    memory: Memory
    without: Memory  # of the same rows, but those that are held out
    held: np.ndarray  # their positions, sorted
    sources: tuple[str, ...]  # of the rows that both have learnt from; none: all


def learnt_best(inputs: dict[str, Folder], seed: int, workers: Workers) -> Learnt:
    """The memory from those sources (`courses`) from which one without the held-out rows does best on them and on validation."""
    from retrikt_ray.student.rows import OWN, among, courses, drawn, sources_of

    sources = sources_of(inputs["store"])
    held, tried = drawn(sources, seed), courses(sources)
    seen = np.ones(len(sources), bool)
    seen[held] = False
    wanted = [mask for named in tried for mask in (among(sources, named), among(sources, named) & seen)]
    found = learn(inputs["store"], seed, workers, wanted, among(sources, OWN))
    best = 0
    if len(tried) > 1:
        lost = each(memory_losses, [(inputs, held, found[1::2])], workers, "index: n-grams on unseen rows")[0]
        best = int(np.argmin(lost))
    return Learnt(found[2 * best], found[2 * best + 1], held, tried[best])


def memory_losses(inputs: dict[str, Folder], held: np.ndarray, memories: list[Memory]) -> list[float]:
    """The mean loss of each memory on the validation rows and the held-out ones (a Ray task)."""
    texts, targets, _ = unseen_rows(inputs, held)
    return [float(losses(memory.answers(texts)[0], targets).mean()) for memory in memories]


def unseen_rows(inputs: dict[str, Folder], held: np.ndarray) -> tuple[list[Text], np.ndarray, int]:
    """Texts and label distributions (Q, C), or values, of the validation rows and of the store's at sorted positions; and how many are of the former."""
    from retrikt_ray.student.rows import StoreRows

    table = inputs["task"].read_table("validation.parquet", [*TEXT_COLUMNS, "value"])
    rows = StoreRows(inputs["store"], held).take(list(range(len(held))))
    truth = one_hot(np.array(table["value"].to_pylist()), rows.teacher.shape[1])
    return texts_of(table) + rows.texts, np.concatenate([truth, rows.teacher.numpy()]), len(table)


def fit_on_unseen(
    inputs: dict[str, Folder], folder: Folder, held: np.ndarray, memory: Memory, names: Sequence[str], threads: int
) -> tuple[Mixture, dict[str, Any]]:
    """Fit the mixture on the validation rows and on the held-out rows of the store, which their neighbours are found without (a Ray task).

    Returns it with `compared`'s figures.
    """
    texts, targets, gold = unseen_rows(inputs, held)
    answers, vectors = (x.numpy() for x in StudentVectors(inputs["student"], 0, threads).load()[0].encode(texts))
    others = np.ones(Source.of(inputs["store"]).rows, bool)
    others[held] = False
    found = Searcher.unsealed(folder, join=False).search(vectors, MOST, others), Lexical.unsealed(folder).search(texts, MOST, others)
    dense, lexical = (Votes(scores, labels_at(inputs["store"], positions)) for positions, scores in found)
    ngrams = memory.answers(texts)
    heard = targets, answers, dense, lexical, ngrams
    mixture, alone = (fit_mixture(*heard, some, gold=gold) for some in (names, ("student",)))
    mixed = mix(answers, voices_of(dense, lexical, ngrams, mixture), mixture)
    return mixture, compared(targets, mixed, mix(answers, {}, alone)) | {"gold": gold}


def labels_at(store: Folder, positions: np.ndarray) -> np.ndarray:
    """Teacher labels (..., C) of rows at any positions (...), of which memory holds no others; of -1 those of some row."""
    wanted, which = np.unique(positions.clip(0), return_inverse=True)
    source = Source.of(store)
    parts = []
    for _, _, first, count in source.groups:
        low, high = np.searchsorted(wanted, (first, first + count))
        if low < high:
            _, table = next(source.read(first, first + count, ("teacher_probs",)))
            parts.append(matrix(table["teacher_probs"].take(pa.array(wanted[low:high] - first))))
    return np.concatenate(parts)[which.reshape(positions.shape)]


def compared(targets: np.ndarray, mixed: np.ndarray, alone: np.ndarray) -> dict[str, Any]:
    """How the mixture and the student as it would be served alone do on rows that neither has learnt from: losses, and the first's advantage with
    half of its 95 % interval, in decisions as labelled (in regression in the loss). All (Q, C).
    """
    both = [losses(answers, targets) for answers in (mixed, alone)]
    gain = both[1] - both[0]
    if targets.shape[1] > 1:
        right = [(answers.argmax(1) == targets.argmax(1)).astype(np.float64) for answers in (mixed, alone)]
        gain = right[0] - right[1]
    half = 1.96 * float(gain.std()) / max(1, len(gain)) ** 0.5
    return {
        "rows": len(targets),
        "loss": float(both[0].mean()),
        "student_loss": float(both[1].mean()),
        "gain": float(gain.mean()),
        "ci95": half,
    }

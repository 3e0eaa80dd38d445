"""Stage 8, index: the student's vectors of the store in FAISS shards, its words in postings, its n-gram memory, and the mixture of their voices."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from retrikt_ray.index.build import IndexConfig, build_index
from retrikt_ray.index.learning import learn
from retrikt_ray.index.lexical import Lexical
from retrikt_ray.index.mixture import MOST, NAMES, Votes, fit_mixture
from retrikt_ray.index.ngrams import Memory
from retrikt_ray.index.search import Searcher
from retrikt_ray.index.vectors import StudentVectors, validation_vectors
from retrikt_ray.runtime.cluster import each, plan
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.store.rows import read_labels
from retrikt_ray.task.metrics import one_hot
from retrikt_ray.task.texts import TEXT_COLUMNS, Text, texts_of

VERSION = 5


def index(config: IndexConfig, inputs: dict[str, Folder], out: dict[str, Folder], *, seed: int) -> dict[str, Any]:
    """Write `index/`: shard-NNNN.faiss, words-NNNN.arrow, ngrams.arrow, index.json, mixture.json.

    1. Learn the n-grams, with and without the held-out rows.  2. Build over the store.  3. Fit the mixture on what nothing has learnt from.
    """
    from retrikt_ray.student.rows import held_out

    workers, folder = plan(config, "index"), out["index"]
    # 1. n-grams
    held = held_out(inputs["store"], seed)
    memory, without = learn(inputs["store"], seed, workers, leave_out=held)
    # 2. build
    queries = each(validation_vectors, [(inputs["task"], inputs["student"], workers.threads)], workers, "index: validation")[0]
    card = build_index(config, inputs["store"], inputs["student"], folder, queries, seed=seed, workers=workers, memory=memory)
    # 3. the mixture
    fitted = each(fit_on_unseen, [(inputs, folder, held, without, workers.threads)], workers, "index: mixture")[0]
    folder.write_json("mixture.json", fitted)
    measured = {"recall_at_10": card["recall"]["value"]} if card["recall"] else {}
    shown = {k: fitted[k] for k in NAMES}
    return {"rows": card["rows"], "chosen": card["why"], "shards": len(card["shards"])} | measured | shown


def fit_on_unseen(inputs: dict[str, Folder], folder: Folder, held: np.ndarray, memory: Memory, threads: int) -> dict[str, Any]:
    """Fit the mixture on the validation rows and on the held-out rows of the store, which their neighbours are found without (a Ray task)."""
    from retrikt_ray.student.rows import StoreRows

    labels = read_labels(inputs["store"])
    table = inputs["task"].read_table("validation.parquet", [*TEXT_COLUMNS, "value"])
    texts: list[Text] = texts_of(table) + StoreRows(inputs["store"], held).take(list(range(len(held)))).texts
    targets = np.concatenate([one_hot(np.array(table["value"].to_pylist()), labels.shape[1]), labels[held]])
    answers, vectors = (x.numpy() for x in StudentVectors(inputs["student"], 0, threads).load()[0].encode(texts))
    others = np.ones(len(labels), bool)
    others[held] = False
    found = Searcher.unsealed(folder, join=False).search(vectors, MOST, others), Lexical.unsealed(folder).search(texts, MOST, others)
    dense, lexical = (Votes(scores, labels[positions]) for positions, scores in found)
    return asdict(fit_mixture(targets, answers, dense, lexical, memory.answers(texts)))

"""Stage 7, index: the student's vectors of the store in FAISS shards, its words in postings, and the mixture that uses both."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from retrikt_ray.index.build import IndexConfig, build_index
from retrikt_ray.index.lexical import Lexical
from retrikt_ray.index.mixture import MOST, Votes, fit_mixture
from retrikt_ray.index.search import Searcher
from retrikt_ray.index.vectors import encode_validation
from retrikt_ray.runtime.cluster import each, plan
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.store.rows import read_labels
from retrikt_ray.task.texts import TEXT_COLUMNS, texts_of

VERSION = 3


def index(config: IndexConfig, inputs: dict[str, Folder], out: dict[str, Folder], *, seed: int) -> dict[str, Any]:
    """Write `index/`: shard-NNNN.faiss, words-NNNN.arrow, index.json, mixture.json.

    1. Validation rows by the student.  2. Build the shards over the store.  3. Fit the mixture on validation.
    """
    workers, folder = plan(config, "index"), out["index"]
    # 1. validation
    answers, queries = each(encode_validation, [(inputs["task"], inputs["student"], workers.threads)], workers, "index: validation")[0]
    # 2. build
    card = build_index(config, inputs["store"], inputs["student"], folder, queries, seed=seed, workers=workers)
    # 3. the mixture
    fitted = each(fit_on_validation, [(inputs, folder, answers, queries)], workers, "index: mixture")[0]
    folder.write_json("mixture.json", fitted)
    measured = {"recall_at_10": card["recall"]["value"]} if card["recall"] else {}
    shown = {k: fitted[k] for k in ("student", "dense", "lexical")}
    return {"rows": card["rows"], "chosen": card["why"], "shards": len(card["shards"])} | measured | shown


def fit_on_validation(inputs: dict[str, Folder], folder: Folder, answers: np.ndarray, queries: np.ndarray) -> dict[str, Any]:
    """Search the validation rows in the new shards and fit the mixture (a Ray task)."""
    table = inputs["task"].read_table("validation.parquet", [*TEXT_COLUMNS, "value"])
    labels = read_labels(inputs["store"])
    votes = []
    for positions, similarities in (
        Searcher.unsealed(folder, join=False).search(queries, MOST),
        Lexical.unsealed(folder).search(texts_of(table), MOST),
    ):
        votes.append(Votes(similarities, labels[positions]))
    return asdict(fit_mixture(np.array(table["value"].to_pylist()), answers, *votes))

"""Stage 7, index: the student's vectors of the store in FAISS shards, its words in postings, and the mixture that uses both."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from retrikt_ray.index.build import Source, build
from retrikt_ray.runtime import artifacts
from retrikt_ray.runtime.cluster import Workers, each, plan
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.settings import Scaled

VERSION = 3
RECALL_QUERIES = 200  # validation rows that recall is measured with at most


class IndexConfig(Scaled):
    """The index over the store."""

    factory: str = Field("auto", description="FAISS factory string, or auto: the most exact kind that fits memory_gb and latency_ms.")
    memory_gb: float = Field(4.0, gt=0, description="What the vectors of the index may take at most (auto).")
    latency_ms: float = Field(10.0, gt=0, description="Time for one query on one thread that auto aims at.")
    shards: int = Field(
        0, ge=0, description="Shard files; each is built by one Ray task. 0: one per 500k rows or 256 MB, two from 100k rows on."
    )
    nprobe: int = Field(
        0,
        ge=0,
        description="Lists that an IVF search visits (candidates of an HNSW search). 0: the fewest within a point of the best measured recall.",
    )


@dataclass(frozen=True)
class StudentVectors:
    """Vectors that a student makes of a table's texts."""

    student: Folder
    width: int
    threads: int
    columns: tuple[str, ...] = ("text", "text_pair")

    def of(self, table: pa.Table) -> np.ndarray:
        """Unit vectors (n, width) float32."""
        texts = list(zip(table["text"].to_pylist(), table["text_pair"].to_pylist(), strict=True))
        return self.load()[0].encode(texts)[1].numpy() if texts else np.zeros((0, self.width), np.float32)

    def load(self) -> Any:
        return loaded(self.student, (artifacts.read_manifest(self.student) or artifacts.check(self.student)).content, self.threads)


@lru_cache(maxsize=1)
def loaded(folder: Folder, content: str, threads: int) -> tuple[Any, str]:
    """A worker loads a student once, not once a row group; `content` tells a student from another in the same folder."""
    import torch

    from retrikt_ray.student.model import Student

    torch.set_num_threads(threads)
    return Student.load(str(folder.local())), content


def encode_validation(task: Folder, student: Folder, threads: int) -> tuple[np.ndarray, np.ndarray]:
    """The student's answers (Q, C) and vectors (Q, width) for the validation rows (a Ray task)."""
    rows = task.read_table("validation.parquet", ["text", "text_pair"]).to_pylist()
    answers, vectors = StudentVectors(student, 0, threads).load()[0].encode([(r["text"], r["text_pair"]) for r in rows])
    return answers.numpy(), vectors.numpy()


def build_index(
    config: IndexConfig, store: Folder, student: Folder, out: Folder, queries: np.ndarray, *, seed: int, workers: Workers | None
) -> dict[str, Any]:
    """Dense and lexical shards over a store, and index.json, which is returned. queries: (Q, width), to measure recall with."""
    threads = workers.threads if workers else 1
    vectors = StudentVectors(student, queries.shape[1], threads)
    keys = {k: getattr(config, k) for k in ("factory", "shards", "nprobe", "memory_gb", "latency_ms")}
    return build(Source.of(store), vectors, out, queries=queries[:RECALL_QUERIES], words=True, seed=seed, workers=workers, **keys)


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
    from retrikt_ray.index.lexical import Lexical
    from retrikt_ray.index.search import Searcher
    from retrikt_ray.knowledge.knowledge import matrix
    from retrikt_ray.predictor import MOST, Votes, fit_mixture

    rows = inputs["task"].read_table("validation.parquet", ["text", "text_pair", "value"]).to_pylist()
    labels = matrix(inputs["store"].read_tables(columns=["teacher_probs"])["teacher_probs"])
    votes = []
    for positions, similarities in (
        Searcher.unsealed(folder, join=False).search(queries, MOST),
        Lexical.unsealed(folder).search([(r["text"], r["text_pair"]) for r in rows], MOST),
    ):
        votes.append(Votes(similarities, labels[positions]))
    return asdict(fit_mixture(np.array([r["value"] for r in rows]), answers, *votes))

"""Tables of vectors and sealed indexes over them."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from retrikt_ray.index.build import IndexConfig, build
from retrikt_ray.index.vectors import Column
from retrikt_ray.runtime import artifacts
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.tables import Source


def write_vectors(folder: Folder, vectors: np.ndarray, group: int, name: str = "part-00000.parquet") -> Source:
    """A Parquet file with a vector column, in row groups of `group` rows."""
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    with folder.create(name) as path:
        pq.write_table(pa.table({"vector": column}), path, row_group_size=group)
    return Source.of(folder)


def make_index(
    root: Path,
    vectors: np.ndarray,
    shards: int,
    factory: str = "Flat",
    nprobe: int = 16,
    group: int = 11,
    queries: np.ndarray | None = None,
) -> Folder:
    """A sealed index over a table of vectors."""
    run = Folder.at(root)
    if not (run / "table").exists():
        write_vectors(run / "table", vectors, group)
    folder = run / f"index-{shards}"
    config = IndexConfig(factory=factory, shards=shards, nprobe=nprobe, memory_gb=1.0)
    queries = np.zeros((0, vectors.shape[1]), np.float32) if queries is None else queries
    column = Column("vector", vectors.shape[1])
    build(config, Source.of(run / "table"), column, folder, queries=queries, words=False, seed=0, workers=None)
    seal(folder)
    return folder


def seal(folder: Folder) -> None:
    artifacts.seal(folder, stage="index", fingerprint="x", config={}, inputs={}, seed=0, started=time.time())


def quarters(rng: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    """Entries in quarters, so that every product is exact and a tie is a tie."""
    return rng.integers(-4, 5, (rows, dim)).astype(np.float32) / 4

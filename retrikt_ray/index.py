"""Stage 7, index: student vectors of the store, FAISS shards built in parallel, and the mixture that uses them.

One quantizer is trained on a sample (for Flat there is nothing to train), the empty trained index is put into Ray's object store, and each
Ray task fills a copy with the rows of its shard and writes one file.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from retrikt_ray.cluster import plan
from retrikt_ray.folders import Folder
from retrikt_ray.progress import track
from retrikt_ray.settings import ConfigError, Scaled

VERSION = 1
TRAIN_ROWS = 100_000  # vectors that a quantizer is trained on at most


class IndexConfig(Scaled):
    """The FAISS index over the store."""

    factory: str = Field("auto", description="FAISS factory string, or auto: Flat up to 200k rows, then IVF with about 4 sqrt(rows) lists.")
    shards: int = Field(2, ge=1, description="Shard files; each is built by one Ray task. Never more than there are rows.")
    nprobe: int = Field(16, ge=1, description="Lists that an IVF search visits.")


def choose_factory(rows: int) -> str:
    """Flat is exact and, below 200k rows of a small student, takes under ten milliseconds a query."""
    return "Flat" if rows <= 200_000 else f"IVF{2 ** round(math.log2(4 * math.sqrt(rows)))},Flat"


class VectorWriter:
    """A Ray Data actor: holds the student and turns a store part into its vectors."""

    def __init__(self, student_uri: str, store_uri: str, scratch_uri: str, threads: int) -> None:
        import torch

        from retrikt_ray.student import Student

        torch.set_num_threads(threads)
        self.student = Student.load(str(Folder(student_uri).local()))
        self.store, self.scratch = Folder(store_uri), Folder(scratch_uri)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        counts = []
        for name in batch["name"]:
            table = self.store.read_table(str(name), ["text", "text_pair"])
            texts = list(zip(table["text"].to_pylist(), table["text_pair"].to_pylist(), strict=True))
            vectors = (
                self.student.encode(texts)[1].numpy() if texts else np.zeros((0, 1), np.float32)
            )  # a part all of whose rows were rejected
            column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
            self.scratch.write_table(str(name), pa.table({"vector": column}))
            counts.append(len(texts))
        return {"rows": counts}


def read_vectors(scratch: Folder, name: str) -> np.ndarray:
    """Vectors of one part, (n, width) float32."""
    column = scratch.read_table(name)["vector"].combine_chunks()
    return np.asarray(column.flatten(), dtype=np.float32).reshape(len(column), column.type.list_size)


def train_index(factory: str, sample: np.ndarray, nprobe: int) -> bytes:
    """An empty trained index for inner products of unit vectors, serialised. Raises ConfigError on a bad factory string."""
    import faiss

    try:
        index = faiss.index_factory(sample.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            index.train(sample)
    except RuntimeError as error:
        raise ConfigError(
            f"index.factory: FAISS refuses {factory!r} for {len(sample)} rows of {sample.shape[1]} dimensions: {str(error).splitlines()[-1]}"
        ) from None
    inner = faiss.try_extract_index_ivf(index)
    if inner is not None:
        inner.nprobe = nprobe
    return faiss.serialize_index(index).tobytes()


def build_shard(
    trained: bytes, scratch: Folder, parts: list[tuple[str, int]], low: int, high: int, out: Folder, name: str
) -> dict[str, Any]:
    """Fill a copy of the trained index with the rows at positions low .. high - 1 and write it as one file (a Ray task).

    parts: (part name, position of its first row), in order.
    """
    import faiss

    index = faiss.IndexIDMap2(faiss.deserialize_index(np.frombuffer(trained, dtype=np.uint8)))
    faiss.omp_set_num_threads(1)
    for part, first in parts:
        if first >= high:
            break
        vectors = read_vectors(scratch, part)
        begin, end = max(low - first, 0), min(high - first, len(vectors))
        if begin < end:
            index.add_with_ids(np.ascontiguousarray(vectors[begin:end]), np.arange(first + begin, first + end, dtype=np.int64))
    out.write_bytes(name, faiss.serialize_index(index).tobytes())
    return {"file": name, "rows": int(index.ntotal), "low": low, "high": high}


def index(config: IndexConfig, inputs: dict[str, Folder], out: dict[str, Folder], *, seed: int) -> dict[str, Any]:
    """Write `index/`: shard-NNNN.faiss, ids.parquet (position -> store id), index.json, mixture.json.

    1. Vectors of the store by the student (Ray Data).  2. Train on a sample.  3. Build shards (Ray tasks).  4. Fit the mixture on validation.
    """
    import ray
    import ray.data

    workers = plan(config, "index")
    store, scratch, folder = inputs["store"], out["scratch"], out["index"]
    names = [n for n in store.files() if n.startswith("part-")]

    # 1. vectors
    there = set(scratch.files())
    missing = [{"name": n} for n in names if n not in there]
    if missing:
        done = ray.data.from_items(missing, override_num_blocks=len(missing)).map_batches(
            VectorWriter,
            fn_constructor_args=(inputs["student"].uri, store.uri, scratch.uri, workers.threads),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(workers.count, len(missing))),
            num_cpus=workers.cpus,
        )
        with track("index: vectors", len(missing), "parts") as progress:
            for _ in done.iter_rows():
                progress.advance()

    # 2. train on a sample
    tables = [store.read_table(n, ["id"]) for n in names]
    ids = pa.concat_tables(tables)
    firsts = np.concatenate([[0], np.cumsum([t.num_rows for t in tables])])
    parts = [(n, int(f)) for n, f in zip(names, firsts[:-1], strict=True)]
    factory = config.factory if config.factory != "auto" else choose_factory(ids.num_rows)
    sample = np.concatenate([v for v in (read_vectors(scratch, n) for n in names) if len(v)])
    if len(sample) > TRAIN_ROWS:
        sample = sample[np.sort(np.random.default_rng(seed).choice(len(sample), TRAIN_ROWS, replace=False))]
    trained = train_index(factory, sample, config.nprobe)

    # 3. shards
    count = min(config.shards, ids.num_rows)
    edges = np.linspace(0, ids.num_rows, count + 1).astype(int)
    build = ray.remote(num_cpus=workers.cpus)(build_shard)
    reference = ray.put(trained)
    pending = [
        build.remote(reference, scratch, parts, int(edges[i]), int(edges[i + 1]), folder, f"shard-{i:04d}.faiss") for i in range(count)
    ]
    with track("index: shards", count, "shards") as progress:
        waiting = list(pending)
        while waiting:
            ready, waiting = ray.wait(waiting)
            progress.advance(len(ready))
    folder.write_table("ids.parquet", ids)
    folder.write_json(
        "index.json",
        {"factory": factory, "width": int(sample.shape[1]), "rows": ids.num_rows, "metric": "cosine", "shards": ray.get(pending)},
    )

    # 4. the mixture
    fitted = ray.get(ray.remote(num_cpus=workers.cpus)(fit_on_validation).remote(inputs, folder, workers.threads))
    folder.write_json("mixture.json", fitted)
    return {"rows": ids.num_rows, "factory": factory, "shards": count, "neighbours": fitted["k"], "weight_of_neighbours": fitted["dense"]}


def fit_on_validation(inputs: dict[str, Folder], folder: Folder, threads: int) -> dict[str, Any]:
    """Search the validation rows in the new shards and fit the mixture (a Ray task)."""
    import faiss
    import torch

    from retrikt_ray.predictor import GRID, fit_mixture
    from retrikt_ray.search import merge, search_shard
    from retrikt_ray.student import Student

    torch.set_num_threads(threads)
    rows = inputs["task"].read_table("validation.parquet").to_pylist()
    answers, vectors = Student.load(str(inputs["student"].local())).encode([(r["text"], r["text_pair"]) for r in rows])
    k = max(m.k for m in GRID)
    found = []
    for shard in folder.read_json("index.json")["shards"]:
        part = faiss.deserialize_index(np.frombuffer(folder.read_bytes(shard["file"]), dtype=np.uint8))
        found.append(search_shard(part, vectors.numpy(), k))
    positions, similarities = merge([i for _, i in found], [s for s, _ in found], k)
    labels = np.array(inputs["store"].read_tables(columns=["teacher_probs"])["teacher_probs"].to_pylist(), dtype=np.float32)
    return asdict(fit_mixture(np.array([r["value"] for r in rows]), answers.numpy(), similarities, labels[positions]))

"""Stage 4, generate: the store's texts, by a Ray Data pool of LM workers, every row exactly once.

The work is cut into fixed shards. Row id and seed follow from (seed, shard, position) and a text from its seed, so one worker and eight give
the same files. A shard is one Parquet file, written aside and renamed; a resumed run lists what is there and does the rest.
"""

from __future__ import annotations

import hashlib
import time
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field

from retrikt_ray.runtime.cluster import plan, pool
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.progress import track
from retrikt_ray.runtime.settings import ConfigError, Scaled
from retrikt_ray.store.rows import GENERATED
from retrikt_ray.task.card import Task
from retrikt_ray.task.texts import split_pair

VERSION = 3


class GenerateConfig(Scaled):
    """How many texts are generated, and how they are sampled."""

    rows: int = Field(2400, ge=0, description="Texts to generate, the conditions in turn. 0: the store has no generated rows.")
    rows_per_shard: int = Field(120, ge=1, description="Texts per shard: the unit of work, of a file and of a resume.")
    temperature: float = Field(0.9, gt=0, description="Sampling temperature.")
    backend: Literal["transformers", "vllm"] = Field(
        "transformers", description="Inference engine; vllm needs the extra of that name and a GPU."
    )
    top_k: int = Field(100, ge=0, description="Sample among this many likeliest tokens; 0: all.")
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Nucleus sampling: the smallest set of tokens with this probability. It sorts the vocabulary at every token, which halves the speed of a small LM.",
    )


def row_seed(seed: int, shard: int, position: int) -> int:
    """The 64-bit seed of one row."""
    return int.from_bytes(hashlib.sha256(f"{seed}:generate:{shard}:{position}".encode()).digest()[:8], "big")


def shard_name(shard: int) -> str:
    return f"part-{shard:05d}.parquet"


class ShardWriter:
    """A Ray Data actor: holds the LM and turns shard numbers into shard files. The rows it returns only count what was done."""

    def __init__(
        self, config: GenerateConfig, task: Task, teacher: Folder, policy: Folder, out: Folder, seed: int, threads: int, gpus: float
    ) -> None:
        import torch

        from retrikt_ray.store.engines import ENGINES, Engine, Order
        from retrikt_ray.teacher.prompts import load_prompts
        from retrikt_ray.teacher.sampling import Sampling

        torch.set_num_threads(threads)
        self.config, self.task, self.seed, self.out = config, task, seed, out
        card = teacher.read_json("teacher.json")
        sampling = Sampling(config.temperature, config.top_k, config.top_p)
        order = Order(
            card["base"], card["dtype"], card["chat"], load_prompts(policy), task.prefixes, card["max_tokens"], task.lines, sampling, gpus
        )
        self.engine: Engine = ENGINES[config.backend](order)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        done: dict[str, list[Any]] = {"shard": [], "rows": [], "tokens": []}
        for shard in batch["shard"]:
            table = self.write(int(shard))
            done["shard"].append(int(shard))
            done["rows"].append(table.num_rows)
            done["tokens"].append(sum(table["tokens"].to_pylist()))
        return done

    def write(self, shard: int) -> pa.Table:
        """Generate and write one shard."""
        size = self.config.rows_per_shard
        first = shard * size
        count = min(size, self.config.rows - first)
        conditions = [(first + i) % len(self.task.conditions) for i in range(count)]
        rows = []
        for i, made in enumerate(self.engine.generate(conditions, [row_seed(self.seed, shard, i) for i in range(count)])):
            text, pair = split_pair(made.text, self.task.pair)
            rows.append(
                {
                    "id": f"generated-{shard:05d}-{i:04d}",
                    "text": text,
                    "text_pair": pair,
                    "condition": conditions[i],
                    "finished": made.finished,
                    "tokens": made.tokens,
                }
            )
        table = pa.Table.from_pylist(rows, schema=GENERATED)
        self.out.write_table(shard_name(shard), table)
        return table


def shard_count(config: GenerateConfig) -> int:
    return -(-config.rows // config.rows_per_shard)


def generate(config: GenerateConfig, inputs: dict[str, Folder], out: dict[str, Folder], *, seed: int) -> dict[str, Any]:
    """Write `generated/`: part-NNNNN.parquet, one per shard.

    1. List the shards that an interrupted run left complete.  2. Generate the rest on the actor pool.  3. Check counts and ids.
    """
    # 1. what is there
    folder = out["generated"]
    total = shard_count(config)
    complete = set(folder.files())
    missing = [s for s in range(total) if shard_name(s) not in complete]
    began, tokens = time.monotonic(), 0
    if total == 0:
        folder.write_table("part-00000.parquet", GENERATED.empty_table())
        return {"rows": 0}

    # 2. the rest
    if missing:
        workers = plan(config, "generate")
        arguments = (config, Task.read(inputs["task"]), inputs["teacher"], inputs["policy"], folder, seed, workers.threads, workers.gpus)
        with track("generate", config.rows, "rows") as progress:
            progress.set((total - len(missing)) * config.rows_per_shard)
            for row in pool(ShardWriter, arguments, [{"shard": s} for s in missing], workers):
                tokens += int(row["tokens"])
                progress.advance(int(row["rows"]), f"{tokens / (time.monotonic() - began):,.0f} tokens/s")

    # 3. exactly once
    ids = folder.read_tables(columns=["id"])["id"].to_pylist()
    if len(ids) != config.rows or len(set(ids)) != config.rows:
        raise ConfigError(
            f"{folder}: {len(ids)} rows, {len(set(ids))} different ids; expected {config.rows}. Remove the folder and run again"
        )
    summary: dict[str, Any] = {"rows": config.rows, "shards": total}
    if missing:
        summary["tokens_per_s"] = round(tokens / (time.monotonic() - began))
    return summary

"""Stage 4, generate: the store's texts, by a Ray Data pool of LM workers, every row exactly once.

The work is cut into fixed shards. Row id and seed follow from (seed, shard, position) and a text from its seed, so one worker and eight give
the same files. A shard is one Parquet file, written aside and renamed; a resumed run lists what is there and does the rest.
A row that cannot be written is kept with its error; a budget stops the work between two shards.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from contextlib import closing
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pyarrow as pa
from pydantic import Field, model_validator

from retrikt_ray.runtime.cluster import Workers, plan, pool
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.progress import track
from retrikt_ray.runtime.settings import ConfigError, Scaled
from retrikt_ray.store.rows import GENERATED
from retrikt_ray.task.card import Task
from retrikt_ray.task.texts import split_pair

if TYPE_CHECKING:
    from retrikt_ray.store.engines import Generated

VERSION = 4
MOST_ERRORS = 0.01  # share of rows that may fail
AT_ONCE = 4096  # texts that a GPU is handed at a time: it writes some hundreds side by side, and the last of them alone


class GenerateConfig(Scaled):
    """How many texts are generated, and how they are sampled."""

    rows: int = Field(8000, ge=0, description="Texts to generate, the conditions in turn. 0: the store has no generated rows.")
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
    max_tokens: int = Field(
        0, ge=0, description="Stop after about this many tokens in all. 0: no limit. Run again with a larger one to go on."
    )
    max_seconds: float = Field(0, ge=0, description="Stop after about this many seconds of this run. 0: no limit.")
    max_cost: float = Field(
        0, ge=0, description="Stop when all workers together have cost about this much at `price_per_hour`. 0: no limit."
    )
    price_per_hour: float = Field(0, ge=0, description="What one worker costs in an hour, in any currency.")
    not_in_fingerprint: ClassVar[frozenset[str]] = Scaled.not_in_fingerprint | {"max_tokens", "max_seconds", "max_cost", "price_per_hour"}

    @model_validator(mode="after")
    def _priced(self) -> GenerateConfig:
        if self.max_cost and not self.price_per_hour:
            raise ValueError("max_cost needs price_per_hour")
        return self

    def spent(self, tokens: int, seconds: float, workers: int) -> str | None:
        """The limit that this much work has reached, as "max_tokens (1,000)", or None."""
        used = {"max_tokens": tokens, "max_seconds": seconds, "max_cost": seconds / 3600 * workers * self.price_per_hour}
        reached = [key for key, value in used.items() if 0 < getattr(self, key) <= value]
        return f"{reached[0]} ({getattr(self, reached[0]):,g})" if reached else None


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
            card["base"],
            card["dtype"],
            card["chat"],
            load_prompts(policy),
            task.prefixes,
            card["max_tokens"],
            task.lines,
            sampling,
            gpus,
            card["starts"],
        )
        self.engine: Engine = ENGINES[config.backend](order)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        tables = self.write([int(shard) for shards in batch["shards"] for shard in shards])
        return {"rows": [table.num_rows for table in tables], "tokens": [sum(table["tokens"].to_pylist()) for table in tables]}

    def write(self, shards: list[int]) -> list[pa.Table]:
        """Generate some shards together, and write each. Raises what the engine raised where no row could be written."""
        size, classes = self.config.rows_per_shard, len(self.task.conditions)
        places = [(shard, i) for shard in shards for i in range(min(size, self.config.rows - shard * size))]
        conditions = [(shard * size + i) % classes for shard, i in places]
        written = self.attempt(conditions, [row_seed(self.seed, shard, i) for shard, i in places])
        failures = [made for made in written if isinstance(made, Exception)]
        if len(failures) == len(written):
            raise failures[0]
        rows: dict[int, list[dict[str, Any]]] = {shard: [] for shard in shards}
        for (shard, i), condition, text in zip(places, conditions, written, strict=True):
            rows[shard].append(self.row(f"generated-{shard:05d}-{i:04d}", condition, text))
        tables = {shard: pa.Table.from_pylist(some, schema=GENERATED) for shard, some in rows.items()}
        for shard, table in tables.items():
            self.out.write_table(shard_name(shard), table)
        return list(tables.values())

    def attempt(self, conditions: list[int], seeds: list[int]) -> list[Generated | Exception]:
        """A text for each row. Where a batch fails its halves are tried, down to the rows that are to blame, and these are given their errors."""
        try:
            return [*self.engine.generate(conditions, seeds)]
        except Exception as error:
            if len(seeds) == 1:
                return [error]
            half = len(seeds) // 2
            return self.attempt(conditions[:half], seeds[:half]) + self.attempt(conditions[half:], seeds[half:])

    def row(self, code: str, condition: int, made: Generated | Exception) -> dict[str, Any]:
        common = {"id": code, "condition": condition}
        if isinstance(made, Exception):
            empty = {"text": "", "text_pair": "" if self.task.pair else None, "finished": False, "tokens": 0}
            return common | empty | {"error": f"{type(made).__name__}: {made}"}
        text, pair = split_pair(made.text, self.task.pair)
        return common | {"text": text, "text_pair": pair, "finished": made.finished, "tokens": made.tokens, "error": None}


def shard_count(config: GenerateConfig) -> int:
    return -(-config.rows // config.rows_per_shard)


def handed(missing: list[int], config: GenerateConfig, workers: Workers) -> list[list[int]]:
    """Shards as workers get them: one at a time on a CPU; together on a GPU, fewer towards the end, so that the workers end together."""
    most = max(1, AT_ONCE // config.rows_per_shard) if workers.gpus else 1
    left, groups = deque(missing), []
    while left:
        fair = -(-len(left) // (2 * workers.count)) if workers.count > 1 else len(left)
        groups.append([left.popleft() for _ in range(min(most, fair))])
    return groups


def generate(config: GenerateConfig, inputs: dict[str, Folder], out: dict[str, Folder], *, seed: int) -> dict[str, Any]:
    """Write `generated/`: part-NNNNN.parquet, one per shard.

    1. List the shards that an interrupted run left complete.  2. Generate the rest on the actor pool.  3. Check counts, ids and errors.
    Raises ConfigError where a budget is spent (shards stay, the next run goes on) and where too many rows failed (their shards go).
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
        if config.max_tokens and len(missing) < total:  # tokens count in all; time and money by the run
            tokens = sum(folder.read_tables(columns=["tokens"])["tokens"].to_pylist())
        task = Task.read(inputs["task"])
        arguments = (config, task, inputs["teacher"], inputs["policy"], folder, seed, workers.threads, workers.gpus)
        with track("generate", config.rows, "rows") as progress:
            done, before = (total - len(missing)) * config.rows_per_shard, tokens
            progress.set(done)
            spent = config.spent(tokens, 0, workers.count)
            items = [] if spent else [{"shards": shards} for shards in handed(missing, config, workers)]
            with closing(pool(ShardWriter, arguments, items, workers)) as finished:
                for row in finished:
                    tokens, done, seconds = tokens + int(row["tokens"]), done + int(row["rows"]), time.monotonic() - began
                    progress.advance(int(row["rows"]), f"{(tokens - before) / seconds:,.0f} tokens/s")
                    spent = config.spent(tokens, seconds, workers.count)
                    if spent:
                        break
        if spent and done < config.rows:
            raise ConfigError(
                f"generate stopped at generate.{spent}: {done:,} of {config.rows:,} rows and {tokens:,} tokens are written, and kept. "
                "Run the same command with a larger limit, or with 0 for none, to go on"
            )
        tokens -= before

    # 3. exactly once
    summary = checked(config, folder)
    if missing:
        summary["tokens_per_s"] = round(tokens / (time.monotonic() - began))
    return summary


def checked(config: GenerateConfig, folder: Folder) -> dict[str, Any]:
    """The stage's figures, once each row is there exactly once and few have failed; else ConfigError."""
    table = folder.read_tables(columns=["id", "error"])
    ids = table["id"].to_pylist()
    if len(ids) != config.rows or len(set(ids)) != config.rows:
        raise ConfigError(
            f"{folder}: {len(ids)} rows, {len(set(ids))} different ids; expected {config.rows}. Remove the folder and run again"
        )
    failed = [(code, error) for code, error in zip(ids, table["error"].to_pylist(), strict=True) if error]
    if len(failed) > MOST_ERRORS * config.rows:
        for shard in {code.split("-")[1] for code, _ in failed}:
            folder.remove(shard_name(int(shard)))
        raise ConfigError(
            f"generate: {len(failed):,} of {config.rows:,} texts could not be written, more than {MOST_ERRORS:.0%}; the first, {failed[0][0]}: {failed[0][1]}. "
            "Their shards are removed: mend the cause and run again, the others are kept"
        )
    return {"rows": config.rows, "shards": shard_count(config)} | ({"errors": len(failed)} if failed else {})

"""Stage 4, generate: the store's texts, by a Ray Data pool of LM workers, every row exactly once.

The work is cut into fixed shards. Row id and seed follow from (seed, shard, position) and a text from its seed, so one worker and eight give
the same files. A shard is a file among the scratch of the run; a resumed run lists what is there and does the rest. Shards are small, so that little
is lost with a worker; when all are there they become the parts of `generated/`, which are large, so that who reads them asks for few files.
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

from retrikt_ray.runtime.cluster import Workers, each, plan, pool
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.progress import track
from retrikt_ray.runtime.settings import ConfigError, Scaled
from retrikt_ray.runtime.tables import writing
from retrikt_ray.store.rows import GENERATED
from retrikt_ray.task.card import Task
from retrikt_ray.task.texts import split_pair

if TYPE_CHECKING:
    from retrikt_ray.store.engines import Generated

VERSION = 5
PART_ROWS = 500_000  # of a file of `generated/`: some 64 MB
GROUP_ROWS = 8192  # of a row group
MOST_ERRORS = 0.01  # share of rows that may fail
AT_ONCE = 4096  # texts that a GPU is handed at a time: it writes some hundreds side by side, and the last of them alone


class GenerateConfig(Scaled):
    """How many texts are generated, and how they are sampled."""

    rows: int = Field(8000, ge=0, description="Texts to generate, the conditions in turn. 0: the store has no generated rows.")
    rows_per_shard: int = Field(120, ge=1, description="Texts per shard: the unit of work and of a resume.")
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


def row_id(shard: int, position: int) -> str:
    return f"generated-{shard:05d}-{position:04d}"


def shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.parquet"


class ShardWriter:
    """A Ray Data actor: holds the LM and turns shard numbers into shard files. The rows it returns only count what was done."""

    def __init__(
        self, config: GenerateConfig, task: Task, teacher: Folder, policy: Folder, shards: Folder, seed: int, threads: int, gpus: float
    ) -> None:
        import torch

        from retrikt_ray.store.engines import ENGINES, Engine, Order
        from retrikt_ray.teacher.prompts import load_prompts
        from retrikt_ray.teacher.sampling import Sampling

        torch.set_num_threads(threads)
        self.config, self.task, self.seed, self.folder = config, task, seed, shards
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
        places = [(shard, i) for shard in shards for i in range(rows_in(self.config, shard))]
        conditions = [(shard * size + i) % classes for shard, i in places]
        written = self.attempt(conditions, [row_seed(self.seed, shard, i) for shard, i in places])
        failures = [made for made in written if isinstance(made, Exception)]
        if len(failures) == len(written):
            raise failures[0]
        rows: dict[int, list[dict[str, Any]]] = {shard: [] for shard in shards}
        for (shard, i), condition, text in zip(places, conditions, written, strict=True):
            rows[shard].append(self.row(row_id(shard, i), condition, text))
        tables = {shard: pa.Table.from_pylist(some, schema=GENERATED) for shard, some in rows.items()}
        for shard, table in tables.items():
            self.folder.write_table(shard_name(shard), table)
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


def rows_in(config: GenerateConfig, shard: int) -> int:
    return min(config.rows_per_shard, config.rows - shard * config.rows_per_shard)


def handed(missing: list[int], config: GenerateConfig, workers: Workers) -> list[list[int]]:
    """Shards as workers get them: one at a time on a CPU; together on a GPU, fewer towards the end, so that the workers end together."""
    most = max(1, AT_ONCE // config.rows_per_shard) if workers.gpus else 1
    left, groups = deque(missing), []
    while left:
        fair = -(-len(left) // (2 * workers.count)) if workers.count > 1 else len(left)
        groups.append([left.popleft() for _ in range(min(most, fair))])
    return groups


def generate(config: GenerateConfig, inputs: dict[str, Folder], out: dict[str, Folder], *, seed: int) -> dict[str, Any]:
    """Write `generated/`: part-NNNNN.parquet, of PART_ROWS rows each.

    1. List the shards that an interrupted run left complete.  2. Generate the rest on the actor pool.  3. Make parts of them, and check ids and errors.
    Raises ConfigError where a budget is spent (shards stay, the next run goes on) and where too many rows failed (their shards go).
    """
    # 1. what is there
    shards = out["scratch"]
    total = shard_count(config)
    complete = set(shards.files())
    missing = [s for s in range(total) if shard_name(s) not in complete]
    began, tokens = time.monotonic(), 0
    if total == 0:
        out["generated"].write_table("part-00000.parquet", GENERATED.empty_table())
        return {"rows": 0}
    workers = plan(config, "generate")

    # 2. the rest
    if missing:
        if config.max_tokens and len(missing) < total:  # tokens count in all; time and money by the run
            tokens = sum(shards.read_tables("shard-", ["tokens"])["tokens"].to_pylist())
        task = Task.read(inputs["task"])
        arguments = (config, task, inputs["teacher"], inputs["policy"], shards, seed, workers.threads, workers.gpus)
        with track("generate", config.rows, "rows") as progress:
            done, before = (total - len(missing)) * config.rows_per_shard, tokens
            progress.set(done)
            spent = config.spent(tokens, 0, workers.count)
            items = [] if spent else [{"shards": some} for some in handed(missing, config, workers)]
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
    took = time.monotonic() - began

    # 3. exactly once
    size = max(1, PART_ROWS // config.rows_per_shard)
    calls = [(config, shards, out["generated"], i, low, min(total, low + size)) for i, low in enumerate(range(0, total, size))]
    failed: dict[str, tuple[str, int]] = {}
    for found in each(join, calls, workers if len(calls) > 1 else None, "generate: parts"):
        failed |= found
    errors = sum(count for _, count in failed.values())
    if errors > MOST_ERRORS * config.rows:
        for name in failed:
            shards.remove(name)
        raise ConfigError(
            f"generate: {errors:,} of {config.rows:,} texts could not be written, more than {MOST_ERRORS:.0%}; the first, {next(iter(failed.values()))[0]}. "
            "Their shards are removed: mend the cause and run again, the others are kept"
        )
    summary = {"rows": config.rows, "shards": total} | ({"errors": errors} if errors else {})
    return summary | ({"tokens_per_s": round(tokens / took)} if missing else {})


def join(config: GenerateConfig, shards: Folder, out: Folder, part: int, low: int, high: int) -> dict[str, tuple[str, int]]:
    """Write the shards low .. high - 1 as one part (a Ray task). Returns by name of a shard, its first error and how many of its rows have one.

    Raises ConfigError for a shard that does not hold exactly its rows.
    """
    failed: dict[str, tuple[str, int]] = {}
    waiting: list[pa.Table] = []
    with writing(out, f"part-{part:05d}.parquet", GENERATED) as parts:
        for shard in range(low, high):
            table = shards.read_table(name := shard_name(shard))
            ids, wanted = table["id"].to_pylist(), [row_id(shard, i) for i in range(rows_in(config, shard))]
            if ids != wanted:
                raise ConfigError(
                    f"{shards}/{name}: {len(ids)} rows, {len(set(ids))} different ids; expected {wanted[0]} to {wanted[-1]}. Remove it and run again"
                )
            errors = [f"{code}: {error}" for code, error in zip(ids, table["error"].to_pylist(), strict=True) if error]
            if errors:
                failed[name] = errors[0], len(errors)
            waiting.append(table)
            if sum(len(some) for some in waiting) >= GROUP_ROWS or shard == high - 1:
                parts.write_table(pa.concat_tables(waiting).combine_chunks())
                waiting = []
    return failed

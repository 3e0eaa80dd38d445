"""What a server can be told: the arguments of `retrikt serve`, and the `args` of a Serve config."""

from __future__ import annotations

import os
from typing import Any, Literal

from pydantic import Field, ValidationError

from retrikt_ray.runtime.settings import ConfigError, Section, explain


class ServeArgs(Section):
    """What `retrikt serve`, or the `args` of a Serve config, can say."""

    run: str = Field(description="Run directory or its URI; on a cluster an absolute path or URI that every node can read.")
    replicas: int = Field(
        1, ge=1, description="Replicas, each with its own student; the index is memory-mapped, or, if IVF of up to 1 GB, held by each."
    )
    threads: int = Field(1, ge=1, description="CPUs a replica reserves, and its torch and FAISS threads.")
    shard_groups: int = Field(
        0,
        ge=0,
        description="Groups that the shards are split into, each a Serve deployment of `threads` CPUs (`Shards0`, ...) that all replicas ask. "
        "0: each replica maps all shards itself.",
    )
    shard_deadline_s: float = Field(5, gt=0, description="Seconds in which each group of shards must have answered a batch.")
    missing_shards: Literal["refuse", "answer"] = Field(
        "refuse",
        description="Where some have not: refuse, with 503 and Retry-After, or answer without their rows, which the header "
        "X-Knowledge-Missing says.",
    )
    max_batch: int = Field(64, ge=1, description="Requests answered together at most. Nobody waits for others: what is queued is taken.")
    max_texts: int = Field(256, ge=1, description="Texts, or rows of an edit, in one request; more are refused with 413.")
    max_text_chars: int = Field(
        20_000, ge=1, description="Characters of one text; longer ones are refused with 413, or cut where the request says `truncate`."
    )
    max_body_bytes: int = Field(
        4_000_000, ge=1, description="Bytes of a request body; a larger one is refused with 413 before it is parsed."
    )
    max_queued: int = Field(
        200, ge=0, description="Requests that wait in a replica beside two full batches; further ones get 503 with Retry-After."
    )
    deadline_s: float = Field(
        10, gt=0, description="Seconds in which a body must have come (else 408), and then be answered (else 504). Edits have no deadline."
    )
    open: Literal["nothing", "read", "write"] | None = Field(
        None,
        description="What may be done without a key; write includes read. Left out: nothing, and a server without keys is refused; "
        "`retrikt serve` on the loopback and without keys says write.",
    )
    keys_file: str | None = Field(
        None,
        description="File of keys, a line each: `read KEY` or `write KEY`. Others are taken from the environment, "
        "RETRIKT_READ_KEYS and RETRIKT_WRITE_KEYS, separated by white space. A write key reads, too.",
    )
    reload: bool = Field(
        False, description="Look at the run every second, and take over student, store and index when they were made anew and are whole."
    )
    runs: str | None = Field(
        None,
        description="Folder or URI of further runs. A request is answered from one of them that it names by the header "
        "serve_multiplexed_model_id (Ray Serve's), from its answers to its knowledge; the page shows `run` alone.",
    )
    runs_held: int = Field(
        4, ge=1, description="Of `runs`, as many as a replica has open at a time: the one that nobody has asked for longest makes room."
    )
    cors_origins: tuple[str, ...] = Field((), description="Origins whose pages may call this server from a browser, such as https://a.org.")

    @property
    def capacity(self) -> int:
        """Requests that a replica takes: a batch in work, one being gathered, and those that wait."""
        return 2 * self.max_batch + self.max_queued


def parse_args(args: dict[str, Any]) -> ServeArgs:
    """Raises ConfigError that names the unknown or wrong key."""
    try:
        return ServeArgs.model_validate(args)
    except ValidationError as error:
        raise explain(error, ServeArgs, "args of the Serve app") from None


class Swap(Section):
    """The `user_config` of a Serve config: what running replicas take over without a restart."""

    run: str = Field(description="Run to answer from in place of `args.run`: an absolute path or URI that every node can read.")


def parse_swap(config: Any) -> Swap:
    """Raises ConfigError that names the unknown or wrong key."""
    try:
        found = Swap.model_validate(config)
    except ValidationError as error:
        raise explain(error, Swap, "user_config of the Serve app") from None
    if "://" not in found.run and not os.path.isabs(found.run):
        raise ConfigError(f"user_config of the Serve app, run: found {found.run!r}, expected an absolute path or a URI")
    return found

"""What a server can be told: the arguments of `retrikt serve`, and the `args` of a Serve config."""

from __future__ import annotations

from typing import Any

from pydantic import Field, ValidationError

from retrikt_ray.runtime.settings import Section, explain


class ServeArgs(Section):
    """What `retrikt serve`, or the `args` of a Serve config, can say."""

    run: str = Field(description="Run directory or its URI; on a cluster an absolute path or URI that every node can read.")
    replicas: int = Field(
        1, ge=1, description="Replicas, each with its own student; the index is memory-mapped, or, if IVF of up to 1 GB, held by each."
    )
    threads: int = Field(1, ge=1, description="CPUs a replica reserves, and its torch and FAISS threads.")
    shard_actors: int = Field(
        0, ge=0, description="Ray actors of `threads` CPUs, beside each replica, that hold the shards. 0: the replica maps them all itself."
    )
    max_batch: int = Field(64, ge=1, description="Requests answered together at most.")
    batch_wait_ms: float = Field(5, ge=0, description="How long a request waits for others to be answered with.")
    max_texts: int = Field(256, ge=1, description="Texts in one request; more are refused with 413.")
    max_text_chars: int = Field(20_000, ge=1, description="Characters of one text; longer ones are refused with 413.")
    max_body_bytes: int = Field(
        4_000_000, ge=1, description="Bytes of a request body; a larger one is refused with 413 before it is parsed."
    )
    max_queued: int = Field(
        200, ge=0, description="Requests that wait in a replica beside two full batches; further ones get 503 with Retry-After."
    )

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

"""What a server can be told, and what it is told of a wrong argument."""

from __future__ import annotations

from typing import Any

import pytest

from retrikt_ray.runtime.settings import ConfigError
from retrikt_ray.serving.args import ServeArgs, parse_args


def test_only_the_run_is_required() -> None:
    args = parse_args({"run": "runs/mine", "deadline_s": 2})
    assert args == ServeArgs(run="runs/mine", deadline_s=2)
    assert (args.replicas, args.threads, args.shard_groups) == (1, 1, 0)


@pytest.mark.parametrize(
    ("args", "error"),
    [
        ({"run": "x", "max_bach": 3}, r"max_bach: there is no such key; did you mean max_batch\?"),
        ({}, "run: this key is required"),
        ({"run": None}, "run: found None; "),
        ({"run": "x", "replicas": 0}, "replicas: found 0; "),
        ({"run": "x", "threads": 1.5}, r"threads: found 1\.5; "),
        ({"run": "x", "deadline_s": 0}, "deadline_s: found 0; "),
        ({"run": "x", "open": "all"}, "open: found 'all'; "),
        ({"run": "x", "max_queued": -1}, "max_queued: found -1; "),
        ({"run": "x", "max_texts": "many"}, "max_texts: found 'many'; "),
    ],
)
def test_a_wrong_argument_is_named(args: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        parse_args(args)


def test_capacity_is_two_batches_and_those_that_wait() -> None:
    """One batch is in work while the next is gathered."""
    assert ServeArgs(run="x", max_batch=3, max_queued=4).capacity == 10
    assert ServeArgs(run="x", max_batch=1, max_queued=0).capacity == 2


def test_every_argument_is_explained() -> None:
    assert all(field.description for field in ServeArgs.model_fields.values())

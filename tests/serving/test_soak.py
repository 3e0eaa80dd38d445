"""Replicas killed, runs swapped and damaged, floods and writes, all under load: nothing fails, and every answer is of one version."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from making.soak import soaking

GROWTH_MB = 30  # of a replica that has settled


@pytest.mark.parametrize(
    ("seconds", "every", "writes"),
    [
        pytest.param(40, 6, 60, marks=pytest.mark.slow, id="short"),
        pytest.param(float(os.environ.get("SOAK_S", "900")), 60, 1000, marks=[pytest.mark.bench, pytest.mark.timeout(0)], id="long"),
    ],
)
def test_soak(tmp_path: Path, seconds: float, every: float, writes: int) -> None:
    with soaking(tmp_path) as soak:
        asyncio.run(soak.run(seconds, every, writes))
        growth = soak.growth()
    print(f"\n{sum(soak.statuses.values()):,} requests {dict(soak.statuses)}; {', '.join(soak.done)}; MB of replicas {growth}; ", end="")
    print(f"{len(soak.seen):,} answers of {len({version for version, *_ in soak.seen})} versions compared")
    soak.check()
    assert len({version.partition(".")[0] for version, *_ in soak.seen}) == 2
    if seconds >= 300:  # else nothing has settled
        assert growth and all(end - settled < GROWTH_MB for settled, end in growth.values()), growth

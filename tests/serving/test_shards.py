"""A group of shards: which indexes it has open, and what it refuses."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import numpy as np
import pytest
from making.vectors import make_index

from retrikt_ray.index.search import Searcher
from retrikt_ray.index.spread import Gone
from retrikt_ray.runtime.artifacts import check
from retrikt_ray.runtime.folders import ArtifactError, Folder
from retrikt_ray.runtime.settings import ConfigError
from retrikt_ray.serving.answering.shards import Asked, Held, ShardGroup, spread
from retrikt_ray.serving.app import build_app
from retrikt_ray.serving.args import parse_args
from retrikt_ray.serving.replica import Endpoint


def index(home: Path, seed: int) -> tuple[Folder, np.ndarray]:
    vectors = np.random.default_rng(seed).normal(size=(40, 8)).astype(np.float32)
    home.mkdir()
    return make_index(home, vectors, 4, "Flat"), vectors


def held(folder: Folder) -> Held:
    return folder.uri, check(folder, only=[]).content


def test_a_group_has_two_indexes_open_and_opens_what_it_is_asked_about(tmp_path: Path) -> None:
    found = [index(tmp_path / str(seed), seed) for seed in range(3)]
    group = ShardGroup(1, 2, 1)
    for folder, _ in found[:2]:
        asyncio.run(group.open(held(folder)))
    asyncio.run(group.open(held(found[0][0])))
    folder, vectors = found[2]
    allowed = np.arange(40) % 3 == 0
    got = asyncio.run(group.once(held(folder), vectors[:5], 20, np.packbits(allowed), False))
    want = Searcher.open(folder).search(vectors[:5], 20, allowed & (np.arange(40) >= 20))  # the second half of the shards
    np.testing.assert_array_equal(got[0], want[0])
    assert list(group.searchers) == [held(found[0][0]), held(folder)]  # that which was asked for longest ago is closed


def test_an_index_that_was_made_anew_is_not_taken_for_the_one_that_was_opened(tmp_path: Path) -> None:
    (old, _), (new, _) = index(tmp_path / "a", 0), index(tmp_path / "b", 1)
    asked = held(old)
    shutil.rmtree(old.uri)
    shutil.copytree(new.uri, old.uri)
    with pytest.raises(ArtifactError, match="was made anew since it was opened"):
        asyncio.run(ShardGroup(0, 2, 1).open(asked))


class Response:
    """As a handle of Serve answers."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def result(self, timeout_s: float) -> None:
        raise self.error


def test_what_a_group_raised_is_told_as_it_was(tmp_path: Path) -> None:
    from ray.exceptions import ActorDiedError, RayTaskError

    wrong = RayTaskError("once", "a traceback", ArtifactError("shard-0000.faiss is truncated"))
    with pytest.raises(ArtifactError, match=r"^shard-0000.faiss is truncated$"):
        Asked(Response(wrong)).result(1)
    with pytest.raises(Gone):
        Asked(Response(ActorDiedError())).result(1)

    class Remote:
        def remote(self, *_: object) -> Response:
            return Response(TimeoutError())

    class Handle:
        open = Remote()

    folder, _ = index(tmp_path / "a", 0)
    with pytest.raises(ConfigError, match=r"Shards0 has not opened its part of .*index-4 in 600 s: no place on the cluster\?"):
        spread([Handle()], parse_args({"run": "x"}), folder)


def test_only_serve_starts_groups(tmp_path: Path) -> None:
    app = build_app({"run": str(tmp_path), "open": "read", "shard_groups": 3})
    assert [group._bound_deployment.name for group in app._bound_deployment.init_args[1]] == ["Shards0", "Shards1", "Shards2"]
    with pytest.raises(ConfigError, match="shard_groups is 3, and 0 are there: only Ray Serve starts them"):
        Endpoint(app._bound_deployment.init_args[0])

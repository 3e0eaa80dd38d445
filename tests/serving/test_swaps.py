"""Another student and store take over from those that answer: which are taken, which are refused, and what requests see of it."""

from __future__ import annotations

import asyncio
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from making.serving_local import Replica, replica
from making.tiny_run import make_run

from retrikt_ray.predictor import Predictor
from retrikt_ray.runtime.settings import ConfigError
from retrikt_ray.serving import replica as module
from retrikt_ray.serving.app import Served
from retrikt_ray.serving.args import parse_swap

TEXT = {"inputs": "a fine film"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    home = tmp_path_factory.mktemp("runs")
    return str(make_run(home / "first")), str(make_run(home / "second", seed=1))


def answer_of(run: str) -> tuple[str, list[dict[str, Any]]]:
    """The version that a run answers with, and its answer."""
    opened = Predictor.open(run)
    scores = dict(zip(opened.task.labels, map(float, opened.predict(TEXT["inputs"], evidence=False).answers[0]), strict=True))
    best_first = sorted(scores.items(), key=lambda item: -item[1])
    return f"{opened.release}.{opened.knowledge.view.version}", [{"label": name, "score": score} for name, score in best_first]


def told(opened: Replica) -> tuple[str, Any]:
    answer = opened.post("predict", TEXT)
    return answer.headers["x-knowledge-version"], answer.json()


def damaged(run: str, path: Path) -> str:
    """A copy of a run, one byte of whose student is another."""
    shutil.copytree(run, path)
    weights = path / "student" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    return str(path)


def figures(opened: Replica) -> dict[str, float]:
    lines = [
        line.rsplit(" ", 1) for line in opened.get("/metrics").text.splitlines() if line.startswith(("retrikt_swap", "retrikt_release"))
    ]
    return {name: float(value) for name, value in lines if "_created" not in name}


def test_another_run_is_taken_over_and_a_damaged_one_is_refused(runs: tuple[str, str], tmp_path: Path) -> None:
    first, second = map(answer_of, runs)
    assert first[0] != second[0] and first[1] != second[1]
    with replica(runs[0]) as opened:
        assert told(opened) == first and opened.get("/info").json()["refused"] is None
        assert opened.endpoint.swap(runs[1])
        assert told(opened) == second
        assert not opened.endpoint.swap(damaged(runs[0], tmp_path / "damaged"))
        assert told(opened) == second and opened.get("/ready").status_code == 200
        info = opened.get("/info").json()
        assert (info["release"], info["refused"]) == (
            second[0].partition(".")[0],
            "the run/student/model.safetensors was altered: its SHA-256 is not the one in the manifest",
        )
        found = figures(opened)
        assert found['retrikt_swaps_total{outcome="taken"}'] == found['retrikt_swaps_total{outcome="refused"}'] == 1
        assert found['retrikt_swap_refused{run=""}'] == 1
        release = second[0].partition(".")[0]
        assert found[f'retrikt_release_taken_seconds{{release="{release}"}}'] == pytest.approx(time.time(), abs=60)
        assert opened.endpoint.swap(runs[0])
        assert (
            told(opened) == first and opened.get("/info").json()["refused"] is None and figures(opened)['retrikt_swap_refused{run=""}'] == 0
        )


def test_a_task_of_another_kind_is_refused(runs: tuple[str, str], tmp_path: Path) -> None:
    pair = str(make_run(tmp_path / "pair", pair=True))
    with replica(runs[0]) as opened:
        assert not opened.endpoint.swap(pair)
        assert (
            opened.endpoint.refused == "the run is a task of another kind than the run that answers, and would have to be asked otherwise"
        )
        assert opened.post("predict", TEXT).status_code == 200


def test_a_batch_ends_with_the_run_it_began_with(runs: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    want = dict(map(answer_of, runs))
    with replica(runs[0], max_batch=1) as opened:
        before, here = opened.endpoint.opened, opened.endpoint
        inner = before.work

        def swapped_meanwhile(*args: Any) -> Any:
            if here.opened is before:
                here.swap(runs[1])
            return inner(*args)

        monkeypatch.setattr(before, "work", swapped_meanwhile)
        answers = opened.together([("predict", TEXT)] * 3)
        assert [a.headers["x-knowledge-version"] for a in answers] == [list(want)[0], *[list(want)[1]] * 2]
        assert all(a.json() == want[a.headers["x-knowledge-version"]] for a in answers)


def test_edits_go_to_the_run_that_answers(runs: tuple[str, str], tmp_path: Path) -> None:
    one, two = (str(shutil.copytree(run, tmp_path / Path(run).name)) for run in runs)
    row = {"id": "new", "text": "a zebra film", "label": "negative"}
    with replica(one) as opened:
        version = opened.request("PUT", "/knowledge", json={"rows": [row]}).json()["version"]
        opened.endpoint.swap(two)
        answer = opened.request("PUT", "/knowledge", json={"rows": [row]}, headers={"If-Match": f'"{version}"'})
        assert (answer.status_code, answer.json()["error"]) == (412, "the edit was made for another run than the one that answers")
        assert opened.request("PUT", "/knowledge", json={"rows": [row]}).json()["version"] == f"{opened.predictor.release}.1"
        knowledge = opened.predictor.knowledge
        inner = knowledge.preview
        knowledge.preview = lambda *args: (opened.endpoint.swap(one), inner(*args))[1]  # type: ignore[method-assign]
        answer = opened.request("POST", "/knowledge/preview", json={"rows": [row], "inputs": "a film"})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert (Predictor.open(one).knowledge.view.version, Predictor.open(two).knowledge.view.version) == (1, 1)


def until(check: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_watched_run_is_taken_over_when_it_is_whole(runs: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that leads to another run, and a folder that is filled anew: the student first, the index last."""
    monkeypatch.setattr(module, "LOOK_S", 0.02)
    monkeypatch.setattr(module, "AGAIN_S", 0.1)
    first, second = map(answer_of, runs)
    link, aside = tmp_path / "run", tmp_path / "aside"
    link.symlink_to(runs[0])
    with replica(str(link), reload=True) as opened:
        assert told(opened) == first
        aside.symlink_to(runs[1])
        aside.replace(link)
        until(lambda: told(opened) == second)
        broken = Path(damaged(runs[0], tmp_path / "broken"))
        aside.symlink_to(broken)
        aside.replace(link)
        until(lambda: opened.get("/info").json()["refused"])
        assert told(opened) == second
        shutil.copy(Path(runs[0]) / "student" / "model.safetensors", broken / "student")  # it is mended, its manifest is as it was
        until(lambda: told(opened) == first)
        aside.symlink_to(runs[1])
        aside.replace(link)
        until(lambda: told(opened) == second)
    folder = tmp_path / "folder"
    shutil.copytree(runs[0], folder)
    with replica(str(folder), reload=True) as opened:
        for name in ("student", "store", "index"):
            shutil.rmtree(folder / name)
            time.sleep(0.1)
            assert told(opened) == first and opened.endpoint.refused is None  # a stage is at work
        for name in ("store", "student", "index"):
            shutil.copytree(Path(runs[1]) / name, folder / name)
        until(lambda: told(opened) == second)


# what Serve calls


def test_a_user_config_says_which_run_answers(runs: tuple[str, str]) -> None:
    first, second = map(answer_of, runs)
    with replica(runs[0]) as opened:
        opened.endpoint.__class__ = Served
        reconfigure: Any = opened.endpoint

        def configure(config: Any) -> None:
            asyncio.run(reconfigure.reconfigure(config))

        before = opened.endpoint.opened
        configure({"run": runs[0]})
        assert opened.endpoint.opened is before  # which is open already
        configure({"run": runs[1]})
        assert told(opened) == second
        configure({"rum": runs[0]})
        assert "rum: there is no such key; did you mean run?" in str(opened.endpoint.refused) and told(opened) == second
        configure({"run": runs[0]})
        assert told(opened) == first and opened.endpoint.refused is None
    with pytest.raises(ConfigError, match=r"run: found 'runs/mine', expected an absolute path or a URI"):
        parse_swap({"run": "runs/mine"})

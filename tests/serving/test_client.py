"""`serve/client.py`, the client without dependencies, against replicas that listen on a port of their own."""

from __future__ import annotations

import json
import runpy
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from making.serving_local import listening, named, replica, scores
from making.tiny_run import make_run

from retrikt_ray.predictor import Predictor
from retrikt_ray.serving.routes import build_api

CLIENT = Path(__file__).parents[2] / "serve" / "client.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_run(tmp_path_factory.mktemp("runs") / "single"))


@pytest.fixture(scope="module")
def single(run: str) -> Iterator[str]:
    with replica(run) as opened, listening(build_api(opened.endpoint)) as url:
        yield url


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with replica(str(make_run(tmp_path_factory.mktemp("runs") / "pair", pair=True, regression=True))) as opened:
        with listening(build_api(opened.endpoint)) as url:
            yield url


def client(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(CLIENT), *args], capture_output=True, text=True, timeout=60)


def test_one_json_line_per_text(run: str, single: str) -> None:
    done = client("--url", single, "a fine film", "so weak")
    assert done.returncode == 0, done.stderr
    want = [named(row) for row in Predictor.open(run).predict(["a fine film", "so weak"]).answers]
    assert [scores(json.loads(line)) for line in done.stdout.splitlines()] == want


def test_retrieval(single: str) -> None:
    done = client("--url", f"{single}/", "--retrieve", "2", "a dull film")
    assert json.loads(done.stdout)[0]["text"] == "a dull film"
    done = client("--url", single, "--retrieve", "2", "--mode", "hybrid", "--label", "negative", "--source", "task", "a dull film")
    both = {side: [r["id"] for r in rows] for side, rows in json.loads(done.stdout).items()}
    assert both == {"dense": ["train-000006", "train-000010"], "lexical": ["train-000006", "train-000010"]}
    done = client("--url", single, "--retrieve", "1", "--mode", "lexical", "never dull")
    assert {"id", "bm25"} <= json.loads(done.stdout)[0].keys()


def test_a_pair_is_explained(pairs: str) -> None:
    done = client("--url", pairs, "--pair", "--explain", "a film", "a play")
    explained = json.loads(done.stdout)
    assert explained["prediction"][0]["label"] == "LABEL_0"
    types = runpy.run_path(str(CLIENT))
    assert explained.keys() == types["Explanation"].__annotations__.keys()
    assert explained["votes"].keys() == types["Votes"].__annotations__.keys()
    assert explained["ngrams"][0].keys() == types["Spoken"].__annotations__.keys()


def test_errors_are_one_line(single: str) -> None:
    done = client("--url", single, "--pair", "a film", "a play")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {single}/predict answered 422: inputs[0].text_pair is given")
    assert done.stderr.endswith("; expected: a text, or a list of such\n")
    done = client("--url", single, "--retrieve", "1", "--label", "warm", "a film")
    assert done.stderr.startswith(f"error: {single}/retrieve answered 422: label: found 'warm'; the labels of tiny are negative, positive")
    done = client("--url", single, "--mode", "hybrid", "a film")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, "client.py: error: --mode, --label and --source go with --retrieve")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        done = client("--url", url, "a film")
    assert (done.returncode, done.stderr) == (1, f"error: {url}/predict: [Errno 111] Connection refused\n")

"""Serving, over real HTTP: three tiny runs behind one Serve on a free loopback port. Expected values come from Predictor directly."""

from __future__ import annotations

import os

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "0")

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import yaml
from pydantic import BaseModel
from ray import serve
from ray.serve.schema import ServeDeploySchema

from retrikt_ray import __version__
from retrikt_ray.api import read_texts
from retrikt_ray.folders import ArtifactError
from retrikt_ray.predictor import Mixture, Predictor
from retrikt_ray.serving import ServeArgs, build_app, check_port, parse_args, serve_run
from retrikt_ray.settings import ConfigError

sys.path.insert(0, str(Path(__file__).parent))
from tiny_run import LABELS, TEXTS, WORDS, make_run

ROOT = Path(__file__).parents[1]
LIMITS = {"max_texts": 5, "max_text_chars": 200, "max_body_bytes": 4000}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Served:
    """The running server: its URL, the runs' Predictors opened here, and where replicas log."""

    url: str
    single: Predictor
    pair: Predictor
    logs: Path

    def post(self, route: str, body: Any, **more: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/{route}", json=body, timeout=30, **more)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("runs")
    single = str(make_run(folder / "single"))
    pair = str(make_run(folder / "pair", pair=True, regression=True))
    broken = str(make_run(folder / "broken", mixture=Mixture(0.5, 0.5, 8, 0.0)))  # tau 0: every prediction is NaN
    port = free_port()
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        apps = {
            "single": ("/", {"run": single, **LIMITS}),
            "pair": ("/pair", {"run": pair}),
            "broken": ("/broken", {"run": broken, "max_batch": 1, "max_queued": 0}),
        }
        serve.run_many([serve.RunTarget(build_app(args), name=name, route_prefix=prefix) for name, (prefix, args) in apps.items()])
        logs = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs" / "serve"
        yield Served(f"http://127.0.0.1:{port}", Predictor.open(single), Predictor.open(pair), logs)
    finally:
        serve.shutdown()
        ray.shutdown()


def expected_scores(predictor: Predictor, text: str) -> dict[str, Any]:
    return dict(zip(LABELS, (pytest.approx(float(p), abs=1e-5) for p in predictor.predict([(text, None)]).answers[0]), strict=True))


# routes


def test_predict_one_text_is_a_list_of_scores_best_first(served: Served) -> None:
    answer = served.post("predict", {"inputs": "a fine film"}).json()
    assert {a["label"]: a["score"] for a in answer} == expected_scores(served.single, "a fine film")
    assert answer[0]["score"] > answer[1]["score"]
    assert sum(a["score"] for a in answer) == pytest.approx(1, abs=1e-5)


def test_predict_list_keeps_order_and_top_k_cuts(served: Served) -> None:
    texts = ["so weak", "a fine film", "never cold"]
    answer = served.post("predict", {"inputs": [texts[0], {"text": texts[1]}, {"text": texts[2], "text_pair": None}]}).json()
    assert [{a["label"]: a["score"] for a in row} for row in answer] == [expected_scores(served.single, t) for t in texts]
    cut = served.post("predict", {"inputs": texts, "top_k": 1}).json()
    assert [[a["label"] for a in row] for row in cut] == [[row[0]["label"]] for row in answer]
    assert len(served.post("predict", {"inputs": texts[0], "top_k": 9}).json()) == 2
    assert len(served.post("predict", {"inputs": texts[:1]}).json()) == 1


def test_spaces_and_newlines_are_those_of_the_task_rows() -> None:
    args = ServeArgs(run="x")
    assert read_texts("  a fine\n\tfilm ", False, args) == [("a fine film", None)]
    assert read_texts([{"text": "a\nb", "text_pair": " c  d"}], True, args) == [("a b", "c d")]


def test_retrieve_gives_the_nearest_rows(served: Served) -> None:
    answer = served.post("retrieve", {"inputs": "a dull film", "k": 3}).json()
    _, positions, similarities = served.single.retrieve([("a dull film", None)], 3)
    assert [r["id"] for r in answer] == [f"train-{p:06d}" for p in positions[0]]
    assert [r["similarity"] for r in answer] == pytest.approx(similarities[0].tolist(), abs=1e-5)
    first = answer[0]  # the row itself: position 6, the first negative one, whose teacher says 0.95
    assert first == {
        "id": "train-000006",
        "text": "a dull film",
        "text_pair": None,
        "source": "task",
        "label": "negative",
        "score": pytest.approx(0.95, abs=1e-6),
        "similarity": pytest.approx(1, abs=1e-5),
    }


def test_retrieve_more_than_there_are_gives_all(served: Served) -> None:
    many = served.post("retrieve", {"inputs": ["a film", "so cold"], "k": 100}).json()
    assert [sorted(r["id"] for r in rows) for rows in many] == [sorted(f"train-{i:06d}" for i in range(12))] * 2
    assert len(served.post("retrieve", {"inputs": "a film"}).json()) == 8


def test_explain_shows_what_voted(served: Served) -> None:
    answer = served.post("explain", {"inputs": "the cast was cold"}).json()
    found = served.single.predict([("the cast was cold", None)])
    assert {a["label"]: a["score"] for a in answer["prediction"]} == expected_scores(served.single, "the cast was cold")
    assert {a["label"]: a["score"] for a in answer["student"]} == {
        label: pytest.approx(float(p), abs=1e-5) for label, p in zip(LABELS, found.student[0], strict=True)
    }
    assert [r["id"] for r in answer["neighbours"]] == [f"train-{p:06d}" for p in found.positions[0]]
    assert answer["mixture"] == {"student": 0.6, "dense": 0.4, "k": 8, "tau": 0.1}
    assert [set(a) for a in served.post("explain", {"inputs": ["a", "b"]}).json()] == [set(answer)] * 2


def test_regression_of_a_pair_is_label_0(served: Served) -> None:
    pair = {"text": "a warm film", "text_pair": "a cold film"}
    value = pytest.approx(float(served.pair.predict([("a warm film", "a cold film")]).answers[0, 0]), abs=1e-5)
    assert served.post("pair/predict", {"inputs": pair}).json() == [{"label": "LABEL_0", "score": value}]
    assert served.post("pair/predict", {"inputs": [pair, pair]}).json() == [[{"label": "LABEL_0", "score": value}]] * 2
    row = served.post("pair/retrieve", {"inputs": {"text": TEXTS[0], "text_pair": TEXTS[-1]}, "k": 1}).json()[0]
    assert (row["id"], row["text_pair"], row["label"], row["score"]) == ("train-000000", TEXTS[-1], "4.75", pytest.approx(4.75))


def test_health_info_and_schema(served: Served) -> None:
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
    info = httpx.get(f"{served.url}/info").json()
    assert info == served.single.info() | {"version": __version__, "limits": LIMITS}
    paths = httpx.get(f"{served.url}/openapi.json").json()["paths"]
    assert set(paths) == {"/predict", "/retrieve", "/explain", "/health", "/info"}


def test_concurrent_requests_each_get_their_own_answer(served: Served) -> None:
    texts = [" ".join(WORDS[(i * s) % len(WORDS)] for s in (1, 2, 3, 5)) for i in range(1, 61)]

    def ask(i: int) -> Any:
        if i % 3 == 0:
            return served.post("retrieve", {"inputs": texts[i], "k": 1 + i % 5}).json()
        if i % 3 == 1:
            return served.post("predict", {"inputs": [texts[i], texts[i - 1]]}).json()
        return served.post("explain", {"inputs": texts[i]}).json()

    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(ask, range(60)))
    for i, answer in enumerate(answers):
        if i % 3 == 0:
            expected = served.single.retrieve([(texts[i], None)], 1 + i % 5)[2][0].tolist()
            assert [r["similarity"] for r in answer] == pytest.approx(expected, abs=1e-5)
        elif i % 3 == 1:
            assert [{a["label"]: a["score"] for a in row} for row in answer] == [
                expected_scores(served.single, t) for t in (texts[i], texts[i - 1])
            ]
        else:
            assert {a["label"]: a["score"] for a in answer["prediction"]} == expected_scores(served.single, texts[i])


# refusals


@pytest.mark.parametrize(
    ("route", "body", "status", "error"),
    [
        ("predict", {"inputs": ""}, 422, "inputs is empty"),
        ("predict", {"inputs": ["a", " \n"]}, 422, "inputs[1] is empty"),
        ("predict", {"inputs": []}, 422, "inputs is an empty list"),
        ("predict", {"input": "a"}, 422, "inputs is missing"),
        ("predict", {"inputs": "a", "topk": 1}, 422, "there is no field topk"),
        ("predict", {"inputs": 3}, 422, "inputs: found 3"),
        ("predict", {"inputs": None}, 422, "inputs: found null"),
        ("predict", {"inputs": ["a", ["b"]]}, 422, 'inputs[1]: found ["b"]'),
        ("predict", {"inputs": {"txt": "a"}}, 422, 'inputs has the unknown field "txt"'),
        ("predict", {"inputs": {}}, 422, "inputs.text is missing"),
        ("predict", {"inputs": {"text": 1}}, 422, "inputs.text: found 1"),
        ("predict", {"inputs": {"text": "a", "text_pair": "b"}}, 422, "inputs.text_pair is given, but this task takes single texts"),
        ("predict", ["a"], 422, 'the body: found ["a"]'),
        ("predict", {"inputs": "a", "top_k": 0}, 422, "top_k: found 0"),
        ("predict", {"inputs": "a", "top_k": "1"}, 422, 'top_k: found "1"'),
        ("retrieve", {"inputs": "a", "k": 101}, 422, "k: found 101"),
        ("retrieve", {"inputs": "a", "k": 2.5}, 422, "k: found 2.5"),
        ("predict", {"inputs": ["a"] * 6}, 413, "inputs holds 6 texts"),
        ("predict", {"inputs": ["a", "a" * 201]}, 413, "inputs[1] has 201 characters"),
        ("explain", {"inputs": "a" * 5000}, 413, "the body has 5"),
        ("pair/predict", {"inputs": "a"}, 422, "inputs.text_pair is missing: this task compares two texts"),
        ("pair/predict", {"inputs": [{"text": "a"}]}, 422, "inputs[0].text_pair is missing"),
        ("pair/predict", {"inputs": {"text": "a", "text_pair": ""}}, 422, "inputs.text_pair is empty"),
        ("predict/", {"inputs": "a"}, 404, "Not Found"),
    ],
)
def test_refusal_says_why(served: Served, route: str, body: Any, status: int, error: str) -> None:
    answer = served.post(route, body)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/json")
    assert answer.json()["error"].startswith(error)
    assert answer.json()["expected"]


@pytest.mark.parametrize(
    ("content", "status", "error"),
    [
        (b"{bad", 400, "the body is not JSON: Expecting property name"),
        (b"", 422, "the body is empty"),
        (b'{"inputs": "\xff"}', 400, "There was an error parsing the body"),
        (b"[" * 3900, 400, "There was an error parsing the body"),
        (b'{"inputs": "\\ud800"}', 422, "inputs holds half of a surrogate pair"),
        (b'{"inputs": NaN}', 422, "inputs: found NaN"),
    ],
)
def test_body_that_is_no_json_or_no_text(served: Served, content: bytes, status: int, error: str) -> None:
    answer = httpx.post(f"{served.url}/predict", content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"][: len(error)]) == (status, error)
    assert answer.json()["expected"]


def test_other_content_types_and_methods(served: Served) -> None:
    answer = httpx.post(f"{served.url}/predict", data={"inputs": "a"})
    assert answer.status_code == 415
    assert answer.json() == {"error": 'Content-Type: found "application/x-www-form-urlencoded"', "expected": "application/json"}
    assert httpx.post(f"{served.url}/predict", content=b'{"inputs": "a"}').status_code == 415
    answer = httpx.get(f"{served.url}/predict")
    assert (answer.status_code, answer.json()["error"]) == (405, "Method Not Allowed")
    assert "POST /predict" in httpx.get(f"{served.url}/nowhere").json()["expected"]


def test_chunked_body_is_bounded(served: Served) -> None:
    chunks = (b'{"inputs": "' if i == 0 else b"a" * 1000 for i in range(50))
    answer = httpx.post(f"{served.url}/predict", content=chunks, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]) == (413, "the body has more than 4000 bytes")


def test_fault_of_the_server_is_json_with_an_id_that_the_log_has(served: Served) -> None:
    answer = served.post("broken/predict", {"inputs": "a film"})
    assert answer.status_code == 500
    assert answer.json()["error"] == "the server failed on this request"
    code = answer.json()["error_id"]
    for _ in range(50):  # the log is written by another process
        text = "".join(p.read_text() for p in served.logs.glob("replica_broken_*"))
        if code in text:
            break
        time.sleep(0.1)
    assert f"error {code} in POST" in text
    assert "Out of range float values" in text


def test_overload_is_refused_with_retry_after(served: Served) -> None:
    heavy = {"inputs": ["a warm film"] * 256, "k": 12}  # two such at a time are what this app takes
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: served.post("broken/retrieve", heavy), range(12)))
    assert {a.status_code for a in answers} == {200, 503}
    refused = next(a for a in answers if a.status_code == 503)
    assert refused.headers["retry-after"] == "1"
    assert refused.json() == {"error": "2 requests are waiting already", "expected": "the same request a second later"}
    assert served.post("broken/retrieve", {"inputs": "a film"}).status_code == 200


# page, client, config


def test_page_is_served_and_needs_nothing_else(served: Served) -> None:
    for path in ("/", "/pair/"):
        answer = httpx.get(served.url + path)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/html")
        assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    page = answer.text
    assert not re.search(r"https?://|innerHTML|insertAdjacentHTML|document\.write", page)
    assert set(re.findall(r'\$\("([\w-]+)"\)', page)) <= set(re.findall(r'id="([\w-]+)"', page))
    assert set(re.findall(r'for="([\w-]+)"', page)) == {"text", "text_pair"}


def run_client(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(ROOT / "serve" / "client.py"), *args], capture_output=True, text=True, timeout=60)


def test_client_command(served: Served) -> None:
    done = run_client("--url", served.url, "a fine film", "so weak")
    assert done.returncode == 0, done.stderr
    rows = [{a["label"]: a["score"] for a in json.loads(line)} for line in done.stdout.splitlines()]
    assert rows == [expected_scores(served.single, t) for t in ("a fine film", "so weak")]
    done = run_client("--url", served.url, "--retrieve", "2", "a dull film")
    assert json.loads(done.stdout)[0]["text"] == "a dull film"
    done = run_client("--url", f"{served.url}/pair", "--pair", "--explain", "a film", "a play")
    assert json.loads(done.stdout)["prediction"][0]["label"] == "LABEL_0"


def test_client_errors_are_one_line(served: Served) -> None:
    done = run_client("--url", served.url, "--pair", "a film", "a play")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {served.url}/predict answered 422: inputs[0].text_pair is given")
    port = free_port()
    done = run_client("--url", f"http://127.0.0.1:{port}", "a film")
    assert (done.returncode, done.stderr) == (1, f"error: http://127.0.0.1:{port}/predict: [Errno 111] Connection refused\n")


def unknown_keys(value: Any, schema: Any, path: str = "") -> list[str]:
    """Keys of the YAML that Serve would ignore in silence; `schema` is the parsed model."""
    if isinstance(value, list):
        return [k for i, (v, s) in enumerate(zip(value, schema, strict=True)) for k in unknown_keys(v, s, f"{path}[{i}]")]
    if not isinstance(schema, BaseModel):
        return []
    known = type(schema).model_fields
    wrong = [f"{path}.{k}" for k in value if k not in known]
    return wrong + [k for name, v in value.items() if name in known for k in unknown_keys(v, getattr(schema, name), f"{path}.{name}")]


def test_yaml_has_only_keys_that_serve_and_the_app_know() -> None:
    config = yaml.safe_load((ROOT / "serve" / "retrikt.yaml").read_text())
    assert unknown_keys(config, ServeDeploySchema.model_validate(config)) == []
    (app,) = config["applications"]
    assert app["import_path"] == "retrikt_ray.serving:build_app"
    assert parse_args(app["args"]).run == "runs/quickstart"
    assert (config["http_options"]["host"], config["http_options"]["port"]) == ("127.0.0.1", 8000)
    typo = {**config, "http_options": {"prot": 8000}, "applications": [{**app, "route_prefx": "/"}]}
    assert unknown_keys(typo, ServeDeploySchema.model_validate(typo)) == [".http_options.prot", ".applications[0].route_prefx"]


# starting


def test_unknown_args_are_named() -> None:
    with pytest.raises(ConfigError, match=r"max_bach: there is no such key; did you mean max_batch\?"):
        build_app({"run": "x", "max_bach": 3})
    with pytest.raises(ConfigError, match="run: this key is required"):
        build_app({})
    with pytest.raises(ConfigError, match="replicas: found 0; "):
        build_app({"run": "x", "replicas": 0})


def test_busy_port_is_an_error_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot listen on 127\.0\.0\.1:{port}: Address already in use"):
            serve_run(str(make_run(tmp_path / "run")), "127.0.0.1", port, {})
    check_port("127.0.0.1", port)
    with pytest.raises(ConfigError, match="port: found 70000, expected 1 to 65535"):
        check_port("127.0.0.1", 70000)
    with pytest.raises(ConfigError, match=r"cannot listen on no\.such\.host\.invalid:8000"):
        check_port("no.such.host.invalid", 8000)


def test_damaged_index_is_refused_by_name(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    shard = tmp_path / "run" / "index" / "shard-0001.faiss"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"index/shard-0001\.faiss was altered"):
        serve_run(str(run), "127.0.0.1", free_port(), {})


def test_serve_run_serves_until_interrupted(tmp_path: Path) -> None:
    run, port = make_run(tmp_path / "run"), free_port()
    code = f"from retrikt_ray.serving import serve_run; serve_run({str(run)!r}, '127.0.0.1', {port}, {{}})"
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, start_new_session=True
    )
    try:
        assert server.stdout is not None
        lines = [server.stdout.readline(), server.stdout.readline()]
        assert lines[0] == f"serving {run} on http://127.0.0.1:{port} (page; API in /openapi.json); Ctrl-C stops\n"
        assert lines[1].strip().startswith("curl ")
        answer = subprocess.run(lines[1].strip(), shell=True, capture_output=True, text=True, timeout=30)  # the line that users copy
        assert {a["label"] for a in json.loads(answer.stdout)} == set(LABELS)
        began = time.monotonic()
        server.send_signal(signal.SIGINT)
        rest, _ = server.communicate(timeout=30)
        assert (server.returncode, rest) == (0, "stopping\n")
        assert time.monotonic() - began < 15
    finally:
        if server.poll() is None:
            server.kill()
    check_port("127.0.0.1", port)

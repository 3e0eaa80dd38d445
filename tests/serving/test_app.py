"""The Serve app and `retrikt serve`: one server with its own Ray on a free loopback port, and what is refused before one starts."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from making.serving_local import JSON, Replica, close_to, replica
from making.tiny_run import LABELS, TEXTS, make_run
from pydantic import BaseModel
from ray.serve.schema import ServeDeploySchema

from retrikt_ray import Client, Predictor
from retrikt_ray.knowledge.knowledge import Knowledge
from retrikt_ray.runtime.artifacts import check
from retrikt_ray.runtime.folders import ArtifactError, Folder
from retrikt_ray.runtime.leases.hold import KNOWLEDGE, hold
from retrikt_ray.runtime.settings import ConfigError
from retrikt_ray.serving.app import build_app
from retrikt_ray.serving.args import parse_args
from retrikt_ray.serving.server import address_of, free_port, serve_run

ROOT = Path(__file__).parents[2]
QUERY = "a zebra film"


# what is refused before anything starts


def test_the_deployment_is_what_the_args_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "runs" / "mine")
    app: Any = build_app({"run": "runs/mine", "replicas": 2, "threads": 3, "max_batch": 8, "max_queued": 4, "open": "read"})
    deployment, config = app._bound_deployment, app._bound_deployment._deployment_config
    assert deployment.init_args[0]["run"] == str(tmp_path / "runs" / "mine")  # a replica's working directory is another
    assert (deployment.num_replicas, deployment.ray_actor_options["num_cpus"]) == (2, 3)
    held = sum(size["bytes"] for name in ("student", "index") for size in check(run / name).files.values())
    assert deployment.ray_actor_options["memory"] == 1_000_000_000 + held + 500 * sum(check(run / "store").rows.values())
    assert config.max_ongoing_requests > 2 * 8 + 4  # what is too much, the replica refuses itself
    with pytest.raises(ConfigError, match=r"max_bach: there is no such key; did you mean max_batch\?"):
        build_app({"run": "x", "max_bach": 3})


def test_busy_port_is_an_error_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot listen on 127\.0\.0\.1:{port}: Address already in use"):
            serve_run(str(make_run(tmp_path / "run")), "127.0.0.1", port, {})
    address_of("127.0.0.1", port)
    with pytest.raises(ConfigError, match="port: found 70000, expected 1 to 65535"):
        address_of("127.0.0.1", 70000)
    with pytest.raises(ConfigError, match=r"cannot listen on no\.such\.host\.invalid:8000"):
        address_of("no.such.host.invalid", 8000)


def test_damaged_index_is_refused_by_name(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    shard = tmp_path / "run" / "index" / "shard-0001.faiss"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"index/shard-0001\.faiss was altered"):
        serve_run(str(run), "127.0.0.1", free_port(), {})


def test_a_cluster_of_others_is_not_served_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS is set: .* use `serve deploy serve/retrikt\.yaml`"):
        serve_run("runs/mine", "127.0.0.1", free_port(), {})


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
    assert app["import_path"] == f"{build_app.__module__}:{build_app.__name__}"
    assert parse_args(app["args"]).run == "runs/quickstart"
    assert (config["http_options"]["host"], config["http_options"]["port"]) == ("127.0.0.1", 8000)
    typo = {**config, "http_options": {"prot": 8000}, "applications": [{**app, "route_prefx": "/"}]}
    assert unknown_keys(typo, ServeDeploySchema.model_validate(typo)) == [".http_options.prot", ".applications[0].route_prefx"]


# a server


@dataclass
class Live:
    """A server that `retrikt serve` started, and the same run opened here."""

    process: subprocess.Popen[str]
    run: str
    url: str
    said: list[str]  # its first two lines
    logs: Path
    client: httpx.Client
    here: Replica  # its shards are in this process, those of the server in deployments of their own

    def post(self, route: str, body: Any) -> httpx.Response:
        return self.client.post(f"/{route}", json=body)

    def logged(self, code: str) -> str:
        """The log of the replica, once it has this error id: another process writes it."""
        for _ in range(50):
            text = "".join(p.read_text() for p in self.logs.glob("session_2*/logs/serve/replica_*"))
            if code in text:
                break
            time.sleep(0.1)
        return text


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    runs, port = tmp_path_factory.mktemp("runs"), free_port()
    run = str(make_run(runs / "run"))
    limits: dict[str, Any] = {"max_texts": 5, "max_text_chars": 200, "max_body_bytes": 4000, "deadline_s": 6}
    limits |= {"runs": str(runs / "others"), "runs_held": 1}
    home = Path(tempfile.mkdtemp(prefix="serving-"))  # Ray's sockets want a short path
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(home)}
    args = [f"{key}={value}" for key, value in {**limits, "shard_groups": 2}.items()]
    server = subprocess.Popen(
        [sys.executable, "-m", "retrikt_ray", "serve", run, "--port", str(port), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
        start_new_session=True,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        with replica(run, **limits) as here, httpx.Client(base_url=url, timeout=30) as client:
            assert server.stdout is not None
            said = [server.stdout.readline(), server.stdout.readline()]
            yield Live(server, run, url, said, home / "ray", client, here)
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGINT)
            server.communicate(timeout=30)
        shutil.rmtree(home, ignore_errors=True)


def test_the_server_says_where_it_is_and_how_it_is_asked(live: Live) -> None:
    assert live.said[0] == f"serving {live.run} on {live.url} (page; API in /docs); Ctrl-C stops\n"
    command = live.said[1].strip()
    assert command.startswith("curl ")
    answer = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=30)  # the line that users copy
    assert {a["label"] for a in json.loads(answer.stdout)} == set(LABELS)


def test_answers_are_those_of_a_replica_here_to_the_last_digit(live: Live) -> None:
    for inputs in ("a fine film", ["never cold", "so weak"], [{"text": "unheard of"}]):
        for route, more in (
            ("predict", {}),
            ("explain", {}),
            ("retrieve", {}),
            ("retrieve", {"mode": "hybrid", "k": 12, "source": "task"}),
            ("embed", {}),
        ):
            body = {"inputs": inputs, **more}
            assert live.post(route, body).json() == live.here.post(route, body).json()
    for path in ("/", "/docs", "/info", "/health", "/ready", "/openapi.json", "/knowledge?q=film"):
        answer, here = live.client.get(path), live.here.get(path)
        assert (answer.content, answer.status_code) == (here.content, 200)
        for name in ("content-type", "content-security-policy", "x-frame-options", "etag"):
            assert answer.headers.get(name) == here.headers.get(name)


def test_other_runs_are_answered_from_where_a_request_names_them(live: Live) -> None:
    """Two more, of which one at a time is open; what is edited stays so while the other is."""
    others = Path(live.run).parent / "others"
    for seed, name in enumerate(("first", "second"), 1):
        make_run(others / name, seed=seed)
    make_run(others / "damaged", seed=3)
    (others / "damaged" / "student" / "config.json").write_text("{}")
    texts, row = ["a fine film", "so weak"], {"id": "new", "text": QUERY, "label": LABELS[0]}
    names = (None, "first", "second", "first")
    clients = {name: Client(live.url, run=name) for name in names}
    found = [[[a.score for a in answer] for answer in clients[name].predict(texts)] for name in names]
    assert found[0] != found[1] != found[2] and found[1] == found[3]
    assert found[1] == [sorted(row, reverse=True) for row in Predictor.open(str(others / "first")).predict(texts).answers.tolist()]
    edited = clients["first"].put([row])
    assert [c.explain([QUERY])[0].told for c in clients.values()] == [None, "new", None]
    assert clients["first"].listing().version == edited.version
    assert live.client.get("/knowledge").json()["version"] != edited.version

    for name, status, why in (
        ("third", 404, "there is no run .third."),
        ("../run", 404, r"there is no run .\.\./run."),
        ("damaged", 503, "the run damaged cannot be opened: runs/damaged/student/config.json has 2 bytes"),
    ):
        answer = live.client.post("/predict", json={"inputs": "a"}, headers={"serve-multiplexed-model-id": name})
        assert (answer.status_code, re.search(why, answer.json()["error"]) is not None) == (status, True), answer.text
        assert answer.headers.get("retry-after") == ("30" if status == 503 else None)
    assert 'retrikt_knowledge_version{run="first"} 1.0' in live.client.get("/metrics").text


def shard_groups(live: Live) -> list[psutil.Process]:
    """The processes of the deployments Shards0 and Shards1."""
    found = [p for p in psutil.Process(live.process.pid).children(recursive=True) if ":Shards" in " ".join(p.cmdline())]
    return sorted(found, key=lambda p: p.cmdline())


def test_shards_are_in_deployments_of_their_own(live: Live) -> None:
    assert len(shard_groups(live)) == 2


def test_refusals_come_through_the_proxy_as_they_are(live: Live) -> None:
    chunks = (b'{"inputs": "' if i == 0 else b"a" * 1000 for i in range(50))
    answer = live.client.post("/predict", content=chunks, headers=JSON)
    assert (answer.status_code, answer.json()["error"]) == (413, "the body has more than 4000 bytes")
    for path, content, headers in (
        ("/predict", b"{bad", JSON),
        ("/predict", b'{"inputs": ""}', JSON),
        ("/predict", b'{"inputs": "a"}', {}),
        ("/predict", b"a" * 5000, JSON),
        ("/nowhere", b"{}", JSON),
        ("/info", b"{}", JSON),
    ):
        answer, here = live.client.post(path, content=content, headers=headers), live.here.send(content, path[1:], headers)
        assert (answer.status_code, answer.json(), answer.headers["content-type"]) == (here.status_code, here.json(), "application/json")


def raw(live: Live, pieces: Iterator[bytes]) -> tuple[int, dict[str, str], Any]:
    """What is answered to bytes as they are: status, headers, JSON. What the server no longer reads is not sent."""
    with socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2])), timeout=30) as sender:
        try:
            for piece in pieces:
                sender.sendall(piece)
        except (BrokenPipeError, ConnectionResetError):
            pass
        answer = b""
        while True:
            try:
                piece = sender.recv(65536)
            except ConnectionResetError:
                break
            answer += piece
            head, gap, body = answer.partition(b"\r\n\r\n")
            headers = dict(line.lower().split(": ", 1) for line in head.decode().split("\r\n")[1:]) if gap else {}
            size = int(headers.get("content-length", -1))
            if not piece or (gap and 0 <= size <= len(body)):
                break
    known = headers.get("content-type") == "application/json"
    return (
        int(answer.split()[1]),
        headers,
        json.loads(body[:size]) if known else None,
    )  # what was sent beyond it is another request, and none


def test_hostile_senders(live: Live) -> None:
    """Bodies of 100 MB, announced and not; heads that are too long, no HTTP, or never end; bodies that never end; all at once."""
    start = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    megabyte = b"%x\r\n%b\r\n" % (2**20, b"a" * 2**20)

    def never() -> Iterator[bytes]:
        yield start + b"Content-Length: 100\r\n\r\n{"

    senders: list[tuple[Iterator[bytes], int, str | None]] = [
        (iter([start + b"Content-Length: 100000000\r\n\r\n", *[b"a" * 2**20] * 100]), 413, "too_large"),
        (iter([start + b"Transfer-Encoding: chunked\r\n\r\n", *[megabyte] * 100]), 413, "too_large"),
        (iter([start, *(b"X-Header-%d: a\r\n" % i for i in range(5000)), b"\r\n"]), 400, None),
        (iter([start + b"X-Header: " + b"a" * 2**20 + b"\r\n\r\n"]), 400, None),
        (iter([b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n"]), 400, None),
        (iter([start]), 408, None),
        (never(), 408, "slow_request"),
    ]
    with ThreadPoolExecutor(len(senders)) as pool:
        answers = list(pool.map(lambda sender: raw(live, sender[0]), senders))
    for (_, status, code), (found, _, body) in zip(senders, answers, strict=True):
        assert (found, body and body["code"]) == (status, code)  # None: HAProxy's own words about what is no request yet
    assert live.post("predict", {"inputs": "a fine film"}).status_code == 200


def test_requests_at_the_same_time(live: Live) -> None:
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda text: live.post("predict", {"inputs": text}).json(), TEXTS * 3))
    assert answers == close_to([live.here.post("predict", {"inputs": text}).json() for text in TEXTS]) * 3


def test_the_typed_client_works(live: Live) -> None:
    with Client(live.url) as client:
        explained = [answer.model_dump() for answer in client.explain(["a fine film", "so weak"])]
    want = live.here.post("explain", {"inputs": ["a fine film", "so weak"]}).json()
    assert [answer["prediction"] for answer in explained] == [answer["prediction"] for answer in want]


@pytest.mark.parametrize("route", ["", "/predict"])
def test_the_hugging_face_client_works_unmodified(live: Live, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # the tests are; this asks the loopback
    client = InferenceClient(model=live.url + route)
    want = [(a["label"], a["score"]) for a in live.here.post("predict", {"inputs": "a fine film"}).json()]
    assert [(a.label, a.score) for a in client.text_classification("a fine film")] == want
    assert [(a.label, a.score) for a in client.text_classification("a fine film", top_k=1)] == want[:1]
    raw = client.text_classification("a fine film", function_to_apply="none")
    assert [(a.label, math.exp(a.score)) for a in raw] == [(label, pytest.approx(score)) for label, score in want]
    vector = InferenceClient(model=f"{live.url}/embed").feature_extraction("a fine film", normalize=True, truncate=True)
    assert vector.shape == (1, 8) and (vector**2).sum() == pytest.approx(1)
    with pytest.raises(HfHubHTTPError, match="422"):
        client.text_classification("a fine film", function_to_apply="sigmoid")


def test_a_client_of_text_embeddings_inference_works_unmodified(live: Live) -> None:
    """What TEI's documentation sends, and what its clients read."""
    body = {"inputs": "a fine film", "raw_scores": False, "truncate": False}
    (one,) = (live.client.post("/predict", json=body).json(),)
    assert one == live.here.post("predict", {"inputs": "a fine film"}).json()
    several = live.client.post(
        "/predict", json={"inputs": [["a fine film"], ["so weak"]], "truncate": True, "truncation_direction": "Right"}
    )
    assert several.json() == close_to([one, live.here.post("predict", {"inputs": "so weak"}).json()])
    raw = live.client.post("/predict", json={"inputs": "a fine film", "raw_scores": True}).json()
    total = sum(math.exp(a["score"]) for a in raw)
    assert [(a["label"], math.exp(a["score"]) / total) for a in raw] == [(a["label"], pytest.approx(a["score"])) for a in one]
    vectors = [
        live.client.post("/embed", json={"inputs": i, "normalize": True, "truncate": False}).json() for i in ("so weak", ["so weak", "a"])
    ]
    assert [len(v) for v in vectors] == [1, 2] and vectors[0][0] == pytest.approx(vectors[1][0])
    assert live.client.post("/predict", json={"inputs": "a" * 300, "truncate": True}).status_code == 200
    assert live.client.post("/predict", json={"inputs": "a" * 300}).status_code == 413


def listening(process: psutil.Process) -> set[tuple[str, int]]:
    """Where a server and all that it has started listen."""
    every = [process, *process.children(recursive=True)]
    found = {c.laddr for p in every for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN or c.type == socket.SOCK_DGRAM}
    return {(address.ip.removeprefix("::ffff:"), address.port) for address in found}


def test_nothing_listens_beyond_the_loopback(live: Live) -> None:
    """Neither HAProxy's statistics, nor Ray's own ports, nor those on which replicas call each other."""
    sockets = listening(psutil.Process(live.process.pid))
    assert ("127.0.0.1", int(live.url.rpartition(":")[2])) in sockets and len(sockets) > 8
    assert {ip for ip, _ in sockets} == {"127.0.0.1"}


def both(live: Live) -> Any:
    """What the server says of the query now; a replica here says the same."""
    answers = []
    for ask in (live.post, live.here.post):
        bodies: dict[str, Any] = {"predict": {}, "explain": {}, "retrieve": {"k": 20, "mode": "hybrid"}}
        answers.append([ask(route, {"inputs": QUERY, **body}).json() for route, body in bodies.items()])
    assert answers[0] == answers[1]
    return answers[0][2]["dense"]


def test_edits_and_compaction_under_the_server(live: Live) -> None:
    """Each is in its next answer; shards of the new base are opened by those who held the old one's."""
    before, groups, knowledge = both(live), shard_groups(live), Knowledge.open(live.run)
    knowledge.add([{"id": "new-1", "text": QUERY, "label": "negative"}])
    assert [(r["id"], r["label"]) for r in both(live)[:1]] == [("new-1", "negative")]
    knowledge.update([{"id": "new-1", "label": "positive"}])
    assert [(r["id"], r["label"]) for r in both(live)[:1]] == [("new-1", "positive")]
    knowledge.delete([before[0]["id"]])
    edited = both(live)
    assert [r["id"] for r in edited] == ["new-1", *(r["id"] for r in before[1:])]
    assert knowledge.compact()
    assert both(live) == close_to(edited)
    assert live.client.get("/info").json()["store"] == {"rows": 12, "version": 4}
    assert shard_groups(live) == groups


def test_a_group_of_shards_that_was_killed_comes_back(live: Live) -> None:
    """Meanwhile answers are the same, or refused."""
    want, killed = both(live), shard_groups(live)[1]
    killed.kill()
    until = time.monotonic() + 60
    while True:
        answer = live.post("retrieve", {"inputs": QUERY, "k": 20, "mode": "dense"})
        if answer.status_code == 200:
            break
        assert (answer.status_code, answer.headers["retry-after"], time.monotonic() < until) == (503, "2", True)
    assert answer.json() == want and both(live) == want
    assert killed not in shard_groups(live) and len(shard_groups(live)) == 2


def test_a_fault_is_in_the_log_of_the_replica(live: Live) -> None:
    Knowledge.open(live.run).add([{"id": "new-2", "text": QUERY, "label": "negative"}])
    answer = damaged(live, {"inputs": QUERY})
    assert answer.status_code == 500
    code = answer.json()["error_id"]
    log = live.logged(code)
    assert f"error {code} in POST /predict" in log
    assert re.search(r"ArtifactError: .*manifest\.json", log)
    assert "new-2" in [r["id"] for r in both(live)]


def test_what_users_send_is_not_in_any_log(live: Live) -> None:
    """Nor is it when a request is refused, and when the server fails on it."""
    secret = "zanzibarsecret"
    for route, body in (
        ("predict", {}),
        ("explain", {}),
        ("retrieve", {"label": secret}),
        ("predict", {secret: 1}),
        ("embed", {"truncate": secret}),
    ):
        live.post(route, {"inputs": f"a {secret} film", **body})
    live.client.put("/knowledge", json={"rows": [{"id": secret, "text": secret, "label": secret}]})
    live.client.put("/knowledge", json={"rows": [{"id": secret, "text": secret, "label": "positive"}]})
    live.client.request("DELETE", f"/knowledge?id={secret}")
    live.client.request("DELETE", f"/knowledge?id={secret}")
    live.client.get(f"/knowledge?q={secret}")
    live.client.get(f"/?text={secret}")
    live.client.get(f"/{secret}", headers={"Authorization": f"Bearer {secret}"})
    code = damaged(live, {"inputs": secret}).json()["error_id"]
    assert code in live.logged(code)  # so the logs are those of this server
    folders = [
        live.logs,
        *(Path(p).parent for c in psutil.Process(live.process.pid).children(recursive=True) for p in c.cmdline() if "retrikt-serve-" in p),
    ]
    assert len(folders) > 1  # of HAProxy, too
    for path in {p for folder in folders for p in folder.rglob("*") if p.is_file()}:
        assert secret.encode() not in path.read_bytes(), path


def damaged(live: Live, body: Any) -> httpx.Response:
    """The answer while the log of the knowledge is damaged, so that the server fails."""
    Knowledge.open(live.run).add([{"text": f"one more {time.time()}", "label": "negative"}])
    path = Path(live.run) / "knowledge" / "manifest.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:-3] + b"???")
    try:
        return live.post("predict", body)
    finally:
        path.write_bytes(whole)


def test_interrupt_answers_what_was_asked_and_frees_the_port(live: Live) -> None:
    """The last of this file: it ends the server. A request is held up in the replica: this process has the right to edit."""
    with ThreadPoolExecutor(1) as pool:
        with hold(Folder.at(live.run), KNOWLEDGE):
            waiting = pool.submit(live.client.put, "/knowledge", json={"rows": [{"id": "last", "text": "the last", "label": "negative"}]})
            time.sleep(1)
            assert not waiting.done()
            began = time.monotonic()
            live.process.send_signal(signal.SIGINT)
            time.sleep(0.5)
        assert (waiting.result().status_code, waiting.result().json()["ids"]) == (200, ["last"])
    rest, _ = live.process.communicate(timeout=30)
    said = [line for line in rest.splitlines() if "(raylet)" not in line]  # it tells of the group that was killed above
    assert (live.process.returncode, said) == (0, ["stopping"])
    assert time.monotonic() - began < 25
    address_of("127.0.0.1", int(live.url.rpartition(":")[2]))

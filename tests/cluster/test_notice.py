"""Notices of spot nodes: read as EC2 and Compute Engine give them, from a server that answers like theirs. (What a drained node is to a training: test_nodes.)"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest

SPEC = spec_from_file_location("notice", Path(__file__).resolve().parents[2] / "cluster" / "notice.py")
assert SPEC and SPEC.loader
notice: Any = module_from_spec(SPEC)
SPEC.loader.exec_module(notice)
ACTION, PREEMPTED = "/latest/meta-data/spot/instance-action", "/computeMetadata/v1/instance/preempted"


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """What a metadata service says, by path; what is not there is a 404, and what comes without its token a 401."""
    says: dict[str, str] = {}

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int, body: str = "") -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def do_PUT(self) -> None:
            known = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
            self.answer(200, "a token") if known else self.answer(400)

        def do_GET(self) -> None:
            if self.headers["X-aws-ec2-metadata-token"] != "a token" and self.headers["Metadata-Flavor"] != "Google":
                return self.answer(401)
            self.answer(200, says[self.path]) if self.path in says else self.answer(404)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
        yield says
        server.shutdown()


def test_ec2_says_when_a_spot_node_ends(metadata: dict[str, str]) -> None:
    assert notice.aws() is None
    end = datetime.now(UTC) + timedelta(seconds=120)
    metadata[ACTION] = json.dumps({"action": "terminate", "time": end.strftime("%Y-%m-%dT%H:%M:%SZ")})
    assert notice.aws() == pytest.approx(120, abs=5)


def test_compute_engine_says_that_a_spot_node_ends(metadata: dict[str, str]) -> None:
    metadata[PREEMPTED] = "FALSE"
    assert notice.gcp() is None
    metadata[PREEMPTED] = "TRUE"
    assert notice.gcp() == notice.GCP_S


def test_a_notice_is_passed_on_once_the_cluster_hears(
    metadata: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No service yet, then none that ends, then a notice, which the cluster hears the second time."""
    seen: list[float] = []
    there = notice.os.environ["GCE_METADATA_HOST"]
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:1")

    def time_passes(_: float) -> None:
        match len(passed):
            case 1:
                monkeypatch.setenv("GCE_METADATA_HOST", there)
                metadata[PREEMPTED] = "FALSE"
            case 2:
                metadata[PREEMPTED] = "TRUE"
        passed.append(None)

    passed: list[None] = []
    monkeypatch.setattr(notice, "time", SimpleNamespace(sleep=time_passes))
    monkeypatch.setattr(notice, "drain", lambda left: seen.append(left) or len(seen) == 2)
    notice.watch("gcp")
    assert seen == [notice.GCP_S] * 2 and len(passed) == 4
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "refused" in said[0] and said[1].endswith("answers")

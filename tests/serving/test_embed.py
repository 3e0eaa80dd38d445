"""`serve/embed.py`: a Predictor in somebody's own FastAPI app answers what a server does, to the last bit."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from making.serving_local import JSON, Local, replica
from making.tiny_run import TEXTS, make_run

from retrikt_ray.knowledge.knowledge import Knowledge

EXAMPLE = Path(__file__).parents[2] / "serve" / "embed.py"


def test_an_app_of_ones_own_answers_as_the_server_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = str(make_run(tmp_path / "run", kind="convolution"))
    monkeypatch.setenv("RUN", run)
    own = Local(runpy.run_path(str(EXAMPLE))["app"])
    with replica(run) as served:
        for text in [*TEXTS, "a zebra film", "unheard of"]:
            answer = own.request("POST", "/tickets", params={"subject": text}).json()
            want = served.post("explain", {"inputs": text}).json()
            best = want["prediction"][0]
            assert (answer["desk"], answer["probability"]) == (best["label"], best["score"])
            assert answer["similar"] == [{"text": row["text"], "label": row["label"]} for row in want["neighbours"][:3]]
        Knowledge.open(run).add([{"text": "a zebra film", "label": "negative"}])
        assert own.send(b"", "reload", JSON).json() == {"rows": 13}
        assert own.request("POST", "/tickets", params={"subject": "a zebra film"}).json()["probability"] == 1.0

"""A client that openapi-python-client makes of /openapi.json works as it comes. `make test-openapi` installs the generator in an environment of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest
from making.serving_local import listening, replica
from making.tiny_run import make_run

from retrikt_ray.serving.api.routes import build_api

HERE = Path(__file__).parents[2] / ".venv-openapi" / "bin"
GENERATOR = shutil.which("openapi-python-client", path=str(HERE))
pytestmark = [pytest.mark.slow, pytest.mark.skipif(GENERATOR is None, reason="there is no generator; `make test-openapi` installs it")]
SCRIPT = """
import json, sys
from made import Client
from made.api.default import delete_knowledge, embed, explain, info, knowledge, metrics, predict, put_knowledge, retrieve
from made.models import DeleteBody, EmbedBody, Body, PredictBody, PutBody, PutBodyRowsItem, RetrieveBody, RetrieveBodyMode, Problem

client = Client(base_url=sys.argv[1], raise_on_unexpected_status=True)
row = PutBodyRowsItem(text="a zebra film", label="negative")
told = {"predict": [s.to_dict() for s in predict.sync(client=client, body=PredictBody(inputs="a fine film", top_k=1))]}
told["several"] = [[s.to_dict() for s in one] for one in predict.sync(client=client, body=PredictBody(inputs=["a fine film", "so weak"]))]
told["embed"] = embed.sync(client=client, body=EmbedBody(inputs="a fine film"))
told["hybrid"] = retrieve.sync(client=client, body=RetrieveBody(inputs="a fine film", k=2, mode=RetrieveBodyMode.HYBRID)).to_dict()
told["explain"] = explain.sync(client=client, body=Body(inputs="a fine film")).to_dict()
refused = predict.sync(client=client, body=PredictBody(inputs=""))
assert isinstance(refused, Problem) and refused.code == "invalid"
put = put_knowledge.sync(client=client, body=PutBody(rows=[row]))
listed = knowledge.sync(client=client, q="zebra", limit=5)
assert [r.id for r in listed.rows] == put.ids and listed.version == put.version == info.sync(client=client).release + ".1"
conflict = delete_knowledge.sync(client=client, body=DeleteBody(ids=put.ids), if_match=f'"{info.sync(client=client).release}.0"')
assert isinstance(conflict, Problem) and conflict.code == "version_differs"
assert delete_knowledge.sync(client=client, body=DeleteBody(ids=put.ids), if_match=f'"{put.version}"').before[0].to_dict()["text"] == "a zebra film"
assert "retrikt_requests_total" in metrics.sync(client=client)
print(json.dumps(told))
"""


def test_a_generated_client_works(tmp_path: Path) -> None:
    with replica(str(make_run(tmp_path / "run"))) as opened, listening(build_api(opened.endpoint)) as url:
        (tmp_path / "openapi.json").write_bytes(httpx.get(f"{url}/openapi.json").content)
        command = [str(GENERATOR), "generate", "--path", "openapi.json", "--meta", "none", "--output-path", "made"]
        made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert made.returncode == 0, made.stdout + made.stderr
        assert "Endpoint will not be generated" not in made.stdout and "unsupported" not in made.stdout.lower(), made.stdout
        (tmp_path / "script.py").write_text(SCRIPT)
        used = subprocess.run([str(HERE / "python"), "script.py", url], cwd=tmp_path, capture_output=True, text=True)
        assert used.returncode == 0, used.stderr
        told, asked = json.loads(used.stdout), {"inputs": "a fine film"}
        assert told["predict"] == opened.post("predict", {**asked, "top_k": 1}).json()
        assert told["several"] == opened.post("predict", {"inputs": ["a fine film", "so weak"]}).json()
        assert told["embed"] == opened.post("embed", asked).json()
        assert told["hybrid"] == opened.post("retrieve", {**asked, "k": 2, "mode": "hybrid"}).json()
        assert told["explain"] == opened.post("explain", asked).json()

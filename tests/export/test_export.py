"""An exported student answers as the run that it was made from, without the package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from making.tiny_run import TEXTS, make_run

from retrikt_ray.export.export import export
from retrikt_ray.index.mixture import Mixture
from retrikt_ray.knowledge.knowledge import Knowledge
from retrikt_ray.predictor import Predictor
from retrikt_ray.runtime.settings import ConfigError

ALLOWED = {"numpy", "tokenizers", "faiss"}  # and what they import; of the rest none may be loaded
ASK = """
import json, sys
from answer import Model
model = Model()
print(json.dumps({"answers": model.predict(json.loads(sys.argv[1])), "modules": sorted(m.split(".")[0] for m in sys.modules)}))
"""
EVERYTHING = Mixture(0.4, 0.3, 0.5, 0.6, 4, 0.1, 3, 1.5)


def asked(folder: Path, texts: list[Any]) -> list[dict[str, Any]]:
    """Ask the exported folder in a process of its own, which must not load the package or anything heavy."""
    done = subprocess.run([sys.executable, "-c", ASK, json.dumps(texts)], cwd=folder, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert not {"torch", "transformers", "ray", "retrikt_ray", "scipy", "sklearn", "pyarrow", "pydantic"} & set(found["modules"])
    return list(found["answers"])


@pytest.mark.parametrize("kind", ["static", "convolution"])
@pytest.mark.parametrize(("pair", "regression"), [(False, False), (True, False), (False, True)])
def test_the_same_answers(tmp_path: Path, pair: bool, regression: bool, kind: str) -> None:
    mixture = Mixture(0.2, 0.3, 0.2, 0.3, 4, 0.1, 3, 1.5) if regression else EVERYTHING
    run = make_run(tmp_path / "run", pair=pair, regression=regression, mixture=mixture, kind=kind)
    export(run.uri, str(tmp_path / "out"))
    texts: list[Any] = [(t, TEXTS[i - 1]) if pair else t for i, t in enumerate([*TEXTS, "a word that nobody knows"])]
    want = Predictor.open(run).predict(texts)
    got = asked(tmp_path / "out", texts)
    np.testing.assert_allclose([g["scores"] for g in got], want.answers, rtol=1e-4, atol=1e-5)
    assert [g["label"] for g in got] == want.labels
    assert [g["neighbours"][0]["id"] for g in got[: len(TEXTS)]] == [n[0].id for n in want.neighbours[: len(TEXTS)]]
    spoken = [{n["ngram"]: n["weight"] for n in g["ngrams"]} for g in got]
    for mine, theirs in zip(spoken, want.ngrams, strict=True):
        assert {n.ngram: pytest.approx(n.weight, abs=1e-6) for n in theirs[:5]} == mine


def test_edits_go_along(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", mixture=EVERYTHING)
    knowledge = Knowledge.open(run)
    knowledge.add([{"id": "new", "text": "zebra crossing", "label": "positive"}])
    knowledge.delete("train-000003")
    export(run.uri, str(tmp_path / "out"))
    texts = ["Zebra crossing", "crossing zebra", *TEXTS]
    got = asked(tmp_path / "out", texts)
    np.testing.assert_allclose([g["scores"] for g in got], Predictor.open(run).predict(texts).answers, rtol=1e-4, atol=1e-5)
    assert got[0]["neighbours"][0]["id"] == "new" and got[0]["scores"] == [0.0, 1.0] and 0 < got[1]["scores"][0] < 1
    assert "train-000003" not in {n["id"] for g in got for n in g["neighbours"]}


def test_the_folder_says_what_it_is(tmp_path: Path) -> None:
    made = export(make_run(tmp_path / "run").uri, str(tmp_path / "out"))
    assert set(made["files"]) == {"README.md", "answer.py", "model.json", "store.jsonl", "tokenizer.json", "vectors.faiss", "weights.npz"}
    text = (tmp_path / "out" / "README.md").read_text()
    assert "pip install numpy tokenizers faiss-cpu" in text and f"{made['rows']:,} rows" in text
    done = subprocess.run([sys.executable, "answer.py", TEXTS[0]], cwd=tmp_path / "out", capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["label"] in ("negative", "positive")


def test_a_folder_with_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        export(make_run(tmp_path / "run").uri, str(tmp_path / "out"))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]

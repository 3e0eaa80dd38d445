"""Twelve kinds of bad input, each through the command a user would type: non-zero exit, one screen, and the culprit's name."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from making.tasks import rows, tiny, write_jsonl, write_task
from making.tiny_run import make_run

from retrikt_ray.runtime.artifacts import read_manifest
from retrikt_ray.runtime.folders import Folder


def retrikt(*arguments: object, **env: str) -> str:
    """Run the command, see that it fails within one screen and without a traceback, and return what it said."""
    command = [sys.executable, "-m", "retrikt_ray", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | env)
    said = done.stdout + done.stderr
    assert done.returncode != 0, said
    assert "Traceback" not in said and len(said.splitlines()) <= 24, said
    return said


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_task(tmp_path / "data")


def write_config(folder: Path, data: Path, **more: object) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tiny("no-such-model", prepare={"data": str(data)}, **more)))
    return path


def prepare(tmp_path: Path, data: Path, *more: str) -> str:
    """`retrikt prepare` must fail and leave no artifact that looks whole."""
    said = retrikt("prepare", tmp_path / "run", write_config(tmp_path, data), *more)
    assert not (tmp_path / "run" / "task" / "manifest.json").exists()
    return said


def test_unknown_key(tmp_path: Path, data: Path) -> None:
    said = prepare(tmp_path, data, "distill.epoch=3")
    assert "distill.epoch: there is no such key" in said and "distill.epochs" in said


def test_wrong_type(tmp_path: Path, data: Path) -> None:
    said = prepare(tmp_path, data, "distill.epochs=many")
    assert "distill.epochs: found 'many'" in said and "integer" in said


def test_missing_file(tmp_path: Path, data: Path) -> None:
    assert f"{tmp_path}/nowhere: no such file or folder" in prepare(tmp_path, data, f"prepare.data={tmp_path}/nowhere")
    (data / "train.jsonl").unlink()
    assert "no train file" in prepare(tmp_path, data)


def test_one_class(tmp_path: Path, data: Path) -> None:
    write_jsonl(data / "train.jsonl", [r for r in rows(20) if r["label"] == "food"])
    said = prepare(tmp_path, data)
    assert "'food'" in said and "at least two classes" in said


def test_empty_text(tmp_path: Path, data: Path) -> None:
    write_jsonl(data / "train.jsonl", [*rows(5), {"text": "  ", "label": "food"}])
    assert "(train), row 6: text is empty" in prepare(tmp_path, data)


def test_test_label_that_train_lacks(tmp_path: Path, data: Path) -> None:
    write_jsonl(data / "test.jsonl", [*rows(4), {"text": "what a goal", "label": "sport"}])
    said = prepare(tmp_path, data)
    assert "test has labels that train lacks: sport" in said


def test_not_utf8(tmp_path: Path, data: Path) -> None:
    (data / "train.jsonl").write_bytes(b'{"text": "fine", "label": "food"}\n{"text": "caf\xe9", "label": "food"}\n')
    said = prepare(tmp_path, data)
    assert "train.jsonl, line 2: byte 0xe9 is not UTF-8" in said


def test_truncated_parquet_and_index(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    run_path = Path(run.uri)
    shard = sorted((run_path / "index").glob("*.faiss"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    said = retrikt("predict", run_path, "a text")
    assert shard.name in said and "truncated" in said
    shard.write_bytes(whole)
    part = sorted((run_path / "store").glob("part-*.parquet"))[0]
    part.write_bytes(part.read_bytes()[:-40])
    said = retrikt("predict", run_path, "a text")
    assert part.name in said and "truncated" in said


def test_truncated_task_file(tmp_path: Path, data: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (data / "train.jsonl").unlink()
    pq.write_table(pa.Table.from_pylist(rows(20)), data / "train.parquet")
    (data / "train.parquet").write_bytes((data / "train.parquet").read_bytes()[:-100])
    said = prepare(tmp_path, data)
    assert "train.parquet is not a readable Parquet file" in said


def test_run_directory_of_another_config(tmp_path: Path, data: Path) -> None:
    config = write_config(tmp_path, data)
    done = subprocess.run(
        [sys.executable, "-m", "retrikt_ray", "prepare", str(tmp_path / "run"), str(config)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    before = read_manifest(Folder.at(tmp_path / "run" / "task"))
    said = retrikt("prepare", tmp_path / "run", config, "prepare.n_per_class=3")
    assert "holds a run of another task" in said and "n_per_class was None, now 3" in said
    assert read_manifest(Folder.at(tmp_path / "run" / "task")) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert "is not a run directory" in retrikt("run", config, "--out", tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_unwritable_path(tmp_path: Path, data: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    said = retrikt("run", write_config(tmp_path, data), "--out", tmp_path / "file" / "run")
    assert f"cannot write to the run directory {tmp_path}/file/run" in said


def test_busy_port(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = retrikt("serve", run.uri, "--port", port)
    assert f"127.0.0.1:{port}" in said


def test_more_gpus_than_there_are(tmp_path: Path, data: Path) -> None:
    said = retrikt("run", write_config(tmp_path, data), "--out", tmp_path / "run", "generate.gpus_per_worker=2", "generate.workers=8")
    assert "generate.workers=8 with generate.gpus_per_worker=2 asks for 16 GPUs" in said
    assert not (tmp_path / "run" / "teacher").exists()  # refused before the first minute of work


def test_interrupted_write_is_not_taken_for_whole(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    run_path = Path(run.uri)
    (run_path / "student" / "manifest.json").unlink()
    said = retrikt("predict", run_path, "a text")
    assert "student is not complete" in said

    other = Path(make_run(tmp_path / "other").uri)
    manifest = other / "store" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()))[:-30])
    assert "store/manifest.json is not JSON" in retrikt("predict", other, "a text")

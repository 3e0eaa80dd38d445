"""Real tasks through the prepare stage. They are read from $RETRIKT_DATA (default ../shared); without that folder these tests are skipped."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from retrikt_ray.runtime.folders import Folder
from retrikt_ray.task.prepare import PrepareConfig, prepare

DATA = Path(os.environ.get("RETRIKT_DATA", Path(__file__).resolve().parent.parent.parent / "shared")) / "data"
TASKS = {  # name: (classes, test rows, pair)
    "sst2": (2, 1821, False),
    "trec": (6, 500, False),
    "banking77": (77, 3080, False),
    "rte": (2, 277, True),
    "cb": (3, 56, True),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_low_resource_sample_of_a_real_task(name: str, tmp_path: Path) -> None:
    if not (DATA / name).is_dir():
        pytest.skip(f"{DATA / name} is not there; point RETRIKT_DATA at a folder with data/{name}")
    classes, test_rows, pair = TASKS[name]
    per_class = 12
    out = Folder.at(tmp_path / "task")
    summary = prepare(PrepareConfig(data=str(DATA / name), n_per_class=per_class, unlabelled="train"), {}, {"task": out}, seed=0)
    assert (summary["train"], summary["classes"], summary["test"]) == (per_class * classes, classes, test_rows)
    rows = {split: out.read_table(f"{split}.parquet").to_pylist() for split in ("train", "validation", "test", "unlabelled")}
    assert all((r["text_pair"] is not None) == pair for split in rows.values() for r in split)
    assert len(rows["validation"]) <= len(rows["train"])
    drawn = {(r["text"], r["text_pair"]) for r in rows["train"]}
    assert not drawn & {(r["text"], r["text_pair"]) for split in ("validation", "test", "unlabelled") for r in rows[split]}
    assert all(r["label"] is None for r in rows["unlabelled"])

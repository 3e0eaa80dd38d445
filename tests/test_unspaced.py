"""Tasks in scripts without spaces pass every stage: by hand through the filters, the card and the index, and as a whole run (slow)."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from making.tasks import tiny
from making.unspaced import LABELS, WORDS, rows, write_task

from retrikt_ray import config, pipeline
from retrikt_ray.index.learning import learn
from retrikt_ray.index.words.lexical import Lexical
from retrikt_ray.index.words.postings import Postings
from retrikt_ray.runtime import artifacts
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.tables import Source
from retrikt_ray.store.annotate import write
from retrikt_ray.store.card import store_card
from retrikt_ray.store.decide import AnnotateConfig, decide
from retrikt_ray.store.rows import ANNOTATED
from retrikt_ray.task.card import Task
from retrikt_ray.task.texts import TEXT_COLUMNS, texts_of

LANGUAGES = tuple(WORDS)


def record(i: int, source: str, row: dict[str, Any]) -> dict[str, Any]:
    right = LABELS.index(row["label"])
    probs = [0.9, 0.1] if right == 0 else [0.1, 0.9]
    known = {"condition": right, "value": float(right)} if source == "task" else {"condition": right, "value": None}
    return {"id": f"{source}-{i}", "text": row["text"], "text_pair": None, "finished": True, "probs": probs, "embedding": probs} | known


def write_store(folder: Folder, language: str) -> tuple[Task, dict[str, int], dict[str, int]]:
    """A store of 24 labelled and 24 generated rows, and what was rejected of four bad ones more."""
    task = Task("t", "classification", LABELS, LABELS, "{label}: ", False, "accuracy")
    for split, low in (("validation", 48), ("test", 60)):
        texts = [row["text"] for row in rows(language, 12, low)]
        (folder / "task").write_table(f"{split}.parquet", pa.table({"text": texts, "text_pair": pa.array([None] * 12, pa.string())}))
    task.write(folder / "task")
    (folder / "generated").write_json("manifest.json", {"fingerprint": "f" * 64})
    good, held = rows(language, 48), rows(language, 12, 60)
    long = "".join(row["text"] for row in good[:6])
    bad = [good[0]["text"] + "!!", good[1]["text"][0], held[3]["text"], long, long + good[2]["text"][0]]
    parts = [
        [record(i, "task", row) for i, row in enumerate(good[:24])],
        [record(i, "generated", row) for i, row in enumerate([*good[24:], *({"text": text, "label": "food"} for text in bad)])],
    ]
    for i, part in enumerate(parts):
        (folder / "scratch").write_table(f"part-{i:05d}.parquet", pa.Table.from_pylist(part, schema=ANNOTATED))
    run = [{"part": i, "source": source, "rows": len(parts[i])} for i, source in enumerate(("task", "generated"))]
    reasons = decide(AnnotateConfig(), [run], folder / "task", folder / "scratch", None)
    folders = {name: folder / name for name in ("task", "generated", "scratch", "store", "rejected")}
    kept, rejected = write([run], reasons, folders, folders, len(parts[0][0]["embedding"]), None)
    counts = {"kept": sum(kept.values()), "by_source": dict(kept), "rejected": dict(rejected), "generated": len(parts[1])}
    (folder / "store").write_json("store.json", counts)
    return task, dict(kept), dict(rejected)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_filters_count_as_they_do_with_spaces(tmp_path: Path, language: str) -> None:
    folder = Folder.at(tmp_path)
    task, kept, rejected = write_store(folder, language)
    assert kept == {"task": 24, "generated": 25}  # the good ones, and one long
    assert rejected == {"duplicate": 1, "too_short": 1, "leakage": 1, "near_duplicate": 1}
    card = store_card(folder / "store", folder / "rejected", task, 0)
    assert card["agreement"] == 1.0 and {c["label"]: c["rows"]["task"] for c in card["classes"]} == {"weather": 12, "food": 12}
    assert 5 <= card["lengths"]["task"]["median"] <= 15
    assert (
        0.1 < card["variety"]["task"]["distinct_1"] < card["variety"]["task"]["distinct_2"] < 0.9
        and card["variety"]["task"]["self_bleu"] > 0.3
    )


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_index_finds_and_weighs_words(tmp_path: Path, language: str) -> None:
    """Held-out texts, in frames and words that the store has in other combinations."""
    folder = Folder.at(tmp_path)
    write_store(folder, language)
    table = folder / "task"
    texts = texts_of(table.read_table("test.parquet"))
    truth = np.array([LABELS.index(row["label"]) for row in rows(language, 12, 60)])
    answers, found = learn(folder / "store", 0, None)[0].answers(texts)
    assert (answers.argmax(1) == truth).all() and found.all()
    source = Source.of(folder / "store")
    store = pa.concat_tables(part for _, part in source.read(0, source.rows, (*TEXT_COLUMNS, "teacher_probs")))
    labels = np.array(store["teacher_probs"].to_pylist()).argmax(1)
    nearest, scores = Lexical([Postings.of([texts_of(store)], 0)]).search(texts, 3)
    assert (nearest[:, 0] >= 0).all() and (scores[:, 0] > 0).all()
    assert (labels[nearest[:, 0]] == truth).mean() > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("language", LANGUAGES)
def test_a_whole_run(cluster_of: Callable[[int], None], tiny_lm: str, tmp_path: Path, language: str) -> None:
    """The LM is random, so its texts are noise of many scripts; all other counts are the task's."""
    cluster_of(4)
    prepare = {"data": str(write_task(tmp_path / "data", language)), "n_per_class": 12, "unlabelled": "train"}
    settings = tiny(tiny_lm, prepare=prepare, teach={"max_tokens": 48, "annotator_epochs": 8})
    run = pipeline.open_run(str(tmp_path / "run"), config.parse(yaml.safe_dump(settings), "test"))
    began = time.perf_counter()
    pipeline.run_all(run)
    for stage in run.stages:
        assert run.status(stage) == "done"
        for name in stage.outputs:
            artifacts.check(run.artifact(name), deep=True)
    report = run.report
    store = report["store"]
    assert store["by_source"]["task"] == 24 and store["by_source"]["unlabelled"] == 12
    assert store["by_source"]["generated"] > 24, store["rejected"]
    assert 5 <= store["lengths"]["unlabelled"]["median"] <= 15
    assert report["systems"]["tfidf_labels"]["score"]["mean"] > 0.9  # by words; as one word a text, it was chance
    assert report["systems"]["tfidf_store"]["parameters"] > 100
    print(f"{language}: {time.perf_counter() - began:.0f} s, {store['by_source']}, {store['rejected']}")

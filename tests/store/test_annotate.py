"""Which rows enter the store: the key of a text, and every reason to reject it, in order. (The stage itself needs Ray: test_pipeline.)"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retrikt_ray.runtime.folders import Folder
from retrikt_ray.store.annotate import CHUNK, AnnotateConfig, decide, has_text, reject_reason, sources, write
from retrikt_ray.store.duplicates import HeldOut, key
from retrikt_ray.store.rows import ANNOTATED
from retrikt_ray.task.card import Task


def row(text: str = "a fine film", text_pair: str | None = None, **more: Any) -> dict[str, Any]:
    return {"text": text, "text_pair": text_pair, "finished": True, "probs": [0.3, 0.7], "condition": 1, "error": None} | more


def reason(
    given: dict[str, Any], source: str = "generated", held_out: tuple[str, ...] = (), seen: tuple[str, ...] = (), **config: Any
) -> str | None:
    return reject_reason(given, source, HeldOut([(t, None) for t in held_out]), {key(t, None) for t in seen}, AnnotateConfig(**config))


def test_has_text() -> None:
    assert has_text(row()) and has_text(row(text_pair="b"))
    assert not has_text(row(text="")) and not has_text(row(text_pair="")) and not has_text(row(text=None))


# -- reasons -----------------------------------------------------------------------------------------------------------


def test_a_good_row_is_kept_and_remembered() -> None:
    seen: set[str] = set()
    assert reject_reason(row(), "generated", HeldOut([]), seen, AnnotateConfig()) is None
    assert seen == {key("a fine film", None)}
    assert reject_reason(row("A fine film."), "generated", HeldOut([]), seen, AnnotateConfig()) == "duplicate"
    assert reject_reason(row("A fine film.", "b"), "generated", HeldOut([]), seen, AnnotateConfig()) is None  # another pair


def test_a_rejected_row_does_not_shadow_a_later_one() -> None:
    seen: set[str] = set()
    config = AnnotateConfig(min_confidence=0.8, min_words=3, require_agreement=True, keep_unfinished=False)
    for bad in (row(probs=[0.5, 0.5]), row("a b"), row(finished=False), row(probs=[0.9, 0.1]), row("")):
        assert reject_reason(bad, "generated", HeldOut([]), seen, config) is not None
    assert seen == set()
    assert reject_reason(row(probs=[0.1, 0.9]), "generated", HeldOut([]), seen, config) is None


def test_a_row_that_could_not_be_written_is_no_empty_text() -> None:
    assert reason(row("", error="MemoryError: no room", probs=None)) == "failed"


@pytest.mark.parametrize("source", ["generated", "task", "unlabelled", "corpus"])
def test_empty_leakage_and_duplicates_are_rejected_whatever_the_source(source: str) -> None:
    assert reason(row(""), source) == "empty"
    assert reason(row(text_pair=""), source) == "empty"
    assert reason(row("A FINE film"), source, held_out=("a fine film",)) == "leakage"
    assert reason(row("A FINE film"), source, seen=("a fine film",)) == "duplicate"


def test_copied_runs_of_words_are_leakage_but_for_the_tasks_rows() -> None:
    held = ("how many films a year does the average person see",)  # 10 words, 3 runs of 8
    copy = row("so how many films a year does the average person watch")
    assert reason(copy, held_out=held) == reason(copy, "unlabelled", held_out=held) == "leakage"
    assert reason(copy, "task", held_out=held) is None  # the user drew the line between these


def test_too_short() -> None:
    assert reason(row("one two"), min_words=3) == "too_short"
    assert reason(row("one two"), "unlabelled", min_words=3) == "too_short"
    assert reason(row("one two"), "task", min_words=3) is None  # the user's own rows stay
    assert reason(row("one two three"), min_words=3) is None


@pytest.mark.parametrize("text", ["我喜欢这部电影。", "映画は面白い", "ภาพยนตร์เรื่องนี้ดีมาก", "iPhone很好"])
def test_texts_without_spaces_are_not_too_short(text: str) -> None:
    assert reason(row(text), min_words=3) is None
    assert reason(row(text), min_words=30) == "too_short"
    assert reason(row("好。")) == "too_short"  # one word and a mark


def test_unfinished() -> None:
    assert reason(row(finished=False)) is None
    assert reason(row(finished=False), keep_unfinished=False) == "unfinished"
    assert reason(row(finished=None), "unlabelled", keep_unfinished=False) is None  # only what was generated can be cut off


def test_low_confidence() -> None:
    assert reason(row(), min_confidence=0.71) == "low_confidence"
    assert reason(row(), min_confidence=0.7) is None
    assert reason(row(condition=None), "unlabelled", min_confidence=0.71) == "low_confidence"
    assert reason(row(), "task", min_confidence=0.71) is None


def test_label_disagreement() -> None:
    assert reason(row(condition=0), require_agreement=True) == "label_disagreement"
    assert reason(row(condition=1), require_agreement=True) is None
    assert reason(row(condition=0)) is None
    assert reason(row(condition=None), "unlabelled", require_agreement=True) is None


def test_values_of_a_regression_are_no_confidences() -> None:
    assert reason(row(probs=[0.1], condition=3), min_confidence=0.9, require_agreement=True) is None


def test_the_first_reason_counts() -> None:
    """A row for which everything is wrong, mended from the front."""
    strict = {"min_words": 2, "keep_unfinished": False, "min_confidence": 0.8, "require_agreement": True}
    bad = {"finished": False, "probs": [0.6, 0.4]}
    assert reason(row("", **bad), held_out=("",), seen=("",), **strict) == "empty"
    assert reason(row("dull", **bad), held_out=("dull",), seen=("dull",), **strict) == "leakage"
    assert reason(row("dull", **bad), seen=("dull",), **strict) == "too_short"
    assert reason(row("so dull", **bad), seen=("so dull",), **strict) == "unfinished"
    assert reason(row("so dull", **bad | {"finished": True}), seen=("so dull",), **strict) == "duplicate"
    assert reason(row("so dull", **bad | {"finished": True}), **strict) == "low_confidence"
    assert reason(row("so dull", probs=[0.9, 0.1]), **strict) == "label_disagreement"
    assert reason(row("so dull", probs=[0.1, 0.9]), **strict) is None


# -- the store's shape -------------------------------------------------------------------------------------------------


def test_sources_come_in_the_order_in_which_duplicates_are_resolved(tmp_path: Any) -> None:
    """Task rows first, generated ones last; long files in chunks; every row in exactly one of them."""
    task, generated = Folder.at(tmp_path / "task"), Folder.at(tmp_path / "generated")
    for folder, name, rows in (
        (generated, "part-00001.parquet", 3),
        (generated, "part-00000.parquet", CHUNK),
        (task, "unlabelled.parquet", 0),
        (task, "train.parquet", CHUNK + 1),
    ):
        folder.write_table(name, pa.table({"id": [str(i) for i in range(rows)]}))
    generated.write_bytes("manifest.json", b"{}")
    harvested = Folder.at(tmp_path / "harvested")
    harvested.write_table("part-00000.parquet", pa.table({"id": ["0", "1"]}))
    chunks = sources({"task": task, "generated": generated})
    with_corpus = sources({"task": task, "generated": generated, "harvested": harvested})
    assert [c["source"] for c in with_corpus] == ["task", "task", "corpus", "generated", "generated"] and with_corpus[2]["rows"] == 2
    assert [(c["part"], c["source"], c["name"], c["start"], c["rows"]) for c in chunks] == [
        (0, "task", "train.parquet", 0, CHUNK),
        (1, "task", "train.parquet", CHUNK, 1),
        (2, "generated", "part-00000.parquet", 0, CHUNK),
        (3, "generated", "part-00001.parquet", 0, 3),
    ]
    assert pq.read_metadata(pa.BufferReader(Folder(chunks[1]["uri"]).read_bytes(chunks[1]["name"]))).num_rows == CHUNK + 1


def record(code: str, text: str, condition: int | None, value: float | None) -> dict[str, Any]:
    answer = {"probs": [0.2, 0.8], "embedding": [1.0, 2.0]} if text else {"probs": None, "embedding": None}
    return {"id": code, "text": text, "text_pair": None, "condition": condition, "value": value, "finished": True} | answer


def stage(path: Any, parts: list[tuple[str, list[dict[str, Any]]]]) -> tuple[dict[str, Folder], list[dict[str, Any]]]:
    """What `annotate` finds after its first step: held-out texts, and annotated parts of (source, records)."""
    folders = {name: Folder.at(path / name) for name in ("task", "generated", "scratch", "store", "rejected")}
    Task("t", "classification", ("no", "yes"), ("no", "yes"), "{label}: ", False, "accuracy").write(folders["task"])
    for split, text in (("validation", "a held out film"), ("test", "another held out film")):
        folders["task"].write_table(f"{split}.parquet", pa.table({"text": [text], "text_pair": pa.array([None], pa.string())}))
    folders["generated"].write_json("manifest.json", {"fingerprint": "f" * 64})
    for part, (_, rows) in enumerate(parts):
        folders["scratch"].write_table(f"part-{part:05d}.parquet", pa.Table.from_pylist(rows, schema=ANNOTATED))
    return folders, [{"part": part, "source": source} for part, (source, _) in enumerate(parts)]


def test_passages_of_a_corpus_are_rows_like_others(tmp_path: Any) -> None:
    """A generated text that says what a passage does goes, copies of held-out texts go, and each row names the artifact that it is from."""
    passages = [record("corpus-0", "A new film", None, None), record("corpus-1", "A held out film!", None, None)]
    parts = [
        ("task", [record("train-0", "a fine film", 1, 1.0)]),
        ("corpus", passages),
        ("generated", [record("g-0", "a new film", 1, None)]),
    ]
    folders, chunks = stage(tmp_path, parts)
    folders["harvested"] = Folder.at(tmp_path / "harvested")
    folders["harvested"].write_json("manifest.json", {"fingerprint": "c" * 64})
    by_source, reasons = write(chunks, decide(AnnotateConfig(), chunks, folders["task"], folders["scratch"]), folders, folders)
    assert dict(by_source) == {"task": 1, "corpus": 1} and dict(reasons) == {"leakage": 1, "duplicate": 1}
    kept = folders["store"].read_tables().to_pylist()
    assert [(r["id"], r["source"], r["asked_label"], r["created_by"]) for r in kept] == [
        ("train-0", "task", "yes", "f" * 16),
        ("corpus-0", "corpus", None, "c" * 16),
    ]


LONG = "the film begins slowly but the second half is worth the wait"


def test_rows_are_decided_over_the_whole_store(tmp_path: Any) -> None:
    """Held-out texts of both splits, and duplicates across parts, are kept out of the store; each row ends in one of the two tables."""
    parts = [
        (
            "task",
            [record("train-0", "a fine film", 1, 1.0), record("train-1", "Another held-out film", 0, 0.0), record("train-2", LONG, 1, 1.0)],
        ),
        (
            "generated",
            [record("g-0", "A fine film!", 1, None), record("g-1", "a held out film", 0, None), record("g-2", "a new film", 0, None)],
        ),
        (
            "generated",
            [
                record("g-3", "a new  film", 1, None),
                record("g-4", "", 1, None),
                record("g-6", "", 1, None) | {"error": "E: why"},
                record("g-5", LONG + " indeed", 1, None),
            ],
        ),
    ]
    folders, chunks = stage(tmp_path, parts)
    reasons_of = decide(AnnotateConfig(), chunks, folders["task"], folders["scratch"])
    by_source, reasons = write(chunks, reasons_of, folders, folders)
    assert dict(by_source) == {"task": 2, "generated": 1}
    assert dict(reasons) == {"leakage": 2, "duplicate": 2, "empty": 1, "failed": 1, "near_duplicate": 1}
    kept = folders["store"].read_tables().to_pylist()
    assert [(r["id"], r["asked_label"], r["value"], r["source"]) for r in kept] == [
        ("train-0", "yes", 1.0, "task"),
        ("train-2", "yes", 1.0, "task"),
        ("g-2", "no", None, "generated"),
    ]
    assert {r["created_by"] for r in kept} == {"f" * 16}
    rejected = {r["id"]: r["reason"] for r in folders["rejected"].read_tables().to_pylist()}
    assert rejected == {
        "train-1": "leakage",
        "g-0": "duplicate",
        "g-1": "leakage",
        "g-3": "duplicate",
        "g-4": "empty",
        "g-6": "failed",
        "g-5": "near_duplicate",
    }
    without = decide(AnnotateConfig(near_duplicates=1), chunks, folders["task"], folders["scratch"])
    assert without[2] == ["duplicate", "empty", "failed", None] and without[:2] == reasons_of[:2]


def test_decisions_do_not_depend_on_how_rows_are_cut_into_parts(tmp_path: Any) -> None:
    words = [f"w{i}" for i in range(40)]
    texts = [" ".join(words[:i] + words[i + 1 + i % 3 :]) for i in range(12)] + [f"no {i} like it" for i in range(12)]
    records = [record(f"g-{i}", text, i % 2, None) for i, text in enumerate(texts)]
    found = []
    for size in (1, 5, 24):
        folders, chunks = stage(tmp_path / str(size), [("generated", records[i : i + size]) for i in range(0, 24, size)])
        found.append([reason for some in decide(AnnotateConfig(), chunks, folders["task"], folders["scratch"]) for reason in some])
    assert found[0] == found[1] == found[2]
    assert 8 <= found[0].count("near_duplicate") <= 11 and found[0][12:] == [None] * 12

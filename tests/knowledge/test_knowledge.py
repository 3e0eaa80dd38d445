"""Edits of a finished run: found at once, by others too; whole or not there; the same answers after compaction as from a fresh build."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from making.tiny_run import LABELS, TEXTS, make_run

from retrikt_ray.cli import main
from retrikt_ray.index.build import IndexConfig, build_index
from retrikt_ray.knowledge import edit, log
from retrikt_ray.knowledge.compact import compact
from retrikt_ray.knowledge.edit import added_rows
from retrikt_ray.knowledge.knowledge import Knowledge
from retrikt_ray.predictor import Predictor
from retrikt_ray.runtime import artifacts
from retrikt_ray.runtime.folders import ArtifactError, Folder
from retrikt_ray.runtime.leases import lease
from retrikt_ray.runtime.settings import ConfigError
from retrikt_ray.task.texts import Text, TextError

QUERY = [("a sharp and brave but cold film", None)]


@pytest.fixture
def run(tmp_path: Path) -> Folder:
    return make_run(tmp_path / "run")


def ids_of(predictor: Predictor, text: str, k: int = 30, **where: str) -> list[str]:
    return predictor.retrieve([(text, None)], k, **where).ids[0]


# -- adding, updating, deleting ------------------------------------------------------------------------------------------


def test_an_added_row_is_found_at_once_and_changes_the_answer(run: Folder) -> None:
    predictor, other = Predictor.open(run), Predictor.open(run)
    before = predictor.predict(QUERY)
    (code,) = predictor.knowledge.add([{"text": QUERY[0][0], "label": "negative"}])
    after = predictor.predict(QUERY)
    assert after.dense is not None and after.lexical is not None
    assert after.dense.ids[0][0] == code and after.dense.scores[0, 0] == pytest.approx(1, abs=1e-6)
    assert after.lexical.ids[0][0] == code
    assert after.dense.labels[0, 0].tolist() == [1, 0]
    np.testing.assert_array_equal(after.student, before.student)  # nothing was trained
    assert after.answers[0, 0] > before.answers[0, 0] + 0.1
    assert other.predict(QUERY).dense.ids[0][0] != code  # opened before; it looks again when asked to
    assert other.knowledge.refresh() and not other.knowledge.refresh()
    np.testing.assert_array_equal(other.predict(QUERY).answers, after.answers)
    np.testing.assert_array_equal(Predictor.open(run).predict(QUERY).answers, after.answers)
    assert Predictor.open(run, edited=False).predict(QUERY).answers.tolist() == before.answers.tolist()  # as the run made it
    predictor.knowledge.delete([code])
    again = predictor.predict(QUERY)
    assert again.answers.tolist() == before.answers.tolist() and again.dense.ids == before.dense.ids


def test_an_update_keeps_the_id(run: Folder) -> None:
    predictor = Predictor.open(run)
    predictor.knowledge.update(
        [{"id": "train-000006", "text": "a fine film", "label": "positive"}, {"id": "train-000000", "label": "negative"}],
    )
    knowledge = predictor.knowledge
    found = knowledge.view.find(["train-000006", "train-000000"])
    rows = {code: knowledge.view.row(p) for code, p in found.items()}
    assert knowledge.count == 12 and ids_of(predictor, "a dull film").count("train-000006") == 1
    assert (rows["train-000006"]["text"], rows["train-000006"]["source"]) == ("a fine film", "added")
    assert rows["train-000000"]["text"] == TEXTS[0] and rows["train-000000"]["teacher_probs"] == [1.0, 0.0]
    knowledge.update([{"id": "train-000000", "teacher_probs": [0.25, 0.75]}])
    assert knowledge.view.row(knowledge.view.find(["train-000000"])["train-000000"])["teacher_probs"] == [0.25, 0.75]


def test_a_deleted_row_is_never_found(run: Folder) -> None:
    predictor = Predictor.open(run)
    assert "train-000002" in ids_of(predictor, TEXTS[2])
    predictor.knowledge.delete(["train-000002", "train-000002"])
    assert len(ids_of(predictor, TEXTS[2])) == 11 and "train-000002" not in ids_of(predictor, TEXTS[2])
    assert "train-000002" not in predictor.knowledge.view.search_words([(TEXTS[2], None)], 30).ids[0]
    with pytest.raises(ConfigError, match="no row with the id 'train-000002'"):
        predictor.knowledge.delete(["train-000002"])
    predictor.knowledge.add([{"id": "train-000002", "text": "never fine", "label": "positive"}])  # its id is free again
    assert ids_of(predictor, "never fine")[:2] == ["train-000011", "train-000002"]  # ties by position
    with pytest.raises(ConfigError, match="this would delete all 12 rows"):
        predictor.knowledge.delete(ids_of(predictor, "fine"))


def test_the_memory_unlearns_only_what_it_has_learnt(tmp_path: Path) -> None:
    """Rows 1, 3, 5, ... are generated; compaction keeps in mind that the n-grams never knew them."""
    run = make_run(tmp_path / "run", learnt=("task", "unlabelled"))
    texts: list[Text] = [(t, None) for t in TEXTS]

    def says() -> np.ndarray:
        return Knowledge.open(run).view.ngrams.answers(texts)[0]

    knowledge, before = Knowledge.open(run), says()
    assert knowledge.view.ngrams.rows == 6
    knowledge.delete(["train-000001", "train-000003"])
    np.testing.assert_array_equal(says(), before)
    knowledge.add([{"id": "new", "text": TEXTS[0], "label": LABELS[0]}])
    added = says()
    assert np.abs(added - before).max() > 0.01
    compact(run)
    np.testing.assert_array_equal(says(), added)
    knowledge = Knowledge.open(run)
    knowledge.delete(["train-000005"])
    np.testing.assert_array_equal(says(), added)
    knowledge.delete(["new"])
    assert np.abs(says() - added).max() > 0.01
    told = says()
    knowledge.delete(["train-000000"])
    assert np.abs(says() - told).max() > 0.001


def test_the_teacher_labels_what_has_no_label(run: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from retrikt_ray.teacher import annotator

    asked: list[Any] = []

    class Teacher:
        @staticmethod
        def load(folder: Folder) -> Teacher:
            assert folder.uri.endswith("/teacher")
            return Teacher()

        def annotate(self, texts: list[Any], batch: int) -> tuple[torch.Tensor, torch.Tensor]:
            asked.extend(texts)
            return torch.tensor([[0.3, 0.7]] * len(texts)), torch.ones(len(texts), 4)

    monkeypatch.setattr(annotator, "Annotator", Teacher)
    (run / "teacher").write_json("teacher.json", {})
    artifacts.seal(run / "teacher", stage="teach", fingerprint="x", config={}, inputs={}, seed=0, started=time.time())
    knowledge = Knowledge.open(run)
    codes = knowledge.add([{"text": "one  more"}, {"text": "two more", "label": "negative"}, {"text": "three more", "label": ""}])
    assert asked == [("one more", None), ("three more", None)]
    rows = [knowledge.view.row(p) for p in knowledge.view.find(codes).values()]
    assert [r["teacher_probs"] for r in rows] == [pytest.approx([0.3, 0.7]), [1.0, 0.0], pytest.approx([0.3, 0.7])]
    knowledge.update([{"id": codes[1], "text": "changed"}])  # the old label was of another text
    assert asked[2:] == [("changed", None)]
    assert compact(run) is not None  # rows with and without the teacher's embedding in one file
    table = ((run / "knowledge") / "base-000003" / "store").read_tables()
    assert table["teacher_embedding"].to_pylist()[-3:] == [[1.0] * 4, [1.0] * 4, [1.0] * 4]


def test_repeating_an_add_adds_nothing_twice(run: Folder) -> None:
    knowledge = Knowledge.open(run)
    (code,) = knowledge.add([{"text": "one more", "label": "positive"}])
    with pytest.raises(ConfigError, match=f"row 1: .* has a row '{code}' already .*; use update"):
        knowledge.add([{"text": "one   more", "label": "negative"}])
    assert knowledge.count == 13 and knowledge.view.log is not None and knowledge.view.log.version == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows to add"),
        ([3], "row 1: found 3, expected an object"),
        ([{"text": "a"}, {"txt": "b"}], "row 2: there is no field 'txt'; expected id, text"),
        ([{"label": "positive"}], "row 1: text: found null; expected a text"),
        ([{"text": 3}], "row 1: text: found 3; expected a text"),
        ([{"text": "a", "text_pair": "b"}], "row 1: text_pair is given, but tiny takes single texts"),
        ([{"text": "a", "label": "good"}], "row 1: label: found 'good'; the labels of tiny are negative, positive"),
        ([{"text": "a", "teacher_probs": [1.0]}], "row 1: teacher_probs: found .*expected a list of 2 numbers"),
        ([{"text": "a", "teacher_probs": [0.9, 0.9]}], "row 1: teacher_probs: .*that sum to 1"),
        ([{"text": "a", "teacher_probs": [0.5, float("nan")]}], "row 1: teacher_probs: .*that sum to 1"),
        ([{"text": "a", "label": "positive", "teacher_probs": [0, 1]}], "row 1: found label and teacher_probs, expected one"),
        ([{"text": "a", "label": "positive"}, {"text": " a", "label": "negative"}], "rows 1 and 2 have the same id, .*: the same text"),
        ([{"text": "b", "id": "train-000001", "label": "positive"}], "row 1: .* has a row 'train-000001' already"),
        ([{"text": "b", "id": 7}], "row 1: id: found 7; expected a string"),
        ([{"text": "a", "teacher_probs": ["0", "1"]}], "row 1: teacher_probs: found .*expected a list of 2 numbers"),
        ([{"text": "a", "teacher_probs": [[1], [0]]}], "row 1: teacher_probs: found .*expected a list of 2 numbers"),
        ([{"text": "a", "teacher_probs": "sure"}], "row 1: teacher_probs: found 'sure', expected a list of 2 numbers"),
        ([{"text": "a", "label": True}], "row 1: label: found True, expected a text"),
        ([{"text": "half \ud800", "label": "positive"}], "row 1: text holds half of a surrogate pair"),
        ([{"text": "b", "id": "\ud800", "label": "positive"}], "row 1: id holds half of a surrogate pair"),
        ([{"text": "a", None: ["b"]}], "row 1: there is no field None"),
    ],
)
def test_bad_rows_are_refused_and_nothing_is_lost(run: Folder, rows: list[Any], message: str) -> None:
    knowledge = Knowledge.open(run)
    with pytest.raises((ConfigError, TextError), match=message):
        knowledge.add(rows)
    assert knowledge.count == 12 and not (run / "knowledge").exists()


def test_bad_updates(run: Folder) -> None:
    knowledge = Knowledge.open(run)
    for rows, message in (
        ([{"text": "a"}], "row 1: found no id"),
        ([{"id": "train-000001"}], "row 1: nothing to update"),
        ([{"id": "nobody", "label": "positive"}], "no row with the id 'nobody'"),
    ):
        with pytest.raises(ConfigError, match=message):
            knowledge.update(rows)
    assert not (run / "knowledge").exists()


def test_pairs_and_regression(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", pair=True, regression=True)
    knowledge = Knowledge.open(run)
    codes = knowledge.add(
        [{"text": "a film", "text_pair": "the film", "label": "4.5"}, {"text": "a", "text_pair": "b", "teacher_probs": [1.5]}]
    )
    assert [knowledge.view.row(p)["teacher_probs"] for p in knowledge.view.find(codes).values()] == [[4.5], [1.5]]
    knowledge.update([{"id": codes[0], "text_pair": "the play", "label": 2}])
    row = knowledge.view.row(knowledge.view.find(codes)[codes[0]])
    assert (row["text"], row["text_pair"], row["teacher_probs"]) == ("a film", "the play", [2.0])
    for bad, message in (
        ({"text": "a", "label": "1"}, "text_pair: found null"),
        ({"text": "a", "text_pair": "c", "label": "high"}, "expected a number"),
    ):
        with pytest.raises((ConfigError, TextError), match=message):
            knowledge.add([bad])
    with pytest.raises(ConfigError, match="the labels of tiny are none, it is a regression"):
        knowledge.view.allowed("positive", None)
    compact(run)
    knowledge.refresh()
    assert knowledge.view.find(codes).keys() == set(codes)


def test_filters(run: Folder) -> None:
    predictor = Predictor.open(run)
    (code,) = predictor.knowledge.add([{"text": "a fine film", "label": "negative"}])
    assert set(ids_of(predictor, "a film", label="positive")) == {f"train-{i:06d}" for i in range(6)}
    assert set(ids_of(predictor, "a film", source="generated")) == {f"train-{i:06d}" for i in range(1, 12, 2)}
    assert ids_of(predictor, "a film", source="added") == [code]
    assert ids_of(predictor, "a film", label="positive", source="added") == []
    words = predictor.knowledge.view.search_words([("a film", None)], 30, label="negative")
    assert set(words.ids[0]) == {code, "train-000006", "train-000008", "train-000010"}
    assert (
        ids_of(predictor, "a film", k=2, label="negative")
        == [i for i in ids_of(predictor, "a film") if i == code or i > "train-000005"][:2]
    )
    with pytest.raises(ConfigError, match="label: found 'good'; the labels of tiny are negative, positive"):
        ids_of(predictor, "a film", label="good")
    with pytest.raises(ConfigError, match=r"source: found 'web'; the sources of the store are added, generated, task"):
        ids_of(predictor, "a film", source="web")


def test_many_edits_become_one_file(run: Folder) -> None:
    predictor = Predictor.open(run)
    codes = [predictor.knowledge.add([{"text": f"film {i}", "label": LABELS[i % 2]}])[0] for i in range(2 * log.FOLD + 3)]
    predictor.knowledge.delete(codes[:5])
    after = predictor.knowledge.view.log
    assert after is not None and len(after.edits) <= log.FOLD and (after.added, after.deleted) == (2 * log.FOLD + 3, 5)
    assert after.version == 2 * log.FOLD + 4
    predictor.knowledge.add([{"text": "last", "label": "positive"}])
    on_disk = {n for n in (run / "knowledge").files() if n.startswith("edit-")}
    named = {e["file"] for e in predictor.knowledge.view.log.edits}
    assert named <= on_disk and len(on_disk) <= log.FOLD + 1
    anew = Predictor.open(run)
    assert anew.knowledge.count == 12 + 2 * log.FOLD + 3 - 5 + 1
    assert set(codes[5:]) < set(ids_of(anew, "film", 99)) and not set(codes[:5]) & set(ids_of(anew, "film", 99))


# -- compaction ----------------------------------------------------------------------------------------------------------


def fresh(path: Path, run: Folder, config: IndexConfig) -> Predictor:
    """A run with the same student whose store was made, and whose index was built, from the live rows of `run`.

    But for the n-gram memory, which an edit moves and does not learn anew: it is that of `run`.
    """
    knowledge = Knowledge.open(run)
    shutil.copytree(run.uri, path, ignore=shutil.ignore_patterns("knowledge", "store", "index"))
    other = Folder.at(path)
    rows = [knowledge.view.row(int(p)) for p in np.flatnonzero(knowledge.view.alive)]
    schema = (run / "store").read_tables().schema
    table = pa.Table.from_pylist([{n: r.get(n) for n in schema.names} for r in rows], schema=schema)
    (other / "store").write_table("part-00000.parquet", table)
    keys: dict[str, Any] = {"fingerprint": "x", "seed": 0, "started": time.time()}
    store = artifacts.seal(other / "store", stage="annotate", config={}, inputs={}, **keys).content
    queries = np.zeros((0, knowledge.view.base.card["width"]), np.float32)
    memory = knowledge.view.ngrams
    build_index(config, other / "store", other / "student", other / "index", queries, seed=0, workers=None, memory=memory)
    (other / "index").write_bytes("mixture.json", (run / "index").read_bytes("mixture.json"))
    artifacts.seal(other / "index", stage="index", config={}, inputs={"store": store, "student": knowledge.student}, **keys)
    return Predictor.open(other)


def assert_same(one: Predictor, other: Predictor) -> None:
    texts = [(t, None) for t in [*TEXTS, *(QUERY[0])] if t]
    for got, want in zip(
        (one.retrieve(texts, 40), one.knowledge.view.search_words(texts, 40)),
        (other.retrieve(texts, 40), other.knowledge.view.search_words(texts, 40)),
        strict=True,
    ):
        assert got.ids == want.ids
        np.testing.assert_array_equal(got.scores, want.scores)
        there = got.positions >= 0
        np.testing.assert_array_equal(got.labels[there], want.labels[there])
    np.testing.assert_array_equal(one.predict(texts).answers, other.predict(texts).answers)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), shards=st.sampled_from([1, 2, 3, 7]))
def test_compaction_is_a_fresh_build(tmp_path_factory: pytest.TempPathFactory, seed: int, shards: int) -> None:
    """The same answers before compaction, after it, and from a run that was built of these rows."""
    root, rng = tmp_path_factory.mktemp("compact"), np.random.default_rng(seed)
    run = make_run(root / "run", shards=shards)
    predictor = Predictor.open(run)
    for step in range(4):
        knowledge = predictor.knowledge
        texts = [" ".join(rng.choice(TEXTS, 2)) + f" {step}{i}" for i in range(rng.integers(1, 4))]
        knowledge.add([{"text": t, "label": str(rng.choice(LABELS))} for t in texts])
        live = knowledge.view.rows["id"].take(pa.array(np.flatnonzero(knowledge.view.alive))).to_pylist()
        if rng.random() < 0.7:
            knowledge.delete(rng.choice(live, 2, replace=False).tolist())
        if step == 1:
            compact(run)
            knowledge.refresh()
    edited, anew = Predictor.open(run), fresh(root / "fresh", run, IndexConfig(shards=shards))
    assert_same(edited, anew)
    after = compact(run)
    assert after is not None and after.base is not None and not after.edits
    compacted = Predictor.open(run)
    assert compacted.knowledge.view.added is None and compacted.knowledge.view.alive.all()
    assert_same(compacted, anew)
    edited.knowledge.refresh()
    assert_same(edited, anew)
    index = (run / "knowledge" / after.base / "index").read_json("index.json")
    assert [s["sha256"] for s in index["shards"]] == [s["sha256"] for s in anew.knowledge.view.base.card["shards"]]  # the very files
    there = {n.split("/")[0] for n in (run / "knowledge").files()}
    assert there == {after.base, after.previous, "manifest.json"} and after.previous is not None  # for readers that have it mapped
    assert compact(run) is None
    shutil.rmtree(root)


def test_a_thread_that_looks_while_another_takes_over_waits_for_the_new_view(run: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else an edit would be made on top of a state that is gone, and answered with its version."""
    knowledge, writer = Knowledge.open(run), Knowledge.open(run)
    writer.add([{"text": "a zebra film", "label": "negative"}])
    now, read_log, here = knowledge.now, log.read_log, threading.get_ident()
    reading, looked = threading.Event(), threading.Event()
    other = threading.Thread(target=lambda: knowledge.refresh(at_once=True))

    def slow_log(folder: Folder) -> Any:
        if threading.current_thread() is other:
            reading.set()
            assert looked.wait(10)
        return read_log(folder)

    def now_as_the_other_reads() -> Any:
        """This thread looks just when the other has begun to take the edit over."""
        found = now()
        if threading.get_ident() == here and not reading.is_set():
            other.start()
            assert reading.wait(10)
            threading.Timer(0.2, looked.set).start()
        return found

    monkeypatch.setattr("retrikt_ray.knowledge.knowledge.read_log", slow_log)
    monkeypatch.setattr(knowledge, "now", now_as_the_other_reads)
    knowledge.refresh(at_once=True)
    assert knowledge.view.version == writer.view.version == 1
    other.join()


def test_readers_go_on_while_a_base_is_replaced(run: Folder) -> None:
    predictor = Predictor.open(run)
    stop, seen, failed = threading.Event(), set(), []

    def read() -> None:
        while not stop.is_set():
            try:
                predictor.knowledge.refresh()
                seen.add(predictor.knowledge.count)
                assert len(ids_of(predictor, "a film", 99)) == predictor.knowledge.count
            except Exception as error:
                failed.append(error)
                return

    reader = threading.Thread(target=read)
    reader.start()
    writer = Knowledge.open(run)
    for i in range(12):
        writer.add([{"text": f"film {i}", "label": "positive"}])
        compact(run)
        writer.refresh()
    stop.set()
    reader.join()
    assert not failed and max(seen) >= 20


# -- a student, store or index made anew ----------------------------------------------------------------------------------


def reseal(folder: Folder, manifest: artifacts.Manifest) -> str:
    return artifacts.seal(
        folder, stage=manifest.stage, fingerprint="anew", config=manifest.config, inputs=manifest.inputs, seed=1, started=time.time()
    ).content


def test_edits_of_another_student_are_refused_and_taken_over(tmp_path: Path) -> None:
    run, twin = make_run(tmp_path / "run"), make_run(tmp_path / "twin", seed=1)
    knowledge = Knowledge.open(run)
    (code,) = knowledge.add([{"text": "one more", "label": "positive"}])
    knowledge.delete(["train-000001"])
    for name in ("student", "index"):  # the run was distilled and indexed again
        shutil.rmtree(tmp_path / "run" / name)
        shutil.copytree(tmp_path / "twin" / name, tmp_path / "run" / name)
    manifest = artifacts.check(run / "index")
    manifest.inputs["store"] = artifacts.check(run / "store").content
    (run / "index").remove("manifest.json")
    reseal(run / "index", manifest)
    with pytest.raises(ArtifactError, match=r"knowledge/manifest\.json holds edits of another student .* `retrikt store compact"):
        Predictor.open(run)
    assert compact(run) is not None
    predictor = Predictor.open(run)
    assert predictor.knowledge.view.find([code, "train-000001"]).keys() == {code}
    assert ids_of(predictor, "one more")[0] == code
    twin_vectors = Predictor.open(twin).student.encode([("one more", None)])[1]
    assert predictor.retrieve([("one more", None)], 1).scores[0, 0] == pytest.approx(1, abs=1e-6)
    np.testing.assert_array_equal(predictor.student.encode([("one more", None)])[1], twin_vectors)


def test_edits_of_another_store_are_refused_and_can_be_saved(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    knowledge = Knowledge.open(run)
    rows = [{"text": "one more", "label": "positive"}, {"text": "two more", "label": "negative"}]
    codes = knowledge.add(rows)
    compact(run)
    knowledge.refresh()
    knowledge.delete(codes[1:])
    knowledge.update([{"id": "train-000000", "label": "negative"}])
    table = (run / "store").read_table("part-00000.parquet")
    manifests = {n: artifacts.check(run / n) for n in ("store", "index")}
    (run / "store").write_table("part-00000.parquet", table.set_column(1, "text", pa.array([t.upper() for t in table["text"].to_pylist()])))
    manifests["index"].inputs["store"] = reseal(run / "store", manifests["store"])
    reseal(run / "index", manifests["index"])
    for act in (lambda: Predictor.open(run), lambda: compact(run)):
        with pytest.raises(ArtifactError, match=r"holds edits of another store .* `retrikt store export"):
            act()
    saved = tmp_path / "added.jsonl"
    done = CliRunner().invoke(main, ["store", "export", run.uri, "--out", str(saved)])
    assert done.exit_code == 0, done.output
    kept = [{"id": codes[0], "text": "one more", "teacher_probs": [0.0, 1.0]}, {"text": TEXTS[0], "teacher_probs": [1.0, 0.0]}]
    assert [json.loads(line) for line in saved.read_text().splitlines()] == kept  # the id of what was updated is the new store's
    shutil.rmtree(tmp_path / "run" / "knowledge")
    done = CliRunner().invoke(main, ["store", "add", run.uri, str(saved)])
    assert done.exit_code == 0, done.output
    assert [{k: v for k, v in row.items() if k != "id"} for row in added_rows(run)] == [
        {k: v for k, v in row.items() if k != "id"} for row in kept
    ]


def test_an_index_of_another_student_is_refused_by_name(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    make_run(tmp_path / "twin", seed=1)
    shutil.rmtree(tmp_path / "run" / "index")
    shutil.copytree(tmp_path / "twin" / "index", tmp_path / "run" / "index")
    with pytest.raises(
        ArtifactError,
        match=r"index/manifest.json says that the index was built from another student than .*/run/student; run `retrikt index",
    ):
        Predictor.open(run)


def test_a_first_edit_that_fails_leaves_nothing(run: Folder) -> None:
    """Here for want of a teacher; and a manifest without edits, which a killed process leaves, binds nothing."""
    with pytest.raises(ConfigError, match=r"row 1: there is no label, and .* has no teacher"):
        Knowledge.open(run).add([{"text": "one more"}])
    assert not (run / "knowledge").exists()
    after = log.Log(0, None, {"student": "s", "store": "s", "index": "s"}, "s")
    (run / "knowledge").write_sealed("manifest.json", asdict(after))
    assert Knowledge.open(run).view.log is None and compact(run) is None and added_rows(run) == []
    Knowledge.open(run).add([{"text": "one more", "label": "positive"}])
    assert Knowledge.open(run).count == 13


def test_a_run_can_be_opened_while_others_edit_and_compact(run: Folder) -> None:
    knowledge, stop = Knowledge.open(run), threading.Event()
    knowledge.add([{"text": "the first", "label": "positive"}])

    def edit() -> None:
        for i in range(40):
            knowledge.add([{"text": f"number {i}", "label": "positive"}])
            if i % 5 == 0:
                compact(run)
                knowledge.refresh()
        stop.set()

    writer = threading.Thread(target=edit)
    writer.start()
    opened = 0
    while not stop.is_set():
        assert Knowledge.open(run).count >= 13
        opened += 1
    writer.join()
    assert opened > 3 and Knowledge.open(run).count == 12 + 41


def test_a_student_made_anew_is_noticed(run: Folder) -> None:
    knowledge = Knowledge.open(run)
    seal = artifacts.check(run / "student")
    (run / "student").write_json("note.json", {})
    reseal(run / "student", seal)
    with pytest.raises(ArtifactError, match=r"run/student was made anew since this process opened it: start the process again"):
        knowledge.add([{"text": "one more", "label": "positive"}])
    assert not (run / "knowledge").exists()


def test_compaction_takes_over_a_changed_index(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    Knowledge.open(run).add([{"text": "one more", "label": "positive"}])
    assert compact(run) is not None and compact(run) is None
    other = make_run(tmp_path / "other", shards=3)
    shutil.rmtree(tmp_path / "run" / "index")
    shutil.copytree(tmp_path / "other" / "index", tmp_path / "run" / "index")
    assert other.exists() and compact(run) is not None
    assert len(Knowledge.open(run).view.base.card["shards"]) == 3 and Knowledge.open(run).count == 13 and compact(run) is None


def test_an_index_made_anew_is_opened_with_the_next_edit(tmp_path: Path) -> None:
    """A reader that was open before it: the log names another index of the same store, under the same name."""
    run = make_run(tmp_path / "run")
    reader = Knowledge.open(run)
    make_run(tmp_path / "other", shards=3)
    shutil.rmtree(tmp_path / "run" / "index")
    shutil.copytree(tmp_path / "other" / "index", tmp_path / "run" / "index")
    Knowledge.open(run).add([{"text": "one more", "label": "positive"}])
    assert reader.refresh() and reader.count == 13
    assert len(reader.view.base.card["shards"]) == 3


def test_a_copy_of_an_object_store_that_was_altered_is_made_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run = make_run(f"memory://altered-{time.time_ns()}/run")
    want = Predictor.open(run).predict(QUERY).answers
    copies = list(tmp_path.rglob("shard-0000.faiss"))
    assert copies
    whole = [copy.read_bytes() for copy in copies]
    for copy, data in zip(copies, whole, strict=True):
        copy.write_bytes(data[:-5] + b"12345")
    np.testing.assert_array_equal(Predictor.open(run).predict(QUERY).answers, want)
    assert [copy.read_bytes() for copy in copies] == whole
    (tmp_path / f"retrikt-{os.getuid()}").chmod(0o777)
    with pytest.raises(ConfigError, match="can be written by others"):
        Predictor.open(run)


def test_a_lost_manifest_is_not_an_unedited_run(run: Folder) -> None:
    Knowledge.open(run).add([{"text": "one more", "label": "positive"}])
    (run / "knowledge").remove("manifest.json")
    with pytest.raises(ArtifactError, match=r"knowledge/manifest\.json is missing, but .*edit-000001\.parquet is there"):
        Predictor.open(run)


def test_a_second_writer_waits_and_is_told(run: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    knowledge = Knowledge.open(run)
    monkeypatch.setattr(log, "WAIT_S", 0.2)
    with log.writing(run), pytest.raises(ConfigError, match=r"run is held by `.*` \(process \d+ on .*, since .* UTC\). Wait for it to end"):
        knowledge.add([{"text": "one more", "label": "positive"}])
    knowledge.add([{"text": "one more", "label": "positive"}])


def test_two_writers_lose_nothing(run: Folder) -> None:
    def write(name: str) -> None:
        knowledge = Knowledge.open(run)
        for i in range(15):
            knowledge.add([{"text": f"{name} {i}", "label": "positive"}])

    threads = [threading.Thread(target=write, args=(n,)) for n in ("one", "two", "three")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Knowledge.open(run).count == 12 + 45


def test_an_editor_that_lost_its_lease_meanwhile_changes_nothing(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even with its request on its way; the file that it had written goes once it cannot be anybody's."""
    for name, seconds in (("LEASE_S", 1.0), ("TRUST_S", 0.6), ("BEAT_S", 0.2), ("POLL_S", 0.05)):
        monkeypatch.setattr(lease, name, seconds)
    run = make_run(f"{s3}/editors-{time.time_ns()}")
    first, second = Knowledge.open(run), Knowledge.open(run)
    first.add([{"id": "before", "text": "the first of all", "label": "positive"}])
    row = {"id": "first", "text": "one more", "teacher_probs": [0.0, 1.0], "text_pair": None}
    with first.editing() as right:
        assert isinstance(right, lease.Lease)
        right.ended.set()  # paused from here: nobody renews it
        second.add([{"id": "second", "text": "another", "label": "positive"}])
        with pytest.raises(lease.LeaseLost, match=r"was changed by another process"):
            first.write([row], [], right)
        monkeypatch.setattr(edit, "tagged_log", lambda folder, right: (first.view.log, '"0123"'))  # as if it had asked before
        right.trusted = lease.now() + 60
        with pytest.raises(lease.LeaseLost, match=r"knowledge/manifest\.json was changed by another process: it was held by `.*`"):
            first.write([row], [], right)
    monkeypatch.undo()
    assert first.refresh(at_once=True) and set(first.view.find(["first", "second"])) == {"second"}
    assert sum(name.startswith("edit-000002-") for name in (run / "knowledge").files()) == 2
    first.add([{"id": "third", "text": "and another", "label": "positive"}])
    assert first.view.log is not None and set((run / "knowledge").files()) == {"manifest.json", *(e["file"] for e in first.view.log.edits)}
    assert Knowledge.open(run).count == 15


def test_knowledge_on_an_object_store(tmp_path: Path) -> None:
    run = make_run(f"memory://knowledge-{time.time_ns()}/run")
    predictor = Predictor.open(run)
    (code,) = predictor.knowledge.add([{"text": "one more", "label": "positive"}])
    assert ids_of(predictor, "one more")[0] == code
    assert compact(run) is not None
    anew = Predictor.open(run)
    assert ids_of(anew, "one more")[0] == code and anew.knowledge.view.added is None


# -- the command line ------------------------------------------------------------------------------------------------------


def invoke(*arguments: str) -> str:
    done = CliRunner().invoke(main, list(arguments))
    assert done.exit_code == 0, done.output
    return done.output


def test_store_commands(run: Folder, tmp_path: Path) -> None:
    first = invoke("store", "add", run.uri, "--text", "a sharp film", "--label", "positive")
    code = first.splitlines()[0]
    assert first.splitlines()[1] == "added 1; 13 rows, version 1"
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"film number {i},negative\n" for i in range(12)))
    assert invoke("store", "add", run.uri, str(rows)).splitlines()[-2:] == ["... and 2 more", "added 12; 25 rows, version 2"]
    assert invoke("store", "update", run.uri, "--id", code, "--label", "negative").splitlines()[-1] == "updated 1; 25 rows, version 3"
    shown = invoke("store", "search", run.uri, "a sharp film", "-k", "2", "--source", "added").splitlines()
    assert len(shown) == 4 and f"negative 1.00  {code} (added): a sharp film" in shown[0]
    assert shown[0].startswith("similarity  1.000") and shown[2].startswith("bm25")
    gone = tmp_path / "gone.txt"
    gone.write_text(f"{code}\n")
    assert invoke("store", "delete", run.uri, "train-000001", "--file", str(gone)).splitlines()[-1] == "deleted 2; 23 rows, version 4"
    assert invoke("store", "compact", run.uri) == "compacted to version 5, base-000005\n"
    assert invoke("store", "compact", run.uri) == "nothing to compact\n"
    table = tmp_path / "more.csv"
    for content, message in (
        ("text,label\na fine, long film,positive\n", "more.csv, line 2: found more fields than the header has (text, label); quote fields"),
        ('text,label\n"' + "x" * 140_000 + '",positive\n', "more.csv, line 2: not CSV (field larger than"),
        ("text,label\nb,positive\nc,good\n", "more.csv, row 2: label: found 'good'"),
    ):
        table.write_text(content)
        wrong = CliRunner().invoke(main, ["store", "add", run.uri, str(table)])
        assert wrong.exit_code == 1 and message in " ".join(wrong.output.split()), wrong.output
    table.write_text('text,teacher_probs\na sure thing,"[0.25, 0.75]"\n')
    assert "added 1" in invoke("store", "add", run.uri, str(table))
    table.write_text("name\ntrain-000001\n")
    wrong = CliRunner().invoke(main, ["store", "delete", run.uri, "--file", str(table)])
    assert wrong.exit_code == 1 and "found no column id (the columns are name)" in " ".join(wrong.output.split())
    wrong = CliRunner().invoke(main, ["store", "add", run.uri, "--text", "x", "--label", "good"])
    assert wrong.exit_code == 1 and "label: found 'good'" in wrong.output
    both = CliRunner().invoke(main, ["store", "add", run.uri, str(rows), "--text", "x"])
    assert both.exit_code == 1 and "either a file of rows or one row" in both.output

"""The n-gram memory follows edits: what is added is answered its way, what is deleted goes, and compaction keeps it to the last bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from making.tiny_run import TEXTS, make_run

from retrikt_ray.index.learning import edited, of_texts
from retrikt_ray.index.mixture import Mixture
from retrikt_ray.index.ngrams import ARRAYS, FILE, Memory
from retrikt_ray.knowledge.compact import compact
from retrikt_ray.knowledge.knowledge import Knowledge
from retrikt_ray.predictor import Predictor
from retrikt_ray.runtime.folders import ArtifactError, Folder
from retrikt_ray.task.texts import Text

ALONE = Mixture(0.0, 0.0, 0.0, 1.0, 8, 0.1, 4, 1.0)  # the memory answers, and nobody else
ASKED: list[Text] = [(t, None) for t in [*TEXTS, "gas smell on floor 3", "a fine but cold play"]]


@pytest.fixture
def run(tmp_path: Path) -> Folder:
    return make_run(tmp_path / "run", mixture=ALONE)


def same(one: Memory, other: Memory) -> None:
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert one.rows == other.rows


def differs(one: Memory, other: Memory) -> bool:
    return len(one.keys) != len(other.keys) or one.steps.tolist() != other.steps.tolist() or one.scales.tolist() != other.scales.tolist()


def test_a_run_has_the_memory_of_its_store(run: Folder) -> None:
    scores = [0.95 - 0.02 * i if i < 6 else 0.05 + 0.02 * (i - 6) for i in range(12)]
    labels = np.array([[1 - s, s] for s in scores], np.float32)
    same(Knowledge.open(run).view.ngrams, of_texts([(t, None) for t in TEXTS], labels))


def test_an_added_row_is_answered_its_way(run: Folder) -> None:
    """Also where its words are known, and say something else."""
    predictor = Predictor.open(run)
    before = predictor.predict(ASKED).answers
    assert before[0, 1] > 0.8
    predictor.knowledge.add([{"text": "a fine film", "label": "negative"}, {"text": "gas smell on floor 3", "label": "positive"}])
    after = predictor.predict(ASKED).answers
    assert after[0, 0] > 0.7 and after[12, 1] > 0.9
    assert after[5].tolist() == before[5].tolist()  # "never dull" shares no word with them
    assert predictor.predict([ASKED[12]]).ngrams[0][0].weight > 0
    np.testing.assert_array_equal(Predictor.open(run).predict(ASKED).answers, after)
    np.testing.assert_array_equal(Predictor.open(run, edited=False).predict(ASKED).answers, before)


def test_rows_that_were_added_and_deleted_leave_no_trace(run: Folder) -> None:
    knowledge = Knowledge.open(run)
    before = knowledge.view.ngrams
    codes = knowledge.add([{"text": "gas smell on floor 3", "label": "positive"}, {"text": "a fine film", "label": "negative"}])
    (third,) = knowledge.add([{"text": "a warm cast", "label": "negative"}])
    assert differs(knowledge.view.ngrams, before)
    knowledge.delete([*codes, third])
    same(knowledge.view.ngrams, before)
    compact(run)
    knowledge.refresh()
    same(knowledge.view.ngrams, before)


def test_the_part_of_a_deleted_row_goes(run: Folder) -> None:
    """As `edited` takes it away, by the teacher's label of the row, in one edit or in several."""
    knowledge = Knowledge.open(run)
    before, labels = knowledge.view.ngrams, knowledge.view.labels
    want = edited(before, ([], labels[:0]), ([ASKED[0], ASKED[7]], labels[[0, 7]]))
    assert differs(want, before)
    knowledge.delete(["train-000000", "train-000007"])
    same(knowledge.view.ngrams, want)
    other = Knowledge.open(make_run(Path(run.uri.removeprefix("file://")).parent / "other"))
    other.delete(["train-000007"])
    other.delete(["train-000000"])
    same(other.view.ngrams, want)
    brave = knowledge.view.ngrams.answers([ASKED[0]])[0][0, 1], before.answers([ASKED[0]])[0][0, 1]
    assert brave[0] < brave[1] - 0.1  # "a fine film" is less surely positive, now that nobody says so


def test_an_update_is_a_deletion_and_an_addition(run: Folder) -> None:
    knowledge = Knowledge.open(run)
    before, labels = knowledge.view.ngrams, knowledge.view.labels
    knowledge.update([{"id": "train-000003", "label": "negative"}])
    same(knowledge.view.ngrams, edited(before, ([ASKED[3]], np.array([[1.0, 0.0]])), ([ASKED[3]], labels[[3]])))
    assert knowledge.view.ngrams.answers([ASKED[3]])[0][0, 0] > 0.7


@pytest.mark.parametrize(("pair", "regression"), [(False, False), (True, True)])
def test_compaction_keeps_the_memory_and_the_answers(tmp_path: Path, pair: bool, regression: bool) -> None:
    """To the last bit, over several edits and a compaction between them; and the file that it writes is the file of that memory."""
    run = make_run(tmp_path / "run", pair=pair, regression=regression)
    predictor, asked = Predictor.open(run), [(t, "a warm play" if pair else None) for t, _ in ASKED]
    more = {"text_pair": "the cast"} if pair else {}
    labels = ["4.5", "0.5"] if regression else ["positive", "negative"]
    knowledge = predictor.knowledge
    for step in range(3):
        codes = knowledge.add([{"text": f"gas smell on floor {step}{i}", "label": label} | more for i, label in enumerate(labels)])
        knowledge.delete([codes[0], f"train-{4 + step:06d}"])
        knowledge.update([{"id": f"train-{step:06d}", "label": labels[1]}])
        memory, answers = knowledge.view.ngrams, predictor.predict(asked).answers
        if step != 1:
            after = compact(run)
            assert after is not None and after.base is not None
            knowledge.refresh()
            same(knowledge.view.ngrams, memory)
            assert predictor.predict(asked).answers.tobytes() == answers.tobytes()
            memory.write(Folder.at(tmp_path / f"by-hand-{step}"))
            written = run / "knowledge" / after.base / "index"
            assert written.read_bytes(FILE) == (tmp_path / f"by-hand-{step}" / FILE).read_bytes()
            same(Predictor.open(run).knowledge.view.ngrams, memory)


def test_a_damaged_memory_is_refused_by_name(run: Folder, tmp_path: Path) -> None:
    data = (run / "index").read_bytes(FILE)
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    for damaged in (bytes(flipped), data[:-9], b"", data + b"x"):
        (run / "index").write_bytes(FILE, damaged)
        with pytest.raises(ArtifactError, match=r"index/ngrams\.arrow"):
            Predictor.open(run)
    (run / "index").remove(FILE)
    with pytest.raises(ArtifactError, match=r"index.*ngrams\.arrow"):
        Predictor.open(run)
    (run / "index").write_bytes(FILE, data)
    knowledge = Knowledge.open(run)
    knowledge.add([{"text": "one more", "label": "positive"}])
    after = compact(run)
    assert after is not None and after.base is not None
    (run / "knowledge" / after.base / "index").write_bytes(FILE, bytes(flipped))
    with pytest.raises(ArtifactError, match=rf"{after.base}/index/ngrams\.arrow"):
        Predictor.open(run)


def test_rows_of_the_log_and_of_the_view_are_the_same(run: Folder) -> None:
    """Compaction reads the deleted rows from the store again, where the view has them in memory."""
    knowledge = Knowledge.open(run)
    knowledge.add([{"text": "gas smell", "teacher_probs": [0.3, 0.7]}])
    knowledge.delete([f"train-{i:06d}" for i in (11, 2, 6)])  # of both parts of the store
    memory = knowledge.view.ngrams
    alive = knowledge.view.rows.filter(pa.array(knowledge.view.alive))["id"].to_pylist()
    compact(run)
    knowledge.refresh()
    assert knowledge.view.rows["id"].to_pylist() == alive
    same(knowledge.view.ngrams, memory)

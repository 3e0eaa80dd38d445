"""Answers of a whole run: the formula in plain loops, evidence, edits, and what is refused."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from making.tiny_run import LABELS, TEXTS, make_run

from retrikt_ray.index.mixture import NAMES, Mixture
from retrikt_ray.index.ngrams import Memory, Spoken, keys_of, pair_keys, word_key
from retrikt_ray.knowledge.compact import compact
from retrikt_ray.knowledge.knowledge import Knowledge
from retrikt_ray.knowledge.view import Neighbour
from retrikt_ray.predictor import Prediction, Predictor
from retrikt_ray.runtime.folders import ArtifactError, Folder
from retrikt_ray.task.texts import TextError

NONE = -np.inf


def close(got: np.ndarray, want: list[list[float]], within: float = 1e-12) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=within)


def by_hand(predictor: Predictor, text: str, rows: list[tuple[str, list[float]]]) -> np.ndarray:
    """The answer for one text, from the formulas in plain loops: cosine, BM25 (k1 1.5, b 0.75), two softmax votes, n-grams, four exponents."""
    m = predictor.mixture

    def voted(scores: list[float], k: int, tau: float) -> np.ndarray | None:
        best = sorted((i for i, s in enumerate(scores) if s > NONE), key=lambda i: (-scores[i], i))[:k]
        weights = [math.exp((scores[i] - scores[best[0]]) / tau) for i in best]
        return sum(w * np.array(rows[i][1]) for w, i in zip(weights, best, strict=True)) / sum(weights) if best else None

    student, vectors = (x.numpy().astype(np.float64) for x in predictor.student.encode([(t, None) for t in [text, *(r[0] for r in rows)]]))
    words = [r[0].split() for r in rows]
    mean = sum(map(len, words)) / len(rows)
    bm25 = []
    for row in words:
        score = 0.0
        for word in text.split():
            holders = sum(word in other for other in words)
            rare = math.log(1 + (len(rows) - holders + 0.5) / (holders + 0.5))
            score += rare * row.count(word) / (row.count(word) + 1.5 * (0.25 + 0.75 * len(row) / mean))
        bm25.append(score or NONE)
    near, shared = voted((vectors[1:] @ vectors[0]).tolist(), m.k, m.tau), voted(bm25, m.lexical_k, m.lexical_tau)
    memory = predictor.knowledge.view.ngrams
    table = said_by(memory, text)
    odds = [math.exp(memory.bias[c] + sum(w[c] for w in table.values()) / math.sqrt(len(table) or 1)) for c in range(2)]
    ngrams = np.array(odds) / sum(odds) if table else None
    answer = np.ones(2)
    for told, weight in ((student[0], m.student), (near, m.dense), (shared, m.lexical), (ngrams, m.ngrams)):
        answer *= (0.98 * (student[0] if told is None else told) + 0.01) ** weight
    return answer / answer.sum()


def said_by(memory: Memory, text: str) -> dict[str, list[float]]:
    """The words and word pairs of a text that a memory knows, and their weights by class."""
    words = text.split()
    keys = {w: word_key(w) for w in words}
    keys |= {f"{a} {b}": int(pair_keys(*(np.array([word_key(w)], np.uint64) for w in (a, b)))[0]) for a, b in pairwise(words)}
    places = {ngram: memory.keys.tolist().index(key) for ngram, key in keys.items() if key in memory.keys.tolist()}
    return {ngram: memory.dense(np.array([place]))[0].tolist() for ngram, place in places.items()}


def teacher(number: int) -> list[float]:
    """What the teacher of a tiny run says of a row."""
    positive = 0.95 - 0.02 * number if number < 6 else 0.05 + 0.02 * (number - 6)
    return [1 - positive, positive]


ROWS = [(text, teacher(i)) for i, text in enumerate(TEXTS)]
QUERIES = ["a fine film", "the cast was cold", "weak weak plot", "words unheard of", "very never brave and dull"]


@pytest.mark.parametrize(
    "weights", [(0.5, 0.3, 0.2, 0.4), (0.2, 0.8, 0.0, 0.0), (0.2, 0.0, 1.8, 0.0), (0.0, 0.0, 0.0, 2.5), (1.0, 0.0, 0.0, 0.0)]
)
def test_predict_is_the_formula_in_plain_loops(tmp_path: Path, weights: tuple[float, float, float, float]) -> None:
    predictor = Predictor.open(make_run(tmp_path, mixture=Mixture(*weights, 5, 0.1, 3, 1.5)))
    want = [by_hand(predictor, text, ROWS) for text in QUERIES]
    for evidence in (True, False):
        close(predictor.predict([(t, None) for t in QUERIES], evidence).answers, want, within=2e-6)  # float32 scores
    strange = predictor.predict([(QUERIES[3], None)])
    assert strange.lexical.positions.tolist() == [[-1] * 3]  # so this query had no lexical vote
    assert {name: found.tolist() for name, (_, found) in strange.voices.items()} == {"dense": [[1]], "lexical": [[0]], "ngrams": [[0]]}


@pytest.mark.parametrize(("dense", "lexical", "ngrams"), [(0.4, 0.0, 0.0), (0.0, 0.4, 0.0), (0.0, 0.0, 0.4), (0.0, 0.0, 0.0)])
def test_predict_asks_no_voice_without_need(tmp_path: Path, dense: float, lexical: float, ngrams: float) -> None:
    predictor = Predictor.open(make_run(tmp_path, mixture=Mixture(0.6, dense, lexical, ngrams, 5, 0.1, 3, 1.5)))
    lean, full = (predictor.predict([("a fine film", None)], evidence) for evidence in (False, True))
    assert (lean.dense is not None, lean.lexical is not None) == (dense > 0, lexical > 0)
    assert full.dense is not None and full.lexical is not None
    assert lean.voices.keys() == {name for name in NAMES[1:] if getattr(predictor.mixture, name)} and [*full.voices] == [*NAMES[1:]]
    assert (full.dense.positions.shape, full.lexical.positions.shape) == ((1, 5), (1, 3))  # k of either side
    np.testing.assert_array_equal(lean.answers, full.answers)


def test_part_of_a_prediction(tmp_path: Path) -> None:
    predictor = Predictor.open(make_run(tmp_path))
    every = predictor.predict([(t, None) for t in QUERIES])
    part = every.part(1, 3)
    assert isinstance(part, Prediction) and part.dense and part.lexical and every.dense and every.lexical
    np.testing.assert_array_equal(part.answers, every.answers[1:3])
    np.testing.assert_array_equal(part.student, every.student[1:3])
    for got, whole in ((part.dense, every.dense), (part.lexical, every.lexical)):
        np.testing.assert_array_equal(got.positions, whole.positions[1:3])
        np.testing.assert_array_equal(got.scores, whole.scores[1:3])
        np.testing.assert_array_equal(got.labels, whole.labels[1:3])
        assert got.ids == whole.ids[1:3]
    assert every.dense.ids[0] != every.dense.ids[1]
    assert part.voices.keys() == every.voices.keys() == {"dense", "lexical", "ngrams"}
    for name, (said, found) in every.voices.items():
        np.testing.assert_array_equal(part.voices[name][0], said[1:3])
        np.testing.assert_array_equal(part.voices[name][1], found[1:3])
    assert part.ngrams == every.ngrams[1:3] and every.ngrams[0] != every.ngrams[1]
    assert part.texts == every.texts[1:3] and part.labels == every.labels[1:3]
    assert predictor.predict(QUERIES, evidence=False).part(0, 1).neighbours is not None


def test_neighbours_are_rows_with_their_score(tmp_path: Path) -> None:
    found = Predictor.open(make_run(tmp_path)).predict(["words unheard of", "never dull"])
    assert found.lexical_neighbours[0] == []
    assert found.dense is not None and len(found.view.neighbours(found.dense, "similarity", 2)[1]) == 2
    assert found.neighbours[1][0] == Neighbour(
        id="train-000005",
        text="never dull",
        text_pair=None,
        source="generated",
        asked_label=None,
        label="positive",
        score=pytest.approx(0.85, abs=1e-6),
        similarity=pytest.approx(1, abs=1e-6),
    )
    # "dull" is in rows 5 and 6, "never" in 5 and 11: rows 6 and 11 hold one of the two words.
    alike = found.lexical_neighbours[1]
    assert [n.id for n in alike] == ["train-000005", "train-000011", "train-000006"]
    assert all(n.bm25 is not None and n.similarity is None for n in alike)


def test_ngrams_are_those_of_the_text_that_say_most_for_its_answer_or_against(tmp_path: Path) -> None:
    run = make_run(tmp_path, mixture=Mixture(0.0, 0.0, 0.0, 1.0, 5, 0.1, 3, 1.5))
    predictor = Predictor.open(run)
    texts = ["warm Robot", "weak robot", "warm weak warm", "words unheard of", " ".join(TEXTS)]
    warm, weak, both, strange, much = (found := predictor.predict(texts)).ngrams
    # Rows 1 and 4, both positive, have "warm"; 8 and 9, both negative, "weak"; none has "robot".
    assert found.labels[:2] == ["positive", "negative"]
    assert [[s.ngram for s in some] for some in (warm, weak, strange)] == [["warm"], ["weak"], []]
    assert warm[0].weight > 0.1 and weak[0].weight > 0.1  # each is for its own answer
    said = {s.ngram: s.weight for s in both}
    assert said.keys() == {"warm", "weak"} and said[f"w{'arm' if found.labels[2] == 'positive' else 'eak'}"] > 0 > min(said.values())
    # Each is the n-gram's own weight beside the mean over the labels, as it counts among the n-grams that are known; strongest first.
    table, label = said_by(predictor.knowledge.view.ngrams, texts[4]), int(found.answers[4].argmax())
    want = {ngram: (w[label] - sum(w) / 2) / math.sqrt(len(table)) for ngram, w in table.items()}
    first = sorted(want, key=lambda ngram: -abs(want[ngram]))[:8]
    assert len(want) > 8 and len(much) == 8
    assert {s.ngram: s.weight for s in much} == {ngram: pytest.approx(want[ngram], abs=1e-9) for ngram in first}
    assert [abs(s.weight) for s in much] == sorted((abs(s.weight) for s in much), reverse=True)


def test_ngrams_follow_the_edits(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert "zebra" not in {s.ngram for s in Predictor.open(run).predict("a zebra film").ngrams[0]}
    Knowledge.open(run).add([{"id": "new", "text": "a zebra film", "label": "negative"}])
    found = Predictor.open(run).predict("zebra")
    (spoken,) = found.ngrams[0]
    assert spoken == Spoken("zebra", spoken.weight) and (spoken.weight > 0) == (found.labels == ["negative"])
    assert Predictor.open(run, edited=False).predict("zebra").ngrams == [[]]


def test_ngrams_of_a_pair_in_regression(tmp_path: Path) -> None:
    """A weight is in units of the value, and no pair of words reaches from one text into the other."""
    predictor = Predictor.open(make_run(tmp_path, pair=True, regression=True))
    found = predictor.predict(("warm", "weak"))
    memory, said = predictor.knowledge.view.ngrams, {s.ngram: s.weight for s in found.ngrams[0]}
    alone = {"warm (in the first alone)", "weak (in the second alone)", *(f"0 of 10 words of the {n} in both" for n in ("first", "second"))}
    assert said.keys() == {"warm", "weak"} | alone
    # What parts the texts of a pair is an n-gram, too, and "warm" ends one of the store's first texts.
    known = (memory.find(keys_of([("warm", "weak")])[0]) >= 0).sum()
    assert known == 4 + 4
    for word in ("warm", "weak"):
        weight = memory.dense(memory.find(np.array([word_key(word)], np.uint64)))[0, 0]
        assert said[word] == pytest.approx(weight / known**0.5, abs=1e-9)


def test_predict_takes_what_a_person_means(tmp_path: Path) -> None:
    single, pair = Predictor.open(make_run(tmp_path / "single")), Predictor.open(make_run(tmp_path / "pair", pair=True))
    want = single.answer([("a fine film", None)])
    for given in ("a fine film", ["a  fine\nfilm"], {"text": "a fine film"}, ("a fine film", None)):
        found = single.predict(given)
        assert len(found) == 1 and found.texts == [("a fine film", None)]
        np.testing.assert_array_equal(found.answers, want.answers)
    assert single.predict(["ok"]).texts == [("ok", None)]  # one text, not the pair "o", "k"
    assert single.predict("ok").texts == [("ok", None)]
    assert pair.predict(("a fine film", "a play")).texts == [("a fine film", "a play")]
    assert pair.predict([("a fine film", "a play"), {"text": "dull", "text_pair": "cold"}]).texts[1] == ("dull", "cold")
    for predictor, given, message in (
        (single, ("a", "b"), "texts.text_pair is given, but this task takes single texts; expected a text"),
        (pair, "ok", "texts.text_pair is missing: this task compares two texts"),
        (pair, ["ok"], r"texts\[0\].text_pair is missing"),
        (single, 3, "texts: found 3; expected a text"),
        (single, [], "texts is an empty list"),
        (single, ["a", " "], r"texts\[1\] is empty"),
        (single, {"txt": "a"}, 'texts has the unknown field "txt"'),
    ):
        with pytest.raises(TextError, match=message):
            predictor.predict(given)


def test_a_prediction_says_what_it_found(tmp_path: Path) -> None:
    predictor = Predictor.open(make_run(tmp_path))
    found = predictor.predict(["a fine film", "a <b>dull</b> film"])
    best = found.answers.argmax(1)
    assert found.labels == [LABELS[i] for i in best] and found.scores == [found.answers[i, b] for i, b in enumerate(best)]
    assert repr(found).splitlines()[0] == f"{found.labels[0]} {found.scores[0]:.2f}  a fine film"
    page = found._repr_html_()
    assert "a &lt;b&gt;dull&lt;/b&gt; film" in page and "<b>dull" not in page
    assert f"{found.neighbours[0][0].similarity:.2f} {found.neighbours[0][0].label}: a fine film" in page
    assert f"{found.ngrams[0][0].weight:+.2f} {found.ngrams[0][0].ngram}<" in page
    values = Predictor.open(make_run(tmp_path / "values", regression=True)).predict("a fine film")
    assert values.scores == [values.answers[0, 0]] and values.labels == [f"{values.answers[0, 0]:.3g}"]


def test_edits_change_the_answer_and_edited_false_does_not_see_them(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    before = Predictor.open(run).predict([("film fine a", None)]).answers
    Knowledge.open(run).add([{"text": "a fine film", "label": "negative"}])
    predictor = Predictor.open(str(tmp_path))
    after = predictor.predict([("film fine a", None)])  # the same words: heard of by retrieval
    close(after.answers, [by_hand(predictor, "film fine a", [*ROWS, ("a fine film", [1.0, 0.0])])], within=2e-6)
    assert after.answers[0, 0] > before[0, 0] + 0.05
    np.testing.assert_array_equal(Predictor.open(run, edited=False).predict([("film fine a", None)]).answers, before)
    state, plain = predictor.info()["store"], Predictor.open(run, edited=False).info()["store"]
    assert (state, plain) == ({"rows": 13, "version": 1}, {"rows": 12, "version": 0})


def test_what_a_person_has_said_of_a_text_is_not_outvoted(tmp_path: Path) -> None:
    """Word for word, whatever the case; the newest of two; of a compacted base, too. Deleted, the voices speak again."""
    run = make_run(tmp_path)
    knowledge, texts = Knowledge.open(run), ["A fine film", "a fine film!", "dull plot"]

    def answers() -> np.ndarray:
        return Predictor.open(run).predict(texts).answers

    before = answers()
    knowledge.add([{"id": "one", "text": "a fine film", "label": "positive"}])
    knowledge.add([{"id": "two", "text": "a fine film", "label": "negative"}])
    found = Predictor.open(run).predict(texts)
    assert found.answers[0].tolist() == [1.0, 0.0] and (found.told >= 0).tolist() == [True, False, False]
    assert 0 < found.answers[1, 0] < 1 and found.part(1, 3).told.tolist() == [-1, -1]
    assert compact(run) is not None
    assert answers()[0].tolist() == [1.0, 0.0]
    Knowledge.open(run).delete("two")
    assert answers()[0].tolist() == [0.0, 1.0]
    Knowledge.open(run).delete("one")
    assert 0 < answers()[0, 0] < 1
    close(answers()[2:], before[2:].tolist(), within=0.05)


def test_info(tmp_path: Path) -> None:
    info = Predictor.open(make_run(tmp_path, mixture=Mixture(0.7, 0.2, 0.1, 0.6, 16, 0.05, 8, 2.0))).info()
    parameters, release = info["student"].pop("parameters"), info.pop("release")
    assert parameters > 0 and len(release) == 12
    assert info == {
        "task": "tiny",
        "problem": "classification",
        "labels": LABELS,
        "pair": False,
        "student": {"kind": "static"},
        "store": {"rows": 12, "version": 0},
        "index": {"factory": "Flat", "shards": 2, "width": 8},
        "ngrams": {
            "ngrams": 52,
            "numbers": 54,
        },  # the twelve rows' words and pairs; a weight each, as one of two labels is 0, and two biases
        "mixture": {"student": 0.7, "dense": 0.2, "lexical": 0.1, "ngrams": 0.6, "prior": []}
        | {"k": 16, "tau": 0.05, "lexical_k": 8, "lexical_tau": 2.0},
    }


def resealed(run: Folder, change: Any) -> None:
    """Alter the index's manifest by `change`, checksum and all: what another version, or another student, would have left."""
    body = run.read_sealed("index/manifest.json")
    change(body)
    run.write_sealed("index/manifest.json", body)


def test_mixture_of_another_version_is_refused_by_name(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    old = json.dumps({"student": 0.6, "dense": 0.3, "lexical": 0.1, "k": 8, "tau": 0.1, "lexical_k": 8, "lexical_tau": 1.0}).encode()
    run.write_bytes("index/mixture.json", old)

    def named(body: dict[str, Any]) -> None:
        body["files"]["mixture.json"] = {"sha256": run.sha256("index/mixture.json"), "bytes": len(old)}

    with pytest.raises(ArtifactError, match=r"index/mixture\.json has \d+ bytes, its manifest says \d+"):
        Predictor.open(run)
    resealed(run, named)
    with pytest.raises(ArtifactError, match=r"index/mixture\.json is not of this version .*ngrams.*; run `retrikt index "):
        Predictor.open(run)


def test_mixture_of_another_student_is_refused_by_name(tmp_path: Path) -> None:
    """Compaction takes edits over to a new student, but the run's own mixture.json is then still the old student's."""
    from retrikt_ray.knowledge.compact import compact
    from retrikt_ray.runtime import artifacts

    run = make_run(tmp_path / "run")
    Knowledge.open(run).add([{"text": "a fine film", "label": "negative"}])
    other = make_run(tmp_path / "other", seed=1)
    run.remove("student")
    (run / "student").upload(tmp_path / "other" / "student")
    assert artifacts.check(run / "student").content == artifacts.check(other / "student").content
    with pytest.raises(ArtifactError, match=r"another student.* than .*/run/student"):
        Predictor.open(run)
    compact(run)
    assert Knowledge.open(run).count == 13
    with pytest.raises(ArtifactError, match=r"index/mixture\.json was fitted for another student; run `retrikt index "):
        Predictor.open(run)

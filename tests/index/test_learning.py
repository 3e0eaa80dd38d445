"""Learning the n-gram memory, against scikit-learn; and following edits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression, Ridge

from retrikt_ray.index import learning
from retrikt_ray.index.learning import PENALTY, edited, fitted, learn, of_texts
from retrikt_ray.index.ngrams import ARRAYS, Memory, pair_keys, word_key
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.tables import Source
from retrikt_ray.store.rows import store_schema
from retrikt_ray.task.metrics import answers_of, losses
from retrikt_ray.task.texts import Text

WORDS = ["not", "very", "good", "dull", "film", "play", "cast", "slow", "warm", "and", "how", "many"]


def some_texts(count: int, seed: int) -> list[Text]:
    rng = np.random.default_rng(seed)
    return [(" ".join(rng.choice(WORDS, rng.integers(2, 9))), None) for _ in range(count)]


def some_labels(texts: list[Text], classes: int) -> np.ndarray:
    """Soft labels that follow from words, and from one pair of words."""
    rng = np.random.default_rng(9)
    weights = {w: rng.normal(size=classes) for w in WORDS} | {"not good": 2 * rng.normal(size=classes)}
    logits = np.array([np.sum([w for g, w in weights.items() if g in t], axis=0) if t else np.zeros(classes) for t, _ in texts])
    if classes == 1:
        return (3 + logits).astype(np.float32)
    found = np.exp(logits)
    return (found / found.sum(1, keepdims=True)).astype(np.float32)


def same(one: Memory, other: Memory) -> None:
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert one.rows == other.rows


class Reference:
    """The features as scikit-learn counts them: idf / (4 sqrt(n)) for each distinct word and pair of words."""

    def __init__(self, texts: list[Text]) -> None:
        self.words = CountVectorizer(ngram_range=(1, 2), binary=True, token_pattern=r"\w+")
        counts = self.words.fit_transform([t for t, _ in texts])
        self.idf = np.log((1 + len(texts)) / (1 + np.asarray(counts.sum(0))[0])) + 1

    def of(self, texts: list[Text]) -> np.ndarray:
        counts = self.words.transform([t for t, _ in texts]).toarray()
        return counts * self.idf / (4 * np.sqrt(np.maximum(counts.sum(1, keepdims=True), 1)))


TEXTS, UNSEEN = some_texts(120, 0), [*some_texts(30, 1), ("never seen", None), ("good , film", None)]


# learning


def test_soft_labels_as_scikit_learn_learns_them() -> None:
    """Whose rows are repeated once a class, weighted by the label. Its penalty is the same one; quantisation costs the rest."""
    labels, reference = some_labels(TEXTS, 3), Reference(TEXTS)
    features = reference.of(TEXTS)
    model = LogisticRegression(C=PENALTY, tol=1e-8, max_iter=5000)
    model.fit(np.repeat(features, 3, 0), np.tile(np.arange(3), len(TEXTS)), sample_weight=labels.ravel())
    weights, bias = fitted(features, labels, np.zeros_like(labels), True, 2000)
    np.testing.assert_allclose(weights - weights.mean(1, keepdims=True), model.coef_.T - model.coef_.T.mean(1, keepdims=True), atol=0.02)
    np.testing.assert_allclose(bias - bias.mean(), model.intercept_ - model.intercept_.mean(), atol=0.02)
    memory = of_texts(TEXTS, labels)
    assert len(memory.keys) == len(reference.idf) and memory.rows == 120
    known = [t for t in [*TEXTS, *UNSEEN] if "," not in t[0]]
    np.testing.assert_allclose(memory.answers(known)[0], model.predict_proba(reference.of(known)), atol=0.02)


def test_values_as_scikit_learn_learns_them() -> None:
    labels, reference = some_labels(TEXTS, 1), Reference(TEXTS)
    shift, scale = labels.mean(), labels.std()
    model = Ridge(alpha=1 / PENALTY, tol=1e-10).fit(reference.of(TEXTS), (labels[:, 0] - shift) / scale)
    got, found = of_texts(TEXTS, labels).answers(UNSEEN)
    np.testing.assert_allclose(got[:30, 0], model.predict(reference.of(UNSEEN[:30])) * scale + shift, atol=0.02 * scale)
    assert found[:, 0].tolist() == [1] * 30 + [0, 1]
    np.testing.assert_allclose(of_texts(TEXTS[:3], np.full((3, 1), 2.0)).answers(UNSEEN)[0], 2.0, atol=1e-3)  # one value for all


def test_the_memory_generalises() -> None:
    memory = of_texts(TEXTS, some_labels(TEXTS, 3))
    wanted = some_labels(UNSEEN[:30], 3)
    prior = np.tile(some_labels(TEXTS, 3).mean(0), (30, 1))
    assert losses(memory.answers(UNSEEN[:30])[0], wanted).mean() < losses(prior, wanted).mean() - 0.1


def test_no_more_ngrams_than_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commonest stay. `good` is in four texts, `film` in three, `good film` in two, `dull` and the rest in one."""
    texts: list[Text] = [("good film", None), ("good film", None), ("good", None), ("film good", None), ("dull", None)]
    monkeypatch.setattr(learning, "MOST_NUMBERS", 7)  # three n-grams of two classes
    memory = of_texts(texts, np.array([[0.0, 1.0]] * 4 + [[1.0, 0.0]]))
    good_film = int(pair_keys(np.array([word_key("good")], np.uint64), np.array([word_key("film")], np.uint64))[0])
    assert memory.keys.tolist() == sorted([word_key("good"), word_key("film"), good_film])
    idf = dict(zip(memory.keys.tolist(), memory.idf.tolist(), strict=True))
    assert idf[word_key("good")] == pytest.approx(np.log(6 / 5) + 1) and idf[good_film] == pytest.approx(np.log(6 / 3) + 1)


def write_store(folder: Folder, texts: list[Text], labels: np.ndarray, parts: int) -> Folder:
    rows = [
        {"id": str(i), "text": a, "text_pair": b, "condition": 0, "teacher_probs": p, "teacher_embedding": [0.0] * 2, "source": "generated"}
        for i, ((a, b), p) in enumerate(zip(texts, labels.tolist(), strict=True))
    ]
    for n, some in enumerate(np.array_split(np.arange(len(rows)), parts)):
        folder.write_table(f"part-{n:05d}.parquet", pa.Table.from_pylist([rows[i] for i in some], schema=store_schema(2)))
    return folder


def test_a_store_is_learnt_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same memory, whatever the tasks it is counted by; and without the rows that are left out as if they were not there."""
    labels = some_labels(TEXTS, 3)
    store, want = write_store(Folder.at(tmp_path), TEXTS, labels, 4), of_texts(TEXTS, labels)
    same(*learn(store, 0, None), want)
    monkeypatch.setattr(learning, "TASK_ROWS", 7)
    same(*learn(store, 1, None), want)
    left_out = np.array([0, 5, 29, 30, 31, 119])
    rest = np.setdiff1d(np.arange(120), left_out)
    whole, without = learn(store, 0, None, [np.ones(120, bool), ~np.isin(np.arange(120), left_out)])
    same(whole, want)
    same(without, of_texts([TEXTS[i] for i in rest], labels[rest]))


def test_a_large_store_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "MOST_ROWS", 50)
    asked: list[np.ndarray] = []
    before = learning.counted
    monkeypatch.setattr(learning, "counted", lambda source, positions: (asked.append(positions), before(source, positions))[1])
    store = write_store(Folder.at(tmp_path), TEXTS, some_labels(TEXTS, 2), 2)
    masks = [np.ones(120, bool), np.arange(120) >= 20]
    (first, without), again, other = (learn(store, seed, None, wanted) for seed, wanted in ((0, masks), (0, ()), (1, ())))
    assert first.rows == 50 and without.rows == (asked[0] >= 20).sum() < 50
    same(first, *again)
    assert asked[0].tolist() == asked[1].tolist() != asked[2].tolist() and len({*asked[0].tolist()}) == 50
    assert asked[0].tolist() == sorted(asked[0].tolist())
    assert not np.array_equal(first.bias, other[0].bias)
    own = np.arange(120) % 4 == 0
    learn(store, 0, None, (), own)
    assert (
        len({*asked[3].tolist()}) == 50
        and own[asked[3]].sum() >= 25
        and (~own[asked[3]]).sum() > 0
        and 0 <= asked[3].min() <= asked[3].max() < 120
    )


def test_counting_reads_rows_at_positions(tmp_path: Path) -> None:
    labels = some_labels(TEXTS, 2)
    source = Source.of(write_store(Folder.at(tmp_path), TEXTS, labels, 3))
    positions = np.array([1, 39, 40, 99])
    keys, rows, found = learning.counted(source, positions)
    want_keys, want_rows = learning.keys_of([TEXTS[i] for i in positions])
    np.testing.assert_array_equal(keys, want_keys)
    np.testing.assert_array_equal(rows, want_rows)
    np.testing.assert_array_equal(found, labels[positions])


# edits


def nothing(classes: int) -> tuple[list[Text], np.ndarray]:
    return [], np.zeros((0, classes))


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_at_the_minimum_a_weight_is_what_the_rows_say(classes: int) -> None:
    """Penalty times (label - answer) idf / (4 sqrt(n)) over the rows that hold it: what makes a row's part known."""
    labels, reference = some_labels(TEXTS, classes), Reference(TEXTS)
    features = reference.of(TEXTS)
    scaled = (labels - labels.mean()) / labels.std() if classes == 1 else labels
    weights, bias = fitted(features, scaled, np.zeros_like(scaled), True, 3000)
    missing = scaled - answers_of(features @ weights + bias)
    np.testing.assert_allclose(weights, PENALTY * features.T @ missing, atol=0.02)


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_the_part_of_a_deleted_row_goes(classes: int) -> None:
    """By hand: -penalty (label - answer) idf / (4 sqrt(n)) in the weight of a feature, times idf / 4 in that of its n-gram."""
    labels = some_labels(TEXTS, classes)
    memory, row = of_texts(TEXTS, labels), 17
    after = edited(memory, nothing(classes), ([TEXTS[row]], labels[[row]]))
    keys, _ = learning.keys_of([TEXTS[row]])
    places = memory.find(keys)
    idf = memory.idf[places].astype(float)
    missing = labels[row] - memory.answers([TEXTS[row]])[0][0]
    more = -PENALTY * missing * (idf / 4 / np.sqrt(len(keys)) * idf / 4)[:, None]

    def apart(weights: np.ndarray) -> np.ndarray:
        return weights - weights.mean(1, keepdims=True) if classes > 1 else weights

    got, was = apart(after.dense(places)), apart(memory.dense(places))
    largest = np.abs(memory.dense(places) + more).max(1, keepdims=True)
    assert (np.abs(got - was - apart(more)) <= largest / 32 + 1e-6).all()
    others = np.setdiff1d(np.arange(len(memory.keys)), places)
    same(after.part(others), memory.part(others))
    assert after.keys.tolist() == memory.keys.tolist() and after.bias.tolist() == memory.bias.tolist()


@pytest.mark.parametrize("classes", [1, 3])
def test_after_deletion_it_answers_more_like_one_that_never_saw_the_row(classes: int) -> None:
    """Texts whose words are common and rare as in a language. What other rows would say instead is not known, so it is not all the way."""
    rng, share = np.random.default_rng(0), 1 / np.arange(2, 402)
    texts: list[Text] = [(" ".join(f"w{i}" for i in rng.choice(400, 10, p=share / share.sum())), None) for _ in range(200)]
    labels = rng.normal(size=(200, 1)) if classes == 1 else np.eye(3)[rng.integers(0, 3, 200)] * 0.8 + 0.2 / 3
    memory, seen, now = of_texts(texts, labels), 0.0, 0.0
    for row in range(6):
        rest = [i for i in range(200) if i != row]
        want = of_texts([texts[i] for i in rest], labels[rest]).answers([texts[row]])[0]
        after = edited(memory, nothing(classes), ([texts[row]], labels[[row]]))
        seen += np.abs(memory.answers([texts[row]])[0] - want).max()
        now += np.abs(after.answers([texts[row]])[0] - want).max()
    assert now < 0.5 * seen


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_an_added_row_is_answered_its_way(classes: int) -> None:
    """Against what the store says of its words; also where it has none that is known. What shares no n-gram with it stays to the last bit."""
    labels = some_labels(TEXTS, classes)
    memory = of_texts(TEXTS, labels)
    texts: list[Text] = [("not good film", None), ("gas smell", None)]
    before = memory.answers(texts)[0]
    wanted = before + 3 if classes == 1 else np.eye(classes)[before.argmin(1)]
    after = edited(memory, (texts, wanted.astype(np.float32)), nothing(classes))
    answers, found = after.answers(texts)
    assert found.tolist() == [[1], [1]]
    assert (losses(answers, wanted) < 0.3 * losses(before, wanted)).all()
    if classes > 1:
        assert answers.argmax(1).tolist() == wanted.argmax(1).tolist()
    touched = after.find(learning.keys_of(texts)[0])
    rest = after.part(np.setdiff1d(np.arange(len(after.keys)), touched))
    same(rest, memory.part(memory.find(rest.keys)))
    far: list[Text] = [("slow , warm", None)]
    assert after.answers(far)[0].tolist() == memory.answers(far)[0].tolist()


def test_new_ngrams_get_the_idf_of_the_rows_that_hold_them() -> None:
    memory = of_texts(TEXTS, some_labels(TEXTS, 2))
    texts: list[Text] = [("gas", None), ("gas film", None), ("leak", None)]
    after = edited(memory, (texts, np.tile([0.0, 1.0], (3, 1))), nothing(2))
    new = {int(k): float(v) for k, v in zip(after.keys, after.idf, strict=True) if memory.find(np.array([k]))[0] < 0}
    assert len(new) == 3  # gas, gas film, leak
    assert new[word_key("gas")] == pytest.approx(np.log(121 / 3) + 1) and new[word_key("leak")] == pytest.approx(np.log(121 / 2) + 1)
    assert (
        memory.idf[memory.find(np.array([word_key("film")], np.uint64))] == after.idf[after.find(np.array([word_key("film")], np.uint64))]
    )


def test_no_edit_changes_nothing() -> None:
    memory = of_texts(TEXTS, some_labels(TEXTS, 3))
    same(edited(memory, nothing(3), nothing(1)), memory)


def test_an_edit_follows_from_what_was_there_and_what_is_now() -> None:
    """Bit for bit, so that compaction gives what a view of the edits gives."""
    labels = some_labels(TEXTS, 3)
    added, deleted = (UNSEEN[:5], some_labels(UNSEEN[:5], 3)), (TEXTS[4:9], labels[4:9])
    same(edited(of_texts(TEXTS, labels), added, deleted), edited(of_texts(TEXTS, labels), added, deleted))


def test_a_text_without_words_can_be_added_and_deleted() -> None:
    memory = of_texts(TEXTS, some_labels(TEXTS, 2))
    blank = ([("\u200b", None), (" ", None)], np.array([[0.0, 1.0]] * 2))
    assert np.isfinite(edited(memory, blank, blank).logits(TEXTS)[0]).all()
    same(edited(memory, nothing(2), ([(" ", None)], np.array([[0.0, 1.0]]))), memory)

"""The n-gram memory: keys, quantised tables and what they answer, worked by hand."""

from __future__ import annotations

import math
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrikt_ray.index.ngrams import (
    ARRAYS,
    BETWEEN,
    FILE,
    SMALLEST,
    STEPS,
    Memory,
    compared,
    keys_of,
    merged,
    named,
    pair_keys,
    word_key,
    words_of,
)
from retrikt_ray.runtime.folders import ArtifactError, Folder
from retrikt_ray.task.texts import Text

SCRIPTS = "ab AB.,'我爱東สวัка\u0301é\u200b"


def single(word: str) -> int:
    return word_key(word)


def pair(first: str, second: str) -> int:
    return int(pair_keys(np.array([word_key(first)], np.uint64), np.array([word_key(second)], np.uint64))[0])


def found(text: Text) -> set[int]:
    return set(keys_of([text])[0].tolist())


def same(one: Memory, other: Memory) -> None:
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert one.rows == other.rows


# n-grams


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (("How many, ok?", None), ["how", "many", ",", "ok", "?"]),
        (("IT's 42%  off_\n", None), ["it", "'", "s", "42", "%", "off_"]),
        (("我爱 film", None), ["我", "爱", "film"]),
        (("東京tower、テスト", None), ["東", "京", "tower", "、", "テ", "ス", "ト"]),
        (("ไทยok", None), ["ไ", "ท", "ย", "ok"]),
        (("한국어 кино", None), ["한국어", "кино"]),  # these have spaces
        (("A b", "C"), ["a", "b", BETWEEN, "c"]),
        (("a\x1fb", ""), ["a", "b"]),  # the mark cannot come from a text; an empty second text is none
        (("  ", None), []),
    ],
)
def test_words(text: Text, words: list[str]) -> None:
    assert words_of(text) == words


def test_keys_are_the_distinct_words_and_neighbours_of_each_text() -> None:
    keys, rows = keys_of([("b a b a", None), ("", None), ("c", None)])
    want = sorted([single("a"), single("b"), pair("a", "b"), pair("b", "a")])
    assert keys.tolist() == [*want, single("c")] and rows.tolist() == [0, 0, 0, 0, 2]
    assert keys.dtype == np.uint64
    assert [len(x) for x in keys_of([])] == [0, 0]


def test_order_counts_and_case_does_not() -> None:
    assert found(("Not Good", None)) == found(("not good", None)) == {single("not"), single("good"), pair("not", "good")}
    assert found(("good not", None)) & found(("not good", None)) == {single("not"), single("good")}


def test_texts_of_a_pair_are_not_joined_over_the_boundary() -> None:
    assert pair("b", "c") not in found(("a b", "c d")) and pair("b", "c") in found(("a b c d", None))
    assert {pair("a", "b"), pair("c", "d"), pair("b", BETWEEN), pair(BETWEEN, "c")} < found(("a b", "c d"))
    assert found(("a", "b")) != found(("b", "a"))
    # Nor the last word of a text with the first of the next.
    keys, _ = keys_of([("a b", None), ("c d", None)])
    assert pair("b", "c") not in keys


def test_keys_are_what_is_on_the_disk_of_older_runs() -> None:
    """Another hash would make every table of theirs silent. splitmix64's last steps, in Python's integers."""
    first, second = (int.from_bytes(blake2b(w.encode(), digest_size=8).digest(), "little") for w in ("how", "many"))
    mixed = (first * 0x9E3779B97F4A7C15 + second) % 2**64
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    assert found(("how many", None)) == {first, second, mixed ^ (mixed >> 31)}
    assert found(("\ud800", None))  # half of a surrogate pair has a key, too


@settings(max_examples=100, deadline=None, derandomize=True)
@given(texts=st.lists(st.tuples(st.text(SCRIPTS, max_size=12), st.none() | st.text(SCRIPTS, max_size=6)), max_size=6))
def test_keys_depend_on_no_other_text(texts: list[Text]) -> None:
    keys, rows = keys_of(texts)
    for i, text in enumerate(texts):
        alone, zeros = keys_of([text])
        assert keys[rows == i].tolist() == alone.tolist() == sorted(set(alone.tolist())) and not zeros.any()
    assert rows.tolist() == sorted(rows.tolist())


def test_named() -> None:
    shown = named(("Not good", "Good"))
    words = {single("not"): "not", single("good"): "good", pair("not", "good"): "not good"}
    assert {k: v for k, v in shown.items() if k in words} == words
    assert sorted(v for k, v in shown.items() if k not in words) == [
        "10 of 10 words of the second in both",
        "5 of 10 words of the first in both",
        "good (in both)",
        "not (in the first alone)",
    ]
    assert named(("", None)) == {} and set(named(("Not good", "Good"))) <= found(("Not good", "Good"))


def test_what_the_texts_of_a_pair_have_in_common() -> None:
    """Each word once, by where it stands; a word in both says something else than the word, and the order of the texts counts."""
    assert compared(("a b", None)) == {} == compared(("a b", ""))
    read = compared(("It is not 5 5", "It is 7"))
    assert sorted(read.values()) == [
        "5 (in the first alone)",
        "5 of 10 words of the first in both",  # it, is of it, is, not, 5
        "6 of 10 words of the second in both",
        "7 (in the second alone)",
        "is (in both)",
        "it (in both)",
        "not (in the first alone)",
    ]
    assert not {single(w) for w in ("it", "is", "not", "5", "7")} & {word_key(w) for w in read}
    assert set(compared(("x y", "x"))) & set(compared(("x", "x y"))) == {f"{BETWEEN}=x"}
    assert {word_key(w) for w in read} < found(("It is not 5 5", "It is 7"))


# tables


def test_of_by_hand() -> None:
    """Less the median: (4, 0, 0), (0.5, 0, -3), (0, 0, 0), and (64, 0.9, 0), of which 0.9 is less than a 64th of 64."""
    weights = np.array([[5.0, 1.0, 1.0], [0.5, 0.0, -3.0], [2.0, 2.0, 2.0], [64.9, 0.9, 0.9 + 0.9]])
    memory = Memory.of(np.arange(4, dtype=np.uint64), np.array([1.0, 1.5, 2.0, 2.5]), weights, np.array([0.1, 0.0, -0.1]), 9)
    assert memory.starts.tolist() == [0, 1, 3, 3, 4]
    assert memory.classes.tolist() == [0, 0, 2, 0]
    assert memory.steps.tolist() == [127, 21, -127, 127]  # 0.5 is 21.2 steps of 3 / 127
    np.testing.assert_allclose(memory.scales, np.array([4, 3, 0, 64 - 0.9]) / 127, rtol=1e-6)
    assert (memory.idf.tolist(), memory.bias.tolist(), memory.rows, memory.numbers) == ([1.0, 1.5, 2.0, 2.5], [0.1, 0.0, -0.1], 9, 4 + 3)
    assert (memory.idf.dtype, memory.scales.dtype, memory.classes.dtype, memory.steps.dtype) == ("f4", "f4", "i2", "i1")


def test_of_two_classes_is_their_difference_and_of_one_the_value() -> None:
    keys, idf = np.arange(2, dtype=np.uint64), np.ones(2)
    two = Memory.of(keys, idf, np.array([[1.0, 4.0], [2.0, 0.0]]), np.zeros(2), 1)
    np.testing.assert_allclose(two.dense(np.arange(2)), [[0, 3], [0, -2]], rtol=1e-6)
    assert two.classes.tolist() == [1, 1]
    np.testing.assert_allclose(
        Memory.of(keys, idf, np.array([[0.7], [-0.2]]), np.zeros(1), 1).dense(np.arange(2)), [[0.7], [-0.2]], rtol=1e-6
    )


def random_memory(seed: int, grams: int, classes: int) -> tuple[Memory, np.ndarray]:
    """And its weights before they were quantised, the constant over the classes taken away."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(grams, classes)) * np.exp(3 * rng.normal(size=(grams, classes)))
    keys = np.sort(rng.choice(10**6, grams, replace=False)).astype(np.uint64)
    memory = Memory.of(keys, rng.uniform(1, 5, grams), weights, rng.normal(size=classes), 100)
    common = {1: np.zeros(grams), 2: weights[:, 0]}.get(classes, np.median(weights, 1))
    return memory, weights - common[:, None]


@pytest.mark.parametrize("classes", [1, 2, 3, 6])
def test_of_loses_at_most_half_a_step_or_what_is_too_small(classes: int) -> None:
    memory, weights = random_memory(classes, 300, classes)
    largest, held = np.abs(weights).max(1, keepdims=True), np.zeros(weights.shape, bool)
    which, column, _ = memory.entries(np.arange(300))
    held[which, column] = True
    np.testing.assert_array_equal(held, (np.abs(weights) >= SMALLEST * largest) & (largest > 0))
    error = np.abs(memory.dense(np.arange(300)) - weights)
    assert (error <= np.where(held, largest / STEPS / 2, SMALLEST * largest) * (1 + 1e-5)).all()
    assert classes < 3 or (~held).sum() > 300  # with one 0 a gram, more than the medians are left out


def test_a_table_that_is_quantised_again_stays_as_it_is() -> None:
    """An edit that says nothing of an n-gram leaves no trace in it."""
    for classes in (1, 2, 3, 4):
        memory, _ = random_memory(classes, 200, classes)
        same(memory.changed(memory.keys, memory.idf, np.zeros((200, classes))), memory)
        same(memory.changed(memory.keys[:0], memory.idf[:0], np.zeros((0, classes))), memory)


def test_changed() -> None:
    memory, _ = random_memory(0, 50, 3)
    before, idf = memory.dense(np.arange(50)), memory.idf
    keys = np.sort(np.array([memory.keys[3], memory.keys[20], 2_000_000, memory.keys[5] + np.uint64(1)], np.uint64))
    assert len(np.intersect1d(keys, memory.keys)) == 2
    more = np.random.default_rng(1).normal(size=(4, 3))
    after = memory.changed(keys, np.full(4, 1.25, np.float32), more)
    assert after.keys.tolist() == sorted({*memory.keys.tolist(), *keys.tolist()}) and len(after.keys) == 52
    for i, key in enumerate(after.keys):
        now, at = after.dense(np.array([i]))[0], memory.find(np.array([key]))[0]
        was = before[at] if at >= 0 else np.zeros(3)
        if key in keys:
            want = was + more[keys.tolist().index(int(key))]
            want = want - np.median(want)
            assert np.abs(now - want).max() <= np.abs(want).max() / 64 and after.idf[i] == 1.25
        else:
            assert now.tolist() == was.tolist() and after.idf[i] == idf[at]
    assert after.rows == 100 and after.bias.tolist() == memory.bias.tolist()


def test_part_and_merged() -> None:
    memory, _ = random_memory(3, 40, 4)
    places = np.arange(1, 40, 3)
    part = memory.part(places)
    assert part.keys.tolist() == memory.keys[places].tolist() and part.starts[0] == 0 and part.starts[-1] == len(part.steps)
    np.testing.assert_array_equal(part.dense(np.arange(len(places))), memory.dense(places))
    rest = memory.part(np.setdiff1d(np.arange(40), places))
    same(merged([rest, part]), memory)
    same(merged([part, memory.part(np.arange(0)), rest]), memory)


def test_find() -> None:
    memory, _ = random_memory(0, 20, 2)
    assert memory.find(memory.keys[[4, 19, 0]]).tolist() == [4, 19, 0]
    assert memory.find(np.array([2**64 - 1, int(memory.keys[0]) - 1], np.uint64)).tolist() == [-1, -1]
    assert memory.part(np.arange(0)).find(memory.keys[:2]).tolist() == [-1, -1]


# answers


def table(weights: dict[int, list[float]], bias: list[float]) -> Memory:
    keys = sorted(weights)
    return Memory.of(np.array(keys, np.uint64), np.ones(len(keys)), np.array([weights[k] for k in keys]), np.array(bias), 10)


@pytest.fixture
def opinions() -> Memory:
    return table(
        {single("not"): [0.0, -1.0], single("good"): [0.0, 2.0], pair("not", "good"): [0.0, -4.0], single("film"): [0.0, 0.0]}, [0, 0.5]
    )


def test_logits_by_hand(opinions: Memory) -> None:
    logits, known = opinions.logits([("Good", None), ("not good", None), ("a good one", None), ("what ?", None), ("film good good", None)])
    assert known.tolist() == [1, 3, 1, 0, 2]
    # bias 0.5; 2 / sqrt(1); (-1 + 2 - 4) / sqrt(3); words that it does not know do not count; a word counts once
    want = [2.5, 0.5 - 3 / math.sqrt(3), 2.5, 0.5, 0.5 + 2 / math.sqrt(2)]
    np.testing.assert_allclose(logits, [[0, x] for x in want], atol=1e-6)
    answers, found = opinions.answers([("Good", None), ("what ?", None)])
    np.testing.assert_allclose(answers[:, 1], [1 / (1 + math.exp(-2.5)), 1 / (1 + math.exp(-0.5))], atol=1e-6)
    np.testing.assert_allclose(answers.sum(1), 1, atol=1e-12)
    assert found.tolist() == [[1.0], [0.0]]


def test_values_in_regression() -> None:
    memory = table({single("good"): [3.0], single("dull"): [-1.0]}, [2.5])
    answers, found = memory.answers([("good", None), ("good , dull", None), ("film", None)])
    np.testing.assert_allclose(answers[:, 0], [5.5, 2.5 + 2 / math.sqrt(2), 2.5], atol=1e-6)
    assert found.tolist() == [[1], [1], [0]]


def test_an_empty_table_says_its_bias() -> None:
    memory = table({single("x"): [0.0, 1.0]}, [0.0, 1.0]).part(np.arange(0))
    logits, known = memory.logits([("good", None), ("", None)])
    assert logits.tolist() == [[0, 1], [0, 1]] and known.tolist() == [0, 0]


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_an_answer_depends_on_no_other_text(classes: int) -> None:
    """To the last bit."""
    rng = np.random.default_rng(classes)
    words = [f"w{i}" for i in range(30)]
    texts = [(" ".join(rng.choice(words, n)), " ".join(rng.choice(words, 3)) if n % 2 else None) for n in (1, 2, 7, 20, 33, 0)]
    keys = np.unique(keys_of(texts)[0])[::2]
    memory = Memory.of(keys, np.ones(len(keys)), rng.normal(size=(len(keys), classes)), rng.normal(size=classes), 1)
    together, found = memory.answers(texts)
    for order in ([5, 4, 3, 2, 1, 0], *([i] for i in range(6))):
        answers, flags = memory.answers([texts[i] for i in order])
        assert answers.tolist() == together[order].tolist() and flags.tolist() == found[order].tolist()


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_the_compiled_loop_adds_up_what_the_table_says_of_each_texts_n_grams(classes: int) -> None:
    """To the last bit: in the order of the keys, each once."""
    rng = np.random.default_rng(classes)
    words = [f"w{i}" for i in range(12)]
    texts = [(" ".join(rng.choice(words, n)), " ".join(rng.choice(words, 5)) if n % 2 else None) for n in (9, 1, 0, 40, 3)]
    keys = np.unique(keys_of(texts)[0])[::2]
    memory = Memory.of(keys, np.ones(len(keys)), rng.normal(size=(len(keys), classes)), rng.normal(size=classes), 1)
    logits, found = memory.logits(texts)
    for text, got, known in zip(texts, logits, found, strict=True):
        places = memory.find(keys_of([text])[0])
        want = np.zeros(classes)
        for weights in memory.dense(places[places >= 0]):
            want += weights
        assert known == (places >= 0).sum() and got.tolist() == (memory.bias + want / np.sqrt(max(1, known))).tolist()
    assert found.max() > 10 and found[2] == 0


def test_a_table_is_not_written_to() -> None:
    bias = np.zeros(2)
    made = Memory.of(np.array([3], np.uint64), np.ones(1), np.ones((1, 2)), bias, 1)
    with pytest.raises(ValueError, match="read-only"):
        made.bias[0] = 1.0
    bias[0] = 1.0  # what was given stays its owner's to write to


def test_spoken(opinions: Memory) -> None:
    """Of (0, w) a class is w / 2 from the mean; `film` says nothing, `so` is not known."""
    spoken = opinions.spoken(("So NOT good film", None), 1, 8)
    assert [s.ngram for s in spoken] == ["not good", "good", "not"]
    np.testing.assert_allclose([s.weight for s in spoken], np.array([-2, 1, -0.5]) / math.sqrt(4), atol=1e-6)
    against = opinions.spoken(("So NOT good film", None), 0, 2)
    assert [(s.ngram, s.weight) for s in against] == [(s.ngram, -s.weight) for s in spoken[:2]]
    assert opinions.spoken(("what ?", None), 0, 8) == []
    # What they say together is the log-odds above the bias.
    logits = opinions.logits([("So NOT good film", None)])[0][0]
    assert 2 * sum(s.weight for s in spoken) == pytest.approx(logits[1] - logits[0] - 0.5, abs=1e-6)


def test_spoken_in_regression_and_of_a_pair() -> None:
    memory = table({single("good"): [3.0], single(BETWEEN): [9.0], pair("good", BETWEEN): [7.0]}, [2.5])
    (said,) = memory.spoken(("good", "film"), 0, 1)
    assert said.ngram == "good"  # what lies between two texts counts, but has no name
    assert said.weight == pytest.approx(3 / math.sqrt(3), abs=1e-6)


# the file


@pytest.mark.parametrize("grams", [0, 1, 60])
@pytest.mark.parametrize("classes", [1, 3])
def test_a_table_survives_its_file(grams: int, classes: int, tmp_path: Path) -> None:
    memory, folder = random_memory(1, max(grams, 1), classes)[0].part(np.arange(grams)), Folder.at(tmp_path)
    memory.write(folder)
    again = Memory.unsealed(folder)
    same(again, memory)
    assert all(getattr(again, name).dtype == getattr(memory, name).dtype for name in ARRAYS)
    first = (tmp_path / FILE).read_bytes()
    again.write(folder / "again")
    assert (tmp_path / "again" / FILE).read_bytes() == first
    assert not again.keys.flags.owndata  # mapped, not read


def test_a_missing_or_foreign_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=rf"{tmp_path} has no n-gram memory of this version .*; run `retrikt index`"):
        Memory.unsealed(Folder.at(tmp_path))
    (tmp_path / FILE).write_bytes(b"not an Arrow file")
    with pytest.raises(ArtifactError, match="has no n-gram memory of this version"):
        Memory.unsealed(Folder.at(tmp_path))

"""Why rows do not enter the store: what speaks against each by itself, in order, and duplicates over the whole store."""

from __future__ import annotations

from itertools import chain, pairwise
from typing import Any

import numpy as np
import pytest

from retrikt_ray.store.decide import KEPT, REASONS, RUN_ROWS, AnnotateConfig, grouped, has_text, judged, reject_reason, resolve, runs_of
from retrikt_ray.store.duplicates import HeldOut, key, near_duplicates, shingles


def row(text: str = "a fine film", text_pair: str | None = None, **more: Any) -> dict[str, Any]:
    return {"text": text, "text_pair": text_pair, "finished": True, "probs": [0.3, 0.7], "condition": 1, "error": None} | more


def reason(given: dict[str, Any], source: str = "generated", held_out: tuple[str, ...] = (), **config: Any) -> str | None:
    return reject_reason(given, source, HeldOut([(t, None) for t in held_out]), AnnotateConfig(**config))


def reasons(
    rows: list[dict[str, Any]], source: str = "generated", cuts: tuple[int, ...] = (), shares: int = 1, **config: Any
) -> list[str | None]:
    """Of all these rows, judged in parts that are cut there, and compared in so many shares."""
    c, edges = AnnotateConfig(**config), [0, *cuts, len(rows)]
    parts = [judged(rows[a:b], source, HeldOut([]), c) for a, b in pairwise(edges)]
    return [None if code == KEPT else REASONS[code] for code in resolve(parts, len(rows), c.near_duplicates, None, shares).tolist()]


def test_has_text() -> None:
    assert has_text(row()) and has_text(row(text_pair="b"))
    assert not has_text(row(text="")) and not has_text(row(text_pair="")) and not has_text(row(text=None))


@pytest.mark.parametrize("cuts", [(), (1,), (1, 2, 3)])
def test_a_row_that_says_what_a_kept_one_said_is_a_duplicate(cuts: tuple[int, ...]) -> None:
    rows = [row(), row("A fine film."), row("A fine film.", "b"), row("a fine  film")]
    assert reasons(rows, cuts=cuts) == [None, "duplicate", None, "duplicate"]  # with another side it is another pair
    assert reasons(rows, "task", cuts=cuts) == [None, "duplicate", None, "duplicate"]


def test_a_rejected_row_does_not_shadow_a_later_one() -> None:
    config = {"min_confidence": 0.8, "min_words": 3, "require_agreement": True, "keep_unfinished": False}
    good = row(probs=[0.1, 0.9])
    doubted, wrong = row(probs=[0.5, 0.5]), row(probs=[0.9, 0.1])
    rows = [doubted, row("a b"), row(finished=False), wrong, row(""), good, doubted, wrong, good]
    expected = ["low_confidence", "too_short", "unfinished", "label_disagreement", "empty", None, *["duplicate"] * 3]
    assert reasons(rows, **config) == expected


def test_near_duplicates_are_those_of_rows_that_are_kept() -> None:
    long = "the film begins slowly but the second half is worth the wait"
    rows = [row(long, probs=[0.5, 0.5]), row(long + " indeed"), row(long), row(long.upper()), row("another one")]
    assert reasons(rows) == [None, "near_duplicate", "duplicate", "duplicate", None]
    assert reasons(rows, near_duplicates=1) == [None, None, "duplicate", "duplicate", None]
    assert reasons(rows, min_confidence=0.6) == ["low_confidence", None, "near_duplicate", "duplicate", None]
    assert reasons(rows, "task") == [None, None, "duplicate", "duplicate", None]  # the user's own rows stay


def walked(rows: list[dict[str, Any]]) -> list[str | None]:
    """What a walk over all rows decides: of those that repeat none before, which are near one that is kept."""
    seen: set[tuple[int, int]] = set()
    found: list[str | None] = []
    for text in rows:
        found.append("duplicate" if (code := key(text["text"], text["text_pair"])) in seen else None)
        seen.add(code)
    left = [i for i, name in enumerate(found) if name is None]
    twins = near_duplicates([shingles((rows[i]["text"], rows[i]["text_pair"])) for i in left], np.zeros(len(left), bool), 0.8)
    for i, twin in zip(left, twins.tolist(), strict=True):
        found[i] = None if twin < 0 else "near_duplicate"
    return found


@pytest.mark.parametrize("shares", [1, 2, 7, 100])
def test_shares_decide_as_a_walk_over_all_rows(shares: int) -> None:
    """Texts that were copied with a word changed, time and again, and equal ones, over parts of all sizes, some of them empty."""
    rng = np.random.default_rng(shares)
    texts: list[list[str]] = []
    for i in range(300):
        text = list(texts[rng.integers(i)]) if i > 40 else [f"w{w}" for w in rng.integers(0, 300, rng.integers(5, 40))]
        if i > 40 and rng.random() < 0.8:
            text[rng.integers(len(text))] = f"w{rng.integers(300)}"
        texts.append(text)
    rows = [row(" ".join(text)) for text in texts]
    cuts = tuple(sorted(rng.integers(0, 300, 9).tolist())) + (300,)
    expected = walked(rows)
    assert reasons(rows, cuts=cuts, shares=shares) == expected
    assert expected.count("duplicate") > 20 and expected.count("near_duplicate") > 50 and expected.count(None) > 60


def test_what_hangs_together_is_of_one_share() -> None:
    links = [(np.array([0, 5]), np.array([3, 6])), (np.array([3]), np.array([7])), (np.array([2]), np.array([8]))]
    for shares in (1, 2, 3, 5):
        groups = [part.tolist() for part in grouped(links, 10, shares)]
        assert len(groups) == shares and sorted(chain.from_iterable(groups)) == [0, 2, 3, 5, 6, 7, 8]  # the others are linked to none
        assert all(set(group) <= set(part) or not set(group) & set(part) for group in ([0, 3, 7], [5, 6], [2, 8]) for part in groups)
        assert all(part == sorted(part) for part in groups)
    assert [len(part) for part in grouped(links, 10, 2)] == [5, 2]
    assert [part.tolist() for part in grouped([], 0, 2)] == [[], []]


def test_nothing_is_decided_over_nothing() -> None:
    assert reasons([]) == reasons([], shares=3) == [] and reasons([row("")], shares=2) == ["empty"]


@pytest.mark.parametrize(
    ("sizes", "width", "expected"),
    [
        ([512] * 3, 64, [3]),
        ([6000] * 5, 64, [2, 2, 1]),  # of RUN_ROWS at least
        ([RUN_ROWS, 1], 64, [1, 1]),
        ([10_000] * 32, 64, [4] * 8),  # as many as RUNS
        ([10_000] * 32, 384, [4] * 8),
        ([10_000] * 96, 384, [8] * 12),  # as large as RUN_BYTES: 73,733 rows
        ([1000] * 96, 4096, [8] * 12),  # 7,719 rows
        ([], 64, []),
    ],
)
def test_chunks_are_taken_in_runs(sizes: list[int], width: int, expected: list[int]) -> None:
    chunks = [{"part": i, "rows": size} for i, size in enumerate(sizes)]
    runs = runs_of(chunks, width)
    assert [len(run) for run in runs] == expected and [chunk for run in runs for chunk in run] == chunks


def test_a_row_that_could_not_be_written_is_no_empty_text() -> None:
    assert reason(row("", error="MemoryError: no room", probs=None)) == "failed"


@pytest.mark.parametrize("source", ["generated", "task", "unlabelled", "corpus"])
def test_empty_leakage_and_duplicates_are_rejected_whatever_the_source(source: str) -> None:
    assert reason(row(""), source) == "empty"
    assert reason(row(text_pair=""), source) == "empty"
    assert reason(row("A FINE film"), source, held_out=("a fine film",)) == "leakage"
    assert reasons([row(), row("A FINE film")], source) == [None, "duplicate"]


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
    assert reason(row("", **bad, error="E: why"), held_out=("",), **strict) == "failed"
    assert reason(row("", **bad), held_out=("",), **strict) == "empty"
    assert reason(row("dull", **bad), held_out=("dull",), **strict) == "leakage"
    assert reason(row("dull", **bad), **strict) == "too_short"
    assert reason(row("so dull", **bad), **strict) == "unfinished"
    assert reason(row("so dull", **bad | {"finished": True}), **strict) == "low_confidence"
    assert reason(row("so dull", probs=[0.9, 0.1]), **strict) == "label_disagreement"
    assert reason(row("so dull", probs=[0.1, 0.9]), **strict) is None

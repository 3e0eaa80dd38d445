"""BM25 over shards: the scores of the library bm25s, the same from any number of shards, and the same before and after compaction."""

from __future__ import annotations

import re
import tracemalloc
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrikt_ray.index.build import count_words, edges
from retrikt_ray.index.words import compiled as compiling
from retrikt_ray.index.words import kernels, lexical
from retrikt_ray.index.words.lexical import Lexical
from retrikt_ray.index.words.postings import Postings, counted
from retrikt_ray.runtime.folders import ArtifactError, Folder
from retrikt_ray.runtime.tables import Source

WORDS = [
    "a",
    "the",
    "film",
    "play",
    "plot",
    "cast",
    "is",
    "was",
    "fine",
    "warm",
    "Brave",
    "sharp",
    "dull",
    "cold",
    "slow",
    "weak",
    "3",
    "naïve",
    "電影",
]


def sentences(rng: np.random.Generator, count: int) -> list[tuple[str, str | None]]:
    weights = 1 / np.arange(1, len(WORDS) + 1)
    return [(" ".join(rng.choice(WORDS, rng.integers(1, 12), p=weights / weights.sum())), None) for _ in range(count)]


def cut(texts: list[tuple[str, str | None]], shards: int) -> Lexical:
    return Lexical([Postings.of([texts[low:high]], low) for low, high in edges(len(texts), shards)])


def tokens(text: str) -> list[str]:
    """Chinese words, as other scripts without spaces, count by the character."""
    return re.findall(r"(?u)\b\w+\b", text.lower().replace("電影", "電 影"))


def test_scores_by_hand() -> None:
    # 3 rows of 2, 3 and 1 words, mean 2. "film" is in rows 0 and 1 (twice there), "dull" in row 2 alone.
    words = cut([("fine film", None), ("film film fine", None), ("dull", None)], 1)
    idf = np.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
    want = [idf * 2 / (2 + 1.5 * (0.25 + 0.75 * 3 / 2)), idf * 1 / (1 + 1.5 * (0.25 + 0.75 * 2 / 2))]
    found, scores = words.search([("film", None)], 3)
    assert found.tolist() == [[1, 0, -1]]
    np.testing.assert_allclose(scores[0, :2], want, rtol=1e-6)
    assert scores[0, 2] == -np.inf
    twice = words.search([("film film", None)], 2)[1]  # a word counts as often as the query has it
    np.testing.assert_allclose(twice[0], 2 * np.array(want), rtol=1e-6)
    assert words.search([("unheard of", None)], 2)[0].tolist() == [[-1, -1]]


def test_scores_are_those_of_bm25s() -> None:
    rng = np.random.default_rng(0)
    texts, queries = sentences(rng, 300), sentences(rng, 40)
    library = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    library.index([tokens(t) for t, _ in texts], show_progress=False)
    found, scores = cut(texts, 3).search(queries, 300)
    for (query, _), ids, got in zip(queries, found, scores, strict=True):
        want = library.get_scores(tokens(query))
        np.testing.assert_allclose(got[ids >= 0], want[ids[ids >= 0]], rtol=1e-4, atol=1e-6)
        assert sorted(ids[ids >= 0].tolist()) == np.flatnonzero(want > 1e-7).tolist()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(1, 50), st.sampled_from([1, 2, 3, 7, 16]), st.integers(1, 60))
def test_any_number_of_shards_gives_the_same_bits(seed: int, rows: int, shards: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    texts, queries, allowed = sentences(rng, rows), sentences(rng, 4), rng.random(rows) < 0.6
    one, many = cut(texts, 1), cut(texts, shards)
    for mask in (None, allowed):
        for got, want in zip(many.search(queries, k, mask), one.search(queries, k, mask), strict=True):
            np.testing.assert_array_equal(got, want)
    found = one.search(queries, k, allowed)[0]
    assert allowed[found[found >= 0]].all()


def brute(texts: list[tuple[str, str | None]], alive: np.ndarray, query: str, allowed: np.ndarray, k: int) -> list[tuple[int, np.float32]]:
    """BM25 by its formula, row by row, the words in the order of their hashes."""
    rows = [tokens(text) for text, _ in texts]
    live = [row for row, lives in zip(rows, alive, strict=True) if lives]
    mean = sum(map(len, live)) / len(live)
    asked = sorted(set(tokens(query)), key=lambda w: int(counted([(w, None)]).indices[0]))
    found = []
    for position, row in enumerate(rows):
        score = np.float32(0)
        for word in asked:
            n, f = sum(word in other for other in live), np.float32(row.count(word))
            weight = np.float32(tokens(query).count(word) * np.log(1 + (len(live) - n + 0.5) / (n + 0.5)))
            score += weight * f / (f + np.float32(1.5) * (np.float32(0.25) + np.float32(0.75) * np.float32(len(row)) / np.float32(mean)))
        if score > 0 and alive[position] and allowed[position]:
            found.append((position, score))
    return sorted(found, key=lambda pair: (-pair[1], pair[0]))[:k]


@pytest.mark.parametrize("seed", range(6))
def test_what_is_left_unread_changes_nothing(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With deletions, edits and rows that may not be found, and with scores that cost next to nothing or very much beside what is read on."""
    monkeypatch.setattr(lexical, "DEAR", (0, 1, 1000)[seed % 3])
    rng = np.random.default_rng(seed)
    texts, more, queries = (
        sentences(rng, 150),
        [*sentences(rng, 9), ("film " * 300, None)],
        [" ".join(t for t, _ in sentences(rng, 2)) for _ in range(6)],
    )
    gone = np.sort(rng.choice(160, 15, replace=False))
    alive = np.isin(np.arange(160), gone, invert=True)
    index = cut(texts, int(rng.integers(1, 4))).edited(more, gone)
    for allowed in (np.ones(160, bool), rng.random(160) < 0.2):
        for k in (1, 5, 200):
            for query in queries:
                found, scores = index.search([(query, None)], k, allowed)
                want = brute(texts + more, alive, query, allowed, k)
                assert found[0][: len(want)].tolist() == [p for p, _ in want] and (found[0][len(want) :] == -1).all()
                np.testing.assert_array_equal(scores[0][: len(want)], np.array([s for _, s in want], np.float32))


def test_few_postings_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4,000 rows that hold common words, those of the rare one that decides a question are read, and few are scored."""
    rng = np.random.default_rng(0)
    texts: list[tuple[str, str | None]] = [(" ".join(rng.choice(WORDS[:6], 8)), None) for _ in range(4000)]
    for row in range(0, 4000, 200):
        texts[row] = (texts[row][0] + " brave", None)
    index, read, scored = cut(texts, 2), [], []
    add, score = kernels.add, kernels.score
    monkeypatch.setattr(kernels, "add", lambda rows, *rest: read.append(len(rows)) or add(rows, *rest))
    monkeypatch.setattr(kernels, "score", lambda rows, *rest: scored.append(len(rows)) or score(rows, *rest))
    found, _ = index.search([("a brave film", None)], 5)
    assert (found % 200 == 0).all()
    assert sum(read) == 20 and sum(scored) <= 60


def test_an_interrupted_question_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while compiled code runs is raised when it has done its work."""
    rng = np.random.default_rng(0)
    index, add = cut(sentences(rng, 50), 1), kernels.add
    want = index.search([("a brave film", None)], 5)

    def interrupted(*given: Any) -> int:
        add(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(kernels, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        index.search([("a brave film", None)], 5)
    monkeypatch.setattr(kernels, "add", add)
    for got, same in zip(index.search([("a brave film", None)], 5), want, strict=True):
        np.testing.assert_array_equal(got, same)


def test_compiled_code_needs_no_folder_to_write_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def njit(*, nogil: bool, cache: bool = False) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(compiling, "njit", njit)
    assert compiling.compiled(len) is len


def test_edits_score_as_an_index_made_anew() -> None:
    rng = np.random.default_rng(1)
    texts, more, queries = sentences(rng, 60), sentences(rng, 9), sentences(rng, 10)
    alive = rng.random(69) < 0.7
    edited = cut(texts, 3).edited(more, np.flatnonzero(~alive))
    anew = cut([t for t, a in zip(texts + more, alive, strict=True) if a], 2)
    ids, scores = edited.search(queries, 100)
    want, want_scores = anew.search(queries, 100)
    np.testing.assert_array_equal(np.where(want >= 0, np.flatnonzero(alive)[want], -1), ids)
    np.testing.assert_array_equal(scores, want_scores)


def test_a_question_of_thousands_of_words() -> None:
    words = cut([(f"w{i} w{i + 1} the", None) for i in range(0, 6000, 2)], 2)
    tracemalloc.start()
    found, _ = words.search([(" ".join(f"w{i}" for i in range(5000)), None)], 3)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    assert found[0].tolist() == [0, 1, 2]  # all that it names score alike


def test_pairs_and_case() -> None:
    words = cut([("A Fine film", "dull"), ("other", "words")], 1)
    assert words.search([("DULL", None)], 1)[0].tolist() == [[0]] and words.search([("x", "FINE")], 1)[0].tolist() == [[0]]


def test_postings_on_disk(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    texts, queries = sentences(rng, 50), sentences(rng, 5)
    store, index = Folder.at(tmp_path / "store"), Folder.at(tmp_path / "index")
    for i, (low, high) in enumerate(((0, 20), (20, 50))):
        store.write_table(
            f"part-{i:05d}.parquet", pa.table({"text": [t for t, _ in texts[low:high]], "text_pair": pa.nulls(high - low, pa.string())})
        )
    ranges = edges(50, 4)
    names = [count_words(Source.of(store), low, high, index, f"words-{i:04d}.arrow") for i, (low, high) in enumerate(ranges)]
    index.write_json("index.json", {"words": names})
    opened = Lexical.unsealed(index)
    for got, want in zip(opened.search(queries, 9), cut(texts, 1).search(queries, 9), strict=True):
        np.testing.assert_array_equal(got, want)
    assert not opened.shards[0].rows.flags.owndata  # memory-mapped
    index.write_bytes("words-0002.arrow", index.read_bytes("words-0002.arrow")[:40])
    with pytest.raises(ArtifactError, match=r"index has postings that are not of this version"):
        Lexical.unsealed(index)


def test_an_empty_shard_and_an_empty_query() -> None:
    words = Lexical([Postings.of([], 0), Postings.of([[("a film", None)]], 0)])
    assert words.search([("film", None), ("?!", None)], 2)[0].tolist() == [[0, -1], [-1, -1]]

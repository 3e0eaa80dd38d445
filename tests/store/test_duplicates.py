"""Texts that say the same: what counts as equal, as near, and as copied, by hand; and the search for them against comparing all with all."""

from __future__ import annotations

import numpy as np
import pytest

from retrikt_ray.store.duplicates import MOST, HeldOut, Ragged, band_keys, jaccard, key, near_duplicates, plain_words, repeated, shingles


def near(texts: list[str], threshold: float = 0.8, fixed: int = 0) -> list[int]:
    return near_duplicates([shingles((t, None)) for t in texts], np.arange(len(texts)) < fixed, threshold).tolist()


def share(first: str | tuple[str, str], second: str | tuple[str, str]) -> float:
    a, b = (shingles(t if isinstance(t, tuple) else (t, None)) for t in (first, second))
    return jaccard(set(a.tolist()), set(b.tolist()))


# -- keys --------------------------------------------------------------------------------------------------------------


def test_key_forgets_case_spacing_and_punctuation() -> None:
    assert key("A fine  film!", None) == key("a fine, film", None) == key("a_fine-film.", "")
    assert all(0 <= part < 2**64 for part in key("x", None))
    different = [
        ("a fine film", None),
        ("a fine plot", None),
        ("film fine a", None),
        ("a fine film 2", None),
        ("größe", None),
        ("grosse", None),
    ]
    different += [("a fine film", "b"), ("b", "a fine film"), ("ab", "c"), ("a", "bc"), ("abc", None)]
    assert len({key(*d) for d in different}) == len(different)


def test_key_keeps_letters_of_every_script() -> None:
    """Vowel signs are combining marks, and part of the word: day, donation; small, big."""
    assert len({key(word, None) for word in ("दिन", "दान", "दीन")}) == 3
    assert key("दिन!", None) == key(" दिन", None)
    assert key("映画", None) != key("映像", None)


def test_key_of_a_text_without_letters_is_the_text() -> None:
    assert len({key(text, None) for text in ("!!!", "...", ":)", "\U0001f600", "\U0001f621")}) == 5
    assert key("ｆｉｌｍ", None) == key("film", None)  # full-width letters are letters


# -- shingles ----------------------------------------------------------------------------------------------------------


def test_plain_words() -> None:
    assert plain_words("A fine, FILM -- really!") == ["a", "fine", "film", "really"]
    assert plain_words("电影好。") == ["电", "影", "好"]
    assert plain_words("?!") == ["?!"] and plain_words("") == [""]


def test_jaccard_by_hand() -> None:
    # Words a b c and pairs ab bc against a b d, ab bd: common a b ab of 7.
    assert share("a b c", "A, b d!") == pytest.approx(3 / 7)
    assert share("a b c", "c b a") == pytest.approx(3 / 7)  # the words alone: order counts
    assert share("a b c", "a b c.") == 1.0 and share("a", "b") == 0.0
    assert share("电影好", "电影坏") == pytest.approx(3 / 7)


def test_jaccard_of_a_pair_is_that_of_the_less_alike_side() -> None:
    """A long premise that two pairs share does not make them alike: the label hangs on the short hypothesis."""
    premise = " ".join(f"w{i}" for i in range(50))
    assert share((premise, "a b c"), (premise, "a b d")) == pytest.approx(3 / 7)
    assert share(("a b d", premise), ("a b c", premise)) == pytest.approx(3 / 7)
    assert share((premise, "a b c"), (premise, "a b c")) == 1.0
    assert share(("a", "b"), ("b", "a")) == 0.0


# -- near duplicates ---------------------------------------------------------------------------------------------------

LONG = "the film begins slowly but the second half with its brave cast is well worth the wait for anyone who likes a quiet story"


def test_a_text_with_a_word_more_or_less_is_a_near_duplicate() -> None:
    assert near([LONG, LONG + " indeed", LONG.replace("slowly ", ""), "another film altogether"]) == [-1, 0, 0, -1]


def test_short_texts_that_share_a_phrase_are_kept() -> None:
    """Real questions and reviews, which differ in the one word that counts."""
    texts = ["What is a fear of points?", "What is a fear of water?", "i love this player .", "i love this product ! ."]
    texts += ["What is the origin of the word trigonometry ?", "What is the origin of the word magic ?", "5 out of 10", "3 out of 10"]
    texts += ["one of the best movies of the year .", "one of the worst movies of the year ."]
    assert near(texts) == [-1] * len(texts)


def test_the_tasks_rows_stay_and_what_is_near_them_goes() -> None:
    assert near([LONG, LONG + " indeed", LONG + " truly"], fixed=2) == [-1, -1, 0]


def test_a_rejected_row_rejects_nobody() -> None:
    """Each text drops a word of the one before: the third is near the second, which is out, but no longer near the first."""
    words = [f"w{i}" for i in range(24)]
    texts = [" ".join(words[i:]) for i in (0, 3, 6)]
    assert share(texts[0], texts[1]) == pytest.approx(41 / 47) and share(texts[1], texts[2]) == pytest.approx(35 / 41)
    assert share(texts[0], texts[2]) == pytest.approx(35 / 47)
    assert near(texts) == [-1, 0, -1]


def test_pairs_are_near_where_both_sides_are() -> None:
    rows = [shingles(t) for t in ((LONG, "it is good"), (LONG, "it is bad"), (LONG + " indeed", "it is good"))]
    assert near_duplicates(rows, np.zeros(3, bool), 0.8).tolist() == [-1, -1, 0]


def test_what_is_found_is_what_comparing_all_with_all_finds() -> None:
    """400 texts, most of them changed copies: every row that is rejected is near an earlier kept one, and no pair above 0.9 is overlooked."""
    rng = np.random.default_rng(0)
    texts: list[list[str]] = []
    for i in range(400):
        if i < 80:
            texts.append([f"w{w}" for w in rng.integers(0, 300, rng.integers(5, 60))])
        else:
            changed = list(texts[rng.integers(i)])
            changed[rng.integers(len(changed))] = f"w{rng.integers(300)}"
            texts.append(changed)
    rows = [shingles((" ".join(t), None)) for t in texts]
    sets = [set(row.tolist()) for row in rows]
    twin = near_duplicates(rows, np.zeros(400, bool), 0.8)
    assert 50 < (twin >= 0).sum() < 300
    for i, other in enumerate(twin.tolist()):
        closest = max((jaccard(sets[i], sets[j]) for j in range(i) if twin[j] < 0), default=0.0)
        if other >= 0:
            assert other < i and twin[other] < 0 and jaccard(sets[i], sets[other]) >= 0.8
        else:
            assert closest < 0.9
    assert near_duplicates(rows, np.zeros(400, bool), 0.8).tolist() == twin.tolist()


def test_a_full_bucket_is_searched_from_its_beginning() -> None:
    """Rows of one text all lie in one bucket; the bound on comparisons leaves the earliest rows of a bucket, and there the first finds them."""
    assert near([LONG] * (3 * MOST)) == [-1] + [0] * (3 * MOST - 1)
    assert near([]) == []


# -- leakage -----------------------------------------------------------------------------------------------------------

HELD = HeldOut(
    [("How long does it take for a transfer to arrive in my account?", None), ("Can I reset my PIN?", None)]
)  # 12 words: 5 runs of 8


@pytest.mark.parametrize(
    ("text", "equals", "copied"),
    [
        ("how long does it take for a transfer to arrive in my account", True, True),
        ("Hello, how long does it take for a transfer to arrive?", False, True),  # 3 of the 5 runs
        ("How long does it take for a transfer to come?", False, False),  # 2 of the 5
        ("Why does it take long for a transfer to arrive in my account?", False, False),  # for a transfer ... account: 1
        ("Can I reset my pin", True, True),  # shorter than a run: as a whole
        ("Please, can I reset my PIN?", False, False),
        ("An unrelated question of more than eight words, for sure", False, False),
        ("", False, False),
    ],
)
def test_copies_of_held_out_texts(text: str, equals: bool, copied: bool) -> None:
    assert (HELD.equals((text, None)), HELD.copied((text, None))) == (equals, copied)


def test_a_run_of_words_must_come_from_one_held_out_text() -> None:
    held = HeldOut([("a b c d e f g h 1 2 3", None), ("i j k l m n o p 1 2 3", None)])  # 4 runs each
    assert not held.copied(("a b c d e f g h and i j k l m n o p", None))
    assert held.copied(("a b c d e f g h 1", None))


def test_a_pair_is_copied_where_both_sides_are() -> None:
    premise = "a b c d e f g h i j"
    held = HeldOut([(premise, "x y"), ("k l m n o p q r s t", "x z")])
    assert held.copied((premise, "X y!"))
    assert not held.copied((premise, "x w"))  # a premise may have other hypotheses
    assert not held.copied((premise, "x z"))  # which is the other pair's


def test_copies_in_unspaced_scripts_count_characters() -> None:
    held = HeldOut([("这部电影的故事很感人我非常喜欢", None)])  # 15 characters, 8 runs
    assert held.copied(("我说这部电影的故事很感人我吧", None))  # 5 of 8
    assert not held.copied(("这部电影的故事不好", None))


def test_no_held_out_texts() -> None:
    assert not HeldOut([]).copied(("a", None)) and not HeldOut([]).equals(("a", None))


def test_a_key_is_repeated_after_the_first_row_that_counts() -> None:
    keys = np.array([[1, 2], [2, 1], [1, 2], [1, 2], [2, 1], [1, 1]], np.uint64)
    assert repeated(keys, np.array([0, 1, 1, 0, 1, 0], bool)).tolist() == [False, False, False, True, True, False]
    assert repeated(keys, np.zeros(6, bool)).tolist() == [False] * 6
    assert repeated(keys[:0], np.zeros(0, bool)).tolist() == []


def test_rows_in_one_array_and_known_hashes_give_the_same_twins() -> None:
    rows = [shingles((" ".join(f"w{j}" for j in range(20) if j != i), None)) for i in range(8)]
    ends = np.cumsum([len(row) for row in rows])
    flat = Ragged(np.concatenate(rows), ends - [len(row) for row in rows], ends)
    assert [row.tolist() for row in flat] == [row.tolist() for row in rows] and len(flat) == 8
    some = Ragged.joined([Ragged(flat.flat, flat.starts[[6, 2]], flat.ends[[6, 2]]), Ragged(flat.flat, flat.starts[:0], flat.ends[:0])])
    assert [row.tolist() for row in some] == [rows[6].tolist(), rows[2].tolist()] and len(some.flat) == len(rows[6]) + len(rows[2])
    twins = near_duplicates(rows, np.zeros(8, bool), 0.7)
    assert (twins[1:] >= 0).all() and near_duplicates(flat, np.zeros(8, bool), 0.7, band_keys(rows)).tolist() == twins.tolist()

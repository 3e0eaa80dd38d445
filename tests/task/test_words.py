"""Words of texts with and without spaces, and how varied texts are, counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from retrikt_ray.export import standalone
from retrikt_ray.index.ngrams import MARKED
from retrikt_ray.index.words.postings import counted
from retrikt_ray.task.words import UNSPACED, WORD, bigrams, distinct, ngrams, self_bleu, words


def close(got: np.ndarray, want: list[float]) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        " A fine\tFilm\n",
        'it\'s 42% off_, "really" ( ... ) -- ok!',
        "Größe кино 한국어 영화 हिन्दी फ़िल्म שלום مرحبا",  # scripts with spaces
        "a\u00a0b\u2003c\x1fd\u3000e \U0001f600",
        "",
    ],
)
def test_texts_with_spaces_are_split_at_them(text: str) -> None:
    assert words(text) == text.lower().split()


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("我喜欢这部电影。", ["我", "喜", "欢", "这", "部", "电", "影。"]),
        ("「好」、と言った…", ["「好」、", "と", "言", "っ", "た…"]),
        ("iPhone手机 is 好", ["iphone", "手", "机", "is", "好"]),
        ("ไม่ดี ครับ", ["ไ", "ม่", "ดี", "ค", "รั", "บ"]),  # vowel signs and tones stay with their letter
        ("ภาษาไทย english", ["ภ", "า", "ษ", "า", "ไ", "ท", "ย", "english"]),
        ("ខ្ញុំ", ["ខ្", "ញុំ"]),
        ("မြန်မာ", ["မြ", "န်", "မာ"]),
        ("ສະບາຍ", ["ສ", "ະ", "ບ", "າ", "ຍ"]),
        ("ﾃｽﾄ𠮷野家々", ["ﾃ", "ｽ", "ﾄ", "𠮷", "野", "家", "々"]),
        ("。。。", ["。。。"]),
    ],
)
def test_texts_without_spaces_are_split_by_character(text: str, want: list[str]) -> None:
    assert words(text) == want
    assert "".join(words(text)) == "".join(text.lower().split())  # nothing is lost


def test_ngrams_of_every_script() -> None:
    assert ngrams(["a", "b", "c"], 2) == [("a", "b"), ("b", "c")]
    assert ngrams(["a", "b"], 3) == []
    assert bigrams(["a b a b", "B c", "d"]) == {("a", "b"), ("b", "a"), ("b", "c")}
    assert bigrams(["电影好"]) == {("电", "影"), ("影", "好")}


def test_self_bleu() -> None:
    # "a b c" against {"a b d", "x"}: unigrams 2/3, bigrams 1/2, trigrams 0/1. "x": unigrams 0/1, no higher orders.
    first = (2 / 3 + 1 / 2 + 0) / 3
    close(self_bleu(["a b c", "A b d", "x"]), [first, first, 0.0])
    close(self_bleu(["电影好", "电影坏", "x"]), [first, first, 0.0])  # the same, without spaces


def test_self_bleu_clips_repeated_ngrams_by_one_other_text() -> None:
    # "a a a" against "a a" and "a": the best other has "a" twice: 2/3; "a a" twice against once: 1/2; trigram 0/1.
    # "a a": unigrams min(2, 3) of 2, bigram min(1, 2) of 1: both 1. "a": 1.
    close(self_bleu(["a a a", "a a", "a"]), [(2 / 3 + 1 / 2) / 3, 1.0, 1.0])


def test_self_bleu_limits() -> None:
    close(self_bleu(["p q r s", "p q r s"]), [1.0, 1.0])
    close(self_bleu(["p q r", "s t u"]), [0.0, 0.0])
    close(self_bleu(["", "p"]), [1.0, 0.0])  # an empty text has no variety
    close(self_bleu(["p q r", "s q t"], top=1), [1 / 3, 1 / 3])


def test_distinct() -> None:
    assert distinct(["a b a b", "a b"]) == pytest.approx(2 / 4)  # ab ba ab, ab
    assert distinct(["a b a b", "a b"], n=1) == pytest.approx(2 / 6)
    assert distinct(["a", ""]) == 0.0
    assert distinct(["好好好"]) == pytest.approx(1 / 2)
    assert distinct(["ดีดีดี"]) == pytest.approx(1 / 2)


def test_words_are_looked_up_by_character_too() -> None:
    """A Chinese question finds the rows that share its characters; Latin words inside of it stay whole."""
    query, *rows = (set(counted([(text, None)]).indices) for text in ("电影film", "我喜欢电影", "电影 film", "a fine film"))
    assert [len(query & row) for row in rows] == [2, 3, 1]


def test_an_exported_student_reads_words_as_the_run_does() -> None:
    assert (standalone.UNSPACED, standalone.WORD, standalone.MARKED) == (UNSPACED, WORD, MARKED)

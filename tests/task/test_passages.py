"""Passages: where sentences end, in several scripts, and how long passages are."""

from __future__ import annotations

import random

import pytest

from retrikt_ray.task.passages import band, passages, sentences
from retrikt_ray.task.words import words


@pytest.mark.parametrize(
    ("document", "cut"),
    [
        ("It rained. We left! Why? Nobody knows.", ["It rained.", "We left!", "Why?", "Nobody knows."]),
        ("Mr. J. R. Smith met Dr. Who. He ran.", ["Mr. J. R. Smith met Dr. Who.", "He ran."]),
        ("It costs 3.50 e.g. in spring. 12 men came.", ["It costs 3.50 e.g. in spring.", "12 men came."]),
        ("“Stay!” she said. “No.” He left.", ["“Stay!” she said.", "“No.”", "He left."]),
        ("a film . it was dull . the end", ["a film .", "it was dull .", "the end"]),
        ("Smart and funny.Griffin is brilliant.", ["Smart and funny.", "Griffin is brilliant."]),
        ("他来了。我们去了公园！很好玩吗？是的。", ["他来了。", "我们去了公园！", "很好玩吗？", "是的。"]),
        ("「いいね。」と言った。次の日。", ["「いいね。」", "と言った。", "次の日。"]),
        ("ฝนตกหนัก เรากลับบ้าน", ["ฝนตกหนัก", "เรากลับบ้าน"]),
        ("वह आया। हम गए।", ["वह आया।", "हम गए।"]),
        ("no marks at all", ["no marks at all"]),
        ("", []),
    ],
)
def test_sentences(document: str, cut: list[str]) -> None:
    found = list(sentences(document))
    assert [document[a:b].strip() for a, b in found] == cut
    assert "".join(document[a:b] for a, b in found) == document


def test_the_band_leaves_out_a_twentieth_at_each_end() -> None:
    assert band([*range(100, -1, -1)]) == (5, 95)
    assert band([7]) == (7, 7)


def test_passages_are_as_near_to_the_length_that_was_drawn_as_sentences_allow() -> None:
    document = "One two. One two three. One two three four. One."
    assert list(passages(document, [5], random.Random(0))) == ["One two. One two three.", "One two three four. One."]
    assert list(passages(document, [4], random.Random(0))) == ["One two three four."]  # 2, then 3 which 4 is no nearer, then 4
    assert list(passages(document, [2, 3, 9], random.Random(0)))[0].startswith("One two.")


def test_passages_outside_the_band_are_left_out() -> None:
    assert list(passages("One. One two three four five six seven eight.", [2, 3], random.Random(0))) == []


def test_lengths_are_as_varied_as_the_labelled_rows() -> None:
    """Short and long rows, 5 and 20 words: passages of both lengths and none far between, out of sentences of 5 words."""
    document = " ".join(f"Word{i} goes into the house." for i in range(2000))
    found = [len(words(p)) for p in passages(document, [5, 20], random.Random(1))]
    found.pop()  # the end of the document
    assert set(found) == {5, 20} and 0.4 < found.count(5) / len(found) < 0.6


def test_white_space_is_made_single_and_scripts_without_spaces_stay_as_they_are() -> None:
    assert list(passages("One  two.\tThree\nfour.", [4], random.Random(0))) == ["One two. Three four."]
    assert list(passages("他来了。我们去了公园！", [9], random.Random(0))) == ["他来了。我们去了公园！"]

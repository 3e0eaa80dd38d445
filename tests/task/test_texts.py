"""Texts, and the one reader of what is handed over."""

from __future__ import annotations

import pickle
from typing import Any

import pyarrow as pa
import pytest

from retrikt_ray.task.texts import TextError, joined, read_string, read_text, read_texts, read_typed, shown, split_pair, texts_of, tidy


def test_tidy() -> None:
    assert tidy(" a\n fine\t\u00a0film ") == "a fine film"


def test_a_pair_is_two_lines_to_a_language_model() -> None:
    assert joined(("a", None)) == "a" and joined(("a", "b")) == "a\nb" and joined(("a", "b"), " / ") == "a / b"
    assert split_pair(" a  film\nand more", False) == ("a film", None)
    assert split_pair("\na film \n a  play\nmore", True) == ("a film", "a play")
    assert split_pair("a film", True) == ("a film", "")  # the second is missing


def test_texts_of_a_table() -> None:
    table = pa.table({"text": ["a", "b"], "text_pair": [None, "c"], "id": [1, 2]})
    assert texts_of(table) == [("a", None), ("b", "c")]


@pytest.mark.parametrize(
    ("given", "pair", "want"),
    [
        ("a  text", False, ("a text", None)),
        (("a", None), False, ("a", None)),
        ({"text": "a", "text_pair": None}, False, ("a", None)),
        (("a", " b"), True, ("a", "b")),
        ({"text": "a", "text_pair": "b"}, True, ("a", "b")),
    ],
)
def test_forms_of_a_text(given: Any, pair: bool, want: Any) -> None:
    assert read_text(given, pair) == want
    assert read_texts(given, pair) == [want]
    assert read_texts([given, given], pair) == [want, want]


@pytest.mark.parametrize(
    ("given", "pair", "found", "expected"),
    [
        (3, False, "x: found 3", "a text"),
        (None, False, "x: found null", "a text"),
        (["a"], False, 'x: found ["a"]', "a text"),
        (("a", "b", "c"), True, 'x: found ["a", "b", "c"]', "a pair"),
        ("", False, "x is empty", "a text"),
        ("a\ud800", False, r'x holds half of a surrogate pair: "a\ud800"', "text that can be written as UTF-8"),
        (("a", 3), True, "x.text_pair: found 3", "a pair"),
        ({"text": "a", "text_pair": " "}, True, "x.text_pair is empty", "a pair"),
        ({"text_pair": "a"}, True, "x.text is missing", "a pair"),
        ({"text": "a", "txt": "b"}, False, 'x has the unknown field "txt"', "a text"),
        (("a", "b"), False, "x.text_pair is given, but this task takes single texts", "a text"),
        ("a", True, "x.text_pair is missing: this task compares two texts", "a pair"),
    ],
)
def test_what_cannot_be_used_is_named(given: Any, pair: bool, found: str, expected: str) -> None:
    with pytest.raises(TextError) as error:
        read_text(given, pair, "x")
    assert error.value.found == found and error.value.expected.startswith(expected)
    assert str(error.value) == f"{error.value.found}; expected {error.value.expected}"
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)  # it comes out of Ray's workers


def test_a_list_names_the_text() -> None:
    with pytest.raises(TextError, match=r"inputs\[1\]: found 7"):
        read_texts(["a", 7], False, "inputs")
    with pytest.raises(TextError, match="inputs is an empty list"):
        read_texts([], False, "inputs")


def test_what_is_found_is_shown_short() -> None:
    with pytest.raises(TextError) as error:
        read_string(["x" * 500], "x")
    assert len(error.value.found) == len("x: found ") + 80 and error.value.found.endswith("...")


def test_command_line() -> None:
    assert read_typed("a text", False) == ("a text", None)
    assert read_typed("a text ||| another", True) == ("a text", "another") == read_typed(shown(("a text", "another")), True)
    for line, pair, expected in (
        ("a", True, "TEXT ||| SECOND TEXT"),
        ("a ||| b", False, "one text"),
        ("a |||", True, "TEXT |||"),
        (" ", False, "one text"),
    ):
        with pytest.raises(TextError, match=f"expected {expected}".replace("|", r"\|")):
            read_typed(line, pair)

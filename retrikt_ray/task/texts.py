"""Texts, and the one reader of texts that anybody hands over: a command line, a file, an HTTP request, an edit, or Python.

A text of a task is a `Text`: the text and, in pair tasks, its second text. White space is made single, since a newline separates the two texts
of a pair where a language model reads or writes them.
"""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

Text = tuple[str, str | None]  # a text and, in pair tasks, its second text
TEXT_COLUMNS = ("text", "text_pair")  # of every table that holds texts: the task's, generated ones, the store


class DataError(ValueError):
    """Data that cannot be used. The text names where it is, what was found and what was expected."""


class TextError(DataError):
    """A text that cannot be used; what was found and what was expected are there apart, too."""

    def __init__(self, found: str, expected: str) -> None:
        super().__init__(f"{found}; expected {expected}")
        self.found, self.expected = found, expected

    def __reduce__(self) -> Any:
        return TextError, (self.found, self.expected)


def tidy(text: str) -> str:
    """One line, single spaces."""
    return " ".join(text.split())


def joined(text: Text, by: str = "\n") -> str:
    """A text as one string; to a language model a pair is two lines."""
    first, second = text
    return first if second is None else f"{first}{by}{second}"


def split_pair(sequence: str, pair: bool) -> Text:
    """What a language model wrote, as a text: its first line; in pair tasks its first two. A missing second line is an empty text."""
    first, second, *_ = [*sequence.strip().split("\n", 2), ""]
    return tidy(first), tidy(second) if pair else None


def texts_of(table: pa.Table) -> list[Text]:
    """The texts of a table that has TEXT_COLUMNS."""
    return list(zip(*(table[name].to_pylist() for name in TEXT_COLUMNS), strict=True))


def read_string(value: Any, where: str, expected: str = "a text") -> str:
    """One string, tidied. Raises TextError where it is no string, empty, or holds what UTF-8 cannot."""
    if not isinstance(value, str):
        raise TextError(f"{where}: found {short(value)}", expected)
    if not value.strip():
        raise TextError(f"{where} is empty", expected)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise TextError(f"{where} holds half of a surrogate pair: {short(value)}", "text that can be written as UTF-8") from None
    return tidy(value)


def read_text(given: Any, pair: bool, where: str = "the text") -> Text:
    """A text from "a text", ("a text", "its second text"), or {"text": ..., "text_pair": ...}.

    pair: whether the task compares two texts. Raises TextError that names `where`, what was found and what was expected.
    """
    expected = 'a pair, such as {"text": "...", "text_pair": "..."}' if pair else "a text"
    first, second, first_where = given, None, where
    if isinstance(given, dict):
        first_where = f"{where}.text"
        unknown = sorted(str(key) for key in given.keys() - set(TEXT_COLUMNS))
        if unknown:
            raise TextError(f"{where} has the unknown field {short(unknown[0])}", expected)
        if "text" not in given:
            raise TextError(f"{first_where} is missing", expected)
        first, second = given["text"], given.get("text_pair")
    elif isinstance(given, tuple) and len(given) == 2:
        first, second = given
    if pair and second is None and isinstance(first, str):
        raise TextError(f"{where}.text_pair is missing: this task compares two texts", expected)
    if not pair and second is not None:
        raise TextError(f"{where}.text_pair is given, but this task takes single texts", expected)
    return read_string(first, first_where, expected), read_string(second, f"{where}.text_pair", expected) if pair else None


def read_texts(given: Any, pair: bool, where: str = "texts") -> list[Text]:
    """The texts of one text or a list of them; what a text is written as: `read_text`. A tuple is a pair, a list is several texts."""
    if not isinstance(given, list):
        return [read_text(given, pair, where)]
    if not given:
        raise TextError(f"{where} is an empty list", "one text at least")
    return [read_text(item, pair, f"{where}[{i}]") for i, item in enumerate(given)]


def read_typed(line: str, pair: bool) -> Text:
    """A text as a person types it on a command line: TEXT, or TEXT ||| SECOND TEXT in pair tasks. Raises TextError."""
    first, mark, second = line.partition("|||")
    try:
        return read_text((first, second) if mark else line, pair)
    except TextError as error:
        raise TextError(error.found, "TEXT ||| SECOND TEXT" if pair else "one text") from None


def shown(text: Text) -> str:
    """A text as `read_typed` takes it."""
    return joined(text, " ||| ")


def short(value: Any) -> str:
    """What was found, short, and in ASCII: it may hold half a surrogate pair."""
    written = json.dumps(value, default=repr)
    return written if len(written) <= 80 else written[:77] + "..."

"""A corpus: general text in files of any number and size, read in pieces that fit in memory.

A piece is what one worker reads at a time: lines that begin in a range of bytes, row groups of a Parquet file, or several small files. Which
pieces there are depends on the files alone.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pyarrow.parquet as pq

from retrikt_ray.runtime.folders import Folder
from retrikt_ray.task.texts import DataError, short

SUFFIXES = (".txt", ".jsonl", ".parquet")
PIECE = 4_000_000  # bytes, about
MOST_PIECES = 500  # of a larger corpus the pieces are larger
ROWS = 256  # of a Parquet file that are in memory at a time


@dataclass(frozen=True)
class Span:
    """Part of a file: bytes start .. stop - 1 of text, or row groups start .. stop - 1 of a Parquet file."""

    uri: str  # of the folder
    name: str
    start: int
    stop: int
    size: int  # bytes

    def __str__(self) -> str:
        return f"{self.uri}/{self.name}"


Piece = tuple[Span, ...]


def files_of(uri: str) -> tuple[Folder, dict[str, list[Any]]]:
    """The folder of a corpus, and of each of its files the size and what else changes when it is replaced. Raises DataError where there is none."""
    head, _, name = uri.rpartition("/")
    if uri.endswith(SUFFIXES):
        folder = Folder.at(head or ".")
        found = {name: stamp} if (stamp := folder.stamp(name)) else {}
    else:
        folder = Folder.at(uri)
        found = {name: stamp for name, stamp in folder.stamps().items() if name.endswith(SUFFIXES)}
    if not found:
        raise DataError(f"{uri}: no such corpus; expected a file or a folder of files that end with {', '.join(SUFFIXES)}")
    return folder, found


def pieces_of(uri: str, megabytes: float, seed: int) -> list[Piece]:
    """The pieces of a corpus in the order of its files; megabytes: of pieces drawn over all of it, 0: all."""
    folder, found = files_of(uri)
    size = max(PIECE, int(megabytes * 1e6 or sum(stamp[0] for stamp in found.values())) // MOST_PIECES)
    pieces: list[Piece] = []
    small: list[Span] = []
    for name in sorted(found):
        for span in spans_of(folder, name, found[name][0], size):
            small.append(span)
            if sum(s.size for s in small) >= size:
                pieces.append(tuple(small))
                small = []
    if small:
        pieces.append(tuple(small))
    if megabytes:
        count = max(1, round(megabytes * 1e6 / size))
        pieces = [pieces[i] for i in sorted(random.Random(f"{seed}:corpus").sample(range(len(pieces)), min(count, len(pieces))))]
    return pieces


def spans_of(folder: Folder, name: str, length: int, size: int) -> Iterator[Span]:
    """A file in spans of about `size` bytes."""
    if not name.endswith(".parquet"):
        count = max(1, round(length / size))
        cuts = [length * i // count for i in range(count + 1)]
        yield from (Span(folder.uri, name, a, b, b - a) for a, b in pairwise(cuts))
        return
    with folder.parquet(name) as file:
        groups = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
    start, total = 0, 0
    for stop, more in enumerate(groups, 1):
        total += more
        if total >= size or stop == len(groups):
            yield Span(folder.uri, name, start, stop, total)
            start, total = stop, 0


def documents(span: Span, column: str) -> Iterator[str | DataError]:
    """The documents of a span; where one cannot be read, what is wrong with it. column: with the text, of JSONL and Parquet.

    Raises DataError where a Parquet file lacks the column.
    """
    folder = Folder(span.uri)
    if span.name.endswith(".parquet"):
        with folder.parquet(span.name) as file:
            yield from rows(file, span, column)
        return
    with folder.open(span.name) as handle:
        if span.start:
            handle.seek(span.start - 1)
            handle.readline()  # begins in the span before
        while (at := handle.tell()) < span.stop and (line := handle.readline()):
            if line.strip():
                yield read_line(line, column if span.name.endswith(".jsonl") else None, f"{span}, byte {at}")


def rows(file: pq.ParquetFile, span: Span, column: str) -> Iterator[str | DataError]:
    if column not in file.schema_arrow.names:
        raise DataError(f"{span}: no column {column!r}; the file has {', '.join(file.schema_arrow.names)} (harvest.text_column)")
    for batch in file.iter_batches(ROWS, range(span.start, span.stop), [column]):
        for value in batch.column(0).to_pylist():
            yield value if isinstance(value, str) else DataError(f"{span}: found {short(value)} in {column!r}, expected a text")


def read_line(line: bytes, column: str | None, where: str) -> str | DataError:
    """A document from a line of text, or of JSON objects with it in a column."""
    try:
        text = line.decode("utf-8-sig")
        value = text if column is None else json.loads(text)[column]
    except UnicodeDecodeError as error:
        return DataError(f"{where}: {error.reason} in 0x{line[error.start]:02x}, expected UTF-8")
    except (ValueError, LookupError, TypeError):
        return DataError(f"{where}: found {short(text.strip())}, expected a JSON object with {column!r} (harvest.text_column)")
    return value if isinstance(value, str) else DataError(f"{where}: found {short(value)} in {column!r}, expected a text")

"""Corpora: which files count, pieces that hold each document once, and documents that cannot be read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retrikt_ray.task import corpus
from retrikt_ray.task.corpus import documents, files_of, pieces_of
from retrikt_ray.task.texts import DataError


def read(pieces: list[corpus.Piece], column: str = "text") -> list[str | DataError]:
    return [document for piece in pieces for span in piece for document in documents(span, column)]


def lines(count: int) -> list[str]:
    """Lines of 1 to 97 characters, some beyond ASCII, each different."""
    return [f"{i} " + "aé漢"[i % 3] * (i * 37 % 90) for i in range(count)]


@pytest.mark.parametrize("size", [1, 7, 64, 1000, 10**9])
def test_every_line_is_in_exactly_one_piece(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever bytes are cut: inside a line, at its end, inside a character."""
    monkeypatch.setattr(corpus, "PIECE", size)
    (tmp_path / "a.txt").write_text("\n".join(lines(60)))  # without a newline at the end
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"body": text}, ensure_ascii=False) + "\n\n" for text in lines(20)))
    pq.write_table(pa.table({"body": lines(10), "n": [*range(10)]}), tmp_path / "c.parquet", row_group_size=3)
    pieces = pieces_of(str(tmp_path), 0, 0)
    found = [str(text).strip() for text in read(pieces, "body")]
    assert found == [text.strip() for text in lines(60) + lines(20) + lines(10)]
    assert (len(pieces) == 1) == (size == 10**9) and max(map(len, pieces)) <= 3
    assert len(pieces) <= corpus.MOST_PIECES


def test_a_large_corpus_has_no_more_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "PIECE", 10)
    monkeypatch.setattr(corpus, "MOST_PIECES", 4)
    (tmp_path / "a.txt").write_text("0123456\n" * 100)
    assert [[(s.start, s.stop) for s in piece] for piece in pieces_of(str(tmp_path / "a.txt"), 0, 0)] == [
        [(0, 200)], [(200, 400)], [(400, 600)], [(600, 800)]
    ]  # fmt: skip


def test_small_files_share_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "PIECE", 25)
    for i in range(7):
        (tmp_path / f"{i}.txt").write_text("0123456789")
    assert [[s.name for s in piece] for piece in pieces_of(str(tmp_path), 0, 0)] == [
        ["0.txt", "1.txt", "2.txt"], ["3.txt", "4.txt", "5.txt"], ["6.txt"]
    ]  # fmt: skip


def test_a_part_of_a_corpus_is_drawn_over_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "PIECE", 1000)
    (tmp_path / "a.txt").write_text("012345678\n" * 10_000)  # 100 pieces
    first = pieces_of(str(tmp_path), 0.01, 0)
    assert len(first) == 10 and first == pieces_of(str(tmp_path), 0.01, 0) != pieces_of(str(tmp_path), 0.01, 1)
    assert min(p[0].start for p in first) < 40_000 and max(p[0].start for p in first) > 60_000


def test_files_of_other_kinds_do_not_count_and_changes_are_seen(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt").write_text("one")
    (tmp_path / "README.md").write_text("two")
    folder, before = files_of(str(tmp_path))
    assert folder.uri == str(tmp_path) and before.keys() == {"deep/a.txt"} and before["deep/a.txt"][0] == 3
    assert files_of(str(tmp_path)) == (folder, before) and files_of(str(tmp_path / "deep" / "a.txt"))[1]["a.txt"] == before["deep/a.txt"]
    os.utime(tmp_path / "deep" / "a.txt", (1, 1))
    assert files_of(str(tmp_path))[1] != before  # as long, at another time


def test_objects_have_a_size_and_a_tag(s3: str) -> None:
    from retrikt_ray.runtime.folders import Folder

    Folder(f"{s3}/corpus").write_bytes("a.txt", b"one\ntwo\nthree\n")
    _, first = files_of(f"{s3}/corpus")
    assert first["a.txt"][0] == 14 and len(first["a.txt"]) > 1
    assert read(pieces_of(f"{s3}/corpus", 0, 0)) == ["one\n", "two\n", "three\n"]
    assert files_of(f"{s3}/corpus/a.txt")[1]["a.txt"][0] == 14
    Folder(f"{s3}/corpus").write_bytes("a.txt", b"one\ntwo\nthrow\n")
    assert files_of(f"{s3}/corpus")[1] != first


@pytest.mark.parametrize("name", ["nothing", "nothing.txt", "empty"])
def test_nothing_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        DataError, match=rf"{name}: no such corpus; expected a file or a folder of files that end with .txt, .jsonl, .parquet"
    ):
        files_of(str(tmp_path / name))


def test_what_cannot_be_read_is_told_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbffine\nbad \xff\n")
    (tmp_path / "b.jsonl").write_text('{"text": "fine"}\n{"txt": "bad"}\n[1]\nnot JSON\n{"text": 3}\n')
    pq.write_table(pa.table({"text": ["fine", None]}), tmp_path / "c.parquet")
    found = read(pieces_of(str(tmp_path), 0, 0))
    assert [text.strip() for text in found if isinstance(text, str)] == ["fine"] * 3
    bad = [str(text).removeprefix(f"{tmp_path}/") for text in found if isinstance(text, DataError)]
    assert bad[0].startswith("a.txt, byte 8: ") and "0xff" in bad[0] and bad[0].endswith("expected UTF-8")
    assert bad[1].startswith('b.jsonl, byte 17: found "{\\"txt') and "JSON object with 'text'" in bad[1]
    assert [line.partition(":")[0] for line in bad[2:5]] == ["b.jsonl, byte 32", "b.jsonl, byte 36", "b.jsonl, byte 45"]
    assert bad[5] == "c.parquet: found null in 'text', expected a text" and len(bad) == 6


def test_a_parquet_file_without_the_column_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["fine"], "n": [1]}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match=r"c.parquet: no column 'text'; the file has body, n \(harvest.text_column\)"):
        read(pieces_of(str(tmp_path), 0, 0))

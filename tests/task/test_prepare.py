"""Task files in, checked rows out: every format, every error with its place, every draw by its seed."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.settings import ConfigError
from retrikt_ray.task.files import Columns, check_rows, find_splits, read_rows
from retrikt_ray.task.prepare import PrepareConfig, bin_of, prepare, quantile_bins, sample, source_digest
from retrikt_ray.task.texts import DataError

ROWS = [{"text": f"text {i}", "label": "good" if i % 2 else "bad"} for i in range(40)]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with 40 train, 10 validation and 6 test rows."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name, count in (("train", 40), ("validation", 10), ("test", 6)):
        write_jsonl(folder / f"{name}.jsonl", [r | {"text": f"{name} {r['text']}"} for r in ROWS[:count]])
    return folder


def run(data: Path | str, seed: int = 0, **config: Any) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any], dict[str, Any]]:
    """The tables of `task/` by split, task.json, and what the stage returns."""
    place = data if isinstance(data, Path) else Path(data)
    task = Folder.at(place.parent / f"task-{random.getrandbits(64):x}")
    counts = prepare(PrepareConfig(data=str(data), **config), {}, {"task": task}, seed=seed)
    tables = {s: task.read_table(f"{s}.parquet").to_pylist() for s in ("train", "validation", "test", "unlabelled")}
    return tables, task.read_json("task.json"), counts


def texts(rows: list[dict[str, Any]]) -> list[str]:
    return [r["text"] for r in rows]


# -- files -------------------------------------------------------------------------------------------------------------

THREE = [{"text": 'a "fine" film, really', "label": "good"}, {"text": "dull\tplay", "label": "bad"}, {"text": "grün", "label": "good"}]


def write(path: Path) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(THREE), path)
    elif path.suffix in (".jsonl", ".json"):
        path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in THREE) + "\n\n", encoding="utf-8")
    else:
        mark = "," if path.suffix == ".csv" else "\t"
        lines = [mark.join(f'"{r[c]}"'.replace('"fine"', '""fine""') for c in ("text", "label")) for r in THREE]
        path.write_text("\n".join([f"text{mark}label", *lines]) + "\n", encoding="utf-8-sig")  # as spreadsheets do it, with a BOM


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / f"train{suffix}")
    assert read_rows(str(tmp_path / f"train{suffix}")) == THREE
    assert read_rows(f"file://{tmp_path}/train{suffix}") == THREE
    assert find_splits(str(tmp_path)) == {"train": f"{tmp_path}/train{suffix}"}
    assert find_splits(f"{tmp_path}/train{suffix}") == {"train": f"{tmp_path}/train{suffix}"}


def test_plain_text_is_one_text_a_line(tmp_path: Path) -> None:
    (tmp_path / "u.txt").write_text("a film\n\n  \nb film\r\n")
    assert read_rows(f"{tmp_path}/u.txt") == [{"text": "a film"}, {"text": "b film"}]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": "y"}\n{"text": "caf\xe9"}\n', "a.jsonl, line 3: byte 0xe9 is not UTF-8"),
        ("a.csv", b"text,label\nx,y\n\xff,z\n", "a.csv, line 3: byte 0xff is not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', "a.jsonl, line 3: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n["y"]\n', "a.jsonl, line 2: found list, expected a JSON object"),
        ("a.xlsx", b"", "a.xlsx: cannot read this kind of file; known are .jsonl, .json, .csv, .tsv, .parquet"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read_rows(f"{tmp_path}/{name}")
    assert words in str(error.value)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such file or folder"):
        find_splits(f"{tmp_path}/nowhere")
    with pytest.raises(DataError, match=r"a\.jsonl: no such file"):
        read_rows(f"{tmp_path}/a.jsonl")
    (tmp_path / "test.csv").touch()
    with pytest.raises(DataError, match=r"no train file; expected train\{\.jsonl"):
        find_splits(str(tmp_path))


def test_splits_and_their_other_names(tmp_path: Path) -> None:
    for name in ("train.csv", "dev.tsv", "test.parquet", "notes.md"):
        (tmp_path / name).touch()
    assert find_splits(str(tmp_path)) == {
        "train": f"{tmp_path}/train.csv",
        "validation": f"{tmp_path}/dev.tsv",
        "test": f"{tmp_path}/test.parquet",
    }
    (tmp_path / "valid.csv").touch()
    with pytest.raises(DataError, match=r"valid\.csv and dev\.tsv both look like the validation split"):
        find_splits(str(tmp_path))

    # -- rows --------------------------------------------------------------------------------------------------------------

    rows = [{"body": " a \n film ", "stars": 4, "other": None}]
    assert check_rows(rows, Columns("body", None, "stars"), "x") == [{"text": "a film", "text_pair": None, "label": "4"}]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"body": "x", "label": "a"}, "x.csv, row 2: no column 'text'; the row has body, label"),
        ({"text": "x"}, "x.csv, row 2: no column 'label'; the row has text"),
        ({"text": "x", "label": None}, "x.csv, row 2: no column 'label'"),
        ({"text": " \n", "label": "a"}, "x.csv, row 2: text is empty"),
        ({"text": "x", "label": " "}, "x.csv, row 2: the label is empty"),
    ],
)
def test_rows_that_cannot_be_used(row: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as error:
        check_rows([{"text": "fine", "label": "a"}, row], Columns("text", None, "label"), "x.csv")
    assert words in str(error.value)


def test_pairs_lack_no_side() -> None:
    with pytest.raises(DataError, match="row 1: b is empty"):
        check_rows([{"text": "x", "b": " ", "label": "a"}], Columns("text", "b", "label"), "x")
    with pytest.raises(DataError, match="x: no rows"):
        check_rows([], Columns("text", None, "label"), "x")


# -- the stage ---------------------------------------------------------------------------------------------------------


def test_all_rows(data: Path) -> None:
    tables, card, counts = run(data, label_names={"good": "very good"})
    assert counts == {"train": 40, "validation": 10, "test": 6, "unlabelled": 0, "classes": 2}
    assert card == {
        "name": "data",
        "problem": "classification",
        "labels": ["bad", "good"],
        "conditions": ["bad", "very good"],
        "template": "{label}: ",
        "pair": False,
        "metric": "accuracy",
    }
    assert tables["train"][1] == {
        "id": "train-000001",
        "text": "train text 1",
        "text_pair": None,
        "label": "good",
        "condition": 1,
        "value": 1.0,
    }
    assert [r["value"] for r in tables["test"]] == [0, 1, 0, 1, 0, 1]  # test rows stay in file order, all of them
    assert texts(tables["test"]) == [f"test text {i}" for i in range(6)]
    assert len({r["id"] for rows in tables.values() for r in rows}) == 56


def test_labels_are_readable_in_conditions(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": f"t{i}", "label": ("rent_payment", "noise")[i % 2]} for i in range(20)])
    assert run(tmp_path / "train.jsonl")[1]["conditions"] == ["noise", "rent payment"]
    with pytest.raises(ConfigError, match=r"prepare\.label_names: 'pests' is not a label; the labels are noise, rent_payment"):
        run(tmp_path / "train.jsonl", label_names={"pests": "insects"})


def test_one_class_is_no_task(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "x"}])
    with pytest.raises(DataError, match="all 2 train rows have the label 'x'; at least two classes are needed"):
        run(tmp_path / "train.jsonl")


def test_a_label_that_train_lacks(data: Path) -> None:
    write_jsonl(data / "test.jsonl", [{"text": "a", "label": "good"}, {"text": "b", "label": "ugly"}])
    with pytest.raises(DataError, match="test has labels that train lacks: ugly; train has bad, good"):
        run(data)


def test_missing_splits_are_cut_from_train(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    write_jsonl(path, ROWS)
    tables, card, counts = run(path)
    # A fifth of 40 for test, then a fifth of the 32 left for validation.
    assert counts == {"train": 26, "validation": 6, "test": 8, "unlabelled": 0, "classes": 2}
    assert card["name"] == "mine"
    every = [t for s in ("train", "validation", "test") for t in texts(tables[s])]
    assert sorted(every) == sorted(r["text"] for r in ROWS)  # nothing lost, nothing in two splits
    assert run(path)[0] == tables and texts(run(path, seed=1)[0]["test"]) != texts(tables["test"])
    assert texts(tables["test"]) != [r["text"] for r in ROWS[:8]]  # drawn, not the head of the file


def test_only_the_missing_split_is_cut(data: Path) -> None:
    (data / "validation.jsonl").unlink()
    tables, _, counts = run(data)
    assert (counts["train"], counts["validation"], counts["test"]) == (32, 8, 6)
    assert texts(tables["test"]) == [f"test text {i}" for i in range(6)]


def test_a_class_that_is_lost_by_cutting_is_an_error(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": "common"} for i in range(9)] + [{"text": "r", "label": "rare"}]
    write_jsonl(tmp_path / "train.jsonl", rows)
    outcomes = []
    for seed in range(12):
        try:
            run(tmp_path / "train.jsonl", seed=seed)
            outcomes.append("kept")
        except DataError as error:
            assert "cut from train" in str(error)
            outcomes.append("lost")
    assert set(outcomes) == {"kept", "lost"}  # the one rare row is now in train, now in a cut split


# -- the low-resource sample -------------------------------------------------------------------------------------------


def test_n_per_class(data: Path) -> None:
    tables, _, counts = run(data, n_per_class=3)
    assert [r["label"] for r in tables["train"]].count("good") == 3 and counts["train"] == 6
    assert counts["validation"] == 6 and counts["test"] == 6  # no more validation rows than training rows
    assert run(data, n_per_class=3)[0] == tables  # the same seed draws the same rows
    assert texts(run(data, seed=1, n_per_class=3)[0]["train"]) != texts(tables["train"])
    order = [int(t.split()[-1]) for t in texts(tables["train"])]
    assert order == sorted(order)  # file order


def test_n_rows(data: Path) -> None:
    tables, _, counts = run(data, n_rows=7, validation_rows=4)
    assert (counts["train"], counts["validation"]) == (7, 4)
    assert run(data, n_rows=7, validation_rows=4)[0] == tables
    assert texts(run(data, seed=1, n_rows=7)[0]["train"]) != texts(tables["train"])
    with pytest.raises(ConfigError, match=r"prepare\.n_rows=41: the train split has only 40 rows"):
        run(data, n_rows=41)


def test_a_small_class_gives_what_it_has() -> None:
    rows = [{"text": str(i), "label": "rare" if i < 2 else "common"} for i in range(10)]
    drawn, rest = sample(rows, PrepareConfig(n_per_class=4), random.Random(0))
    assert [r["label"] for r in drawn] == ["rare"] * 2 + ["common"] * 4
    assert sorted(texts(drawn + rest), key=int) == texts(rows)
    with pytest.raises(ConfigError, match=r"prepare\.n_per_class=9: every class has fewer train rows: common \(8\), rare \(2\)"):
        sample(rows, PrepareConfig(n_per_class=9), random.Random(0))


# -- unlabelled texts --------------------------------------------------------------------------------------------------


def test_unlabelled_rows_of_train(data: Path) -> None:
    tables, _, counts = run(data, n_per_class=3, unlabelled="train")
    assert counts["unlabelled"] == 34
    assert sorted(texts(tables["unlabelled"] + tables["train"])) == sorted(f"train text {i}" for i in range(40))
    assert {(r["label"], r["value"], r["condition"]) for r in tables["unlabelled"]} == {(None, None, None)}  # the labels are not used
    assert run(data, n_per_class=3, unlabelled="train", unlabelled_rows=5)[2]["unlabelled"] == 5


def test_unlabelled_file(data: Path, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("one\ntwo\nthree\n")
    tables, _, _ = run(data, unlabelled=f"{tmp_path}/more.txt")
    assert texts(tables["unlabelled"]) == ["one", "two", "three"] and tables["unlabelled"][0]["id"] == "unlabelled-000000"


# -- pairs and regression ----------------------------------------------------------------------------------------------


def test_pairs(tmp_path: Path) -> None:
    rows = [{"text": f"a{i}", "text_pair": f"b{i}", "label": str(i % 2)} for i in range(20)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    tables, card, _ = run(tmp_path / "train.jsonl")
    assert card["pair"] and all(r["text_pair"] == "b" + r["text"][1:] for r in tables["train"])
    write_jsonl(tmp_path / "train.jsonl", [{"p": r["text"], "q": r["text_pair"], "y": r["label"]} for r in rows])
    renamed, card, _ = run(tmp_path / "train.jsonl", text_column="p", text_pair_column="q", label_column="y")
    assert card["pair"] and renamed == tables


def test_quantile_bins_by_hand() -> None:
    edges = quantile_bins([float(v) for v in (7, 1, 9, 3, 5, 2, 4, 10, 8, 6)], 5)
    assert edges == [3, 5, 7, 9]  # {1, 2}, {3, 4}, {5, 6}, {7, 8}, {9, 10}
    assert [bin_of(v, edges) for v in (0.5, 2.9, 3, 6, 8.9, 9, 99)] == [0, 0, 1, 2, 3, 4, 4]


def test_regression(tmp_path: Path) -> None:
    values = {"train": range(1, 11), "validation": (2, 3), "test": (0, 11)}
    for split, numbers in values.items():
        write_jsonl(tmp_path / f"{split}.jsonl", [{"text": f"t{n}", "label": n} for n in numbers])
    tables, card, counts = run(tmp_path, problem="regression")
    assert card["labels"] == [] and counts["classes"] == 0 and card["metric"] == "pearson"
    assert card["conditions"] == ["1.50", "3.50", "5.50", "7.50", "9.50"]  # the bins' means
    assert [(r["value"], r["condition"]) for r in tables["train"]] == [(float(n), (n - 1) // 2) for n in range(1, 11)]
    assert [(r["value"], r["condition"]) for r in tables["test"]] == [(0.0, 0), (11.0, 4)]


@pytest.mark.parametrize("label", ["high", "nan", "inf"])
def test_regression_wants_numbers(tmp_path: Path, label: str) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": f"t{i}", "label": str(i)} for i in range(9)] + [{"text": "x", "label": label}])
    with pytest.raises(DataError, match=rf"train row 10: the label '{label}' is not a number \(regression\)"):
        run(tmp_path / "train.jsonl", problem="regression")


# -- what makes a run stale --------------------------------------------------------------------------------------------


def test_source_digest(data: Path) -> None:
    config = PrepareConfig(data=str(data))
    before = source_digest(config)
    assert len(before) == 3 and source_digest(config) == before
    (data / "test.jsonl").write_text((data / "test.jsonl").read_text() + "\n")
    after = source_digest(config)
    assert len([n for n in before if before[n] != after[n]]) == 1
    assert source_digest(PrepareConfig(data="hf://datasets/a/b", unlabelled="train")) == {}


def test_source_digest_does_not_depend_on_where_the_files_are(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was moved with its data, or the packaged task of another machine, is not stale."""
    monkeypatch.chdir(tmp_path)
    before = source_digest(PrepareConfig(data="data"))
    shutil.copytree(data, tmp_path / "elsewhere" / "data")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert source_digest(PrepareConfig(data="data")) == before


def test_source_digest_sees_files_of_one_name_apart(data: Path, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n')
    digest = source_digest(PrepareConfig(data=str(data), unlabelled=f"{tmp_path}/train.jsonl"))
    (data / "train.jsonl").write_text("changed")
    assert source_digest(PrepareConfig(data=str(data), unlabelled=f"{tmp_path}/train.jsonl")) != digest

"""The data card of a store of ten rows, counted by hand; and the command that shows it."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from retrikt_ray.cli import main
from retrikt_ray.runtime import artifacts
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.store.card import NEIGHBOURS, SHOWN, store_card
from retrikt_ray.store.rows import Row, rejected_schema, store_schema, table_of
from retrikt_ray.task.card import Task

TASK = Task("films", "classification", ("bad", "good"), ("a bad film", "a good film"), "{label}: ", False, "accuracy")
VALUES = Task("films", "regression", (), ("low", "high"), "{label}: ", False, "pearson")


def row(code: str, text: str, source: str, asked: int | None, probs: list[float], embedding: tuple[float, float] = (1, 0)) -> Row:
    return Row(code, text, None, None if asked is None else TASK.conditions[asked], asked, None, probs, list(embedding), source, "test")


KEPT = [
    row("t-0", "a fine film", "task", 1, [0.1, 0.9]),
    row("t-1", "a dull film", "task", 0, [0.8, 0.2]),
    row("u-0", "one two three four", "unlabelled", None, [0.45, 0.55]),
    row("u-1", "- one two three four", "unlabelled", None, [0.95, 0.05]),
    row("g-0", "* a film", "generated", 0, [0.7, 0.3]),
    row("g-1", "a film a film a film", "generated", 0, [0.35, 0.65]),
    row("g-2", "这部电影好", "generated", 1, [0.04, 0.96]),
]
REJECTED = [("g-3", "a film", "duplicate"), ("g-4", "a film!", "near_duplicate"), ("g-5", "", "empty"), ("g-6", "x", "too_short")]


def write(folder: Folder, kept: list[Row], rejected: list[tuple[str, str, str]], generated: int) -> None:
    width = len(kept[0].teacher_embedding or ())
    out = [row(code, text, "generated", 1, [0.5, 0.5], (0,) * width) for code, text, _ in rejected]  # type: ignore[arg-type]
    (folder / "store").write_table("part-00000.parquet", table_of(kept, store_schema(width)))
    why = [{"reason": reason} for _, _, reason in rejected]
    (folder / "rejected").write_table("part-00000.parquet", table_of(out, rejected_schema(width), why))
    sources = [r.source for r in kept]
    by_source, reasons = {s: sources.count(s) for s in dict.fromkeys(sources)}, {reason: 1 for _, _, reason in rejected}
    (folder / "store").write_json("store.json", {"kept": len(kept), "by_source": by_source, "rejected": reasons, "generated": generated})


@pytest.fixture
def folder(tmp_path: Any) -> Folder:
    folder = Folder.at(tmp_path)
    write(folder, KEPT, REJECTED, 7)
    return folder


def card_of(folder: Folder, task: Task = TASK, seed: int = 0) -> dict[str, Any]:
    return store_card(folder / "store", folder / "rejected", task, seed)


def test_figures_by_hand(folder: Folder) -> None:
    card = card_of(folder)
    assert card["generated"] == 7 and card["kept"] == 7 and card["by_source"] == {"task": 2, "unlabelled": 2, "generated": 3}
    assert card["rejected"] == {"duplicate": 1, "near_duplicate": 1, "empty": 1, "too_short": 1}
    assert card["repeated"] == pytest.approx(2 / 7)
    assert card["agreement"] == pytest.approx(2 / 3)  # g-0 and g-2
    assert card["classes"] == [
        {"label": "bad", "rows": {"task": 1, "unlabelled": 1, "generated": 1}, "asked": 2, "agreement": 0.5},
        {"label": "good", "rows": {"task": 1, "unlabelled": 1, "generated": 2}, "asked": 1, "agreement": 1.0},
    ]
    assert card["begin_with_a_letter"] == {"task": 1.0, "unlabelled": 0.5, "generated": pytest.approx(2 / 3)}
    assert card["lengths"]["task"] == {"low": 3.0, "median": 3.0, "high": 3.0}
    assert card["lengths"]["generated"]["median"] == 5.0  # of 3, 5 characters, 6
    assert card["confidence"] == {
        "unlabelled": pytest.approx([0, 0, 0, 0, 0, 0.5, 0, 0, 0, 0.5]),
        "generated": pytest.approx([0, 0, 0, 0, 0, 0, 1 / 3, 1 / 3, 0, 1 / 3]),
    }


def test_variety_is_of_equally_many_rows_of_each_source(folder: Folder) -> None:
    variety = card_of(folder)["variety"]
    assert {kind: v["rows"] for kind, v in variety.items()} == {"task": 2, "unlabelled": 2, "generated": 2}
    # a fine film, a dull film: 4 of 6 words and 4 of 4 pairs differ; overlap of either with the other 2/3, 0 and 0.
    assert variety["task"] == {"rows": 2, "distinct_1": pytest.approx(4 / 6), "distinct_2": 1.0, "self_bleu": pytest.approx(2 / 9)}


def test_rows_off_the_task_are_farther_than_the_labelled_ones_from_each_other(tmp_path: Any) -> None:
    angles = {"task": np.linspace(0, 0.45, 20) ** 2, "unlabelled": np.linspace(0, 0.1, 20), "generated": np.linspace(0, 3, 20)}
    rows = [row(f"{k}-{i}", "a b", k, 0, [1, 0], (np.cos(a), np.sin(a))) for k, some in angles.items() for i, a in enumerate(some)]
    write(Folder.at(tmp_path), rows, [], 20)
    off = card_of(Folder.at(tmp_path))["off_task"]
    assert off == {"task": 0.05, "unlabelled": 0.0, "generated": 0.9}  # the far end of the labelled arc; all but two of the long one
    write(Folder.at(tmp_path), rows[:NEIGHBOURS] + rows[20:], [], 20)
    assert card_of(Folder.at(tmp_path))["off_task"] == {}  # too few labelled rows to say


def test_drawn_rows_are_generated_ones_of_all_classes_in_equal_parts(tmp_path: Any) -> None:
    rows = [row(f"g-{i}", f"text {i}", "generated", int(i < 12), [0.6, 0.4]) for i in range(200)]  # 12 asked to be good
    write(Folder.at(tmp_path), [*KEPT[:4], *rows], [(f"r-{i}", f"again {i}", "duplicate") for i in range(9)], 209)
    card = card_of(Folder.at(tmp_path))
    assert len(card["rows"]) == SHOWN and {r["source"] for r in card["rows"]} == {"generated"}
    asked = [r["asked"] for r in card["rows"]]
    assert asked == ["a bad film"] * 10 + ["a good film"] * 10
    assert {(r["label"], r["agrees"]) for r in card["rows"]} == {("bad", True), ("bad", False)} and card["rows"][0][
        "score"
    ] == pytest.approx(0.6)
    assert len({r["id"] for r in card["rows"]}) == SHOWN
    assert [r["reason"] for r in card["rejected_rows"]] == ["duplicate"] * 3
    again, other = card_of(Folder.at(tmp_path)), card_of(Folder.at(tmp_path), seed=1)
    assert again == card and [r["id"] for r in other["rows"]] != [r["id"] for r in card["rows"]]


def test_passages_of_a_corpus_are_told_and_drawn_as_well(tmp_path: Any) -> None:
    passages = [row(f"c-{i}", f"passage number {i}", "corpus", None, [0.3, 0.7]) for i in range(30)]
    write(Folder.at(tmp_path), [*KEPT[:4], *passages, *KEPT[4:]], REJECTED, 7)
    card = card_of(Folder.at(tmp_path))
    assert [*card["variety"]] == ["task", "unlabelled", "corpus", "generated"] and card["by_source"]["corpus"] == 30
    assert card["classes"][1]["rows"] == {"task": 1, "unlabelled": 1, "corpus": 30, "generated": 2}
    assert [r["source"] for r in card["rows"]] == ["corpus"] * SHOWN + ["generated"] * 3
    assert {(r["asked"], r["label"], r["agrees"]) for r in card["rows"][:SHOWN]} == {(None, "good", None)}


def test_a_store_without_generated_rows(tmp_path: Any) -> None:
    write(Folder.at(tmp_path), KEPT[:4], [], 0)
    card = card_of(Folder.at(tmp_path))
    assert card["agreement"] is None and card["repeated"] is None and set(card["variety"]) == {"task", "unlabelled"}
    assert {r["id"] for r in card["rows"]} == {"u-0", "u-1"} and {r["asked"] for r in card["rows"]} == {None}
    assert card["rejected_rows"] == []


def test_regression_tells_the_mean_value_of_what_was_asked(tmp_path: Any) -> None:
    kept = [row("t-0", "a b", "task", 0, [1.0]), row("g-0", "a c", "generated", 0, [2.0]), row("g-1", "a d", "generated", 0, [3.0])]
    write(Folder.at(tmp_path), kept, [], 2)
    card = card_of(Folder.at(tmp_path), VALUES)
    assert card["classes"] == [{"label": "low", "asked": 2, "value": 2.5}, {"label": "high", "asked": 0, "value": None}]
    assert card["agreement"] is None and card["confidence"] == {}
    assert [(r["label"], r["agrees"]) for r in card["rows"]] in ([("2", None), ("3", None)], [("3", None), ("2", None)])


@pytest.mark.parametrize("task", [TASK, VALUES])
def test_the_command_shows_figures_and_rows(folder: Folder, task: Task) -> None:
    if task.regression:
        write(folder, [row("t-0", "a b", "task", 0, [1.0]), row("g-0", "* a film", "generated", 0, [2.0])], REJECTED, 7)
    folder.write_bytes("config.yaml", b"seed: 3\n")
    task.write(folder / "task")
    for name in ("task", "store", "rejected"):
        artifacts.seal(folder / name, stage=name, fingerprint="f", config={}, inputs={}, seed=3, started=time.time())
    done = CliRunner().invoke(main, ["store", "card", folder.uri])
    assert done.exit_code == 0, done.output
    assert "near_duplicate" in done.output and "g-4  near_duplicate: a film!" in done.output
    if task.regression:
        assert "g-0  asked a bad film, teacher 2 2.00: * a film" in done.output and "mean value" in done.output
    else:
        assert "67% of the generated rows are as asked" in done.output
        assert "g-0  asked a bad film, teacher bad 0.70: * a film" in done.output
    (folder / "store").remove()
    assert CliRunner().invoke(main, ["store", "card", folder.uri]).exit_code != 0

"""Harvesting: what is best, what is chosen, and the stage on a small corpus of three kinds of files, its actors called in this process."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from making.tasks import corpus_documents, write_corpus, write_jsonl, write_task

from retrikt_ray.runtime.cluster import Workers
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.store import harvest as stage
from retrikt_ray.store.harvest import Best, HarvestConfig, balanced, harvest, labels_of
from retrikt_ray.store.nearness import Encoded, weights_of
from retrikt_ray.store.rows import HARVESTED
from retrikt_ray.task import corpus
from retrikt_ray.task.prepare import PrepareConfig, prepare
from retrikt_ray.task.texts import DataError, Text, texts_of
from retrikt_ray.teacher.annotator import Annotator


def test_the_best_are_kept_and_equal_ones_once() -> None:
    best = Best(3)
    best.add(np.array([0.1, 0.5, 0.3]), [("a", "1"), ("b", "1"), ("c", "1")])
    best.add(np.array([0.5, 0.4, 0.3]), [("B", "2"), ("d", "2"), ("e", "2")])  # B is b in capitals
    assert [(text, file) for _, text, file in best.shrink()] == [("b", "1"), ("d", "2"), ("c", "1")]  # c as good as e, and earlier


def test_the_best_do_not_depend_on_how_they_come_and_memory_is_bounded() -> None:
    rng = np.random.default_rng(0)
    scores, texts = rng.random(1000), [(f"text {i % 700}", "f") for i in range(1000)]
    whole, parts = Best(20), Best(20)
    whole.add(scores, texts)
    for low in range(0, 1000, 7):
        parts.add(scores[low : low + 7], texts[low : low + 7])
        assert len(parts.rows) <= 40
    assert whole.shrink() == parts.shrink() and len(whole.rows) == 20
    assert [row[0] for row in whole.rows] == sorted((row[0] for row in whole.rows), reverse=True)


def test_balanced_takes_the_first_of_each_label_and_shares_what_one_lacks() -> None:
    labels = np.array([0, 0, 0, 0, 0, 1, 0, 2, 1, 2, 2, 2, 1])
    assert balanced(labels, 6).tolist() == [0, 1, 5, 7, 8, 9]
    assert balanced(labels, 11).tolist() == [0, 1, 2, 3, 5, 7, 8, 9, 10, 11, 12]  # 3 of label 1, then 4 of 2 and 4 of 0
    assert balanced(labels, 100).tolist() == [*range(13)]
    assert balanced(np.array([1, 1, 1]), 2).tolist() == [0, 1]


def test_labels_are_classes_or_quantiles(tmp_path: Path) -> None:
    task = Folder.at(tmp_path)
    card = {"name": "t", "problem": "classification", "labels": ["a", "b"], "conditions": [], "template": "", "pair": False, "metric": "x"}
    task.write_json("task.json", card)
    assert labels_of(np.array([[0.9, 0.1], [0.2, 0.8]]), task).tolist() == [0, 1]
    task.write_json("task.json", card | {"problem": "regression", "labels": []})
    task.write_table("train.parquet", pa.table({"value": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]}))  # a fifth each: 1, 2, 3 and 4
    assert labels_of(np.array([[-3.0], [1.5], [2.5], [3.5], [9.0]]), task).tolist() == [0, 1, 2, 3, 4]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Actors are called in this process; how many items each pool was given."""
    items_of: list[int] = []

    def pool(actor: type, arguments: tuple[Any, ...], items: list[dict[str, Any]], workers: Workers) -> Any:
        items_of.append(len(items))
        made = actor(*arguments)
        for item in items:
            found = made({key: [value] for key, value in item.items()})
            yield {key: value[0] for key, value in found.items()}

    def fitted(config: HarvestConfig, inputs: dict[str, Folder], general: list[str], workers: Workers) -> np.ndarray:
        return weights_of(inputs["teacher"], inputs["task"], general, config.batch)

    monkeypatch.setattr(stage, "pool", pool)
    monkeypatch.setattr(stage, "fitted", fitted)
    monkeypatch.setattr(stage, "plan", lambda *_: Workers(1, 1, 0))
    monkeypatch.setattr(stage, "CHUNK", 16)
    monkeypatch.setattr(corpus, "PIECE", 700)
    return items_of


@pytest.fixture
def inputs(tiny_encoder: str, tmp_path: Path) -> dict[str, Folder]:
    """The task of `write_task` with 12 labelled rows of each class, a teacher that was not trained and says both, and the corpus of `write_corpus`."""
    task, teacher = Folder.at(tmp_path / "task"), Folder.at(tmp_path / "teacher")
    prepare(PrepareConfig(data=str(write_task(tmp_path / "data")), n_per_class=12), {}, {"task": task}, seed=0)
    torch.manual_seed(3)
    annotator = Annotator.start(tiny_encoder, "", "float32", 2, 0, 32).eval()
    with torch.no_grad():
        annotator.head.weight.normal_()
        some: list[Text] = [(text, None) for document in corpus_documents() for text in document]
        annotator.head.bias.copy_(-annotator.head.weight @ annotator.annotate(some)[1].mean(0))
    annotator.save(teacher, tiny_encoder, "", "float32")
    teacher.write_json("teacher.json", {"annotator": tiny_encoder, "base": "", "dtype": "float32", "max_tokens": 32})
    return {"task": task, "teacher": teacher, "corpus": Folder.at(write_corpus(tmp_path))}


def harvested(inputs: dict[str, Folder], out: Path, **keys: Any) -> tuple[pa.Table, dict[str, Any]]:
    folders = {"harvested": Folder.at(out / "harvested"), "scratch": Folder.at(out / "scratch")}
    told = harvest(HarvestConfig(**keys), inputs, folders, seed=0)
    return folders["harvested"].read_tables(), told


def test_the_nearest_of_each_label_are_found_in_files_of_every_kind(here: list[int], inputs: dict[str, Folder], tmp_path: Path) -> None:
    """As by hand: each sentence is a passage, since the labelled rows have four and five words."""
    found, told = harvested(inputs, tmp_path, rows=20)
    assert found.schema.equals(HARVESTED) and told == {
        "rows": 20,
        "candidates": 36 * 3 - 6,
        "passages": 36 * 3,
    }  # one passage is there seven times
    assert found["id"].to_pylist() == [f"corpus-{i:06d}" for i in range(20)]
    nearness = found["nearness"].to_numpy()
    assert (np.diff(nearness) <= 0).all() and -1 <= nearness[-1] < nearness[0] <= 1.0001
    sentences: list[Text] = [(text, None) for text in sorted({text for document in corpus_documents() for text in document})]
    annotator = Annotator.load(inputs["teacher"])
    score = Encoded(annotator, texts_of(inputs["task"].read_table("train.parquet")))(sentences, 64)  # not trained: as it was before
    answers = annotator.annotate(sentences)[0].numpy().argmax(1)
    share = min(10, *np.bincount(answers, minlength=2))
    ranked = [sentences[i][0] for i in np.argsort(-score)]
    label = dict(zip((text for text, _ in sentences), answers.tolist(), strict=True))
    few = int(np.bincount(answers, minlength=2).argmin())
    wanted = [t for t in ranked if label[t] == few][:share] + [t for t in ranked if label[t] != few][: 20 - share]
    assert share > 2 and set(found["text"].to_pylist()) == set(wanted)
    assert {Path(file).name for file in found["file"].to_pylist()} == {"a.txt", "b.jsonl", "c.parquet"}


def test_pieces_that_are_done_are_not_read_again(here: list[int], inputs: dict[str, Folder], tmp_path: Path) -> None:
    whole, _ = harvested(inputs, tmp_path / "whole", rows=20)
    pieces, chunks = here
    assert pieces > 3 and chunks > 2
    harvested(inputs, tmp_path / "cut", rows=20)
    scratch = Folder.at(tmp_path / "cut" / "scratch")
    for name in [n for n in scratch.files() if n.startswith("ranked") or n == "sifted-00001.parquet"]:
        scratch.remove(name)
    Folder.at(tmp_path / "cut" / "harvested").remove()
    again, _ = harvested(inputs, tmp_path / "cut", rows=20)
    assert here[4:] == [1, chunks] and again.equals(whole)


def test_few_candidates_are_the_nearest_by_token_vectors(here: list[int], inputs: dict[str, Folder], tmp_path: Path) -> None:
    """And what they are does not depend on how the corpus is cut."""
    found, told = harvested(inputs, tmp_path / "small", rows=20, candidates=10)
    assert told["candidates"] == 10 >= len(found)
    corpus.PIECE = 10**6  # `here` puts it back
    one, _ = harvested(inputs, tmp_path / "one", rows=20, candidates=10**6)
    assert here[2] == 1 and len(one) > len(found)


def test_copies_of_held_out_texts_and_of_each_other_are_left_out(here: list[int], inputs: dict[str, Folder], tmp_path: Path) -> None:
    test, own = (inputs["task"].read_table(f"{split}.parquet")["text"].to_pylist() for split in ("test", "train"))
    texts = [*test[:5], own[0].upper(), "a quiet town near water", "a quiet town, near water!"]
    write_jsonl(tmp_path / "small" / "a.jsonl", [{"text": text} for text in texts])
    found, _ = harvested(inputs | {"corpus": Folder.at(tmp_path / "small")}, tmp_path, rows=20)
    kept = found["text"].to_pylist()
    assert len(kept) == 1 and kept[0].startswith("a quiet town")


def test_labels_are_balanced_by_what_the_annotator_says(
    here: list[int], inputs: dict[str, Folder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An annotator that gives a third of the passages to one class, the rest to the other."""
    plain = Annotator.annotate

    def annotate(self: Annotator, texts: Any, batch: int = 64) -> Any:
        first = torch.tensor([float("Minister" in text) for text, _ in texts])
        return torch.stack([first, 1 - first], 1), plain(self, texts, batch)[1]

    monkeypatch.setattr(Annotator, "annotate", annotate)
    found, _ = harvested(inputs, tmp_path, rows=20)
    assert Counter("Minister" in text for text in found["text"].to_pylist()) == {True: 10, False: 10}


def test_a_corpus_that_cannot_be_read_is_refused(here: list[int], inputs: dict[str, Folder], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "bad" / "a.jsonl", [{"txt": "a"}] * 3)
    with pytest.raises(DataError, match=r"a.jsonl, byte 0: found .* expected a JSON object with 'text' \(harvest.text_column\)"):
        harvested(inputs | {"corpus": Folder.at(tmp_path / "bad")}, tmp_path)
    rows = [{"text": f"the rain is here {i}"} for i in range(90)]
    write_jsonl(tmp_path / "mixed" / "a.jsonl", [*rows, {"text": 3}, {"text": None}])
    with pytest.raises(DataError, match=r"2 documents could not be read, and 90 passages were; the first: .*a.jsonl, byte \d+: found 3"):
        harvested(inputs | {"corpus": Folder.at(tmp_path / "mixed")}, tmp_path)


def test_a_corpus_of_other_lengths_is_refused(here: list[int], inputs: dict[str, Folder], tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("word " * 500)
    with pytest.raises(DataError, match=r"no passage of 4 to \d words, as the labelled rows have"):
        harvested(inputs | {"corpus": Folder.at(tmp_path / "long.txt")}, tmp_path)


def test_what_is_told_of_a_piece_is_kept_with_it(here: list[int], inputs: dict[str, Folder], tmp_path: Path) -> None:
    _, told = harvested(inputs, tmp_path, rows=5)
    with Folder.at(tmp_path / "scratch").parquet("sifted-00000.parquet") as file:
        mine = json.loads(file.schema_arrow.metadata[b"told"])
    assert 0 < mine["passages"] < told["passages"] and mine["unreadable"] == 0

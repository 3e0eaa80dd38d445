"""The distill stage and the n-grams where a store has unlabelled texts and others: it is tried without the others, and unseen rows choose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from making.tiny_run import LABELS, VALIDATION, WORDS, make_student

from retrikt_ray.index.index import learnt_best
from retrikt_ray.report.material import Material
from retrikt_ray.report.remade import Remade
from retrikt_ray.report.systems import tfidf_store
from retrikt_ray.runtime.cluster import plan
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.settings import Scaled
from retrikt_ray.store.rows import store_schema
from retrikt_ray.student import distill as distilling
from retrikt_ray.student.distill import distill, named, token_counts
from retrikt_ray.student.fit import DistillConfig
from retrikt_ray.student.inherit import count_tokens
from retrikt_ray.student.model import Student
from retrikt_ray.student.rows import load_rows, load_validation, sources_of
from retrikt_ray.teacher.annotator import Annotator, tokenizer_of

GOOD, OWN = set(WORDS[8:12]), ("task", "unlabelled")
CONFIG = DistillConfig(epochs=1, size=0.2, batch=32, workers=1)


def rows_of(rng: np.random.Generator, count: int, source: str, wrong: bool) -> list[dict[str, Any]]:
    """Texts whose label is whether they have more good words than bad ones; or just the other way round."""
    rows = []
    for i in range(count):
        words = [str(w) for w in rng.choice(WORDS[8:16], 3)] + [str(w) for w in rng.choice(WORDS[:8], 4)]
        value = float((sum(w in GOOD for w in words) >= 2) != wrong)
        probs = [0.95, 0.05] if not value else [0.05, 0.95]
        texts = {"id": f"{source}-{i}", "text": " ".join(rng.permutation(words)), "text_pair": None}
        rows.append(
            texts
            | {
                "condition": 0,
                "value": value if source == "task" else None,
                "teacher_probs": probs,
                "teacher_embedding": [0.0, 1.0],
                "source": source,
            }
        )
    return rows


@pytest.fixture(scope="module")
def made(tiny_encoder: str, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, dict[str, Folder]]:
    """Inputs of the stages, by whether what was generated is labelled the wrong way round."""
    root, found = tmp_path_factory.mktemp("stores"), {}
    torch.manual_seed(2)
    teacher = Folder.at(root / "teacher")
    annotator = Annotator.start(tiny_encoder, "", "float32", 2, 0, 16)
    annotator.save(teacher, tiny_encoder, "", "float32")
    teacher.write_json("teacher.json", {"parameters": annotator.parameter_count, "annotator": tiny_encoder})
    for wrong in (True, False):
        rng = np.random.default_rng(0)
        task, store = Folder.at(root / f"task-{wrong}"), Folder.at(root / f"store-{wrong}")
        rows = rows_of(rng, 20, "task", False) + rows_of(rng, 520, "unlabelled", False) + rows_of(rng, 900, "generated", wrong)
        store.write_table("part-00000.parquet", pa.Table.from_pylist(rows, schema=store_schema(2)))
        store.write_json("store.json", {"kept": len(rows)})
        validation = [{k: row[k] for k in ("text", "text_pair", "value")} for row in rows_of(rng, 60, "task", False)]
        task.write_table("validation.parquet", pa.Table.from_pylist(validation, schema=VALIDATION))
        card = {
            "name": "tiny",
            "problem": "classification",
            "labels": LABELS,
            "conditions": LABELS,
            "template": "",
            "pair": False,
            "metric": "accuracy",
        }
        task.write_json("task.json", card)
        found[wrong] = {"task": task, "teacher": teacher, "store": store}
    return found


def right(student: Student, inputs: dict[str, Folder]) -> float:
    rows = load_validation(inputs["task"], 2)
    return float((student.encode(rows.texts)[0].argmax(1).numpy() == rows.truth.numpy()).mean())


@pytest.mark.usefixtures("cluster")
def test_tokens_are_counted_in_tasks_as_in_one_process(
    made: dict[bool, dict[str, Folder]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers, texts = plan(CONFIG, "distill"), load_rows(made[True]["store"]).texts
    want = count_tokens(tokenizer_of(made[True]["teacher"]), [texts])
    assert want.total() > 7 * 1440 and token_counts(made[True], Folder.at(tmp_path / "one"), workers) == want
    monkeypatch.setattr(distilling, "COUNT_ROWS", 500)
    several = Folder.at(tmp_path / "several")
    assert token_counts(made[True], several, workers) == want
    monkeypatch.setattr(distilling, "each", None)
    assert token_counts(made[True], several, workers) == want  # kept


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_student_learns_from_what_does_best_on_unseen_rows(made: dict[bool, dict[str, Folder]], tmp_path: Path) -> None:
    inputs, out = made[True], {"student": Folder.at(tmp_path / "student"), "scratch": Folder.at(tmp_path / "scratch")}
    summary = distill(CONFIG, inputs, out, seed=0)
    learnt = out["student"].read_json("learnt.json")
    assert learnt["sources"] == list(OWN) and summary["learnt_from"] == "task and unlabelled"
    assert learnt["loss"].keys() == {"all", "task and unlabelled"} and learnt["loss"]["task and unlabelled"] < learnt["loss"]["all"] - 0.1
    assert right(Student.load(str(out["student"].local())), inputs) > 0.9


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("better", [(), OWN])
def test_the_better_student_is_kept(
    made: dict[bool, dict[str, Folder]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, better: tuple[str, ...]
) -> None:
    """What was trained before the stage was cut off is not trained again."""
    inputs, out = made[True], {"student": Folder.at(tmp_path / "student"), "scratch": Folder.at(tmp_path / "scratch")}
    trained: list[tuple[str, ...]] = []

    def launch(loop: Any, config: dict[str, Any], workers: Any, scratch: Folder, name: str, label: str) -> None:
        trained.append(config["sources"])
        make_student(False, 2, len(trained)).save(str(tmp_path / name))
        config["out"].upload(tmp_path / name)
        loss = 0.4 if config["sources"] == better else 0.5
        config["out"].write_json("learnt.json", {"sources": config["sources"], "loss": {named(config["sources"]): loss}})
        if len(trained) == 1:
            raise InterruptedError

    monkeypatch.setattr("retrikt_ray.runtime.training.launch", launch)
    with pytest.raises(InterruptedError):
        distill(CONFIG, inputs, out, seed=0)
    distill(CONFIG, inputs, out, seed=0)
    assert trained == [(), OWN]
    learnt = out["student"].read_json("learnt.json")
    assert learnt["sources"] == list(better) and sorted(learnt["loss"].values()) == [0.4, 0.5]
    kept = Student.load(str(out["student"].local())).model
    assert torch.equal(kept.head.weight, make_student(False, 2, 1 + bool(better)).model.head.weight)


@pytest.mark.usefixtures("cluster")
def test_ngrams_are_learnt_from_what_does_best_on_unseen_rows(made: dict[bool, dict[str, Folder]]) -> None:
    workers = plan(Scaled(), "index")
    bad, good = (learnt_best(made[wrong], 0, workers) for wrong in (True, False))
    assert bad.sources == OWN and bad.memory.rows == 540 and bad.without.rows == 540 - 52
    assert good.sources == () and good.memory.rows == 1440
    assert {*sources_of(made[True]["store"])[bad.held]} == {"unlabelled"}


def test_reports_and_benches_choose_as_the_stages_do(made: dict[bool, dict[str, Folder]]) -> None:
    some = Material(made[True], 0, 1, config=CONFIG)
    remade = Remade.of(some, CONFIG, list(range(1440)))
    assert remade.memory.rows == 540 and right(remade.student, made[True]) > 0.8
    texts, truth = some.split("validation")
    assert (remade.answer(texts).argmax(1) == truth).mean() > 0.9
    assert (tfidf_store(some).answer(texts).argmax(1) == truth).mean() > 0.9

"""What each system of a report is fitted to, and RetriKT made anew on a part of a store."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from making.tiny_run import LABELS, TEXTS, make_run, make_student
from making.tiny_run import VALIDATION as SCHEMA

from retrikt_ray.index.learning import of_texts
from retrikt_ray.index.mixture import ALONE, NAMES, Mixture, Votes, fit_mixture, mix, voices_of
from retrikt_ray.report import material as materials
from retrikt_ray.report import remade, systems
from retrikt_ray.report.material import Material
from retrikt_ray.report.remade import Remade
from retrikt_ray.report.systems import BY_NAME, SYSTEMS, part_of_store
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.student.fit import DistillConfig
from retrikt_ray.student.rows import Rows
from retrikt_ray.task.card import Task
from retrikt_ray.task.texts import Text
from retrikt_ray.teacher.annotator import Annotator

TASK = Task("tiny", "classification", tuple(LABELS), tuple(LABELS), "{label}: ", False, "accuracy")
VALIDATION: tuple[list[Text], np.ndarray] = (
    [("a fine play", None), ("a dull play", None), ("never warm", None)],
    np.array([1.0, 0.0, 0.0]),
)


def material(copies: int = 1) -> Any:
    """Of a store of the tiny run's texts, so many times, whose rows 0 and 2 have a true label. Made by hand: no teacher, no training."""
    sure = torch.tensor(([0.9] * 6 + [0.1] * 6) * copies)
    texts = [(f"{t} {i}" if i else t, None) for i in range(copies) for t in TEXTS]
    rows = Rows(texts, torch.stack([1 - sure, sure], 1), None, torch.full((12 * copies,), float("nan")))
    source = np.array(["generated"] * len(texts))
    source[[0, 2]] = "task"
    more: dict[str, Any] = {"distill": DistillConfig(), "task": TASK, "seed": 3, "threads": 1, "split": lambda _: VALIDATION}
    return SimpleNamespace(rows=rows, labelled=[0, 2], source=source, **more)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[DistillConfig, list[int], list[int] | None]]:
    """What students were trained with: config, rows of the store, and rows that chose their weights."""
    calls: list[tuple[DistillConfig, list[int], list[int] | None]] = []

    def trained(_: Any, config: DistillConfig, index: list[int], held: list[int] | None = None) -> Any:
        calls.append((config, index, held))
        return make_student(False, 2, 0)

    for module in (systems, remade):
        monkeypatch.setattr(module, "trained", trained)
    return calls


def test_every_system_is_named_once_and_retrikt_is_first() -> None:
    assert SYSTEMS[0].name == "retrikt" and len(BY_NAME) == len(SYSTEMS)
    assert [s.name for s in SYSTEMS if not s.baseline] == ["retrikt", "student_kd_store"]
    assert all(s.title and s.description for s in SYSTEMS)


def test_students_of_the_labels_alone(asked: list[Any]) -> None:
    some = material()
    BY_NAME["student_kd_labels"].fit(some)
    BY_NAME["student_labels"].fit(some)
    (kd, first, held), (labels, second, other) = asked
    assert first == second == [0, 2] and not held and not other  # none of the generated rows
    assert kd == some.distill
    assert (labels.kd, labels.relation, labels.retrieval, labels.labels) == (0, 0, 0, 1)  # and no word of the teacher


def test_a_part_of_the_store_keeps_the_tasks_rows(asked: list[Any]) -> None:
    system, rows = part_of_store(material(), 0.5)
    ((config, index, held),) = asked
    assert rows == len(index) == 2 + 5 and {0, 2} <= set(index) and len(set(index)) == 7 and not held  # too few to hold any out
    assert config == DistillConfig()
    answers = system.answer([("a fine film", None), ("dull", None)])
    np.testing.assert_allclose(answers.sum(1), 1, atol=1e-6)
    part_of_store(material(), 0.5)
    assert asked[1][1] == index  # the same draw


def test_retrikt_made_anew_holds_rows_out_of_everything_that_its_mixture_is_fitted_with(asked: list[Any]) -> None:
    some = material(copies=4)
    index = [0, 2, *range(3, 45)]
    made = Remade.of(some, some.distill, index)
    ((_, kept, held),) = asked
    assert held is not None and len(held) == 4 and not {0, 2} & set(held)  # a tenth of 42
    assert sorted([*kept, *held]) == index
    unseen = made.unseen
    assert unseen.texts == [*VALIDATION[0], *(some.rows.texts[i] for i in held)]
    want = np.concatenate([[[0, 1], [1, 0], [1, 0]], some.rows.teacher[held].numpy()])
    np.testing.assert_array_equal(unseen.targets, want)
    assert [index[i] for i in np.flatnonzero(~unseen.others)] == held
    # They find no row that is held out, and the n-gram memory has not seen one; answers come from all rows.
    _, dense, lexical, (said, _) = made.heard
    np.testing.assert_array_equal(said, unseen.memory.answers(unseen.texts)[0])
    assert np.isfinite(dense.scores).sum(1).max() == len(kept) and np.isfinite(lexical.scores).sum(1).max() <= len(kept)
    assert (unseen.memory.rows, made.memory.rows) == (len(kept), len(index))
    everything = of_texts([some.rows.texts[i] for i in index], some.rows.teacher[index].numpy())
    np.testing.assert_array_equal(made.memory.steps, everything.steps)
    vector = made.student.encode([some.rows.texts[held[0]]])[1].numpy()
    own = made.votes(made.searcher.search(vector, len(index)))
    assert own.scores[0, 0] == pytest.approx(1, abs=1e-5) and np.isfinite(own.scores).sum() == len(index)


def test_answers_of_some_voices(asked: list[Any]) -> None:
    some = material()
    made, texts = Remade.of(some, some.distill, list(range(12))), VALIDATION[0]
    student = made.student.encode(texts)[0].numpy()
    np.testing.assert_allclose(made.answer(texts, ALONE), 0.98 * student + 0.01, atol=1e-6)
    np.testing.assert_array_equal(made.answer(texts), made.answer(texts, made.mixture))
    both = Mixture(0.0, 0.0, 0.0, 1.0, 8, 0.1, 4, 1.0)
    np.testing.assert_allclose(made.answer(texts, both), 0.98 * made.memory.answers(texts)[0] + 0.01, atol=1e-6)
    every = Mixture(0.2, 0.3, 0.4, 0.5, 8, 0.1, 4, 1.0)
    dense = made.votes(made.searcher.search(made.student.encode(texts)[1].numpy(), 64))
    voices = voices_of(dense, made.votes(made.words.search(texts, 64)), made.memory.answers(texts), every)
    np.testing.assert_allclose(made.answer(texts, every), mix(student, voices, every), atol=1e-6)
    few, some_rows = made.fitted(rows=2), made.unseen.targets[:2]
    dense, lexical = (Votes(v.scores[:2], v.labels[:2]) for v in made.heard[1:3])
    assert few == fit_mixture(some_rows, made.heard[0][:2], dense, lexical, (made.heard[3][0][:2], made.heard[3][1][:2]), gold=2)
    for name in NAMES:
        fitted = made.fitted(tuple(n for n in NAMES if n != name))
        assert getattr(fitted, name) == 0 and sum(getattr(fitted, n) for n in NAMES) > 0


def test_a_students_unseen_rows_are_validation_and_what_is_held_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run, found = make_run(tmp_path / "run"), []

    def fit(student: Any, rows: Rows, unseen: Rows, config: DistillConfig, seed: int, _: Any) -> None:
        found.append((rows.texts, unseen.texts, unseen.teacher.tolist(), seed))

    monkeypatch.setattr("retrikt_ray.student.fit.fit", fit)
    monkeypatch.setattr("retrikt_ray.student.fit.untrained", lambda *_: make_student(False, 2, 0))
    monkeypatch.setattr("retrikt_ray.teacher.annotator.tokenizer_of", lambda _: None)
    monkeypatch.setattr("retrikt_ray.student.inherit.count_tokens", lambda *_: Counter())
    some = Material({name: run / name for name in ("task", "teacher", "store")}, 5, 1, config=DistillConfig())
    materials.trained(some, some.distill, [3, 1], [8])
    ((texts, unseen, targets, seed),) = found
    assert [t for t, _ in texts] == [TEXTS[1], TEXTS[3]] and seed == 5
    assert [t for t, _ in unseen] == [*TEXTS[:3], TEXTS[8]]
    assert targets[:3] == [[0, 1]] * 3 and targets[3] == some.rows.teacher[8].tolist()


def test_the_majority_of_an_even_sample_is_told_by_validation() -> None:
    """Two labelled rows of each class; of three validation rows two are of the second."""
    some = SimpleNamespace(
        task=TASK,
        split=lambda name: ([], np.array([0.0, 0.0, 1.0, 1.0] if name == "train" else [1.0, 1.0, 0.0] if name == "validation" else [])),
    )
    np.testing.assert_allclose(BY_NAME["majority"].fit(some).answer([("a", None)] * 2), [[3 / 7, 4 / 7]] * 2)


def test_a_pretrained_encoder_is_a_student_like_any_other(monkeypatch: pytest.MonkeyPatch, tiny_encoder: str, tmp_path: Path) -> None:
    """The same losses, the same votes: it learns the tiny run's labels, and its vectors find the rows."""
    monkeypatch.setattr("retrikt_ray.student.fit.MIN_STEPS", 60)
    torch.manual_seed(0)
    Annotator.start(tiny_encoder, "", "auto", 2, 0, 16).save(Folder.at(tmp_path / "teacher"), tiny_encoder, "", "auto")
    run = make_run(tmp_path / "run")
    rows = [{"text": t, "text_pair": None, "value": float(i < 6)} for i, t in enumerate(TEXTS)]
    (run / "task").write_table("validation.parquet", pa.Table.from_pylist(rows, schema=SCHEMA))
    inputs = {name: run / name for name in ("task", "store")} | {"teacher": Folder.at(tmp_path / "teacher")}
    config = DistillConfig(model=tiny_encoder, learning_rate=2e-3, epochs=1, batch=8)
    assert config.kd and config.relation and config.labels
    some = Material(inputs, 0, 1, config=config)
    made = Remade.of(some, some.distill, list(range(12)))
    texts: list[Text] = [(t, None) for t in TEXTS]
    student, vectors = made.student.encode(texts)
    assert made.student.model.config.kind == "pretrained" and vectors.shape == (12, 32)
    assert (student.argmax(1).numpy() == [1] * 6 + [0] * 6).mean() >= 0.75
    assert made.searcher.search(vectors.numpy(), 1)[0][:, 0].tolist() == list(range(12))
    every = Mixture(0.5, 0.5, 0.0, 0.5, 4, 0.1, 4, 1.0)
    without_dense = made.answer(texts, Mixture(0.5, 0.0, 0.0, 0.5, 4, 0.1, 4, 1.0))
    assert made.answer(texts, every).shape == (12, 2) and np.abs(made.answer(texts, every) - without_dense).max() > 1e-3


def test_material_of_some_sources(tmp_path: Path) -> None:
    """As the benches' protocols ask for: in the tiny run rows 1, 3, 5, ... are generated, the others the task's."""
    run = make_run(tmp_path / "run")
    inputs = {name: run / name for name in ("task", "store")}
    assert [t for t, _ in Material(inputs, 0, 1, ("generated",)).rows.texts] == TEXTS[1::2]
    assert Material(inputs, 0, 1, ("task",)).source.tolist() == ["task"] * 6 and Material(inputs, 0, 1).source[:2].tolist() == [
        "task",
        "generated",
    ]
    assert len(Material(inputs, 0, 1, ("task", "generated")).rows) == len(Material(inputs, 0, 1).rows) == 12
    config = DistillConfig(size=0.5)
    assert Material(inputs, 0, 1, config=config).distill is config


def test_material_reads_a_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    some = Material({name: run / name for name in ("task", "store", "student", "index")}, 0, 1)
    assert some.task.name == "tiny" and some.labelled == list(range(12))
    assert some.split("validation")[1].tolist() == [1.0, 1.0, 1.0]
    texts = [(t, None) for t in TEXTS[:3]]
    for name in ("retrikt", "student_kd_store"):
        assert BY_NAME[name].fit(some).parameters == some.predictor.student.model.parameter_count
    mixed, alone = (BY_NAME[name].fit(some).answer(texts) for name in ("retrikt", "student_kd_store"))
    np.testing.assert_array_equal(mixed, some.predictor.predict(TEXTS[:3]).answers)
    assert np.abs(mixed - alone).max() > 0.01

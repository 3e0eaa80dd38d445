"""What each system of a report is fitted to."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from making.tiny_run import LABELS, TEXTS, make_run, make_student

from retrikt_ray.index.mixture import Mixture
from retrikt_ray.report import systems
from retrikt_ray.report.systems import BY_NAME, SYSTEMS, Material, part_of_store
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.student.fit import DistillConfig, Rows
from retrikt_ray.task.card import Task

TASK = Task("tiny", "classification", tuple(LABELS), tuple(LABELS), "{label}: ", False, "accuracy")


def material(folder: Path) -> Any:
    """Of a store whose rows 0 and 2 have a true label. Made by hand: no teacher, no training."""
    sure = torch.tensor([0.9] * 6 + [0.1] * 6)
    rows = Rows([(t, None) for t in TEXTS], torch.stack([1 - sure, sure], 1), None, torch.full((12,), float("nan")))
    Folder.at(folder).write_json("mixture.json", asdict(Mixture(0.5, 0.3, 0.2, 4, 0.1, 4, 1.0)))
    return SimpleNamespace(
        rows=rows, labelled=[0, 2], distill=DistillConfig(), task=TASK, seed=3, threads=1, inputs={"index": Folder.at(folder)}
    )


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[DistillConfig, list[int]]]:
    """What students were trained with: config, and rows of the store."""
    calls: list[tuple[DistillConfig, list[int]]] = []

    def trained(_: Any, config: DistillConfig, index: list[int]) -> Any:
        calls.append((config, index))
        return make_student(False, 2, 0)

    monkeypatch.setattr(systems, "trained", trained)
    return calls


def test_every_system_is_named_once_and_retrikt_is_first() -> None:
    assert SYSTEMS[0].name == "retrikt" and len(BY_NAME) == len(SYSTEMS)
    assert [s.name for s in SYSTEMS if not s.baseline] == ["retrikt", "student_kd_store"]
    assert all(s.title and s.description for s in SYSTEMS)


def test_students_of_the_labels_alone(asked: list[Any], tmp_path: Path) -> None:
    some = material(tmp_path)
    BY_NAME["student_kd_labels"].fit(some)
    BY_NAME["student_labels"].fit(some)
    (kd, first), (labels, second) = asked
    assert first == second == [0, 2]  # none of the generated rows
    assert kd == some.distill
    assert (labels.kd, labels.relation, labels.retrieval, labels.labels) == (0, 0, 0, 1)  # and no word of the teacher


def test_a_part_of_the_store_keeps_the_tasks_rows(asked: list[Any], tmp_path: Path) -> None:
    system, rows = part_of_store(material(tmp_path), 0.5)
    ((config, index),) = asked
    assert rows == len(index) == 2 + 5 and {0, 2} <= set(index) and len(set(index)) == 7
    assert config == DistillConfig()
    answers = system.answer([("a fine film", None), ("dull", None)])
    np.testing.assert_allclose(answers.sum(1), 1, atol=1e-6)
    part_of_store(material(tmp_path), 0.5)
    assert asked[1][1] == index  # the same draw


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

"""Fitting a student: what its loss is made of, and which weights it keeps."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from making.tiny_run import TEXTS, make_run, make_student
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from retrikt_ray.runtime.training import Solo
from retrikt_ray.student import fit as fitting
from retrikt_ray.student import losses
from retrikt_ray.student.fit import DistillConfig, distillation, fit, unseen_loss
from retrikt_ray.student.model import Student
from retrikt_ray.student.rows import Batches, Rows, StoreRows, load_rows
from retrikt_ray.task.texts import Text

ALL: list[Text] = [(text, None) for text in TEXTS]
INDEX = [0, 3, 6, 7, 11]
NOTHING = {"kd": 0.0, "relation": 0.0, "retrieval": 0.0, "labels": 0.0, "token_dropout": 0.0}


def rows(truth: bool = True) -> Rows:
    """The texts of the tiny run: six positive ones, of which the teacher is rather sure, then six negative ones; every third has no true label."""
    sure = torch.tensor([0.9 - 0.05 * i for i in range(6)] + [0.1 + 0.05 * i for i in range(6)])
    known = torch.tensor([float(i < 6) if truth and i % 3 else math.nan for i in range(12)])
    embeddings = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
    return Rows(ALL, torch.stack([1 - sure, sure], 1), embeddings, known)


def loss_of(student: Student, some: Rows, index: list[int], **keys: float) -> float:
    alone = Solo(torch.optim.SGD(student.model.parameters(), 0.1), 1, 0)
    loss, _ = distillation(student, some, DistillConfig(**(NOTHING | keys)), alone, lambda _: [len(index)])(0, index)
    return loss.item()


def test_the_loss_is_the_weighted_sum_of_its_parts() -> None:
    student, some = make_student(False, 2, 0), rows()
    logits, vectors = student.model(**student.tensors([ALL[i] for i in INDEX]))
    teacher, truth = some.teacher[INDEX], some.truth[INDEX]
    known = ~torch.isnan(truth)
    assert known.tolist() == [False, False, False, True, True]
    assert some.embeddings is not None
    parts = {
        "kd": losses.kd(logits, teacher),
        "relation": losses.relation(vectors, some.embeddings[INDEX], 0.05),
        "retrieval": losses.retrieval(vectors, teacher, 0.05),
        "labels": 2 / 5 * cross_entropy(logits[known], truth[known].long()),  # a mean over all rows, of which two have a label
    }
    for name, part in parts.items():
        assert part > 1e-3
        assert loss_of(student, some, INDEX, **{name: 2.0}) == pytest.approx(2 * part.item(), rel=1e-5)
    weights = {"kd": 1.0, "relation": 0.3, "retrieval": 1.0, "labels": 0.5}
    whole = sum(weights[name] * part.item() for name, part in parts.items())
    assert loss_of(student, some, INDEX, **weights) == pytest.approx(whole, rel=1e-5)


def test_parts_that_need_others_or_labels_are_left_out_without_them() -> None:
    student = make_student(False, 2, 0)
    every = {"kd": 1.0, "relation": 1.0, "retrieval": 1.0, "labels": 1.0}
    for some, index in ((rows(truth=False), [4]), (rows(), [0])):
        assert loss_of(student, some, index, **every) == pytest.approx(loss_of(student, some, index, kd=1.0), rel=1e-6)


def test_regression_is_standardised() -> None:
    student = make_student(False, 1, 0)
    student.model.shift.fill_(2.0)
    student.model.scale.fill_(4.0)
    some = Rows(ALL[:2], torch.tensor([[2.0], [6.0]]), None, torch.tensor([math.nan, 10.0]))
    logits, _ = student.model(**student.tensors(ALL[:2]))
    kd = ((logits[:, 0] - torch.tensor([0.0, 1.0])) ** 2).mean().item()
    assert loss_of(student, some, [0, 1], kd=1.0) == pytest.approx(kd, rel=1e-5)
    labels = 0.5 * ((logits[1, 0] - 2.0) ** 2).item()
    assert loss_of(student, some, [0, 1], labels=1.0) == pytest.approx(labels, rel=1e-5)


def test_token_dropout_hides_tokens_in_training() -> None:
    student, some = make_student(False, 2, 0), rows()
    found = []
    for dropout in (0.0, 0.0, 0.5, 0.5):
        torch.manual_seed(len(found))
        found.append(loss_of(student, some, INDEX, kd=1.0, token_dropout=dropout))
    assert found[0] == found[1] and len({*found}) == 3
    assert student.model.training  # so that a transformer drops out, too


def test_the_loss_on_unseen_rows() -> None:
    """The student's own, to the soft labels: -(0.25 log p0 + 0.75 log p1); in regression the squared error of values."""
    student = make_student(False, 2, 0)
    probs = student.encode(ALL[:2])[0].double().numpy()
    some = Rows(ALL[:2], torch.tensor([[0.25, 0.75], [1.0, 0.0]]), None, torch.tensor([math.nan, 1.0]))
    want = -(0.25 * math.log(probs[0, 0]) + 0.75 * math.log(probs[0, 1]) + math.log(probs[1, 0])) / 2
    assert unseen_loss(student, some) == pytest.approx(want, rel=1e-5)
    student = make_student(False, 1, 0)
    value = student.encode(ALL[:1])[0].item()
    assert unseen_loss(student, Rows(ALL[:1], torch.tensor([[value + 3]]), None, torch.zeros(1))) == pytest.approx(9, rel=1e-4)


def test_the_best_weights_on_unseen_rows_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """They say the opposite of the store, so the first look is the best one, and every further step makes it worse."""
    monkeypatch.setattr(fitting, "MIN_STEPS", 48)
    student, some = make_student(False, 2, 0), rows()
    unseen = Rows(ALL, torch.eye(2)[[0] * 6 + [1] * 6], None, torch.full((12,), math.nan))
    looks: list[float] = []
    config = DistillConfig(batch=4, epochs=1, learning_rate=0.05)
    session = fit(student, some, unseen, config, 0, lambda o, _, total: Watching(o, total, 0, student, unseen, looks))
    assert session.total == 48 and len(looks) == 16  # never fewer steps
    assert min(looks) == looks[0] < looks[-1] - 0.1
    assert unseen_loss(student, unseen) == pytest.approx(looks[0], rel=1e-6)
    assert not student.model.training


class Watching(Solo):
    """Writes down the loss on unseen rows where `fit` looks: every sixteenth of the way."""

    def __init__(self, optimizer: torch.optim.Optimizer, total: int, seed: int, student: Student, unseen: Rows, looks: list[float]) -> None:
        super().__init__(optimizer, total, seed)
        self.student, self.unseen, self.looks = student, unseen, looks

    def done(self, step: int, note: str = "") -> None:
        if step % (self.total // 16) == 0:
            self.looks.append(unseen_loss(self.student, self.unseen))


def test_a_store_that_is_read_as_the_training_goes_gives_the_same_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the same rows in memory in the same batches: what differs is where they lie."""
    monkeypatch.setattr(fitting, "MIN_STEPS", 24)
    store = make_run(tmp_path / "run") / "store"
    answers, groups = [], [np.arange(7), np.arange(7, 12)]  # the parts of the tiny run
    for some in (load_rows(store), StoreRows(store, np.arange(12))):
        student = make_student(False, 2, 0)
        monkeypatch.setattr(type(some), "batches", lambda _, batch, epochs, seed: Batches(groups, batch, epochs, seed))
        fit(student, some, load_rows(store), DistillConfig(batch=4, epochs=1), 0, lambda o, _, total: Solo(o, total, 0))
        answers.append(student.encode(ALL)[0])
    assert torch.equal(*answers)


def test_the_same_seed_gives_the_same_student_and_another_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "MIN_STEPS", 48)
    students = []
    for seed in (0, 0, 1):
        student, some = make_student(False, 2, 0), rows()
        config = DistillConfig(batch=4, epochs=1, learning_rate=0.05)
        fit(student, some, some, config, seed, lambda o, _, total, seed=seed: Solo(o, total, seed))
        students.append(student.encode(ALL)[0])
    assert torch.equal(students[0], students[1]) and not torch.equal(students[0], students[2])
    same = students[0].argmax(1) == some.teacher.argmax(1)
    assert same.float().mean() >= 0.75  # it has learnt what the teacher says, but for what a bag of words cannot: "never dull"


def test_any_number_of_workers_learns_what_one_does(tmp_path: Path) -> None:
    """Relation and retrieval are losses of the whole batch, though a worker of four sees one to three of its rows, or none."""
    script = Path(__file__).resolve().parents[1] / "making" / "distil_workers.py"
    subprocess.run([sys.executable, str(script), str(tmp_path), "1", "2", "4"], check=True, timeout=120)
    for deal in ("steps", "groups"):
        one, two, four, plain = (load_file(tmp_path / f"{deal}-{name}.safetensors") for name in ("1", "2", "4", "plain"))
        for name, weights in one.items():
            assert_close(two[name], weights, rtol=1e-4, atol=1e-6)
            assert_close(four[name], weights, rtol=1e-4, atol=1e-6)
        assert max((plain[name] - one[name]).abs().max().item() for name in one) > 1e-3  # without the two losses: far away

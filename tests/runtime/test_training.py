"""Batches, rates, seeds and optimizer states: what makes a resumed run end as an undisturbed one. (Workers need Ray: test_pipeline.)"""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from retrikt_ray.runtime import training
from retrikt_ray.runtime.training import Solo, epoch_batches, load_optimizer_state, optimizer_state, seed_everything, warmup_linear


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 4), st.integers(0, 9))
def test_every_epoch_visits_every_row_once(count: int, batch: int, epochs: int, seed: int) -> None:
    steps = list(epoch_batches(count, batch, epochs, seed))
    per_epoch = -(-count // batch)
    assert len(steps) == per_epoch * epochs
    for epoch in range(epochs):
        part = steps[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(i for rows in part for i in rows) == list(range(count))
        assert [len(rows) for rows in part[:-1]] == [batch] * (per_epoch - 1)


def test_orders_depend_on_seed_and_epoch() -> None:
    one = list(epoch_batches(50, 50, 2, seed=1))
    assert one[0] != one[1] and one[0] != list(range(50))
    assert list(epoch_batches(50, 50, 2, seed=1)) == one
    assert list(epoch_batches(50, 50, 2, seed=2))[0] != one[0]
    assert next(epoch_batches(50, 50, 9, seed=1)) == one[0]  # not on how many epochs there will be


def test_warmup_linear_by_hand() -> None:
    # 20 steps: up over 2, then (20 - step) / 18.
    assert [warmup_linear(s, 20) for s in (0, 1, 2, 11, 19, 20, 25)] == pytest.approx([0.5, 1.0, 1.0, 0.5, 1 / 18, 0.0, 0.0], abs=1e-12)
    assert [warmup_linear(s, 4, warmup=0.5) for s in range(4)] == pytest.approx([0.5, 1.0, 1.0, 0.5], abs=1e-12)
    assert [warmup_linear(s, 3) for s in range(3)] == pytest.approx([1.0, 1.0, 0.5], abs=1e-12)  # at least one step up
    assert warmup_linear(0, 1) == 1.0


def test_seed_everything_is_repeatable() -> None:
    def draw(*key: object) -> tuple[float, float, float]:
        seed_everything(*key)
        return random.random(), float(np.random.rand()), torch.rand(()).item()

    first = draw(3, "student", 1)
    assert draw(3, "student", 1) == first
    for other in ((3, "student", 2), (4, "student", 1), (31, "student"), (3, "student")):
        assert all(a != b for a, b in zip(draw(*other), first, strict=True))
    assert draw(3, 11) != draw(31, 1)


def model() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    groups = [{"params": net[0].parameters(), "lr": 0.1}, {"params": net[2].parameters(), "lr": 0.02}]
    return net, torch.optim.AdamW(groups, weight_decay=0.01)


def step(net: torch.nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    seed_everything(7, number)
    net(torch.randn(5, 3)).pow(2).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_an_optimizer_that_is_put_back_makes_the_identical_next_step() -> None:
    net, optimizer = model()
    for i in range(3):
        step(net, optimizer, i)
    weights = {k: v.clone() for k, v in net.state_dict().items()}
    flat = optimizer_state(optimizer)
    assert sorted(flat) == [f"{i}.{name}" for i in range(4) for name in ("exp_avg", "exp_avg_sq", "step")]
    assert all(isinstance(v, torch.Tensor) for v in flat.values()) and flat["2.step"].item() == 3
    kept = {k: v.clone() for k, v in flat.items()}
    step(net, optimizer, 3)
    assert all(torch.equal(flat[k], kept[k]) for k in flat)  # a copy, not a view that training moves on

    again, fresh = model()
    again.load_state_dict(weights)
    load_optimizer_state(fresh, flat)
    step(again, fresh, 3)
    for name, tensor in net.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name

    without, bare = model()
    without.load_state_dict(weights)
    step(without, bare, 3)
    assert not torch.equal(without.state_dict()["0.weight"], net.state_dict()["0.weight"])  # the state does matter


def test_solo_sets_rates_clips_and_updates() -> None:
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    other = torch.nn.Parameter(torch.tensor([0.0]))
    optimizer = torch.optim.SGD([{"params": [weight], "lr": 1.0}, {"params": [other], "lr": 0.1}])
    solo = Solo(optimizer, total=20, seed=0)
    assert solo.share([4, 5, 6]) == [4, 5, 6] and solo.start == 0
    solo.set_rate(0)
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, pytest.approx(0.05)]
    solo.set_rate(11)
    solo.set_rate(1)  # from the base rates, whatever was set before
    assert [g["lr"] for g in optimizer.param_groups] == [1.0, 0.1]
    (0.5 * (weight**2).sum()).backward()  # gradient (3, 4) of norm 5, clipped to norm 1
    solo.update()
    assert_close(weight.detach(), torch.tensor([3.0 - 0.6, 4.0 - 0.8]), rtol=0, atol=1e-5)
    assert weight.grad is None
    solo.done(1)


def test_workers_share_a_batch() -> None:
    class Second(Solo):
        rank, world = 1, 3

    assert Second(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), 1, 0).share([10, 11, 12, 13, 14]) == [11, 14]


class Recorded(Solo):
    """Begins at `start`, has a rank, and writes down what it is asked."""

    def __init__(self, parameter: torch.nn.Parameter, total: int, start: int = 0, rank: int = 0, world: int = 1) -> None:
        super().__init__(torch.optim.SGD([parameter], lr=0.1), total, seed=7)
        self.start, self.rank, self.world = start, rank, world
        self.weights: list[float] = []
        self.finished: list[tuple[int, str]] = []

    def update(self, weight: float = 1.0, clip: float = 1.0) -> None:
        self.weights.append(weight)
        self.world, world = 1, self.world  # there is nobody to reduce with
        super().update(weight, clip)
        self.world = world

    def done(self, step: int, note: str = "") -> None:
        self.finished.append((step, note))


def trained(start: int, value: float, noise: int) -> tuple[float, Recorded]:
    """A run of five batches whose loss is noisy, from a step and a value on; `noise`: whatever random state went before."""
    parameter = torch.nn.Parameter(torch.tensor([value]))
    session = Recorded(parameter, 5, start)
    torch.manual_seed(noise)

    def loss_of(step: int, rows: list[int]) -> tuple[torch.Tensor, str]:
        return (parameter * torch.rand(1) * (step + len(rows))).sum(), f"step {step}"

    training.run(session, training.Steps([[0, 1], [2, 3], [4, 5], [6, 7], [8]]), loss_of)
    return parameter.item(), session


def test_run_goes_on_where_it_was_to_the_same_weights() -> None:
    whole, session = trained(0, 1.0, noise=1)
    assert session.finished == [(i + 1, f"step {i}") for i in range(5)]
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    values: list[float] = []
    first = Recorded(parameter, 5)
    training.run(
        first,
        training.Steps([[0, 1], [2, 3], [4, 5], [6, 7], [8]]),
        lambda step, rows: ((parameter * torch.rand(1) * (step + len(rows))).sum(), ""),
        after=lambda steps: values.append(parameter.item()),
    )
    assert values[-1] == whole and len(values) == 5
    resumed, rest = trained(3, values[2], noise=2)
    assert resumed == whole and [step for step, _ in rest.finished] == [4, 5]


def test_run_weighs_a_workers_share_and_asks_nothing_of_one_without_rows() -> None:
    parameter, asked = torch.nn.Parameter(torch.zeros(1)), []

    def loss_of(step: int, rows: list[int]) -> tuple[torch.Tensor, str]:
        asked.append(rows)
        return parameter.sum(), ""

    session = Recorded(parameter, 2, rank=1, world=3)
    training.run(session, training.Steps([[10, 11, 12, 13], [14]]), loss_of)
    assert asked == [[11]] and session.weights == [1 / 4, 0.0]  # of four rows one is this worker's; of one row none
    assert [step for step, _ in session.finished] == [1, 2]


def test_run_draws_other_noise_on_other_workers() -> None:
    drawn = []
    for rank in (0, 1):
        parameter = torch.nn.Parameter(torch.zeros(1))

        def loss_of(step: int, rows: list[int], parameter: torch.nn.Parameter = parameter) -> tuple[torch.Tensor, str]:
            drawn.append(torch.rand(1).item())
            return parameter.sum(), ""

        training.run(Recorded(parameter, 1, rank=rank, world=2), training.Steps([[0, 1]]), loss_of)
    assert drawn[0] != drawn[1]


def test_checkpoints_come_by_steps_and_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """An eighth of the steps here is ten; step 13 takes six minutes."""
    saved: list[int] = []
    session = object.__new__(training.Session)
    session.rank, session.world, session.total, session.every, session.saved, session.asked = 1, 1, 80, 10, 0.0, 0.0
    session.leaving = set()
    monkeypatch.setattr(session, "save", saved.append)
    monkeypatch.setattr(session, "announced", lambda: False)
    clock = [0.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: clock[0])
    for step in range(1, 26):
        clock[0] += 360 if step == 13 else 1
        session.done(step)
    assert saved == [10, 13, 20]


def test_a_training_saves_when_a_node_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each node, and Ray is not asked at every step."""
    now, going, asked = [100.0], [], []
    session: Any = object.__new__(training.Session)
    session.world, session.saved, session.asked, session.leaving = 1, 100.0, 100.0, set()

    def info() -> Any:
        asked.append(now[0])
        return SimpleNamespace(preempted_node_ids=list(going)) if going else None

    monkeypatch.setattr("ray.train.get_preemption_info", info)
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def after(seconds: float) -> bool:
        now[0] += seconds
        return bool(session.due())

    assert not after(1.0) and asked == []
    assert not after(1.5) and asked == [102.5]
    going.append("a")
    assert not after(1.0)
    assert after(1.5) and not after(2.5)
    going.append("b")
    assert after(2.5) and not after(2.5)
    assert after(training.LEAVING_S)  # until it is gone

"""Losses of distillation: expected values worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from retrikt_ray.student import losses

LOG2, LOG3 = math.log(2), math.log(3)


def t(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_soft_cross_entropy_is_a_kl() -> None:
    # Row 0: 0.5 log(0.5 / 0.25) + 0.5 log(0.5 / 0.75) = 0.5 log(4/3). Row 1, a one-hot target: -log 0.75.
    got = losses.soft_cross_entropy(torch.log(t([0.25, 0.75], [0.25, 0.75])), t([0.5, 0.5], [0.0, 1.0]))
    assert got.item() == pytest.approx((0.5 * math.log(4 / 3) - math.log(0.75)) / 2, abs=1e-12)
    target = t([0.2, 0.3, 0.5])
    assert losses.soft_cross_entropy(torch.log(target), target).item() == pytest.approx(0.0, abs=1e-12)


def test_kd_of_classes() -> None:
    # Logits (0, log 3) are probabilities (1/4, 3/4): KL((1/2, 1/2) || (1/4, 3/4)) = 0.5 log(4/3).
    logits = t([5.0, 5.0 + LOG3]).requires_grad_()
    loss = losses.kd(logits, t([0.5, 0.5]))
    assert loss.item() == pytest.approx(0.5 * math.log(4 / 3), abs=1e-12)
    loss.backward()
    assert_close(logits.grad, t([-0.25, 0.25]), rtol=0, atol=1e-12)  # p - target


def test_kd_of_values_is_the_squared_error() -> None:
    assert losses.kd(t([1.0], [2.0]), t([3.0], [2.5])).item() == pytest.approx((4 + 0.25) / 2, abs=1e-12)


def test_similarities() -> None:
    got = losses.similarities(t([3.0, 4.0], [2.0, 0.0], [0.0, -9.0]))
    inf = math.inf
    assert_close(got, t([-inf, 0.6, -0.8], [0.6, -inf, 0.0], [-0.8, 0.0, -inf]), rtol=0, atol=1e-12)


# Unit vectors at 0, 90 and 180 degrees: similarities 0 and -1 from the ends, 0 and 0 from the middle.
FAN = t([1.0, 0.0], [0.0, 1.0], [-1.0, 0.0])
# All three at 120 degrees from each other: every row sees the other two alike.
EVEN = t([1.0, 0.0], [-0.5, math.sqrt(3) / 2], [-0.5, -math.sqrt(3) / 2])


def test_relation() -> None:
    # tau = 1 / log 3. FAN's ends: softmax of (0, -log 3) is (3/4, 1/4); its middle (1/2, 1/2). EVEN is (1/2, 1/2) everywhere.
    # Teacher EVEN, student FAN: the ends cost KL((1/2, 1/2) || (3/4, 1/4)) = 0.5 log(4/3), the middle 0; mean over 3 rows.
    assert losses.relation(FAN, EVEN, tau=1 / LOG3).item() == pytest.approx(2 / 3 * 0.5 * math.log(4 / 3), abs=1e-9)
    # The other way round: KL((3/4, 1/4) || (1/2, 1/2)) = log 2 + 3/4 log(3/4) + 1/4 log(1/4).
    other = LOG2 + 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    assert losses.relation(EVEN, FAN, tau=1 / LOG3).item() == pytest.approx(2 / 3 * other, abs=1e-9)


def test_relation_is_least_at_the_teachers_own_geometry_and_has_finite_gradients() -> None:
    turned = (FAN @ t([0.6, 0.8], [-0.8, 0.6]) * 7).requires_grad_()  # turning and scaling leave cosines alone
    loss = losses.relation(turned, FAN, tau=0.05)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-9)
    assert_close(turned.grad, torch.zeros_like(turned), rtol=0, atol=1e-9)


def test_retrieval_leaves_the_row_itself_out() -> None:
    teacher = t([1.0, 0.0], [0.0, 1.0], [0.5, 0.5])
    # Votes with tau = 1 / log 3: row 0: 3/4 of row 1 + 1/4 of row 2 = (1/8, 7/8); row 1: half of 0, half of 2 = (3/4, 1/4);
    # row 2: 1/4 of row 0 + 3/4 of row 1 = (1/4, 3/4). KL: log 8, log 4, and 0.5 log(0.5 / 0.25) + 0.5 log(0.5 / 0.75) = 0.5 log(4/3).
    want = (3 * LOG2 + 2 * LOG2 + 0.5 * math.log(4 / 3)) / 3
    assert losses.retrieval(FAN, teacher, tau=1 / LOG3).item() == pytest.approx(want, abs=1e-9)


def test_retrieval_of_values_is_the_squared_error() -> None:
    # Votes: 3/4 * 2 + 1/4 * 6 = 3; (0 + 6) / 2 = 3; 1/4 * 0 + 3/4 * 2 = 1.5. Errors 3, 1, -4.5.
    assert losses.retrieval(FAN, t([0.0], [2.0], [6.0]), tau=1 / LOG3).item() == pytest.approx((9 + 1 + 20.25) / 3, abs=1e-9)


def test_retrieval_floors_a_vote_without_support() -> None:
    # Two rows vote for each other with certainty and are certain of the opposite: -log of the floor 1e-6.
    assert losses.retrieval(t([1.0, 0.0], [0.0, 1.0]), t([1.0, 0.0], [0.0, 1.0]), tau=1.0).item() == pytest.approx(
        -math.log(1e-6), abs=1e-9
    )


def test_gradient_pulls_a_row_to_neighbours_of_its_label() -> None:
    vectors = t([1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]).requires_grad_()
    losses.retrieval(vectors, t([1.0, 0.0], [0.0, 1.0], [1.0, 0.0]), tau=0.5).backward()
    assert vectors.grad.isfinite().all()
    assert vectors.grad[0, 1] > 0  # row 0 moves away from row 1, which has the other label

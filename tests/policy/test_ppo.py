"""PPO's maths: every expected value is worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from retrikt_ray.policy import ppo


def t(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_masked_mean_leaves_padding_out() -> None:
    assert ppo.masked_mean(t([1, 2, 99], [3, 99, 99]), t([1, 1, 0], [1, 0, 0])).item() == pytest.approx(2.0)  # (1 + 2 + 3) / 3
    assert ppo.masked_mean(t([5, 5]), t([0, 0])).item() == 0.0  # nothing to average


def test_whiten() -> None:
    # Entries 1, 3, 5, 7: mean 4, variance (9 + 1 + 1 + 9) / 4 = 5. The masked 100 counts for nothing and becomes 0.
    x = ppo.whiten(t([1, 3, 100], [5, 7, 100]), t([1, 1, 0], [1, 1, 0]))
    r = 1 / math.sqrt(5)
    assert_close(x, t([-3 * r, -r, 0], [r, 3 * r, 0]), rtol=0, atol=1e-8)


def test_token_rewards_put_the_score_on_the_last_token() -> None:
    log_probs, reference = t([-1.0, -2.0, -3.0], [-1.0, -1.0, -7.0]), t([-1.5, -1.0, -3.0], [-1.0, -3.0, -9.0])
    got = ppo.token_rewards(torch.tensor([2.0, -1.0], dtype=torch.float64), log_probs, reference, t([1, 1, 1], [1, 1, 0]), kl_weight=0.1)
    # Row 0: -0.1 (0.5, -1, 0) = (-0.05, 0.1, 0), + 2 on token 2. Row 1: -0.1 (0, 2, masked) = (0, -0.2, 0), - 1 on token 1.
    assert_close(got, t([-0.05, 0.1, 2.0], [0.0, -1.2, 0.0]), rtol=0, atol=1e-12)


def test_gae() -> None:
    rewards, values, mask = t([1, 0, 2], [1, 3, 40]), t([0.5, 1, 1.5], [2, 1, 50]), t([1, 1, 1], [1, 1, 0])
    advantages, returns = ppo.gae(rewards, values, mask, gamma=0.9, lam=0.5)
    # gamma lam = 0.45. Row 0: delta_2 = 2 - 1.5 = 0.5; delta_1 = 0.9 * 1.5 - 1 = 0.35; delta_0 = 1 + 0.9 * 1 - 0.5 = 1.4.
    # A_2 = 0.5; A_1 = 0.35 + 0.45 * 0.5 = 0.575; A_0 = 1.4 + 0.45 * 0.575 = 1.65875.
    # Row 1 has ended after token 1, so V_2 = 0: delta_1 = 3 - 1 = 2; delta_0 = 1 + 0.9 * 1 - 2 = -0.1; A_0 = -0.1 + 0.45 * 2 = 0.8.
    assert_close(advantages, t([1.65875, 0.575, 0.5], [0.8, 2.0, 0.0]), rtol=0, atol=1e-12)
    assert_close(returns, t([2.15875, 1.575, 2.0], [2.8, 3.0, 0.0]), rtol=0, atol=1e-12)


def test_gae_limits() -> None:
    rewards, values, mask = t([1, 2, 4]), t([3, 5, 7]), t([1, 1, 1])
    # lam = 1: the return is the discounted sum of rewards, whatever the critic says: 4; 2 + 0.5 * 4 = 4; 1 + 0.5 * 4 = 3.
    assert_close(ppo.gae(rewards, values, mask, gamma=0.5, lam=1.0)[1], t([3, 4, 4]), rtol=0, atol=1e-12)
    # lam = 0: one-step errors: 1 + 5 - 3, 2 + 7 - 5, 4 - 7.
    assert_close(ppo.gae(rewards, values, mask, gamma=1.0, lam=0.0)[0], t([3, 4, -3]), rtol=0, atol=1e-12)


def test_leave_one_out() -> None:
    # Condition 0 has 1, 2, 6: less the means of the others, 4, 3.5, 1.5. Condition 1 has 10 alone: less the mean of all others, 3.
    got = ppo.leave_one_out(torch.tensor([1.0, 10.0, 2.0, 6.0]), torch.tensor([0, 1, 0, 0]))
    assert_close(got, torch.tensor([-3.0, 7.0, -1.5, 4.5]), rtol=0, atol=1e-6)


def test_means_are_taken_over_all_workers() -> None:
    # Another worker has the entries 5, 7: sums 12 and 2 of them, squares about their common mean 4: 1 + 9.
    others = iter([t([12, 2])[0], t([10, 2])[0]])
    x = ppo.whiten(t([1, 3, 100]), t([1, 1, 0]), lambda own: own + next(others))
    assert_close(x, t([-3 / math.sqrt(5), -1 / math.sqrt(5), 0]), rtol=0, atol=1e-8)


def test_policy_loss_clips_only_what_would_gain() -> None:
    ratios, advantages = t([1.5, 0.5, 1.5, 0.5, 1.1]), t([1, 1, -1, -1, 2])
    losses = ppo.policy_loss(torch.log(ratios) - 3.0, torch.full_like(ratios, -3.0), advantages, clip=0.2)
    # -min(rho A, clip(rho) A): -1.2 (clipped from 1.5), -0.5, 1.5, 0.8 (clipped from 0.5), -2.2.
    assert_close(losses, t([-1.2, -0.5, 1.5, 0.8, -2.2]), rtol=0, atol=1e-12)


def test_policy_gradient_is_zero_where_clipped() -> None:
    log_probs = torch.log(t([1.5, 1.1])).requires_grad_()
    ppo.policy_loss(log_probs, t([0, 0]), t([1, 1]), clip=0.2).sum().backward()
    assert_close(log_probs.grad, t([0.0, -1.1]), rtol=0, atol=1e-12)  # d(-rho) / d log rho = -1.1


def test_value_loss_takes_the_worse_of_plain_and_clipped() -> None:
    values, old, returns = t([2.0, 0.1, 3.0, -2.0]), t([1.0, 0.0, 1.0, 1.0]), t([2.0, 1.0, 0.0, -2.0])
    # Plain: 0, 0.81, 9, 0. Clipped values 1.5, 0.1, 1.5, 0.5: 0.25, 0.81, 2.25, 6.25. Half the maxima.
    assert_close(ppo.value_loss(values, old, returns, clip=0.5), t([0.125, 0.405, 4.5, 3.125]), rtol=0, atol=1e-12)


def test_approx_kl_is_from_the_first_to_the_second() -> None:
    # q = 2 and q = 1/2: (2 - 1) - log 2 and (0.5 - 1) + log 2.
    log_probs, other = t([-1, -1]), t([-1 + math.log(2), -1 - math.log(2)])
    assert_close(ppo.approx_kl(log_probs, other), t([1 - math.log(2), math.log(2) - 0.5]), rtol=0, atol=1e-12)
    # Exact over a whole distribution: pi = (3/4, 1/4), other = (1/4, 3/4); KL(pi || other) = 0.5 log 3, and the other way round the same estimate is not.
    pi, rho = torch.tensor([0.75, 0.25], dtype=torch.float64), torch.tensor([0.3, 0.7], dtype=torch.float64)
    exact = (pi * (pi / rho).log()).sum()
    assert (pi * ppo.approx_kl(pi.log(), rho.log())).sum().item() == pytest.approx(exact.item(), abs=1e-12)
    assert (pi * ppo.approx_kl(rho.log(), pi.log())).sum().item() != pytest.approx(exact.item(), abs=1e-2)


def test_text_kl_is_a_sum_over_tokens() -> None:
    got = ppo.text_kl(t([-1, -1, -1], [-2, -2, -9]), t([-2, -3, -1], [-1, -4, 0]), t([1, 1, 1], [1, 1, 0]))
    assert got.tolist() == [3.0, 1.0]  # (1 + 2 + 0) and (-1 + 2)


@pytest.mark.parametrize(("kl", "factor"), [(6.0, 1.0), (6.6, 1.1), (5.4, 0.9), (60.0, 1.2), (0.0, 0.8)])
def test_adapt_kl_weight(kl: float, factor: float) -> None:
    assert ppo.adapt_kl_weight(0.5, kl, target=6.0) == pytest.approx(0.5 * factor, abs=1e-12)

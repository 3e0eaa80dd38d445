"""Policy gradients on token sequences: the maths, without Ray and without a model.

Notation: B texts of at most T tokens, right-padded; `mask` (B, T) is 1 on tokens that were generated, <eos> included. The action at t is
the t-th token. `total` sums a tensor over the workers, each of which has some of the texts. Sources: PPO, Schulman et al. 2017 (arXiv 1707.06347);
GAE, Schulman et al. 2016 (arXiv 1506.02438); per-token KL reward and adaptive coefficient, Ziegler et al. 2019 (arXiv 1909.08593, section 2.2);
leave-one-out baseline (RLOO), Ahmadian et al. 2024 (arXiv 2402.14740, section 3.2); low-variance KL estimator, Schulman 2020 (k3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Rollout(NamedTuple):
    """Generated texts and what the old policy, the reference and the critic said of them."""

    conditions: Tensor  # (B,) condition of each text
    ids: Tensor  # (B, T)
    mask: Tensor  # (B, T)
    log_probs: Tensor  # (B, T) under the policy that generated them
    ref_log_probs: Tensor  # (B, T) under the SFT prompt
    values: Tensor  # (B, T) the critic's
    scores: Tensor  # (B,) reward of the whole text


Total = Callable[[Tensor], Tensor]


def alone(x: Tensor) -> Tensor:
    """The sum over one worker."""
    return x


def masked_mean(x: Tensor, mask: Tensor, total: Total = alone) -> Tensor:
    """Mean over the entries with mask 1. Shapes equal; scalar."""
    sums = total(torch.stack([(x * mask).sum(), mask.sum().to(x.dtype)]))
    return sums[0] / sums[1].clamp(min=1)


def whiten(x: Tensor, mask: Tensor, total: Total = alone) -> Tensor:
    """Zero mean and unit variance over the masked entries of all workers; zeros elsewhere."""
    mean = masked_mean(x, mask, total)
    variance = masked_mean((x - mean) ** 2, mask, total)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def leave_one_out(rewards: Tensor, conditions: Tensor) -> Tensor:
    """RLOO: each text's reward less the mean of the others of its condition, or, where there are none, of all others. (B,), (B,) -> (B,)

    Needs two texts at least; what a text got itself is in no baseline of its own, so that the gradient stays unbiased.
    """
    same = (conditions[:, None] == conditions[None]).to(rewards.dtype)
    same.fill_diagonal_(0)
    others = torch.ones_like(same).fill_diagonal_(0)
    peers = torch.where(same.sum(1, keepdim=True) > 0, same, others)
    return rewards - peers @ rewards / peers.sum(1)


def token_rewards(scores: Tensor, log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor, kl_weight: float) -> Tensor:
    """r_t = -kl_weight (log pi - log ref), plus the text's score on its last token. (B, T)"""
    rewards = -kl_weight * (log_probs - ref_log_probs) * mask
    last = mask.long().sum(1) - 1
    rewards[torch.arange(len(scores), device=scores.device), last] += scores
    return rewards


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages A_t = sum_l (gamma lam)^l delta_{t+l} with delta_t = r_t + gamma V_{t+1} - V_t, and returns A + V. (B, T) each.

    The value after the last token is 0: a text that is cut by the length limit has ended, too.
    """
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    following = torch.zeros_like(rewards[:, 0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = (delta + gamma * lam * running) * mask[:, t]
        advantages[:, t] = running
        following = values[:, t] * mask[:, t]
    return advantages, (advantages + values) * mask


def policy_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Clipped surrogate of each token: -min(rho A, clip(rho, 1 - clip, 1 + clip) A). (B, T)"""
    ratio = torch.exp(log_probs - old_log_probs)
    return torch.maximum(-ratio * advantages, -ratio.clamp(1 - clip, 1 + clip) * advantages)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """0.5 max((V - R)^2, (V_clipped - R)^2) of each token, V_clipped within `clip` of the old value. (B, T)"""
    near = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)


def approx_kl(log_probs: Tensor, other_log_probs: Tensor) -> Tensor:
    """KL(pi || other) at each token, from samples of pi: (q - 1) - log q with q = other / pi; never negative. (B, T)"""
    log_q = other_log_probs - log_probs
    return torch.expm1(log_q) - log_q


def text_kl(log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor) -> Tensor:
    """KL of each text in nats: sum_t (log pi - log ref). (B,)"""
    return ((log_probs - ref_log_probs) * mask).sum(1)


def adapt_kl_weight(weight: float, kl: float, target: float) -> float:
    """Proportional controller: weight (1 + clip(kl / target - 1, -0.2, 0.2)), after Ziegler et al. 2019, section 2.2."""
    return weight * (1.0 + max(-0.2, min(0.2, kl / target - 1.0)))

"""The parts of a PPO iteration: roll out, advantages, update, watch; and what a run remembers from one iteration to the next.

A held-out set of (condition, seed) pairs is generated from every few iterations: its mean reward chooses the best prompt, and its
distinct-2, KL, and share of ended texts tell a collapse.

Policy, reference and critic are one frozen base (`Agent`), so that PPO holds one model in memory where a usual PPO holds four.
Each part is a function of tensors and of a training session, which gives means over the workers and steps the optimizer.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from retrikt_ray.policy import ppo
from retrikt_ray.policy.reward_model import RewardModel, Rewards
from retrikt_ray.runtime import training
from retrikt_ray.task import words
from retrikt_ray.teacher import lm
from retrikt_ray.teacher.base import Base, pad_rows
from retrikt_ray.teacher.prefix import run_prefix, run_prefix_of
from retrikt_ray.teacher.sampling import Sampling


@dataclass(kw_only=True)
class History:
    """What a run remembers: kept in its checkpoints, and at the end, as curves.json, in its folder."""

    curve: list[dict[str, float]] = field(default_factory=list)  # figures of each iteration's roll out
    watch: list[dict[str, float]] = field(default_factory=list)  # figures of the held-out texts, the first of the supervised prompt
    best_step: int = 0  # iterations behind the best prompt
    collapse: str | None = None  # why the run ended early
    kl_weight: float  # of the next iteration
    reservoir: list[str] = field(default_factory=list)  # earlier texts, which novelty is measured against

    @staticmethod
    def from_json(value: dict[str, Any]) -> History:
        return History(**value)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def curves(self) -> dict[str, Any]:
        """All but the texts."""
        return {key: value for key, value in self.to_json().items() if key != "reservoir"}

    def add_watch(self, figures: dict[str, float], collapse: str | None) -> bool:
        """Take in figures of the held-out texts. Returns whether their prompt is the best so far, which that of a collapse never is."""
        best = collapse is None and figures["reward"] > max(earlier["reward"] for earlier in self.watch)
        if best:
            self.best_step = int(figures["step"])
        self.watch.append(figures)
        self.collapse = collapse
        return best


class Agent:
    """Policy, reference and critic: the frozen base behind two prompts, and a small head on its hidden states."""

    def __init__(self, base: Base, prompt: Tensor, prefixes: list[str], max_tokens: int, lines: int, seed: int) -> None:
        """prompt: (C, S, d), the supervised one, where the policy starts. prefixes: C readable starts of a text. max_tokens, lines: of a text."""
        self.base, self.prefixes, self.max_tokens, self.lines = base, prefixes, max_tokens, lines
        self.policy = nn.Parameter(prompt.clone())
        self.best = prompt.clone()  # the policy of the best step
        width = base.model.config.hidden_size
        training.seed_everything(seed, "value head")
        self.critic = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 64), nn.Tanh(), nn.Linear(64, 1)).to(base.device)
        with torch.no_grad():
            self.reference = run_prefix(base, prompt, prefixes)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, by name."""
        critic = {f"critic.{name}": tensor for name, tensor in self.critic.state_dict(keep_vars=True).items()}
        return {"policy": self.policy, "best": self.best} | critic

    def optimizer(self, learning_rate: float, value_learning_rate: float) -> torch.optim.Optimizer:
        groups = [{"params": [self.policy], "lr": learning_rate}, {"params": self.critic.parameters(), "lr": value_learning_rate}]
        return torch.optim.AdamW(groups, weight_decay=0.0)

    def values(self, hidden: Tensor) -> Tensor:
        """The critic's value of each token. hidden (B, T, d) -> (B, T)"""
        return self.critic(hidden).squeeze(-1)


class Generated(NamedTuple):
    """Texts of B rows, at most T tokens long, right-padded."""

    texts: list[str]
    conditions: Tensor  # (B,)
    ids: Tensor  # (B, T)
    mask: Tensor  # (B, T) 1 on tokens that were generated, <eos> included
    logits: Tensor  # (B, T, V) of the policy
    hidden: Tensor  # (B, T, d) the states that they come from
    log_probs: Tensor  # (B, T) under the policy
    ref_log_probs: Tensor  # (B, T) under the supervised prompt


@torch.no_grad()
def generate(agent: Agent, conditions: Tensor, seeds: list[int]) -> Generated:
    """A text of the policy for each condition (B,), each from a seed of its own."""
    prefix = run_prefix(agent.base, agent.policy, agent.prefixes)
    written = lm.sample(agent.base, prefix, conditions, seeds, agent.max_tokens, Sampling(), agent.lines)
    ids, mask = pad_rows(written, agent.base.eos, agent.base.device)
    logits, hidden = lm.score(agent.base, prefix, conditions, ids, mask)
    ref_logits, _ = lm.score(agent.base, agent.reference, conditions, ids, mask)
    log_probs, ref_log_probs = lm.log_probs_of(logits, ids), lm.log_probs_of(ref_logits, ids)
    return Generated(agent.base.decode(ids, mask), conditions, ids, mask, logits, hidden, log_probs, ref_log_probs)


def rollout_seed(seed: int, group: object, row: int) -> int:
    """A 64-bit seed for one text; group: the iteration, or "watch"."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{group}:{row}".encode()).digest()[:8], "big")


def roll_out(agent: Agent, reward_model: RewardModel, rows: list[int], step: int, seed: int) -> tuple[ppo.Rollout, Rewards]:
    """This worker's texts of an iteration, rewarded. A row has the same condition and seed whatever the number of workers."""
    conditions = torch.tensor([(row + step) % len(agent.prefixes) for row in rows], device=agent.base.device)
    generated = generate(agent, conditions, [rollout_seed(seed, step, row) for row in rows])
    judged = reward_model(generated.texts, conditions, generated.ids, generated.mask)
    reward_model.remember(generated.texts)
    with torch.no_grad():
        values = agent.values(generated.hidden) * generated.mask
    rollout = ppo.Rollout(
        conditions=conditions,
        ids=generated.ids,
        mask=generated.mask.float(),
        log_probs=generated.log_probs,
        ref_log_probs=generated.ref_log_probs,
        values=values,
        scores=torch.tensor(judged.total, dtype=torch.float32, device=agent.base.device),
    )
    return rollout, judged


def advantages_of(rollout: ppo.Rollout, session: training.Session, kl_weight: float, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Whitened advantages, and returns, (B, T) each. Scores are centred and scaled over the batch: the terms' sizes differ by task."""
    scores = (rollout.scores - session.mean(rollout.scores.mean())) / (session.mean(rollout.scores.std()) + 1e-6)
    token_rewards = ppo.token_rewards(scores, rollout.log_probs, rollout.ref_log_probs, rollout.mask, kl_weight)
    advantages, returns = ppo.gae(token_rewards, rollout.values, rollout.mask, gamma, lam)
    return ppo.whiten(advantages, rollout.mask), returns


def minibatches(count: int, size: int, epochs: int, session: training.Session, step: int) -> list[list[int]]:
    """Row numbers of each update of an iteration. size: rows over all workers, so that every worker makes the same number of updates."""
    own = max(1, size // session.world)
    seeds = [session.seed * 7919 + step * 31 + epoch for epoch in range(epochs)]
    return [rows for seed in seeds for rows in training.epoch_batches(count, own, 1, seed)]


def update(
    agent: Agent,
    session: training.Session,
    rollout: ppo.Rollout,
    advantages: Tensor,
    returns: Tensor,
    batches: list[list[int]],
    *,
    clip: float,
    stop_kl: float,
) -> int:
    """A clipped update for each batch of row numbers, as long as the policy is near the one that generated the texts. Returns the number made.

    The first batch on which it is further away than `stop_kl` nats a token ends them: clipped ratios no longer hold it back.
    """
    for made, rows in enumerate(batches):
        ids, mask = rollout.ids[rows], rollout.mask[rows]
        prefix, (conditions,) = run_prefix_of(agent.base, agent.policy, agent.prefixes, rollout.conditions[rows])
        logits, hidden = lm.score(agent.base, prefix, conditions, ids, mask.long())
        log_probs, old_log_probs = lm.log_probs_of(logits, ids), rollout.log_probs[rows]
        if session.mean(ppo.approx_kl(log_probs.detach(), old_log_probs, mask)).item() > stop_kl:
            return made
        surrogate, _ = ppo.policy_loss(log_probs, old_log_probs, advantages[rows], mask, clip)
        critic_loss = ppo.value_loss(agent.values(hidden.detach()), rollout.values[rows], returns[rows], mask, 5 * clip)
        (surrogate + 0.5 * critic_loss).backward()
        session.update(1 / session.world)
    return len(batches)


def curve_point(session: training.Session, step: int, judged: Rewards, kl: float) -> dict[str, float]:
    """Figures of iteration `step`, over all workers."""
    figures = {"step": step, "reward": float(np.mean(judged.total)), "kl": kl} | {k: float(v.mean()) for k, v in judged.terms.items()}
    return {k: round(session.mean(torch.tensor(v, dtype=torch.float64)).item(), 5) for k, v in figures.items()}


def watch(agent: Agent, reward_model: RewardModel, count: int, step: int, seed: int) -> dict[str, float]:
    """Figures of `count` held-out texts after `step` iterations; every worker computes the same."""
    conditions = torch.arange(count, device=agent.base.device) % len(agent.prefixes)
    generated = generate(agent, conditions, [rollout_seed(seed, "watch", row) for row in range(count)])
    judged = reward_model(generated.texts, conditions, generated.ids, generated.mask)
    figures = {
        "reward": float(judged.total.mean()),
        "fidelity": float(judged.terms["fidelity"].mean()),
        "kl": ppo.text_kl(generated.log_probs, generated.ref_log_probs, generated.mask).item(),
        "distinct_2": words.distinct(generated.texts),
        "self_bleu": float(words.self_bleu(generated.texts).mean()),
        "entropy": ppo.entropy(generated.logits, generated.mask).item(),
        "terminated": float(np.mean(agent.base.ended(generated.ids, generated.mask, agent.lines))),
    }
    return {"step": step} | {k: round(v, 5) for k, v in figures.items()}


def collapse_reason(figures: dict[str, float], first: dict[str, float], kl_limit: float, distinct_share: float) -> str | None:
    """Why these figures of the held-out texts count as a collapse, or None. first: those of the supervised prompt."""
    if figures["kl"] > kl_limit:
        return f"step {figures['step']}: KL {figures['kl']:.1f} nats a text, limit {kl_limit:g}"
    if figures["distinct_2"] < distinct_share * first["distinct_2"]:
        return f"step {figures['step']}: distinct-2 {figures['distinct_2']:.2f}, began at {first['distinct_2']:.2f}"
    if figures["terminated"] < 0.5 * first["terminated"]:
        return f"step {figures['step']}: only {figures['terminated']:.0%} of the texts end, began at {first['terminated']:.0%}"
    return None

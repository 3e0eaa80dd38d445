"""The parts of an iteration of reinforcement: roll out, advantages, update, watch.

A held-out set of (condition, seed) pairs is generated from every few iterations: its rewards, paired with those of the best prompt so far, choose the best
prompt, and its distinct-2, KL, and share of ended texts tell a collapse.

Policy, reference and critic are one frozen base (`Agent`), so that a run holds one model in memory where a usual PPO holds four. Each part is a function of
tensors and of a training session, which sums over the workers: a worker has some rows of every batch, and what depends on all rows is computed from all of
them, so that the number of workers changes nothing but the order of sums.
"""

from __future__ import annotations

import hashlib
import random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from retrikt_ray.policy import ppo
from retrikt_ray.policy.reward_model import RewardModel, Rewards
from retrikt_ray.runtime import training
from retrikt_ray.task import words
from retrikt_ray.teacher import lm, prompts
from retrikt_ray.teacher.base import Base, pad_rows
from retrikt_ray.teacher.prefix import run_prefix, run_prefix_of
from retrikt_ray.teacher.sampling import Sampling


class Agent:
    """Policy, reference and critic: the frozen base behind two prompts, and a small head on its hidden states."""

    def __init__(
        self,
        base: Base,
        prompt: Tensor,
        prefixes: list[str],
        max_tokens: int,
        lines: int,
        seed: int,
        sampling: Sampling,
        algorithm: str,
    ) -> None:
        """prompt: (C, S, d), the supervised one, where the policy starts; tokens that all conditions share stay shared.

        prefixes: C readable starts of a text. max_tokens, lines: of a text.
        """
        self.base, self.prefixes, self.max_tokens, self.lines, self.sampling = base, prefixes, max_tokens, lines, sampling
        self.policy = prompts.split(prompt)
        self.best = prompt.clone()  # the policy of the best step
        width = base.model.config.hidden_size
        training.seed_everything(seed, "value head")
        head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 64), nn.Tanh(), nn.Linear(64, 1))
        self.critic = head.to(base.device) if algorithm == "ppo" else None
        with torch.no_grad():
            self.reference = run_prefix(base, prompt, prefixes)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, by name."""
        parts: dict[str, nn.Module] = {"policy": self.policy} | ({"critic": self.critic} if self.critic else {})
        return {f"{part}.{name}": t for part, module in parts.items() for name, t in module.state_dict(keep_vars=True).items()} | {
            "best": self.best
        }

    def optimizer(self, learning_rate: float, value_learning_rate: float) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = [{"params": list(self.policy.parameters()), "lr": learning_rate}]
        if self.critic:
            groups.append({"params": list(self.critic.parameters()), "lr": value_learning_rate})
        return torch.optim.AdamW(groups, weight_decay=0.0)

    def values(self, hidden: Tensor) -> Tensor:
        """The critic's value of each token, 0 without a critic. hidden (B, T, d) -> (B, T)"""
        return self.critic(hidden).squeeze(-1) if self.critic else torch.zeros(hidden.shape[:2], device=hidden.device)


class Generated(NamedTuple):
    """Texts of B rows, at most T tokens long, right-padded."""

    texts: list[str]
    conditions: Tensor  # (B,)
    ids: Tensor  # (B, T)
    mask: Tensor  # (B, T) 1 on tokens that were generated, <eos> included
    log_probs: Tensor  # (B, T) under the policy
    ref_log_probs: Tensor  # (B, T) under the supervised prompt
    entropy: Tensor  # (B, T) of the policy, in nats
    values: Tensor  # (B, T) the critic's


@torch.no_grad()
def generate(agent: Agent, conditions: Tensor, seeds: list[int]) -> Generated:
    """A text of the policy for each condition (B,), each from a seed of its own."""
    base = agent.base
    prefix = run_prefix(base, agent.policy(), agent.prefixes)
    written = lm.sample(base, prefix, conditions, seeds, agent.max_tokens, agent.sampling, agent.lines) if seeds else []
    ids, mask = pad_rows(written or [[base.eos]], base.eos, base.device)
    ids, mask = ids[: len(seeds)], mask[: len(seeds)]
    log_probs, ref_log_probs, entropy, values = (torch.zeros(ids.shape, device=base.device) for _ in range(4))
    lengths = mask.sum(1).tolist()
    for rows in lm.micro_batches(base, list(range(len(seeds))), lengths, prefix.mask.shape[1]):
        width = max(lengths[row] for row in rows)
        own = conditions[rows], ids[rows, :width], mask[rows, :width]
        log_probs[rows, :width], entropy[rows, :width], hidden = lm.score_tokens(base, prefix, *own, agent.sampling.temperature)
        values[rows, :width] = agent.values(hidden)
        ref_log_probs[rows, :width] = lm.score_tokens(base, agent.reference, *own, agent.sampling.temperature)[0]
    return Generated(base.decode(ids, mask), conditions, ids, mask, log_probs * mask, ref_log_probs * mask, entropy * mask, values * mask)


def rollout_seed(seed: int, group: object, row: int) -> int:
    """A 64-bit seed for one text; group: the iteration, or "watch"."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{group}:{row}".encode()).digest()[:8], "big")


def schedule(step: int, texts: int, conditions: int, seed: int, group: int = 1) -> list[int]:
    """The condition of each text of an iteration. All conditions come once before one comes again, each time in another order.

    group: how many texts of a condition come one behind the other and count as one; divides `texts`.
    """
    found = []
    for place in range(step * texts // group, (step + 1) * texts // group):
        turn, at = divmod(place, conditions)
        order = list(range(conditions))
        random.Random(f"{seed}:schedule:{turn}").shuffle(order)
        found += [order[at]] * group
    return found


def divisor(count: int, most: int) -> int:
    """The largest number up to `most` that divides `count`."""
    return next(size for size in range(min(most, count), 0, -1) if count % size == 0)


def group_size(texts: int, conditions: int) -> int:
    """Texts of a condition that are compared with each other (GRPO), equally many of each: those that there are in an iteration, but 4 where there are fewer.

    What does not divide `texts` is taken less; of a prime number of texts all are one group.
    """
    size = divisor(texts, max(texts // conditions, 4))
    return size if size > 1 else texts


def roll_out(
    agent: Agent, reward_model: RewardModel, session: training.Session, asked: list[int], group: object, *, held_out: bool = False
) -> tuple[Generated, Rewards]:
    """This worker's texts of an iteration, and the rewards of all workers' texts. asked: a condition a row.

    A row has the same condition and seed whatever the number of workers.
    """
    rows = session.share(list(range(len(asked))))
    conditions = torch.tensor([asked[row] for row in rows], dtype=torch.long, device=agent.base.device)
    generated = generate(agent, conditions, [rollout_seed(session.seed, group, row) for row in rows])
    own = reward_model.read(generated.texts, conditions, generated.ids, generated.mask) if rows else []
    read = session.gather_rows(own, len(asked))
    judged = reward_model.judge(read, held_out=held_out)
    if not held_out:
        reward_model.remember([r.text for r in read])
    return generated, judged


def as_rollout(generated: Generated, judged: Rewards, session: training.Session) -> ppo.Rollout:
    """This worker's part of it. Rewards are centred and scaled over all texts."""
    scores = (judged.total - judged.total.mean()) / (judged.total.std() + 1e-6)
    own = session.share(list(range(len(scores))))
    return ppo.Rollout(
        conditions=generated.conditions,
        ids=generated.ids,
        mask=generated.mask.float(),
        log_probs=generated.log_probs,
        ref_log_probs=generated.ref_log_probs,
        values=generated.values,
        scores=torch.tensor(scores[own], dtype=torch.float32, device=generated.ids.device),
    )


def advantages_of(
    rollout: ppo.Rollout, session: training.Session, count: int, algorithm: str, kl_weight: float, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages of this worker's rows, scaled over all `count` rows of the workers, and returns (of PPO); (B, T) each."""
    if algorithm == "ppo":
        token_rewards = ppo.token_rewards(rollout.scores, rollout.log_probs, rollout.ref_log_probs, rollout.mask, kl_weight)
        advantages, returns = ppo.gae(token_rewards, rollout.values, rollout.mask, gamma, lam)
        return ppo.whiten(advantages, rollout.mask, session.sum), returns
    own = rollout.scores - kl_weight * ppo.text_kl(rollout.log_probs, rollout.ref_log_probs, rollout.mask)
    pairs = session.gather_rows(list(zip(own.tolist(), rollout.conditions.tolist(), strict=True)), count)
    rewards, conditions = (torch.tensor(x) for x in zip(*pairs, strict=True))
    found = ppo.leave_one_out(rewards, conditions)
    found = found / (found.std(correction=0) + 1e-8)
    rows = found[session.share(list(range(count)))].to(rollout.mask)
    return rows[:, None] * rollout.mask, torch.zeros_like(rollout.mask)


def minibatches(count: int, size: int, epochs: int, seed: int, step: int) -> list[list[int]]:
    """Row numbers of all workers' rows, for each update of an iteration."""
    return [rows for epoch in range(epochs) for rows in training.epoch_batches(count, size, 1, seed * 7919 + step * 31 + epoch)]


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

    The first batch on which it is further away than `stop_kl` nats a token ends them: clipped ratios no longer hold it back. A batch's gradients are
    summed over micro-batches and workers.
    """
    lengths = rollout.mask.sum(1).long().tolist()
    for made, batch in enumerate(batches):
        rows = [row // session.world for row in batch if row % session.world == session.rank]
        tokens = session.sum(rollout.mask[rows].sum()).clamp(min=1)
        far = torch.zeros((), device=tokens.device)
        for part in lm.micro_batches(agent.base, rows, lengths, agent.reference.mask.shape[1], gradients=True):
            width = max(lengths[row] for row in part)
            ids, mask, old_log_probs = rollout.ids[part, :width], rollout.mask[part, :width], rollout.log_probs[part, :width]
            prefix, (conditions,) = run_prefix_of(agent.base, agent.policy(), agent.prefixes, rollout.conditions[part])
            log_probs, _, hidden = lm.score_tokens(agent.base, prefix, conditions, ids, mask.long(), agent.sampling.temperature)
            losses = ppo.policy_loss(log_probs, old_log_probs, advantages[part, :width], clip)
            if agent.critic:
                values = agent.values(hidden.detach())
                losses = losses + 0.5 * ppo.value_loss(values, rollout.values[part, :width], returns[part, :width], 5 * clip)
            ((losses * mask).sum() / tokens).backward()
            far += (ppo.approx_kl(old_log_probs, log_probs.detach()) * mask).sum()
        if (session.sum(far) / tokens).item() > stop_kl:
            session.optimizer.zero_grad(set_to_none=True)
            return made
        session.update()
    return len(batches)


def mean_kl(generated: Generated, session: training.Session) -> float:
    """KL to the supervised prompt in nats a text, over all workers' texts."""
    kl = ppo.text_kl(generated.log_probs, generated.ref_log_probs, generated.mask)
    sums = session.sum(torch.stack([kl.sum(), torch.tensor(float(len(kl)), device=kl.device)]))
    return (sums[0] / sums[1]).item()


def curve_point(step: int, judged: Rewards, kl: float) -> dict[str, float]:
    """Figures of iteration `step`."""
    figures = {"reward": float(judged.total.mean()), "kl": kl} | {k: float(v.mean()) for k, v in judged.terms.items()}
    return {"step": step} | {k: round(v, 5) for k, v in figures.items()}


def watch(
    agent: Agent, reward_model: RewardModel, session: training.Session, count: int, step: int
) -> tuple[dict[str, float], list[float]]:
    """Figures of `count` held-out texts after `step` iterations, the same on every worker, and the reward of each text."""
    asked = [row % len(agent.prefixes) for row in range(count)]
    generated, judged = roll_out(agent, reward_model, session, asked, "watch", held_out=True)
    ended = agent.base.ended(generated.ids, generated.mask, agent.lines)
    rows = session.gather_rows(list(zip(generated.texts, ended, strict=True)), count)
    texts = [text for text, _ in rows]
    figures = {
        "reward": float(judged.total.mean()),
        "fidelity": float(judged.terms["fidelity"].mean()),
        "kl": mean_kl(generated, session),
        "distinct_2": words.distinct(texts),
        "self_bleu": float(words.self_bleu(texts).mean()),
        "entropy": ppo.masked_mean(generated.entropy, generated.mask, session.sum).item(),
        "terminated": float(np.mean([end for _, end in rows])),
    }
    return {"step": step} | {k: round(v, 5) for k, v in figures.items()}, judged.total.tolist()

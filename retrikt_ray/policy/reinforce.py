"""Stage 3, reinforce: PPO on the generation prompt, with the frozen base as policy, reference and critic at once.

Policy and reference are the same base behind two prompts, the critic is a small head on its hidden states, and the annotator judges. Only
prompt and head have gradients, so data parallelism moves a few kilobytes a step.

A held-out set of (condition, seed) pairs is generated from every few iterations: its mean reward chooses the best prompt, and its
distinct-2, KL, and share of ended texts tell a collapse, at which the run stops and keeps the best prompt.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from retrikt_ray.policy import rewards as terms
from retrikt_ray.runtime.cluster import plan
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.settings import Scaled, Section

VERSION = 1


class RewardWeights(Section):
    """Weight of each term in the reward of a text."""

    fidelity: float = Field(1.0, description="log p(asked label | text) by the annotator; in regression the distance to the asked value.")
    diversity: float = Field(1.0, description="1 - self-BLEU inside the batch.")
    novelty: float = Field(1.0, description="Share of the text's word bigrams that neither the task rows nor earlier texts have.")
    domain: float = Field(4.0, description="Cosine similarity of the text's embedding to its 5 nearest task rows.")
    fluency: float = Field(0.3, description="Mean log-likelihood of a token under the bare base LM.")
    length: float = Field(1.0, description="Ended by itself, within the lengths of the task rows.")


class ReinforceConfig(Scaled):
    """PPO on the generation prompt."""

    steps: int = Field(16, ge=0, description="PPO iterations; 0 keeps the supervised prompt.")
    texts: int = Field(64, ge=4, description="Texts per iteration, over all workers.")
    epochs: int = Field(2, ge=1, description="Passes over the texts of an iteration.")
    minibatch: int = Field(32, ge=1, description="Texts per gradient step.")
    learning_rate: float = Field(0.01, gt=0, description="Peak learning rate of the prompt.")
    value_learning_rate: float = Field(0.003, gt=0, description="Peak learning rate of the value head.")
    clip: float = Field(0.2, gt=0, description="Clip range of the probability ratio and, times 5, of the value.")
    gamma: float = Field(1.0, gt=0, le=1, description="Discount per token.")
    lam: float = Field(0.95, ge=0, le=1, description="GAE's lambda.")
    kl_weight: float = Field(0.1, ge=0, description="Weight of the per-token KL to the supervised prompt.")
    kl_target: float = Field(0.0, ge=0, description="KL per text (nats) that the weight is adapted to; 0: the weight is fixed.")
    stop_kl: float = Field(0.1, gt=0, description="KL per token to the generating policy at which an iteration's passes end early.")
    collapse_kl: float = Field(20.0, gt=0, description="KL per text (nats) to the supervised prompt that counts as a collapse.")
    collapse_distinct: float = Field(
        0.6, ge=0, le=1, description="Distinct-2, as a share of the supervised prompt's, that counts as a collapse."
    )
    watch_every: int = Field(4, ge=1, description="Iterations between looks at the held-out set.")
    watch_texts: int = Field(64, ge=4, description="Texts of the held-out set.")
    weights: RewardWeights = RewardWeights()
    custom_rewards: dict[str, float] = Field(
        {}, description="More terms: {package.module:function: weight}, each (texts, labels) -> array of (N,)."
    )


def ppo_loop(config: dict[str, Any]) -> None:
    """PPO in a Ray Train worker. Rank 0 writes `prompts/` and `curves.json`.

    Per iteration: 1. roll out texts. 2. Reward them. 3. Advantages. 4. Clipped updates over minibatches and epochs. 5. Watch.
    """
    import torch
    from torch import nn

    from retrikt_ray.policy import ppo
    from retrikt_ray.policy.reward_model import Judge
    from retrikt_ray.runtime import training
    from retrikt_ray.teacher import lm, prompts

    c, task, seed = ReinforceConfig(**config["section"]), config["task"], config["seed"]
    teacher = Folder(config["teacher_uri"])
    card = teacher.read_json("teacher.json")
    base = lm.Base.load(card["base"], card["dtype"])
    templates = [task["template"].format(label=name) for name in task["conditions"]]
    start = prompts.load_prompts(teacher).to(base.device)  # (C, S, d)
    policy = nn.Parameter(start.clone())
    best = start.clone()
    training.seed_everything(seed, "value head")
    critic = nn.Sequential(
        nn.LayerNorm(base.model.config.hidden_size), nn.Linear(base.model.config.hidden_size, 64), nn.Tanh(), nn.Linear(64, 1)
    ).to(base.device)
    optimizer = torch.optim.AdamW(
        [{"params": [policy], "lr": c.learning_rate}, {"params": critic.parameters(), "lr": c.value_learning_rate}], weight_decay=0.0
    )
    tensors = {"policy": policy, "best": best} | {f"critic.{k}": v for k, v in critic.state_dict(keep_vars=True).items()}
    session = training.Session(config, optimizer, tensors, c.steps)
    judge = Judge(base, teacher, Folder(config["task_uri"]), c, task)
    notes = session.notes or {"curve": [], "watch": [], "best_step": 0, "collapse": None, "kl_weight": c.kl_weight}
    session.notes = notes
    judge.reservoir = notes.setdefault("reservoir", [])
    with torch.no_grad():
        reference = lm.run_prefix(base, start, templates)

    def generate(prompt: Any, conditions: Any, seeds: list[int]) -> tuple[Any, Any]:
        with torch.no_grad():
            return lm.sample(base, lm.run_prefix(base, prompt, templates), conditions, seeds, card["max_tokens"])

    def watch(prompt: Any, step: int) -> dict[str, float]:
        """Figures of the held-out texts; every worker computes the same."""
        conditions = torch.arange(c.watch_texts, device=base.device) % len(templates)
        ids, mask = generate(prompt, conditions, [training_seed(seed, "watch", i) for i in range(c.watch_texts)])
        with torch.no_grad():
            logits, _ = lm.score(base, lm.run_prefix(base, prompt, templates), conditions, ids, mask)
            log_p = lm.log_probs_of(logits, ids)
            ref_logits, _ = lm.score(base, reference, conditions, ids, mask)
        texts = base.decode(ids, mask)
        total, parts = judge(texts, conditions, ids, mask, remember=False)
        figures = {
            "reward": float(total.mean()),
            "fidelity": float(parts["fidelity"].mean()),
            "kl": ppo.text_kl(log_p, lm.log_probs_of(ref_logits, ids), mask).item(),
            "distinct_2": terms.distinct(texts),
            "self_bleu": float(terms.self_bleu(texts).mean()),
            "entropy": ppo.entropy(logits, mask).item(),
            "terminated": ((ids == base.eos) & mask.bool()).any(1).float().mean().item(),
        }
        return {"step": step} | {k: round(v, 5) for k, v in figures.items()}

    if not notes["watch"]:
        notes["watch"].append(watch(start, 0))
    for step in range(session.start, c.steps):
        if notes["collapse"]:
            session.done(step + 1, "stopped")
            continue
        # 1. roll out: row r of iteration i always has the same seed and condition, whatever the number of workers
        session.set_rate(step)
        rows = session.mine(list(range(c.texts)))
        conditions = torch.tensor([(r + step) % len(templates) for r in rows], device=base.device)
        ids, mask = generate(policy.detach(), conditions, [training_seed(seed, step, r) for r in rows])
        with torch.no_grad():
            logits, hidden = lm.score(base, lm.run_prefix(base, policy, templates), conditions, ids, mask)
            log_p = lm.log_probs_of(logits, ids)
            ref_log_p = lm.log_probs_of(lm.score(base, reference, conditions, ids, mask)[0], ids)
            values = critic(hidden).squeeze(-1) * mask
        # 2. reward
        total, parts = judge(base.decode(ids, mask), conditions, ids, mask, remember=True)
        rollout = ppo.Rollout(
            conditions, ids, mask.float(), log_p, ref_log_p, values, torch.tensor(total, dtype=torch.float32, device=base.device)
        )
        # 3. advantages. Scores are centred and scaled per batch: the terms' sizes differ by task
        scores = (rollout.scores - session.mean(rollout.scores.mean())) / (session.mean(rollout.scores.std()) + 1e-6)
        token_rewards = ppo.token_rewards(scores, log_p, ref_log_p, rollout.mask, notes["kl_weight"])
        advantages, returns = ppo.gae(token_rewards, values, rollout.mask, c.gamma, c.lam)
        advantages = ppo.whiten(advantages, rollout.mask)
        # 4. update
        stopped = False
        for epoch in range(c.epochs):
            # Minibatches count over all workers, so that every worker makes the same number of steps.
            for part in training.epoch_batches(len(rows), max(1, c.minibatch // session.world), 1, seed * 7919 + step * 31 + epoch):
                prefix, (rows_of_part,) = lm.run_prefix_of(base, policy, templates, conditions[part])
                logits, hidden = lm.score(base, prefix, rows_of_part, ids[part], mask[part])
                new_log_p = lm.log_probs_of(logits, ids[part])
                kl = session.mean(ppo.approx_kl(new_log_p.detach(), log_p[part], rollout.mask[part])).item()
                if kl > c.stop_kl:
                    stopped = True
                    break
                surrogate, _ = ppo.policy_loss(new_log_p, log_p[part], advantages[part], rollout.mask[part], c.clip)
                new_values = critic(hidden.detach()).squeeze(-1)
                critic_loss = ppo.value_loss(new_values, values[part], returns[part], rollout.mask[part], 5 * c.clip)
                (surrogate + 0.5 * critic_loss).backward()
                session.update(1 / session.world)
            if stopped:
                break
        kl = session.mean(ppo.text_kl(log_p, ref_log_p, rollout.mask)).item()
        if c.kl_target:
            notes["kl_weight"] = ppo.adapt_kl_weight(notes["kl_weight"], kl, c.kl_target)
        point = {"step": step + 1, "reward": float(np.mean(total)), "kl": kl} | {k: float(v.mean()) for k, v in parts.items()}
        notes["curve"].append({k: round(session.mean(torch.tensor(v, dtype=torch.float64)).item(), 5) for k, v in point.items()})
        # 5. watch
        if (step + 1) % c.watch_every == 0 or step + 1 == c.steps:
            look = watch(policy.detach(), step + 1)
            notes["collapse"] = collapsed(look, notes["watch"][0], c)
            if notes["collapse"] is None and look["reward"] > max(w["reward"] for w in notes["watch"]):
                best.copy_(policy.detach())
                notes["best_step"] = step + 1
            notes["watch"].append(look)
        notes["reservoir"] = judge.reservoir
        session.done(step + 1, f"reward {np.mean(total):.2f}, fidelity {parts['fidelity'].mean():.2f}, KL {kl:.1f}")
    if session.rank == 0:
        out = Folder(config["out_uri"])
        prompts.save_prompts(out, best, card["base"])
        out.write_json("curves.json", {k: v for k, v in notes.items() if k != "reservoir"})


def training_seed(seed: int, group: object, row: int) -> int:
    """A 64-bit seed for one rollout."""
    import hashlib

    return int.from_bytes(hashlib.sha256(f"{seed}:{group}:{row}".encode()).digest()[:8], "big")


def collapsed(look: dict[str, float], first: dict[str, float], c: ReinforceConfig) -> str | None:
    """Why this look at the held-out texts counts as a collapse, or None."""
    if look["kl"] > c.collapse_kl:
        return f"step {look['step']}: KL {look['kl']:.1f} nats a text, limit {c.collapse_kl:g}"
    if look["distinct_2"] < c.collapse_distinct * first["distinct_2"]:
        return f"step {look['step']}: distinct-2 {look['distinct_2']:.2f}, began at {first['distinct_2']:.2f}"
    if look["terminated"] < 0.5 * first["terminated"]:
        return f"step {look['step']}: only {look['terminated']:.0%} of the texts end, began at {first['terminated']:.0%}"
    return None


def reinforce(config: ReinforceConfig, inputs: dict[str, Folder], out: dict[str, Folder], *, seed: int) -> dict[str, Any]:
    """Write `policy/`: prompts/ (PEFT adapters) and curves.json {curve, watch, best_step, collapse}."""
    from retrikt_ray.runtime.training import launch

    policy, teacher = out["policy"], inputs["teacher"]
    for path in config.custom_rewards:
        terms.custom_term(path)
    if config.steps == 0:
        for name in teacher.files():
            if name.startswith("prompts/"):
                policy.write_bytes(name, teacher.read_bytes(name))
        policy.write_json("curves.json", {"curve": [], "watch": [], "best_step": 0, "collapse": None})
        return {"ppo": "off, the supervised prompt is kept"}
    if not policy.exists("curves.json"):
        common = {
            "section": config.model_dump(),
            "task": inputs["task"].read_json("task.json"),
            "task_uri": inputs["task"].uri,
            "teacher_uri": teacher.uri,
            "out_uri": policy.uri,
            "seed": seed,
        }
        launch(ppo_loop, common, plan(config, "reinforce", cpus=2, grow=False), out["scratch"], "ppo", "reinforce: PPO")
    curves = policy.read_json("curves.json")
    best = next(w for w in curves["watch"] if w["step"] == curves["best_step"])
    figures = {
        "best_step": f"{curves['best_step']} of {config.steps}",
        "reward": f"{curves['watch'][0]['reward']:.2f} -> {best['reward']:.2f}",
    }
    return figures | {"KL": best["kl"]} | ({"collapse": curves["collapse"] + "; rolled back"} if curves["collapse"] else {})

"""The parts of a PPO iteration, on a tiny LM and without Ray."""

from __future__ import annotations

import json
import math

import pytest
import torch
from making.policy_run import SEED, ScriptedRewards
from torch.testing import assert_close

from retrikt_ray.policy import loop, ppo
from retrikt_ray.policy.loop import Agent, History
from retrikt_ray.policy.reinforce import ReinforceConfig
from retrikt_ray.policy.reward_model import Rewards
from retrikt_ray.task import words
from retrikt_ray.teacher import lm
from retrikt_ray.teacher.prefix import prefix_embeddings, run_prefix

FIRST = {"step": 0, "reward": 1.0, "kl": 0.0, "distinct_2": 0.8, "terminated": 0.9}
ROWS = list(range(8))


def config(**keys: object) -> ReinforceConfig:
    return ReinforceConfig(**({"steps": 4, "texts": 8, "minibatch": 4, "epochs": 2, "watch_texts": 6, "learning_rate": 0.1} | keys))


def test_history_survives_json() -> None:
    history = History(
        kl_weight=0.1 + 0.2, curve=[{"step": 1.0, "kl": 1 / 3}], watch=[FIRST], best_step=3, collapse="why", reservoir=["ä", "\ufffd\n"]
    )
    assert History.from_json(json.loads(json.dumps(history.to_json()))) == history
    assert list(history.to_json()) == ["curve", "watch", "best_step", "collapse", "kl_weight", "reservoir"]
    assert list(history.curves()) == ["curve", "watch", "best_step", "collapse", "kl_weight"]  # texts stay in the checkpoint


def test_the_best_prompt_is_better_than_every_earlier_one_and_none_of_a_collapse() -> None:
    history = History(kl_weight=0.1, watch=[FIRST])
    for step, reward, best in ((2, 0.5, False), (4, 1.5, True), (6, 1.2, False), (8, 1.5, False), (10, 1.6, True)):
        assert history.add_watch(FIRST | {"step": step, "reward": reward}, None) == best
    assert history.best_step == 10 and history.collapse is None
    assert not history.add_watch(FIRST | {"step": 12, "reward": 9.0}, "KL")
    assert history.best_step == 10 and history.collapse == "KL"
    assert [figures["step"] for figures in history.watch] == [0, 2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize(
    ("figures", "reason"),
    [
        ({}, None),
        ({"kl": 20.0}, None),
        ({"kl": 20.1}, "step 4: KL 20.1 nats a text, limit 20"),
        ({"distinct_2": 0.48}, None),  # 0.6 of 0.8
        ({"distinct_2": 0.47}, "step 4: distinct-2 0.47, began at 0.80"),
        ({"terminated": 0.45}, None),
        ({"terminated": 0.44}, "step 4: only 44% of the texts end, began at 90%"),
    ],
)
def test_collapse_reason(figures: dict[str, float], reason: str | None) -> None:
    assert loop.collapse_reason(FIRST | {"step": 4} | figures, FIRST, kl_limit=20.0, distinct_share=0.6) == reason


def test_rollout_seeds_differ_by_seed_iteration_and_row() -> None:
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, "watch", 0), (0, "watch", 1), (0, 11, 1), (0, 1, 11)]
    seeds = [loop.rollout_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys) and all(0 <= s < 2**64 for s in seeds)
    assert loop.rollout_seed(0, "watch", 1) == seeds[5]


def test_an_agent_starts_at_the_reference(start) -> None:
    agent, _ = start(config())
    rollout, judged = loop.roll_out(agent, ScriptedRewards([], 6), ROWS, step=0, seed=SEED)
    assert torch.equal(rollout.log_probs, rollout.ref_log_probs)
    assert sorted(agent.tensors()) == ["best", *(f"critic.{i}.{n}" for i in (0, 1, 3) for n in ("bias", "weight")), "policy"]
    assert torch.equal(agent.best, agent.policy) and not agent.best.requires_grad
    assert rollout.scores.tolist() == judged.total.tolist()
    assert (rollout.values * (1 - rollout.mask)).abs().max() == 0 < rollout.values.abs().max()


def test_log_probs_are_of_the_policy_and_of_the_supervised_prompt(start) -> None:
    agent, _ = start(config())
    with torch.no_grad():
        agent.policy.add_(0.5 * torch.randn(agent.policy.shape, generator=torch.Generator().manual_seed(0)))
    rollout, _ = loop.roll_out(agent, ScriptedRewards([], 6), ROWS, step=0, seed=SEED)
    for soft, got in ((agent.policy.detach(), rollout.log_probs), (agent.best, rollout.ref_log_probs)):
        for row in range(3):  # each alone, the whole sequence at once
            condition, length = int(rollout.conditions[row]), int(rollout.mask[row].sum())
            prefix = prefix_embeddings(agent.base, soft, agent.prefixes)[condition]
            ids = rollout.ids[row, :length]
            with torch.no_grad():
                logits = agent.base.model(inputs_embeds=torch.cat([prefix, agent.base.embed(ids)])[None]).logits[0, len(prefix) - 1 : -1]
            assert_close(got[row, :length], torch.log_softmax(logits, -1)[torch.arange(length), ids], rtol=0, atol=1e-4)


def test_a_row_has_its_text_whatever_the_number_of_workers(start) -> None:
    agent, _ = start(config())
    model = ScriptedRewards([], 6)
    loop.roll_out(agent, model, ROWS, step=3, seed=SEED)
    both = model.reservoir
    halves = []
    for rank in (0, 1):
        model.reservoir = []
        rollout, _ = loop.roll_out(agent, model, ROWS[rank::2], step=3, seed=SEED)
        assert rollout.conditions.tolist() == [(row + 3) % 2 for row in ROWS[rank::2]]
        halves.append(model.reservoir)
    assert [text for pair in zip(*halves, strict=True) for text in pair] == both
    model.reservoir = []
    loop.roll_out(agent, model, ROWS, step=5, seed=SEED)
    assert set(model.reservoir).isdisjoint(both)  # another iteration, other texts


def test_advantages_by_hand(start) -> None:
    _, session = start(config())
    zeros = torch.zeros(2, 2)
    rollout = ppo.Rollout(
        conditions=torch.tensor([0, 1]),
        ids=torch.zeros(2, 2, dtype=torch.long),
        mask=torch.tensor([[1.0, 1.0], [1.0, 0.0]]),
        log_probs=torch.tensor([[-1.0, -2.0], [-3.0, 0.0]]),
        ref_log_probs=torch.tensor([[-2.0, -2.0], [-3.0, 0.0]]),
        values=zeros,
        scores=torch.tensor([7.0, 5.0]),
    )
    # Scores: mean 6, standard deviation sqrt(2), so +-r with r = 1/sqrt(2). Token rewards: (-0.5, r) and (-r). lam = gamma = 1: returns are sums.
    r = 1 / math.sqrt(2)
    advantages, returns = loop.advantages_of(rollout, session, kl_weight=0.5, gamma=1.0, lam=1.0)
    assert_close(returns, torch.tensor([[r - 0.5, r], [-r, 0.0]]), rtol=0, atol=1e-5)
    entries = torch.tensor([r - 0.5, r, -r])
    scaled = (entries - entries.mean()) / entries.std(correction=0)
    assert_close(advantages, torch.tensor([[scaled[0], scaled[1]], [scaled[2], 0.0]]), rtol=0, atol=1e-5)


def test_minibatches(start) -> None:
    _, session = start(config())
    batches = loop.minibatches(10, 4, 2, session, step=1)
    assert [len(rows) for rows in batches] == [4, 4, 2, 4, 4, 2]
    for epoch in (batches[:3], batches[3:]):
        assert sorted(row for rows in epoch for row in rows) == list(range(10))
    assert batches[:3] != batches[3:] and batches != loop.minibatches(10, 4, 2, session, step=2)
    _, session = start(config(), world=2)
    assert [len(rows) for rows in loop.minibatches(5, 4, 1, session, step=1)] == [2, 2, 1]  # 4 rows over both workers
    assert [len(rows) for rows in loop.minibatches(2, 1, 1, session, step=1)] == [1, 1]


def rolled_out(agent: Agent) -> tuple[ppo.Rollout, torch.Tensor]:
    """Texts, and advantages of 1 for all tokens of the first four, -1 for those of the others."""
    rollout, _ = loop.roll_out(agent, ScriptedRewards([], 6), ROWS, step=0, seed=SEED)
    signs = torch.tensor([1.0] * 4 + [-1.0] * 4)[:, None]
    return rollout, signs * rollout.mask


def test_an_update_makes_good_texts_likelier_and_bad_ones_less_likely(start) -> None:
    agent, session = start(config(learning_rate=0.02))
    rollout, advantages = rolled_out(agent)
    session.set_rate(0)
    assert loop.update(agent, session, rollout, advantages, advantages, [ROWS] * 2, clip=0.2, stop_kl=9.0) == 2
    prefix = run_prefix(agent.base, agent.policy, agent.prefixes)
    with torch.no_grad():
        log_probs = lm.log_probs_of(lm.score(agent.base, prefix, rollout.conditions, rollout.ids, rollout.mask.long())[0], rollout.ids)
    gain = ((log_probs - rollout.log_probs) * rollout.mask).sum(1)
    assert gain[:4].sum() > 0 > gain[4:].sum()


def test_the_critic_learns_the_returns_and_leaves_the_prompt_alone(start) -> None:
    agent, session = start(config(value_learning_rate=0.01))
    rollout, _ = rolled_out(agent)
    before, zeros = agent.policy.detach().clone(), torch.zeros_like(rollout.mask)
    session.set_rate(0)
    loop.update(agent, session, rollout, zeros, rollout.mask * 0.5, [ROWS] * 5, clip=0.2, stop_kl=9.0)
    assert torch.equal(agent.policy, before)
    with torch.no_grad():
        _, hidden = lm.score(agent.base, agent.reference, rollout.conditions, rollout.ids, rollout.mask.long())
        values = agent.values(hidden)
    first, last = (ppo.masked_mean((v - 0.5) ** 2, rollout.mask) for v in (rollout.values, values))
    assert last < 0.7 * first


def test_updates_end_where_the_policy_is_too_far_from_the_one_that_generated(start) -> None:
    batches = [ROWS[:4], ROWS[4:]] * 2
    policies = {}
    for name, stop_kl, some in (("stopped", 1e-4, batches), ("one", math.inf, batches[:1]), ("all", math.inf, batches)):
        agent, session = start(config())
        rollout, advantages = rolled_out(agent)
        session.set_rate(0)
        made = loop.update(agent, session, rollout, advantages, advantages, some, clip=0.2, stop_kl=stop_kl)
        assert made == session.updates == {"stopped": 1, "one": 1, "all": 4}[name]
        assert all(
            p.grad is None for group in session.optimizer.param_groups for p in group["params"]
        )  # none is left for the next iteration
        policies[name] = agent.policy.detach()
    assert torch.equal(policies["stopped"], policies["one"]) and not torch.equal(policies["stopped"], policies["all"])


def test_curve_point(start) -> None:
    _, session = start(config())
    judged = Rewards(torch.tensor([1.0, 2.0]).numpy(), {"fidelity": torch.tensor([-1.0, 0.0]).numpy()})
    assert loop.curve_point(session, 3, judged, kl=1 / 3) == {"step": 3.0, "reward": 1.5, "kl": 0.33333, "fidelity": -0.5}


def test_watch(start) -> None:
    agent, _ = start(config())
    model = ScriptedRewards([1.5, 2.5, 3.5], 6)
    first, again = (loop.watch(agent, model, 6, step, seed=SEED) for step in (0, 4))
    assert again == first | {"step": 4, "reward": 2.5, "fidelity": 2.5}  # the same held-out conditions and seeds
    assert first["kl"] == 0.0 and model.reservoir == []  # held-out texts are no earlier texts
    seeds = [loop.rollout_seed(SEED, "watch", row) for row in range(6)]
    generated = loop.generate(agent, torch.tensor([0, 1, 0, 1, 0, 1]), seeds)
    assert first["distinct_2"] == pytest.approx(words.distinct(generated.texts), abs=1e-5)
    assert first["self_bleu"] == pytest.approx(words.self_bleu(generated.texts).mean(), abs=1e-5)
    with torch.no_grad():
        agent.policy.add_(torch.randn(agent.policy.shape, generator=torch.Generator().manual_seed(0)))
    assert loop.watch(agent, model, 6, 8, seed=SEED)["kl"] > 1


def test_watch_counts_texts_that_end(start, monkeypatch: pytest.MonkeyPatch) -> None:
    agent, _ = start(config())
    end = agent.base.eos
    monkeypatch.setattr(loop.lm, "sample", lambda *_: [[5, end], [5, 6, 7], [end], [5, 6, end]])
    assert loop.watch(agent, ScriptedRewards([0.0], 4), 4, 0, seed=SEED)["terminated"] == 0.75

"""The parts of a PPO iteration, on a tiny LM and without Ray."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from making.policy_run import SEED, ScriptedRewards
from torch.testing import assert_close

from retrikt_ray.policy import grpo, loop, ppo
from retrikt_ray.policy.history import History, collapse_reason
from retrikt_ray.policy.loop import Agent
from retrikt_ray.policy.reinforce import ReinforceConfig
from retrikt_ray.policy.reward_model import Rewards
from retrikt_ray.runtime import training
from retrikt_ray.task import words
from retrikt_ray.teacher import lm
from retrikt_ray.teacher.prefix import prefix_embeddings, run_prefix

FIRST = {"step": 0, "reward": 1.0, "kl": 0.0, "distinct_2": 0.8, "terminated": 0.9}
ROWS = list(range(8))
ASKED = [0, 1] * 4


def rolled(agent: Agent, session: training.Session, group: object = 0) -> tuple[ppo.Rollout, Rewards]:
    generated, judged = loop.roll_out(agent, ScriptedRewards([]), session, ASKED, group)  # type: ignore[arg-type]
    return loop.as_rollout(generated, judged, session), judged


class Token(NamedTuple):
    """What is read of a text: its first token."""

    text: str
    token: int


def config(**keys: object) -> ReinforceConfig:
    return ReinforceConfig(**({"steps": 4, "texts": 8, "minibatch": 4, "epochs": 2, "watch_texts": 6, "learning_rate": 0.1} | keys))


def test_history_survives_json() -> None:
    history = History(
        kl_weight=0.1 + 0.2,
        curve=[{"step": 1.0, "kl": 1 / 3}],
        watch=[FIRST],
        best_step=3,
        collapse="why",
        best_rewards=[0.5, 1 / 3],
        scale={"middles": {"a": [1.0]}, "spreads": {"a": 0.1}},
        reservoir=["ä", "\ufffd\n"],
    )
    assert History.from_json(json.loads(json.dumps(history.to_json()))) == history
    assert list(history.curves()) == ["curve", "watch", "best_step", "collapse", "kl_weight"]  # the rest stays in the checkpoint


def test_the_best_prompt_is_better_by_more_than_noise_and_none_of_a_collapse() -> None:
    """Rewards of four held-out texts: the gain's mean against two standard errors, text by text."""
    first = [1.0, 5.0, -3.0, 0.0]
    history = History(kl_weight=0.1)
    assert history.add_watch(FIRST, first, None) and history.best_step == 0

    def look(step: int, gains: list[float], collapse: str | None = None) -> bool:
        return history.add_watch(FIRST | {"step": step}, [a + b for a, b in zip(first, gains, strict=True)], collapse)

    assert not look(2, [1.0, -1.0, 1.0, 0.0])  # mean 0.25, standard error 0.48
    assert not look(4, [-0.5] * 4)
    assert look(6, [0.5, 0.6, 0.4, 0.5])  # mean 0.5, standard error 0.04, though texts differ by eight
    assert not look(8, [0.5, 0.6, 0.4, 0.5]) and history.best_step == 6  # equal is not better
    assert not look(10, [9.0] * 4, "KL") and history.best_step == 6 and history.collapse == "KL"
    assert [figures["step"] for figures in history.watch] == [0, 2, 4, 6, 8, 10]


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
    assert collapse_reason(FIRST | {"step": 4} | figures, FIRST, kl_limit=20.0, distinct_share=0.6, count=192) == reason


def test_few_texts_that_end_by_chance_are_no_collapse() -> None:
    """1 of 8 ends where 3 of 8 did: the difference of 0.25 has a standard error of 0.21."""
    now, then = FIRST | {"step": 4, "terminated": 0.125}, FIRST | {"terminated": 0.375}
    assert collapse_reason(now, then, 20.0, 0.6, count=8) is None
    assert collapse_reason(now, then, 20.0, 0.6, count=64) is not None


@pytest.mark.parametrize("conditions", [2, 6, 150])
def test_every_condition_comes_once_before_one_comes_again(conditions: int) -> None:
    texts = 64
    steps = -(-conditions // texts) * 2
    drawn = [c for step in range(steps) for c in loop.schedule(step, texts, conditions, seed=0)]
    for start in range(0, len(drawn) - conditions + 1, conditions):
        assert sorted(drawn[start : start + conditions]) == list(range(conditions))
    assert {c for step in range(3) for c in loop.schedule(step, texts, conditions, seed=0)} == set(range(conditions))
    assert conditions < 6 or loop.schedule(0, texts, conditions, seed=1) != drawn[:texts]


def test_groups_of_texts() -> None:
    """The texts of a condition in an iteration, 4 at least, and equally many in each group."""
    sizes = {(64, 2): 32, (48, 6): 8, (64, 3): 16, (64, 150): 4, (9, 2): 3, (10, 6): 2, (13, 2): 13, (4, 2): 4}
    assert {key: loop.group_size(*key) for key in sizes} == sizes
    drawn = [loop.schedule(step, 12, 5, 0, group=4) for step in range(5)]
    assert all(texts[i : i + 4] == [texts[i]] * 4 for texts in drawn for i in (0, 4, 8))
    order = [texts[i] for texts in drawn for i in (0, 4, 8)]
    assert all(sorted(order[i : i + 5]) == list(range(5)) for i in (0, 5, 10))  # all conditions once before one comes again


def test_rollout_seeds_differ_by_seed_iteration_and_row() -> None:
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, "watch", 0), (0, "watch", 1), (0, 11, 1), (0, 1, 11)]
    seeds = [loop.rollout_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys) and all(0 <= s < 2**64 for s in seeds)
    assert loop.rollout_seed(0, "watch", 1) == seeds[5]


def test_an_agent_starts_at_the_reference(start) -> None:
    agent, session = start(config(algorithm="ppo"))
    rollout, judged = rolled(agent, session)
    assert torch.equal(rollout.log_probs, rollout.ref_log_probs)
    critic = [f"critic.{i}.{n}" for i in (0, 1, 3) for n in ("bias", "weight")]
    assert sorted(agent.tensors()) == ["best", *critic, "policy.own", "policy.shared"]
    assert torch.equal(agent.best, agent.policy()) and not agent.best.requires_grad
    centred = judged.total - judged.total.mean()
    assert_close(rollout.scores.double(), torch.tensor(centred / judged.total.std()), rtol=0, atol=1e-5)
    assert (rollout.values * (1 - rollout.mask)).abs().max() == 0 < rollout.values.abs().max()
    assert start(config())[0].critic is None  # none is needed where texts are compared with each other


def test_tokens_that_the_prompts_share_stay_shared(start) -> None:
    agent, session = start(config())
    assert agent.policy.shared.shape[0] == agent.policy.own.shape[1] == 2
    rollout, advantages = rolled_out(agent, session)
    session.set_rate(0)
    loop.update(agent, session, rollout, advantages, advantages, [ROWS], clip=0.2, stop_kl=9.0)
    prompt = agent.policy()
    assert torch.equal(prompt[0, :2], prompt[1, :2]) and not torch.equal(prompt[0, 2:], prompt[1, 2:])
    assert not torch.equal(prompt, agent.best)


def test_log_probs_are_of_the_policy_and_of_the_supervised_prompt(start) -> None:
    agent, session = start(config(temperature=0.5))
    with torch.no_grad():
        agent.policy.own.add_(0.5 * torch.randn(agent.policy.own.shape, generator=torch.Generator().manual_seed(0)))
    rollout, _ = rolled(agent, session)
    for soft, got in ((agent.policy().detach(), rollout.log_probs), (agent.best, rollout.ref_log_probs)):
        for row in range(3):  # each alone, the whole sequence at once
            condition, length = int(rollout.conditions[row]), int(rollout.mask[row].sum())
            prefix = prefix_embeddings(agent.base, soft, agent.prefixes)[condition]
            ids = rollout.ids[row, :length]
            with torch.no_grad():
                logits = agent.base.model(inputs_embeds=torch.cat([prefix, agent.base.embed(ids)])[None]).logits[0, len(prefix) - 1 : -1]
            assert_close(got[row, :length], torch.log_softmax(2 * logits, -1)[torch.arange(length), ids], rtol=0, atol=1e-4)


def test_iterations_write_other_texts(start) -> None:
    agent, session = start(config())
    model = ScriptedRewards([])
    loop.roll_out(agent, model, session, ASKED, 3)
    first, model.reservoir = model.reservoir, []
    loop.roll_out(agent, model, session, ASKED, 3)
    assert model.reservoir == first
    model.reservoir = []
    loop.roll_out(agent, model, session, ASKED, 5)
    assert set(model.reservoir).isdisjoint(first)


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
        scores=torch.tensor([0.7, -0.7]),
    )
    # Token rewards: (-0.5, r) and (-r). lam = gamma = 1: returns are sums.
    r = 0.7
    advantages, returns = loop.advantages_of(rollout, session, 2, "ppo", kl_weight=0.5, gamma=1.0, lam=1.0)
    assert_close(returns, torch.tensor([[r - 0.5, r], [-r, 0.0]]), rtol=0, atol=1e-5)
    # RLOO: rewards r - 0.5 (1 + 0) and -r; each less the other, and both by their deviation: +1 and -1, at every token.
    advantages_rloo, returns = loop.advantages_of(rollout, session, 2, "rloo", kl_weight=0.5, gamma=1.0, lam=1.0)
    assert_close(advantages_rloo, torch.tensor([[1.0, 1.0], [-1.0, 0.0]]), rtol=0, atol=1e-5)
    assert not returns.any()
    entries = torch.tensor([r - 0.5, r, -r])
    scaled = (entries - entries.mean()) / entries.std(correction=0)
    assert_close(advantages, torch.tensor([[scaled[0], scaled[1]], [scaled[2], 0.0]]), rtol=0, atol=1e-5)


def test_minibatches() -> None:
    batches = loop.minibatches(10, 4, 2, 0, step=1)
    assert [len(rows) for rows in batches] == [4, 4, 2, 4, 4, 2]
    for epoch in (batches[:3], batches[3:]):
        assert sorted(row for rows in epoch for row in rows) == list(range(10))
    assert batches[:3] != batches[3:] and batches != loop.minibatches(10, 4, 2, 0, step=2)


def rolled_out(agent: Agent, session: training.Session) -> tuple[ppo.Rollout, torch.Tensor]:
    """Texts, and advantages of 1 for all tokens of the first four, -1 for those of the others."""
    rollout, _ = rolled(agent, session)
    signs = torch.tensor([1.0] * 4 + [-1.0] * 4)[:, None]
    return rollout, signs * rollout.mask


def test_micro_batches_change_nothing_but_the_order_of_sums(start, monkeypatch: pytest.MonkeyPatch) -> None:
    grads = []
    for room in (lm.ACTIVATIONS, 1):
        monkeypatch.setattr(lm, "ACTIVATIONS", room)
        monkeypatch.setattr("transformers.PreTrainedModel.get_memory_footprint", lambda *_: 0)
        agent, session = start(config(algorithm="ppo"))
        rollout, advantages = rolled_out(agent, session)
        assert len(lm.micro_batches(agent.base, ROWS, [5] * 8, 4, gradients=True)) == (1 if room > 1 else 8)
        session.update = lambda: grads.append([p.grad.clone() for group in session.optimizer.param_groups for p in group["params"]])  # noqa: B023
        loop.update(agent, session, rollout, advantages, rollout.mask, [ROWS], clip=0.2, stop_kl=9.0)
    assert len(grads) == 2 and all(float(g.abs().max()) > 0 for g in grads[0])
    for whole, parts in zip(*grads, strict=True):
        assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_an_update_makes_good_texts_likelier_and_bad_ones_less_likely(start) -> None:
    agent, session = start(config(learning_rate=0.02))
    rollout, advantages = rolled_out(agent, session)
    session.set_rate(0)
    assert loop.update(agent, session, rollout, advantages, advantages, [ROWS] * 2, clip=0.2, stop_kl=9.0) == 2
    with torch.no_grad():
        prefix = run_prefix(agent.base, agent.policy(), agent.prefixes)
        log_probs, _, _ = lm.score_tokens(
            agent.base, prefix, rollout.conditions, rollout.ids, rollout.mask.long(), agent.sampling.temperature
        )
    gain = ((log_probs - rollout.log_probs) * rollout.mask).sum(1)
    assert gain[:4].sum() > 0 > gain[4:].sum()


def test_the_critic_learns_the_returns_and_leaves_the_prompt_alone(start) -> None:
    agent, session = start(config(algorithm="ppo", value_learning_rate=0.01))
    rollout, _ = rolled_out(agent, session)
    before, zeros = agent.policy().detach(), torch.zeros_like(rollout.mask)
    session.set_rate(0)
    loop.update(agent, session, rollout, zeros, rollout.mask * 0.5, [ROWS] * 5, clip=0.2, stop_kl=9.0)
    assert torch.equal(agent.policy(), before)
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
        rollout, advantages = rolled_out(agent, session)
        session.set_rate(0)
        made = loop.update(agent, session, rollout, advantages, advantages, some, clip=0.2, stop_kl=stop_kl)
        assert made == session.updates == {"stopped": 1, "one": 1, "all": 4}[name]
        assert all(
            p.grad is None for group in session.optimizer.param_groups for p in group["params"]
        )  # none is left for the next iteration
        policies[name] = agent.policy().detach()
    assert torch.equal(policies["stopped"], policies["one"]) and not torch.equal(policies["stopped"], policies["all"])


def test_curve_point() -> None:
    judged = Rewards(torch.tensor([1.0, 2.0]).numpy(), {"fidelity": torch.tensor([-1.0, 0.0]).numpy()})
    assert loop.curve_point(3, judged, kl=1 / 3) == {"step": 3, "reward": 1.5, "kl": 0.33333, "fidelity": -0.5}


def test_watch(start) -> None:
    agent, session = start(config())
    model = ScriptedRewards([1.5, 2.5, 3.5])
    (first, rewards), (again, _) = (loop.watch(agent, model, session, 6, step) for step in (0, 4))
    assert again == first | {"step": 4, "reward": 2.5, "fidelity": 2.5} and rewards == [1.5] * 6  # the same held-out conditions and seeds
    assert first["kl"] == 0.0 and model.reservoir == []  # held-out texts are no earlier texts
    seeds = [loop.rollout_seed(SEED, "watch", row) for row in range(6)]
    generated = loop.generate(agent, torch.tensor([0, 1, 0, 1, 0, 1]), seeds)
    assert first["distinct_2"] == pytest.approx(words.distinct(generated.texts), abs=1e-5)
    assert first["self_bleu"] == pytest.approx(words.self_bleu(generated.texts).mean(), abs=1e-5)
    assert first["entropy"] == pytest.approx(ppo.masked_mean(generated.entropy, generated.mask).item(), abs=1e-5)
    with torch.no_grad():
        agent.policy.own.add_(torch.randn(agent.policy.own.shape, generator=torch.Generator().manual_seed(0)))
    assert loop.watch(agent, model, session, 6, 8)[0]["kl"] > 1


def test_watch_counts_texts_that_end(start, monkeypatch: pytest.MonkeyPatch) -> None:
    agent, session = start(config())
    end = agent.base.eos
    monkeypatch.setattr(loop.lm, "sample", lambda *_: [[5, end], [5, 6, 7], [end], [5, 6, end]])
    assert loop.watch(agent, ScriptedRewards([0.0]), session, 4, 0)[0]["terminated"] == 0.75


ALGORITHMS = ("rloo", "ppo", "grpo")


@pytest.mark.usefixtures("frozen")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_toy_problem_is_solved_and_with_a_broken_sign_it_is_not(start, algorithm: str, sign: float) -> None:
    """Texts of one token; the reward is whether it is among the first half of the vocabulary. The best that can be is 1."""

    class Half(ScriptedRewards):
        def read(self, texts: list[str], conditions: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> list[Any]:
            return [Token(text, int(row[0])) for text, row in zip(texts, ids, strict=True)]

        def judge(self, read: list[Any], *, held_out: bool = False) -> Rewards:
            total = np.array([float(r.token < half) for r in read])
            return Rewards(sign * total, {"fidelity": total})

    c = config(algorithm=algorithm, steps=16, texts=32, minibatch=16, epochs=2, learning_rate=0.3, kl_weight=0.0, stop_kl=1e6)
    agent, session = start(c)
    agent.max_tokens, half = 1, agent.base.embed.weight.shape[0] // 2
    shares = []
    for step in range(c.steps):
        session.set_rate(step)
        generated, judged = loop.roll_out(agent, Half([]), session, [0] * 16 + [1] * 16, step)
        shares.append(float(judged.terms["fidelity"].mean()))
        if algorithm == "grpo":
            grpo.update(agent, session, generated, judged.total, step, group=16, minibatch=16, epochs=2, clip=0.2, kl_weight=0.0)
            continue
        rollout = loop.as_rollout(generated, judged, session)
        advantages, returns = loop.advantages_of(rollout, session, 32, algorithm, 0.0, 1.0, 0.95)
        loop.update(agent, session, rollout, advantages, returns, loop.minibatches(32, 16, 2, 0, step), clip=0.2, stop_kl=1e6)
    first, last = shares[0], float(np.mean(shares[-4:]))
    assert (last > 0.8 and first < 0.3) if sign > 0 else last < 0.3

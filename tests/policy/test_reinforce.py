"""The PPO loop and its stage, on a tiny LM and without Ray: what guards a run, and what is kept of it. (With workers: test_pipeline.)"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from making.policy_run import SEED, Checkpoint, LoneSession, ScriptedRewards, make_task
from torch import Tensor

from retrikt_ray.policy import loop, reinforce, rewards
from retrikt_ray.policy.history import History
from retrikt_ray.policy.loop import Agent
from retrikt_ray.policy.reinforce import ReinforceConfig
from retrikt_ray.policy.reward_model import RewardModel
from retrikt_ray.runtime import training
from retrikt_ray.runtime.cluster import Workers
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.settings import ConfigError
from retrikt_ray.teacher import lm, prompts
from retrikt_ray.teacher.annotator import Annotator

TINY = {"steps": 3, "texts": 8, "minibatch": 4, "epochs": 2, "watch_every": 1, "watch_texts": 6, "learning_rate": 0.02, "stop_kl": 1e6}
UNGUARDED = {"collapse_kl": 1e6, "collapse_distinct": 0.0}


def config(**keys: object) -> ReinforceConfig:
    return ReinforceConfig(**(TINY | UNGUARDED | keys))


def policy_at(session: LoneSession, checkpoint: int) -> Tensor:
    """The prompts of a checkpoint."""
    tensors = session.checkpoints[checkpoint].tensors
    return prompts.SoftPrompt(tensors["policy.shared"], tensors["policy.own"])()


def test_a_collapse_ends_the_run_at_the_best_prompt(start) -> None:
    """The second watch is over the limit, though its reward is the highest."""
    c = config(steps=5)
    agent, session = start(c)
    history = reinforce.train(c, agent, ScriptedRewards([0.0, 1.0, 2.0, 3.0, 4.0, 5.0]), session)
    limit = (history.watch[1]["kl"] + history.watch[2]["kl"]) / 2
    assert history.collapse is None and history.watch[1]["kl"] < limit  # the unguarded run drifts on

    c = config(steps=5, collapse_kl=limit)
    agent, session = start(c)
    history = reinforce.train(c, agent, ScriptedRewards([0.0, 1.0, 2.0]), session)
    assert history.collapse is not None and history.collapse.startswith("step 2: KL ")
    assert len(history.curve) == 2 and len(history.watch) == 3 and session.updates == 2 * 4
    assert session.progress[2:] == ["stopped"] * 3 and len(session.progress) == 5
    assert history.best_step == 1 and torch.equal(agent.best, policy_at(session, 0))
    last = session.checkpoints[-1]
    assert json.loads(last.notes)["collapse"] == history.collapse
    assert torch.equal(last.tensors["policy.own"], session.checkpoints[1].tensors["policy.own"])  # nothing moves any more


def test_a_run_that_had_collapsed_does_not_go_on_when_resumed(start) -> None:
    c = config(steps=4)
    agent, session = start(c)
    session.start = 2
    session.notes = History(kl_weight=0.1, watch=[{"step": 0, "reward": 0.0}], collapse="step 2: KL").to_json()
    assert reinforce.train(c, agent, ScriptedRewards([]), session).collapse == "step 2: KL"
    assert session.progress == ["stopped"] * 2 and session.updates == 0


def test_the_best_watched_prompt_is_kept_not_the_last(start) -> None:
    c = config(algorithm="ppo")
    agent, session = start(c)
    history = reinforce.train(c, agent, ScriptedRewards([0.0, 1.0, 3.0, 2.0]), session)
    assert history.best_step == 2
    assert torch.equal(agent.best, policy_at(session, 1))
    assert not torch.equal(agent.best, agent.policy())
    assert [group["lr"] for group in session.optimizer.param_groups] == pytest.approx(
        [0.01, 0.0015]
    )  # of three steps one is up, and the third has half the peak
    agent, session = start(c)
    supervised = agent.policy().detach().clone()
    assert reinforce.train(c, agent, ScriptedRewards([0.0, -1.0, -3.0, -2.0]), session).best_step == 0
    assert torch.equal(agent.best, supervised) and not torch.equal(agent.policy(), supervised)


def test_an_iteration_ends_early_where_its_policy_has_moved_too_far(start) -> None:
    """Four minibatches; only at the first is the policy the one that generated the texts."""
    counts = {}
    for stop_kl in (1e-4, 1e6):
        c = config(steps=2, stop_kl=stop_kl)
        agent, session = start(c)
        reinforce.train(c, agent, ScriptedRewards([0.0, 1.0, 2.0]), session)
        counts[stop_kl] = session.updates
    assert counts == {1e-4: 2 * 1, 1e6: 2 * 4}


def test_the_kl_weight_follows_its_target(start) -> None:
    def run(target: float) -> tuple[LoneSession, History]:
        c = config(kl_weight=0.5, kl_target=target)
        agent, session = start(c)
        return session, reinforce.train(c, agent, ScriptedRewards([0.0] * 4), session)

    fixed_session, fixed = run(0.0)
    assert fixed.kl_weight == 0.5 and fixed.curve[0]["kl"] == 0.0 < fixed.curve[1]["kl"]
    session, adapted = run(fixed.curve[1]["kl"] / 1.1)
    # The texts of the first iteration are the supervised prompt's own, far below the target; those of the second are a tenth above it.
    assert adapted.curve[:2] == fixed.curve[:2]
    weights = [json.loads(checkpoint.notes)["kl_weight"] for checkpoint in session.checkpoints]
    assert weights[:2] == pytest.approx([0.5 * 0.8, 0.5 * 0.8 * 1.1], rel=1e-3) and adapted.kl_weight == weights[2]
    policies = [
        (a.tensors["policy.own"], b.tensors["policy.own"]) for a, b in zip(fixed_session.checkpoints, session.checkpoints, strict=True)
    ]
    assert torch.equal(*policies[0]) and not torch.equal(*policies[1])  # the new weight counts from the next iteration on


@pytest.fixture
def judged_by_annotator(root: Folder, base: lm.Base) -> Callable[[ReinforceConfig], RewardModel]:
    def make(c: ReinforceConfig) -> RewardModel:
        rows = (root / "task").read_table("train.parquet")
        return RewardModel(base, Annotator.load(root / "teacher"), make_task(), rows, c.weights, c.custom_rewards)

    return make


@pytest.mark.usefixtures("frozen")
@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_an_interrupted_run_ends_as_an_undisturbed_one(start, judged_by_annotator, algorithm: str) -> None:
    c = config(algorithm=algorithm, watch_every=2, kl_target=0.05, weights={"novelty": 5.0})

    def run(checkpoint: Checkpoint | None) -> tuple[Agent, LoneSession, History]:
        agent, session = start(c)
        if checkpoint:
            session.restore(checkpoint)
        return agent, session, reinforce.train(c, agent, judged_by_annotator(c), session)

    agent, session, whole = run(None)
    for checkpoint in session.checkpoints[:-1]:
        again, resumed, history = run(checkpoint)
        assert len(resumed.progress) == 3 - checkpoint.step
        assert history == whole
        for name, tensor in agent.tensors().items():
            assert torch.equal(again.tensors()[name], tensor), name
    assert len(whole.reservoir) == 24 and len(whole.curve) == 3 and [w["step"] for w in whole.watch] == [0, 2, 3]


@pytest.fixture
def stage(root: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Folder, dict[str, Any]]]:
    """Runs the stage with the loop in this process."""

    def launch(train_loop: Callable[[dict[str, Any]], None], keys: dict[str, Any], *_: object) -> None:
        train_loop(keys | {"threads": 1, "board": None})

    monkeypatch.setattr(training, "launch", launch)
    monkeypatch.setattr(training, "Session", LoneSession)
    monkeypatch.setattr(reinforce, "plan", lambda *_, **__: Workers(1, 1, 0))

    def run(c: ReinforceConfig) -> tuple[Folder, dict[str, Any]]:
        inputs = {"task": root / "task", "teacher": root / "teacher"}
        policy = Folder.at(tmp_path / "policy")
        return policy, reinforce.reinforce(c, inputs, {"policy": policy, "scratch": Folder.at(tmp_path / "scratch")}, seed=SEED)

    return run


def scripted(monkeypatch: pytest.MonkeyPatch, held_out: list[float]) -> list[Tensor]:
    """Script the rewards of the held-out texts; the policies that they were generated by are collected in the list that is returned."""
    policies: list[Tensor] = []
    watch = loop.watch

    def collecting(agent: Agent, *arguments: Any) -> tuple[dict[str, float], list[float]]:
        policies.append(agent.policy().detach().clone())
        reward = held_out[len(policies) - 1]
        figures, rewards = watch(agent, *arguments)
        return figures | {"reward": reward}, [reward] * len(rewards)

    monkeypatch.setattr(loop, "watch", collecting)
    return policies


def test_the_stage_writes_the_best_prompt(stage, monkeypatch: pytest.MonkeyPatch) -> None:
    policies = scripted(monkeypatch, [0.0, 1.0, 3.0, 2.0])
    policy, figures = stage(config())
    assert torch.equal(prompts.load_prompts(policy), policies[2])
    assert not any(torch.equal(policies[2], policies[i]) for i in (0, 1, 3))
    curves = policy.read_json("curves.json")
    assert list(curves) == ["curve", "watch", "best_step", "collapse", "kl_weight"]
    assert curves["best_step"] == 2 and curves["collapse"] is None and len(curves["curve"]) == 3
    assert list(curves["curve"][0]) == ["step", "reward", "kl", *rewards.TERMS]
    assert figures == {"best_step": "2 of 3", "reward": "0.00 -> 3.00", "KL": curves["watch"][2]["kl"]}


def test_a_collapse_rolls_back_to_the_supervised_prompt_and_says_so(stage, root: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    policies = scripted(monkeypatch, [0.0, 9.0])
    policy, figures = stage(config(collapse_kl=1e-3, learning_rate=0.1))
    assert torch.equal(prompts.load_prompts(policy), prompts.load_prompts(root / "teacher"))
    assert len(policies) == 2 and not torch.equal(policies[0], policies[1])
    assert figures["best_step"] == "0 of 3"
    assert figures["collapse"].startswith("step 1: KL ") and figures["collapse"].endswith("; rolled back")


def test_a_finished_run_is_not_run_again(stage, monkeypatch: pytest.MonkeyPatch) -> None:
    _, figures = stage(config(steps=1))
    monkeypatch.setattr(training, "launch", lambda *_: pytest.fail("launched again"))
    assert stage(config(steps=1))[1] == figures


def test_no_steps_keep_the_supervised_prompt(stage, root: Folder) -> None:
    policy, _ = stage(config(steps=0))
    for name in policy.files():
        if name != "curves.json":
            assert policy.read_bytes(name) == (root / "teacher").read_bytes(name)
    assert [n for n in policy.files() if n.startswith("prompts/")] == [n for n in (root / "teacher").files() if n.startswith("prompts/")]
    assert policy.read_json("curves.json") == {"curve": [], "watch": [], "best_step": 0, "collapse": None}


def test_a_custom_term_that_is_not_there_is_refused_before_the_run(stage) -> None:
    with pytest.raises(ConfigError, match=r"reinforce\.custom_rewards: 'no_such:term' cannot be imported"):
        stage(config(custom_rewards={"no_such:term": 1.0}))

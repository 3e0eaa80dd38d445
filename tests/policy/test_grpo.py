"""GRPO by TRL, on a tiny LM: what TRL makes of the texts and rewards that it is handed. (The loop around it: test_reinforce, test_loop.)"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from making.policy_run import SEED, ScriptedRewards, make_task
from torch.testing import assert_close

from retrikt_ray import pipeline
from retrikt_ray.policy import grpo, loop, reinforce
from retrikt_ray.policy.reinforce import ReinforceConfig
from retrikt_ray.policy.reward_model import RewardModel
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.settings import ConfigError
from retrikt_ray.runtime.training import Solo
from retrikt_ray.teacher import lm, prompts
from retrikt_ray.teacher.annotator import Annotator
from retrikt_ray.teacher.prefix import run_prefix

pytestmark = pytest.mark.usefixtures("frozen")

ASKED = [1] * 4 + [0] * 4
REWARDS = np.array([1.0, 2.0, 4.0, 1.0, -3.0, 0.5, 0.5, 0.0])


def config(**keys: object) -> ReinforceConfig:
    tiny = {"algorithm": "grpo", "steps": 1, "texts": 8, "minibatch": 8, "epochs": 1, "watch_texts": 6}
    return ReinforceConfig(**(tiny | keys))


@pytest.mark.parametrize("room", [lm.ACTIVATIONS, 1])
def test_an_update_follows_the_gradient_of_the_formula(start, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """One step of plain descent, whole and by micro-batches of one text, from a policy that is not the reference."""
    monkeypatch.setattr(lm, "ACTIVATIONS", room)
    monkeypatch.setattr("transformers.PreTrainedModel.get_memory_footprint", lambda *_: 0)
    agent, _ = start(config())
    with torch.no_grad():
        agent.policy.own.add_(0.3 * torch.randn(agent.policy.own.shape, generator=torch.Generator().manual_seed(0)))
    generated = loop.generate(agent, torch.tensor(ASKED), list(range(8)))
    params = list(agent.policy.parameters())
    # A = (reward - mean of its group) / standard deviation of its group; the loss is the mean over all tokens of -rho A + beta rho (q - 1 - log q),
    # with rho = pi / pi_old = 1 and q = reference / pi.
    groups = REWARDS.reshape(2, 4)
    advantages = torch.tensor(((groups - groups.mean(1, keepdims=True)) / (groups.std(1, ddof=1, keepdims=True) + 1e-4)).reshape(8, 1))
    prefix = run_prefix(agent.base, agent.policy(), agent.prefixes)
    now, _, _ = lm.score_tokens(agent.base, prefix, generated.conditions, generated.ids, generated.mask, agent.sampling.temperature)
    log_q, rho = generated.ref_log_probs - now, (now - now.detach()).exp()
    losses = -rho * advantages + 0.5 * rho * (log_q.exp() - 1 - log_q)
    gradients = torch.autograd.grad((losses * generated.mask).sum() / generated.mask.sum(), params)
    norm = torch.cat([g.flatten() for g in gradients]).norm().item()

    before = [p.detach().clone() for p in params]
    session = Solo(torch.optim.SGD(params, lr=0.1), 1, SEED)
    grpo.update(agent, session, generated, REWARDS, 0, group=4, minibatch=8, epochs=1, clip=0.2, kl_weight=0.5)
    for was, parameter, gradient in zip(before, params, gradients, strict=True):
        assert_close((was - parameter.detach()) / 0.1, (gradient / max(1.0, norm)).float(), rtol=1e-3, atol=1e-5)
        assert float(gradient.abs().max()) > 0.01 and parameter.grad is None


def test_every_update_is_made_at_the_rate_of_the_session(start) -> None:
    agent, session = start(config(steps=4, learning_rate=0.02))
    rates: list[float] = []
    session.optimizer.register_step_post_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    generated = loop.generate(agent, torch.tensor(ASKED), list(range(8)))
    for step in (1, 2):
        session.set_rate(step)
        grpo.update(agent, session, generated, REWARDS, step, group=4, minibatch=4, epochs=3, clip=0.2, kl_weight=0.0)
    assert rates == pytest.approx([0.02] * 6 + [0.02 * 2 / 3] * 6)  # two minibatches, three passes


def test_equal_rewards_in_a_group_teach_nothing(start) -> None:
    """Groups are compared within themselves: that one condition is rewarded more than the other is no reason to move."""
    agent, session = start(config(learning_rate=0.1))
    session.set_rate(0)
    generated = loop.generate(agent, torch.tensor(ASKED), list(range(8)))
    before = agent.policy().detach()
    flat = np.array([5.0] * 4 + [-5.0] * 4)
    grpo.update(agent, session, generated, flat, 0, group=4, minibatch=8, epochs=1, clip=0.2, kl_weight=0.0)
    assert torch.equal(agent.policy(), before)


def test_it_leaves_the_base_alone_and_says_nothing(start, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    agent, session = start(config())
    model, tokenizer = agent.base.model, agent.base.tokenizer
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings, pad = model.config.to_dict(), tokenizer.pad_token
    capfd.readouterr()
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("error")
        reinforce.train(config(), agent, ScriptedRewards([0.0, 1.0]), session)
    assert capfd.readouterr() == ("", "") and not caplog.records
    assert not model.training and all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert model.config.to_dict() == settings and tokenizer.pad_token == pad and not any(p.requires_grad for p in model.parameters())
    prompt = agent.policy()
    assert torch.equal(prompt[0, :2], prompt[1, :2]) and not torch.equal(prompt, agent.reference.embeds[:, :4])


def test_without_trl_the_extra_is_named_before_anything_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    ReinforceConfig().check_packages()
    run: Any = SimpleNamespace(config=SimpleNamespace(reinforce=config()))
    for begin in (lambda: pipeline.preflight(run), lambda: reinforce.reinforce(config(), {}, {}, seed=0)):
        with pytest.raises(ConfigError, match=r"reinforce\.algorithm: grpo needs the package trl.*pip install 'retrikt-ray\[trl\]'"):
            begin()


@pytest.mark.slow
def test_two_workers_of_ray_train_do_what_one_does(cluster, start, base: lm.Base, root: Folder, tmp_path: Path) -> None:
    """Three are asked for, of which two get equal shares of eight texts. A minibatch is all texts, so that it does not matter which of them a worker has."""
    c = config(steps=2, workers=3, cpus_per_worker=1)
    agent, session = start(c)
    rows = (root / "task").read_table("train.parquet")
    one = reinforce.train(c, agent, RewardModel(base, Annotator.load(root / "teacher"), make_task(), rows, c.weights, {}), session)
    assert one.curve[1]["kl"] > 0

    out = {name: Folder.at(tmp_path / name) for name in ("policy", "scratch")}
    reinforce.reinforce(c, {"task": root / "task", "teacher": root / "teacher"}, out, seed=SEED)
    two = out["policy"].read_json("curves.json")
    for mine, theirs in ((one.curve, two["curve"]), (one.watch, two["watch"])):
        assert len(mine) == len(theirs) == 2
        for figures, others in zip(mine, theirs, strict=True):
            assert others == pytest.approx(figures, abs=2e-4)
    assert_close(prompts.load_prompts(out["policy"]), agent.best, rtol=0, atol=1e-5)

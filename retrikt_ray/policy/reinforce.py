"""Stage 3, reinforce: PPO, RLOO or GRPO on the generation prompt, with the frozen base as policy, reference and critic at once.

Policy and reference are the same base behind two prompts, the critic is a small head on its hidden states, and the annotator judges. Only
prompt and head have gradients, so data parallelism moves a few kilobytes a step. A collapse ends the run early; what is kept is the best
prompt by the held-out texts, never just the last one.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from retrikt_ray.policy.rewards import RewardWeights, custom_term
from retrikt_ray.runtime.cluster import plan
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.settings import ConfigError, Scaled
from retrikt_ray.task.card import Task

if TYPE_CHECKING:
    from retrikt_ray.policy.history import History
    from retrikt_ray.policy.loop import Agent
    from retrikt_ray.policy.reward_model import RewardModel
    from retrikt_ray.runtime.training import Session

VERSION = 4

Algorithm = Literal["ppo", "rloo", "grpo"]


class ReinforceConfig(Scaled):
    """Reinforcement of the generation prompt."""

    algorithm: Algorithm = Field(
        "rloo",
        description="rloo: each text against the others of its condition, no critic. ppo: a value head and generalised advantages. "
        "grpo: groups of texts of a condition, by TRL (extra `trl`).",
    )
    steps: int = Field(
        0,
        ge=0,
        description="Iterations, 16 to begin with; 0 keeps the supervised prompt: the same time spent on more texts gave better students (docs/benchmarks.md).",
    )
    texts: int = Field(64, ge=4, description="Texts per iteration, over all workers.")
    epochs: int = Field(2, ge=1, description="Passes over the texts of an iteration.")
    minibatch: int = Field(32, ge=1, description="Texts per gradient step, over all workers; grpo: the next below that divides `texts`.")
    temperature: float = Field(0.9, gt=0, description="Sampling temperature: that of `generate`, for which the prompt is tuned.")
    top_k: int = Field(100, ge=0, description="Sample among this many likeliest tokens, as `generate` does; 0: all.")
    learning_rate: float = Field(0.01, gt=0, description="Peak learning rate of the prompt.")
    value_learning_rate: float = Field(0.003, gt=0, description="Peak learning rate of the value head (ppo).")
    clip: float = Field(0.2, gt=0, description="Clip range of the probability ratio and, times 5, of the value.")
    gamma: float = Field(1.0, gt=0, le=1, description="Discount per token (ppo).")
    lam: float = Field(0.95, ge=0, le=1, description="GAE's lambda (ppo).")
    kl_weight: float = Field(
        0.1, ge=0, description="Weight of the KL to the supervised prompt, nats against standard deviations of the reward."
    )
    kl_target: float = Field(0.0, ge=0, description="KL per text (nats) that the weight is adapted to; 0: the weight is fixed.")
    stop_kl: float = Field(
        0.1, gt=0, description="KL per token to the generating policy at which an iteration's passes end early (rloo, ppo)."
    )
    collapse_kl: float = Field(20.0, gt=0, description="KL per text (nats) to the supervised prompt that counts as a collapse.")
    collapse_distinct: float = Field(
        0.6, ge=0, le=1, description="Distinct-2, as a share of the supervised prompt's, that counts as a collapse."
    )
    watch_every: int = Field(4, ge=1, description="Iterations between looks at the held-out set.")
    watch_texts: int = Field(192, ge=4, description="Texts of the held-out set.")
    weights: RewardWeights = RewardWeights()
    custom_rewards: dict[str, float] = Field(
        {}, description="More terms: {package.module:function: weight}, each (texts, labels) -> array of (N,)."
    )

    def check_packages(self) -> None:
        """Raises ConfigError where the algorithm needs a package that is not there."""
        if self.algorithm == "grpo" and find_spec("trl") is None:
            raise ConfigError("reinforce.algorithm: grpo needs the package trl, which is not installed: pip install 'retrikt-ray[trl]'")


def reinforce_loop(config: dict[str, Any]) -> None:
    """Reinforcement in a Ray Train worker. Rank 0 writes `prompts/` and `curves.json`."""
    from retrikt_ray.policy.loop import Agent
    from retrikt_ray.policy.reward_model import RewardModel
    from retrikt_ray.runtime import training
    from retrikt_ray.teacher import prompts
    from retrikt_ray.teacher.annotator import Annotator
    from retrikt_ray.teacher.base import Base
    from retrikt_ray.teacher.sampling import Sampling

    c, task, teacher = ReinforceConfig(**config["section"]), config["task"], config["teacher"]
    card = teacher.read_json("teacher.json")
    base = Base.load(card["base"], card["dtype"], card["chat"])
    supervised = prompts.load_prompts(teacher).to(base.device)
    sampling = Sampling(c.temperature, c.top_k)
    agent = Agent(base, supervised, task.prefixes, card["max_tokens"], task.lines, config["seed"], sampling, c.algorithm)
    optimizer = agent.optimizer(c.learning_rate, c.value_learning_rate)
    session = training.Session(config, optimizer, agent.tensors(), c.steps)
    rows = config["task_folder"].read_table("train.parquet")
    reward_model = RewardModel(base, Annotator.load(teacher, base), task, rows, c.weights, c.custom_rewards)
    history = train(c, agent, reward_model, session)
    if session.rank == 0:
        prompts.save_prompts(config["out"], agent.best, card["base"])
        config["out"].write_json("curves.json", history.curves())


def train(c: ReinforceConfig, agent: Agent, reward_model: RewardModel, session: Session) -> History:
    """All iterations from where the session starts. `agent.best` is then the prompt of `history.best_step`."""
    from retrikt_ray.policy import loop
    from retrikt_ray.policy.history import History

    history = History.from_json(session.notes) if session.notes else History(kl_weight=c.kl_weight)
    if session.notes:
        reward_model.restore(history.scale, history.reservoir)
    else:
        figures, rewards = loop.watch(agent, reward_model, session, c.watch_texts, 0)
        history.add_watch(figures, rewards, None)
        history.scale = None if reward_model.scale is None else asdict(reward_model.scale)
    for step in range(session.start, c.steps):
        progress = "stopped" if history.collapse else iterate(c, agent, reward_model, session, history, step)
        history.reservoir = reward_model.reservoir
        session.notes = history.to_json()
        session.done(step + 1, progress)
    return history


def iterate(c: ReinforceConfig, agent: Agent, reward_model: RewardModel, session: Session, history: History, step: int) -> str:
    """1. Roll out and reward texts. 2. Advantages. 3. Clipped updates over minibatches and epochs. 4. KL weight. 5. Watch.

    Returns a line on the progress.
    """
    from retrikt_ray.policy import loop, ppo
    from retrikt_ray.policy.history import collapse_reason

    session.set_rate(step)
    # 1. roll out
    group = loop.group_size(c.texts, len(agent.prefixes)) if c.algorithm == "grpo" else 1
    asked = loop.schedule(step, c.texts, len(agent.prefixes), session.seed, group)
    generated, rewards = loop.roll_out(agent, reward_model, session, asked, step)
    # 2. and 3. advantages and updates
    if c.algorithm == "grpo":
        from retrikt_ray.policy import grpo

        sizes = {"group": group, "minibatch": loop.divisor(c.texts, c.minibatch), "epochs": c.epochs}
        grpo.update(agent, session, generated, rewards.total, step, **sizes, clip=c.clip, kl_weight=history.kl_weight)
    else:
        rollout = loop.as_rollout(generated, rewards, session)
        advantages, returns = loop.advantages_of(rollout, session, c.texts, c.algorithm, history.kl_weight, c.gamma, c.lam)
        batches = loop.minibatches(c.texts, c.minibatch, c.epochs, session.seed, step)
        loop.update(agent, session, rollout, advantages, returns, batches, clip=c.clip, stop_kl=c.stop_kl)
    # 4. KL weight
    kl = loop.mean_kl(generated, session)
    if c.kl_target:
        history.kl_weight = ppo.adapt_kl_weight(history.kl_weight, kl, c.kl_target)
    history.curve.append(loop.curve_point(step + 1, rewards, kl))
    # 5. watch
    if (step + 1) % c.watch_every == 0 or step + 1 == c.steps:
        figures, held_out = loop.watch(agent, reward_model, session, c.watch_texts, step + 1)
        collapse = collapse_reason(figures, history.watch[0], c.collapse_kl, c.collapse_distinct, c.watch_texts)
        if history.add_watch(figures, held_out, collapse):
            agent.best.copy_(agent.policy().detach())
    return f"reward {rewards.total.mean():.2f}, fidelity {rewards.terms['fidelity'].mean():.2f}, KL {kl:.1f}"


def reinforce(config: ReinforceConfig, inputs: dict[str, Folder], out: dict[str, Folder], *, seed: int) -> dict[str, Any]:
    """Write `policy/`: prompts/ (PEFT adapters) and curves.json {curve, watch, best_step, collapse}."""
    from retrikt_ray.policy.loop import divisor
    from retrikt_ray.runtime.training import launch

    config.check_packages()
    policy, teacher = out["policy"], inputs["teacher"]
    for path in config.custom_rewards:
        custom_term(path)
    if config.steps == 0:
        for name in teacher.files():
            if name.startswith("prompts/"):
                policy.write_bytes(name, teacher.read_bytes(name))
        policy.write_json("curves.json", {"curve": [], "watch": [], "best_step": 0, "collapse": None})
        return {"reinforcement": "off, the supervised prompt is kept"}
    if not policy.exists("curves.json"):
        common = {
            "section": config.model_dump(),
            "task": Task.read(inputs["task"]),
            "task_folder": inputs["task"],
            "teacher": teacher,
            "out": policy,
            "seed": seed,
        }
        planned = plan(config, "reinforce", cpus=2, grow=False)
        if config.algorithm == "grpo":  # TRL gives each worker the same number of a minibatch's texts
            planned = replace(planned, count=divisor(divisor(config.texts, config.minibatch), planned.count), least=None)
        elif planned.count > config.texts:  # more would have nothing to write
            planned = replace(planned, count=config.texts, least=None)
        launch(reinforce_loop, common, planned, out["scratch"], config.algorithm, "reinforce: prompt")
    curves = policy.read_json("curves.json")
    best = next(figures for figures in curves["watch"] if figures["step"] == curves["best_step"])
    figures = {
        "best_step": f"{curves['best_step']} of {config.steps}",
        "reward": f"{curves['watch'][0]['reward']:.2f} -> {best['reward']:.2f}",
    }
    return figures | {"KL": best["kl"]} | ({"collapse": curves["collapse"] + "; rolled back"} if curves["collapse"] else {})

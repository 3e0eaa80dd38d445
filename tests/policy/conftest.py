"""A tiny task and teacher, and what PPO makes of them; made once."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
from making.policy_run import MAX_TOKENS, SEED, LoneSession, make_task, make_teacher

from retrikt_ray.policy.loop import Agent
from retrikt_ray.policy.reinforce import ReinforceConfig
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.teacher import lm, prompts
from retrikt_ray.teacher.sampling import Sampling


@pytest.fixture(scope="session")
def root(tiny_lm: str, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A folder with `task/` and `teacher/`."""
    folder = Folder.at(tmp_path_factory.mktemp("taught"))
    make_teacher(folder, tiny_lm)
    return folder


@pytest.fixture(scope="session")
def base(tiny_lm: str) -> lm.Base:
    return lm.Base.load(tiny_lm)


@pytest.fixture
def start(root: Folder, base: lm.Base) -> Callable[..., tuple[Agent, LoneSession]]:
    """Makes an agent at the supervised prompt and a session that trains it."""

    def make(c: ReinforceConfig, world: int = 1) -> tuple[Agent, LoneSession]:
        task, sampling = make_task(), Sampling(c.temperature, c.top_k)
        agent = Agent(base, prompts.load_prompts(root / "teacher"), task.prefixes, MAX_TOKENS, task.lines, SEED, sampling, c.algorithm)
        optimizer = agent.optimizer(c.learning_rate, c.value_learning_rate)
        return agent, LoneSession({"seed": SEED}, optimizer, agent.tensors(), c.steps, world)

    return make


@pytest.fixture
def frozen() -> Iterator[None]:
    """Garbage is not looked for among what is there already: TRL has it collected in every iteration, which would take longer than all else in it."""
    gc.freeze()
    yield
    gc.unfreeze()

"""The config of a bench: which runs are made, and what is compared on them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from retrikt_ray.bench.groups import GROUPS, SLOW
from retrikt_ray.config import RunConfig, mapping
from retrikt_ray.runtime.settings import ConfigError, Section, explain


class BenchConfig(Section):
    """Tasks x seeds x protocols x groups of systems. A task is a run's config, over what all tasks have in common."""

    common: dict[str, dict[str, Any]] = Field({}, description="Sections of a run's config that all tasks share.")
    tasks: dict[str, dict[str, dict[str, Any]]] = Field(description="By name of the task: sections of a run's config, over `common`.")
    seeds: list[int] = Field([0, 1, 2, 3, 4], min_length=1, description="Each draws other labelled rows and makes all else anew.")
    protocols: list[Literal["generated", "unlabelled", "corpus", "corpus_generated"]] = Field(
        ["generated", "unlabelled"],
        description="Which rows of a store count beside the labelled ones: generated ones, these and the task's unlabelled texts, passages of a corpus, or these and generated ones.",
    )
    groups: list[str] = Field(
        [name for name in GROUPS if name not in SLOW], description="What is compared; default everything but `model`."
    )

    @field_validator("groups")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        unknown = sorted(set(value) - set(GROUPS))
        if unknown:
            raise ValueError(f"there is no group {unknown[0]!r}; there are {', '.join(GROUPS)}")
        return value

    def run_config(self, task: str, seed: int) -> RunConfig:
        """The config of one run. Raises ConfigError that names the task and the key."""
        own = self.tasks[task]
        sections: dict[str, Any] = {key: self.common.get(key, {}) | own.get(key, {}) for key in {**self.common, **own, "prepare": {}}}
        sections["prepare"] |= {"name": task}
        try:
            return RunConfig.model_validate(sections | {"seed": seed})
        except ValidationError as error:
            raise explain(error, RunConfig, f"tasks.{task}") from None


def load(path: str, overrides: Sequence[str] = ()) -> BenchConfig:
    """Read a bench's YAML, in which $NAME stands for an environment variable. Raises ConfigError that names the file and the key."""
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"{path}: no such config file")
    text = os.path.expandvars(file.read_text(encoding="utf-8"))
    try:
        config = BenchConfig.model_validate(mapping(text, path, overrides))
    except ValidationError as error:
        raise explain(error, BenchConfig, path) from None
    for task in config.tasks:
        config.run_config(task, config.seeds[0])
    return config

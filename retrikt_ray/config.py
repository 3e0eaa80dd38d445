"""The config of a run: one section per stage, loaded strictly from YAML, with `stage.key=value` overrides.

The sections live beside the stages they configure; this module only puts them together, loads them and writes their documentation
(`python -m retrikt_ray.config > docs/configuration.md`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError

from retrikt_ray.index.build import IndexConfig
from retrikt_ray.policy.reinforce import ReinforceConfig
from retrikt_ray.report.evaluate import EvaluateConfig
from retrikt_ray.runtime.folders import PACKAGED
from retrikt_ray.runtime.nodes import ClusterConfig
from retrikt_ray.runtime.settings import ConfigError, Section, explain, nearest_key
from retrikt_ray.store.decide import AnnotateConfig
from retrikt_ray.store.generate import GenerateConfig
from retrikt_ray.store.harvest import HarvestConfig
from retrikt_ray.student.fit import DistillConfig
from retrikt_ray.task.prepare import PrepareConfig
from retrikt_ray.teacher.teach import TeachConfig

TOP = "(top level)"
QUICKSTART = PACKAGED / "config.yaml"


class RunConfig(Section):
    """One run: one task, one teacher, one seed."""

    seed: int = Field(0, ge=0, description="Seed of everything that is drawn: rows, batches, generated texts, weights.")
    prepare: PrepareConfig = PrepareConfig()
    teach: TeachConfig = TeachConfig()
    reinforce: ReinforceConfig = ReinforceConfig()
    generate: GenerateConfig = GenerateConfig()
    harvest: HarvestConfig = HarvestConfig()
    annotate: AnnotateConfig = AnnotateConfig()
    distill: DistillConfig = DistillConfig()
    index: IndexConfig = IndexConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    cluster: ClusterConfig = ClusterConfig()


class _StrictLoader(yaml.SafeLoader):
    """YAML that refuses a key written twice, where plain YAML lets the last one win in silence."""


def _unique_mapping(loader: _StrictLoader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    written = set()
    for key_node, _ in node.value:
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
        if key is None or key in written:
            what = "a key must be a word" if key is None else f"the key {key!r} is written twice"
            raise ConfigError(f"line {key_node.start_mark.line + 1}: {what}")
        written.add(key)
    loader.flatten_mapping(node)  # merge keys (<<) come first and give way to the keys that are written out
    return {loader.construct_object(k, deep=True): loader.construct_object(v, deep=True) for k, v in node.value}


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def mapping(text: str, where: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Sections from YAML text and `key.path=value` overrides. Raises ConfigError that says where it is not such."""
    try:
        data = yaml.load(text, _StrictLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not YAML: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{where}, {error}") from None
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: found {type(data).__name__}, expected a mapping of sections such as `prepare:`")
    for item in overrides:
        override(data, item)
    return data


def parse(text: str, where: str, overrides: Sequence[str] = ()) -> RunConfig:
    """A config from YAML text and `key.path=value` overrides. Raises ConfigError that names the key and the nearest valid one."""
    data = mapping(text, where, overrides)
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise explain(error, RunConfig, where if not overrides else f"{where} with {' '.join(overrides)}") from None


def override(data: dict[str, Any], item: str) -> None:
    """Put `distill.epochs=3` into the nested mapping; the value is YAML."""
    path, equals, value = item.partition("=")
    if not equals or not path:
        raise ConfigError(f"override {item!r}: expected key=value, e.g. distill.epochs=3")
    *parents, leaf = path.split(".")
    for key in parents:
        data = data.setdefault(key, {})
        if not isinstance(data, dict):
            near = nearest_key(RunConfig, path)
            raise ConfigError(f"override {item!r}: {key} is not a section" + (f"; did you mean {near}?" if near else ""))
    try:
        data[leaf] = yaml.load(value, _StrictLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {item!r}: the value is not YAML ({error})") from None


def load(path: str | None, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of a file, or the packaged quick start where no file is given."""
    file = Path(path) if path is not None else QUICKSTART
    if not file.is_file():
        raise ConfigError(f"{path}: no such config file")
    try:
        return parse(file.read_text(encoding="utf-8"), str(file), overrides)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8") from None


def documentation() -> str:
    """Markdown tables of every key, from the models themselves."""
    lines = [
        "# Configuration",
        "",
        "One YAML file a run; every key has a default. On the command line, `section.key=value` overrides the file.",
        "Unknown keys are errors. Keys of scale (workers, CPUs, GPUs) may change without making artifacts stale.",
        "",
        "_Generated by `make docs` from the models in the package; do not edit._",
    ]

    def table(model: type[BaseModel], title: str) -> None:
        inner = []
        lines.extend(
            [
                "",
                f"## {title}",
                "",
                (model.__doc__ or "").strip().split("\n")[0],
                "",
                "| key | type | default | meaning |",
                "|---|---|---|---|",
            ]
        )
        for name, info in model.model_fields.items():
            kind = info.annotation
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                inner.append((kind, f"{title}.{name}" if title != TOP else name))
                continue
            shown = kind.__name__ if isinstance(kind, type) and not get_args(kind) else re.sub(r"[a-z_.]+\.(?=[A-Z])", "", str(kind))
            default = (
                yaml.safe_dump(list(info.default) if isinstance(info.default, tuple) else info.default, default_flow_style=True)
                .strip()
                .removesuffix("...")
                .strip()
            )
            cells = [f"`{name}`", shown.replace("|", "\\|"), f"`{default}`", (info.description or "").replace("|", "\\|")]
            lines.append("| " + " | ".join(cells) + " |")
        for section, path in inner:
            table(section, path)

    table(RunConfig, TOP)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(documentation(), end="")

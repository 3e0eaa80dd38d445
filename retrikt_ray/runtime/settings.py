"""The base of every config section: strict, frozen, documented, and with errors that name the key.

Each stage owns its section (a subclass of `Section`) beside its code; `config.py` puts them together into one run config.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator


class ConfigError(ValueError):
    """A config that cannot be used. The text names the key, what was found and what was expected."""


class Section(BaseModel):
    """A part of the config. Unknown keys are errors; values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)
    not_in_fingerprint: ClassVar[frozenset[str]] = frozenset()

    def fingerprint_view(self) -> dict[str, Any]:
        """The values that an artifact depends on."""
        return {k: v for k, v in self.model_dump(mode="json").items() if k not in self.not_in_fingerprint}


class Range(Section):
    """A number of workers that may change while a stage runs."""

    min: int = Field(ge=1)
    max: int = Field(ge=1)

    @model_validator(mode="after")
    def _in_order(self) -> Range:
        if self.min > self.max:
            raise ValueError
        return self


def number_or_range(value: Any) -> int | Range:
    if isinstance(value, Range) or (type(value) is int and value >= 0):
        return value
    try:
        return Range.model_validate(value)
    except ValidationError:
        raise ValueError("expected a number, 0 or more, or {min: N, max: M} with 1 <= N <= M") from None


class Scaled(Section):
    """How a stage spreads over the cluster. What it writes does not depend on this, so it is not part of a fingerprint."""

    workers: Annotated[int | Range, BeforeValidator(number_or_range)] = Field(
        0,
        description="Worker processes: N, or {min: N, max: M} to begin with N and take up to M as nodes come and go. 0: one per GPU, or as many as the CPUs allow with two to spare; on a cluster that autoscales, from 1 up to these.",
    )
    cpus_per_worker: float = Field(0, ge=0, description="CPUs a worker reserves, and its torch threads. 0: chosen by the stage.")
    gpus_per_worker: float = Field(-1, ge=-1, description="GPUs a worker reserves. -1: one where the cluster has GPUs, else none.")
    not_in_fingerprint: ClassVar[frozenset[str]] = frozenset({"workers", "cpus_per_worker", "gpus_per_worker"})


def _section_at(model: type[BaseModel], path: tuple[Any, ...]) -> type[BaseModel] | None:
    for key in path:
        fields = model.model_fields
        if key not in fields:
            return None
        annotation = fields[key].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return None
        model = annotation
    return model


def all_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Full paths of all keys of a section, depth first."""
    keys = []
    for name, info in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            keys += all_keys(info.annotation, f"{prefix}{name}.")
    return keys


def nearest_key(model: type[BaseModel], path: str) -> str | None:
    """The valid key that a person who wrote `path` probably meant: first among its siblings, then anywhere."""
    parent, _, leaf = path.rpartition(".")
    section = _section_at(model, tuple(parent.split(".")) if parent else ())
    if section is not None:
        close = difflib.get_close_matches(leaf, section.model_fields, n=1, cutoff=0.6)
        if close:
            return f"{parent}.{close[0]}" if parent else close[0]
    keys = all_keys(model)
    same_leaf = [k for k in keys if k.rpartition(".")[2] == leaf]
    return same_leaf[0] if same_leaf else next(iter(difflib.get_close_matches(path, keys, n=1, cutoff=0.6)), None)


def explain(error: ValidationError, model: type[BaseModel], where: str) -> ConfigError:
    """Pydantic's findings as lines a person can act on."""
    lines = []
    for item in error.errors():
        path = ".".join(str(p) for p in item["loc"])
        if item["type"] == "extra_forbidden":
            near = nearest_key(model, path)
            lines.append(f"{path}: there is no such key" + (f"; did you mean {near}?" if near else ""))
        elif item["type"] == "missing":
            lines.append(f"{path}: this key is required")
        else:
            lines.append(f"{path}: found {item.get('input')!r}; {item['msg'][0].lower()}{item['msg'][1:]}")
    return ConfigError(f"{where}:\n  " + "\n  ".join(lines))

"""The run: which stage reads and writes what, which are done, which are stale, and doing the rest in order.

A run directory holds one folder per artifact, `config.yaml` (resolved), and `logs/`. A stage is skipped when its artifacts are complete and
their fingerprint is that of today's config, inputs and code version; otherwise it runs again, and so does what hangs on it.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from retrikt_ray.config import RunConfig, load, parse
from retrikt_ray.runtime import artifacts
from retrikt_ray.runtime.artifacts import Manifest, read_manifest
from retrikt_ray.runtime.folders import ArtifactError, Folder, digest
from retrikt_ray.runtime.leases.hold import FILES, RUN, hold
from retrikt_ray.runtime.leases.lease import Right
from retrikt_ray.runtime.progress import console
from retrikt_ray.runtime.settings import ConfigError
from retrikt_ray.task.card import Task
from retrikt_ray.task.corpus import files_of
from retrikt_ray.task.prepare import source_digest


@dataclass(frozen=True)
class Stage:
    """One row of the table: a function `retrikt_ray.<package>.<name>:<name>` of (config section, inputs, outputs, seed)."""

    package: str
    name: str
    title: str  # what it does, for help
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]  # the first is the one that says "done": it is sealed last

    def module(self) -> Any:
        return importlib.import_module(f"retrikt_ray.{self.package}.{self.name}")


STAGES = (
    Stage("task", "prepare", "Read, check and sample the task.", (), ("task",)),
    Stage("teacher", "teach", "Tune the generation prompt and the annotator.", ("task",), ("teacher",)),
    Stage("policy", "reinforce", "Reinforcement of the generation prompt.", ("task", "teacher"), ("policy",)),
    Stage("store", "generate", "Generate texts.", ("task", "teacher", "policy"), ("generated",)),
    Stage("store", "harvest", "Choose passages of a corpus that are like the task's texts.", ("task", "teacher"), ("harvested",)),
    Stage(
        "store",
        "annotate",
        "Label, embed and filter texts: the store.",
        ("task", "teacher", "generated", "harvested"),
        ("store", "rejected"),
    ),
    Stage("student", "distill", "Train the student.", ("task", "teacher", "store"), ("student",)),
    Stage("index", "index", "Build the index.", ("task", "store", "student"), ("index",)),
    Stage(
        "report",
        "evaluate",
        "Score everything on test and write the report.",
        ("task", "teacher", "policy", "store", "rejected", "student", "index"),
        ("report",),
    ),
)
BY_NAME = {stage.name: stage for stage in STAGES}
MADE_BY = {output: stage for stage in STAGES for output in stage.outputs}

Status = Literal["done", "stale", "partial", "missing"]


@dataclass(frozen=True)
class Run:
    """A run directory and its config."""

    folder: Folder
    config: RunConfig

    def artifact(self, name: str) -> Folder:
        return self.folder / name

    @property
    def report(self) -> dict[str, Any]:
        """What report.json says. Raises ArtifactError while there is none."""
        return self.artifact("report").read_json("report.json")

    def __fspath__(self) -> str:
        """The folder: a finished run can be handed to whatever takes one."""
        return self.folder.uri

    def __repr__(self) -> str:
        return f"Run({self.folder.uri!r}: " + ", ".join(f"{stage.name} {self.status(stage)}" for stage in self.stages) + ")"

    def _repr_html_(self) -> str | None:
        """The report's table, in a notebook."""
        from retrikt_ray.report.table import as_html

        return as_html(self.report) if self.artifact("report").exists("report.json") else None

    @property
    def log_file(self) -> Path | None:
        return Path(self.folder.uri) / "logs" / "ray.log" if self.folder.is_local else None

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Those of this run, in order: without a corpus there is nothing to harvest."""
        return tuple(stage for stage in STAGES if stage.name != "harvest" or self.config.prepare.corpus)

    def inputs(self, stage: Stage) -> tuple[str, ...]:
        """The artifacts that the stage reads in this run."""
        return tuple(name for name in stage.inputs if MADE_BY[name] in self.stages)

    def source(self, stage: Stage) -> Any:
        """What changes when the user's own files do that a stage reads."""
        if stage.name == "harvest" and self.config.prepare.corpus:
            return files_of(self.config.prepare.corpus)[1]
        return source_digest(self.config.prepare) if stage.name == "prepare" else None

    def fingerprint(self, stage: Stage) -> str | None:
        """What the stage's artifacts depend on, or None while an input is not there."""
        contents = {}
        for name in self.inputs(stage):
            manifest = read_manifest(self.artifact(name))
            if manifest is None:
                return None
            contents[name] = manifest.content
        return digest(
            {
                "stage": stage.name,
                "version": stage.module().VERSION,
                "seed": self.config.seed,
                "config": getattr(self.config, stage.name).fingerprint_view(),
                "inputs": contents,
                "source": self.source(stage),
            }
        )

    def status(self, stage: Stage) -> Status:
        """done: complete and current; stale: complete, but config, inputs or code changed; partial: begun; missing."""
        found = [read_manifest(self.artifact(name)) for name in stage.outputs]
        if all(m is not None for m in found):
            current = self.fingerprint(stage)
            return "done" if all(m is not None and m.fingerprint == current for m in found) else "stale"
        return "partial" if any(self.artifact(name).exists() for name in stage.outputs) else "missing"


def open_run(out: str, config: RunConfig) -> Run:
    """Take a directory for a run of this config. Raises ConfigError when it holds a run of another task or seed, or is not writable."""
    folder = Folder.at(out)
    if not folder.exists("config.yaml") and (found := set(folder.files()) - FILES) and "config.yaml" not in found:  # written meanwhile
        raise ConfigError(f"{folder} is not a run directory: it has files but no config.yaml; choose another --out")
    try:
        with hold(folder, RUN):
            write_config(folder, config)
    except OSError as error:
        raise ConfigError(f"cannot write to the run directory {folder}: {error.strerror or error}") from None
    return Run(folder, config)


def write_config(folder: Folder, config: RunConfig) -> None:
    """Leave the config in a run directory that is held. Raises ConfigError when a run of another task or seed is there."""
    if folder.exists("config.yaml"):
        theirs = load_config(folder)
        if theirs == config:
            return
        begun = read_manifest(folder / "task") is not None  # before, there is nothing to lose
        old, new = ({"seed": c.seed, **c.prepare.fingerprint_view()} for c in (theirs, config))
        if begun and old != new:
            changed = ", ".join(f"{k} was {old[k]!r}, now {new[k]!r}" for k in old if old[k] != new[k])
            raise ConfigError(f"{folder} holds a run of another task ({changed}); choose another --out, or remove the folder")
    folder.write_bytes("config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True).encode())


def run(config: RunConfig | str | os.PathLike[str] | None, out: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Run:
    """Run all stages into the directory or URI `out`, with progress; what is done is skipped. Returns the finished run.

    config: a RunConfig, the path of a YAML file, or None for the packaged quick start; overrides: "section.key=value", over a file.
    """
    if isinstance(config, RunConfig) and overrides:
        raise ConfigError(f"overrides go with a config file; found a RunConfig and {' '.join(overrides)}")
    settings = config if isinstance(config, RunConfig) else load(None if config is None else os.fspath(config), overrides)
    opened = open_run(os.fspath(out), settings)
    run_all(opened)
    return opened


def load_config(folder: Folder) -> RunConfig:
    return parse(folder.read_bytes("config.yaml").decode(), f"{folder}/config.yaml")


def load_run(uri: str) -> Run:
    """An existing run. Raises ArtifactError when the folder is not one."""
    folder = Folder.at(uri)
    if not folder.exists("config.yaml"):
        raise ArtifactError(f"{folder} is not a run directory: it has no config.yaml")
    return Run(folder, load_config(folder))


def check_inputs(run: Run, stage: Stage) -> dict[str, str]:
    """Compare every input with its manifest, SHA-256 included, before anything is made from it. Their contents by name."""
    contents = {}
    for name in run.inputs(stage):
        made_by = MADE_BY[name].name
        if read_manifest(run.artifact(name)) is None:
            raise ConfigError(f"{stage.name} needs {run.artifact(name)}, which is not complete; run `retrikt {made_by} {run.folder}` first")
        try:
            contents[name] = artifacts.check(run.artifact(name), deep=True).content
        except ArtifactError as error:
            raise ArtifactError(f"{error}. Remove {run.artifact(name)} and run again: {made_by} and what hangs on it are redone") from None
    return contents


def run_stage(run: Run, stage: Stage, right: Right) -> Manifest:
    """Run one stage from its inputs to sealed outputs. right: to write below the run directory."""
    contents = check_inputs(run, stage)
    fingerprint = run.fingerprint(stage)
    assert fingerprint is not None
    outputs = {name: run.artifact(name) for name in stage.outputs}
    for folder in outputs.values():
        artifacts.open_draft(folder, fingerprint, right)
    # Checkpoints of training live beside the artifacts, under the fingerprint, so that another config never resumes from them.
    scratch = run.folder / f".scratch/{stage.name}-{fingerprint[:12]}"
    started = time.time()
    section = getattr(run.config, stage.name)
    work = getattr(stage.module(), stage.name)
    inputs = {name: run.artifact(name) for name in run.inputs(stage)}
    corpus = {"corpus": Folder.at(run.config.prepare.corpus)} if stage.name == "harvest" and run.config.prepare.corpus else {}
    summary = work(section, inputs | corpus, outputs | {"scratch": scratch}, seed=run.config.seed)
    sealed = [
        artifacts.seal(
            outputs[name],
            stage=stage.name,
            fingerprint=fingerprint,
            config=section.fingerprint_view(),
            inputs=contents,
            seed=run.config.seed,
            started=started,
            summary=summary,
            right=right,
        )
        for name in reversed(stage.outputs)
    ]
    scratch.remove()
    return sealed[-1]


def run_all(run: Run, only: str | None = None, force: bool = False) -> None:
    """Run what is not done, in order; `only`: that stage alone; `force`: even if it is done."""
    from retrikt_ray.runtime import cluster

    connected = False
    with hold(run.folder, RUN) as right:
        write_config(run.folder, run.config)
        if only and BY_NAME[only] not in run.stages:
            console.print(f"[dim]{only:<10} nothing to do: prepare.corpus is not set[/dim]")
        for stage in run.stages:
            if only and stage.name != only:
                continue
            if not (force and only) and run.status(stage) == "done":
                for name in stage.outputs:
                    try:
                        artifacts.check(run.artifact(name))
                    except ArtifactError as error:
                        raise ArtifactError(f"{error}. Remove {run.artifact(name)} and run again: it is made anew") from None
                console.print(f"[dim]{stage.name:<10} done before, skipped[/dim]")
                continue
            if not connected and stage.name != "prepare":
                cluster.connect(run.log_file, run.config.cluster)
                preflight(run)
                connected = True
            for name in stage.outputs if force and only else ():
                right.check()
                run.artifact(name).remove()
            manifest = run_stage(run, stage, right)
            console.print(f"[bold]{stage.name:<10}[/bold] {manifest.seconds:7.1f} s  {sentence(manifest.summary)}")


def preflight(run: Run) -> None:
    """Refuse before the first minute of work what the cluster can never give in the last."""
    from retrikt_ray.runtime.cluster import plan
    from retrikt_ray.runtime.settings import Scaled

    run.config.reinforce.check_packages()
    if run.config.prepare.corpus:
        files_of(run.config.prepare.corpus)  # raises where there is none
        if Task.read(run.artifact("task")).pair:
            raise ConfigError("prepare.corpus: this task compares two texts, and passages of a corpus are single ones; leave it out")
    for stage in run.stages:
        section = getattr(run.config, stage.name)
        if isinstance(section, Scaled):
            plan(section, stage.name)


def sentence(summary: dict[str, Any]) -> str:
    """A stage's own figures on one line."""
    return ", ".join(f"{k.replace('_', ' ')} {v:,}" if isinstance(v, int) else f"{k.replace('_', ' ')} {v}" for k, v in summary.items())

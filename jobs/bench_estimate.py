"""Benchmark of `retrikt estimate`: `python -m jobs.bench_estimate [TASK ...]`, of quickstart, trec and banking77. The figures of docs/benchmarks.md come from here.

Each config is estimated and then run, one after the other on the same machine; told by stage, with the error of the whole. The bar: 25 % in time, 10 % in tokens.
trec and banking77 (77 classes, 8 labelled rows each) are small runs over $RETRIKT_DATA/data/TASK.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from retrikt_ray import config, pipeline
from retrikt_ray.estimate.estimate import estimate
from retrikt_ray.runtime.artifacts import read_manifest

DATA = os.environ.get("RETRIKT_DATA", "../shared") + "/data"
TASKS: dict[str, tuple[str | None, list[str]]] = {
    "quickstart": (None, []),
    "trec": (
        "jobs/trec.yaml",
        [f"prepare.data={DATA}/trec", "prepare.label_column=label", "prepare.revision=null", "generate.rows=3000", "reinforce.steps=16"],
    ),
    "banking77": (
        "jobs/trec.yaml",
        [
            "prepare.name=banking77",
            f"prepare.data={DATA}/banking77",
            "prepare.label_column=label",
            "prepare.revision=null",
            "prepare.label_names={}",
            "prepare.n_per_class=8",
            "teach.prompt_epochs=3",
            "teach.annotator_epochs=3",
            "generate.rows=3000",
            "reinforce.steps=4",
        ],
    ),
}
TIME, TOKENS = 0.25, 0.10


def compared(name: str) -> dict[str, Any]:
    """Estimated and taken: seconds by stage, and tokens."""
    path, overrides = TASKS[name]
    settings, out = config.load(path, overrides), f"runs/bench-estimate/{name}"
    opened = pipeline.open_run(out, settings)
    for stage in pipeline.STAGES:  # what an earlier bench left
        for made in stage.outputs:
            opened.artifact(made).remove()
    told = estimate(settings, out)
    run = pipeline.run(settings, out)
    took = {}
    for stage in run.stages:
        manifest = read_manifest(run.artifact(stage.outputs[0]))
        assert manifest is not None
        took[stage.name] = manifest.seconds
    tokens = sum(run.artifact("generated").read_tables(columns=["tokens"])["tokens"].to_pylist())
    return {"told": told, "took": took, "seconds": sum(took.values()), "tokens": tokens}


def main() -> None:
    names = sys.argv[1:] or list(TASKS)
    if unknown := set(names) - TASKS.keys():
        raise SystemExit(f"unknown tasks {', '.join(sorted(unknown))}; known: {', '.join(TASKS)}")
    lines, missed = [], []
    for name in names:
        found = compared(name)
        told = found["told"]
        time, tokens = told["seconds"] / found["seconds"] - 1, told["tokens"] / found["tokens"] - 1
        stages = ", ".join(f"{s['stage']} {s['seconds']:.0f} / {found['took'][s['stage']]:.0f}" for s in told["stages"])
        figures = f"{told['seconds']:.0f} ± {told['plus_minus']:.0f} | {found['seconds']:.0f} | {time:+.0%} | {told['tokens']:,} | {found['tokens']:,} | {tokens:+.1%}"
        lines.append(f"| {name} | {figures} | {stages} |")
        print(lines[-1], flush=True)
        if abs(time) > TIME or abs(tokens) > TOKENS:
            missed.append(name)
    print(
        "\n| | estimated, s | taken, s | | tokens estimated | written | | by stage, estimated / taken, s |\n|---|---|---|---|---|---|---|---|"
    )
    print("\n".join(lines))
    if missed:
        raise SystemExit(f"farther off than {TIME:.0%} in time or {TOKENS:.0%} in tokens: {', '.join(missed)}")


if __name__ == "__main__":
    main()

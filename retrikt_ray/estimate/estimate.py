"""`retrikt estimate`: what a run will take, from a small run of the same stages on the same machines.

The small run has the same models, lengths, batches and workers, but few texts and passes; what it took is stretched to the config's (`scaling.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from retrikt_ray import pipeline
from retrikt_ray.config import RunConfig
from retrikt_ray.estimate import scaling
from retrikt_ray.runtime import cluster
from retrikt_ray.runtime.artifacts import read_manifest
from retrikt_ray.runtime.progress import console, listening
from retrikt_ray.runtime.settings import Scaled
from retrikt_ray.student.rows import ENOUGH, MOST_TIMES
from retrikt_ray.task.corpus import files_of

WAVES = 6  # shards that each worker writes in the small run: fewer say little about their rate
UNLABELLED = 400  # texts of the domain in the small run
MOVED = 0.3  # of a text's length, which iterations that the small run leaves out may change (TREC: 15.7 tokens after 4, 11.4 after 16)
CANDIDATES, MEGABYTES = 2048, 8  # of a corpus there, the latter for each worker
STEPS, STUDENT_STEPS = 16, 240  # of a training or of reinforcement there, about; the student's are short
PROMPT_STEPS = 128  # texts behind a prompt that has learnt little are longer or shorter than those of the run
FILE = "estimate.json"


def estimate(config: RunConfig, out: str) -> dict[str, Any]:
    """Run the small run inside the run directory `out`, and write what a run of this config will take to `estimate.json` there.

    Returns {"stages": [{stage, seconds, plus_minus, tokens, workers, memory_mb, cost}], "seconds", "plus_minus", "tokens", "tokens_plus_minus", "cost"}.
    """
    run = pipeline.open_run(out, config)
    pipeline.run_all(run, only="prepare")
    prepared = read_manifest(run.folder / "task")
    assert prepared is not None
    train, unlabelled = prepared.rows["train"], prepared.rows["unlabelled"]
    cluster.connect(run.log_file, config.cluster)
    small = shrunk(config, train, cluster.plan(config.generate, "generate").count)
    folder = run.folder / ".probe"
    folder.remove()
    probe = pipeline.open_run(folder.uri, small)
    found: dict[str, tuple[list[scaling.Part], float]] = {}
    for stage in probe.stages:
        with listening() as trackers, watched_memory() as peak:
            pipeline.run_all(probe, only=stage.name)
        found[stage.name] = [p for t in trackers if (p := scaling.part(t.label, t.points))], peak[0]
    of_probe = read_manifest(probe.folder / "task")
    assert of_probe is not None
    ratios = scaling.ratios(
        scaling.amounts(config, train, unlabelled, megabytes(config), MOST_TIMES, ENOUGH),
        scaling.amounts(small, train, of_probe.rows["unlabelled"], megabytes(small), MOST_TIMES, ENOUGH),
    )
    rows = [row(stage, probe, config, *found[stage.name], ratios) for stage in probe.stages]
    with_trainings(rows, probe)
    result = total(rows, *tokens(probe, config))
    folder.remove()
    run.folder.write_json(FILE, result)
    return result


def shrunk(config: RunConfig, train: int, workers: int) -> RunConfig:
    """The same run with few texts and passes: enough steps and shards for a rate."""

    def passes(epochs: int, rows: int, batch: int, steps: int = STEPS) -> int:
        return min(epochs, -(-steps * batch // max(1, rows)))

    t, g = config.teach, config.generate
    rows = min(g.rows, WAVES * workers * g.rows_per_shard)
    texts = UNLABELLED if config.prepare.unlabelled_rows is None else min(UNLABELLED, config.prepare.unlabelled_rows)
    changes: dict[str, dict[str, Any]] = {
        "prepare": {"unlabelled_rows": texts if config.prepare.unlabelled else None},
        "teach": {
            "prompt_epochs": passes(t.prompt_epochs, train, t.prompt_batch, PROMPT_STEPS),
            "annotator_epochs": passes(t.annotator_epochs, train, t.annotator_batch),
        },
        "reinforce": {"steps": min(config.reinforce.steps, STEPS)},
        "generate": {"rows": rows, "max_tokens": 0, "max_seconds": 0, "max_cost": 0},
        "harvest": {
            "rows": min(config.harvest.rows, CANDIDATES // 4),
            "candidates": min(config.harvest.candidates, CANDIDATES),
            "megabytes": min(megabytes(config), workers * MEGABYTES),
        },
        "distill": {"epochs": min(config.distill.epochs, -(-STUDENT_STEPS * config.distill.batch // (rows + train)))},
    }
    sections = {name: getattr(config, name).model_copy(update=change) for name, change in changes.items()}
    return config.model_copy(update=sections)


def megabytes(config: RunConfig) -> float:
    """What is read of the corpus."""
    if not config.prepare.corpus:
        return 0
    found = sum(stamp[0] for stamp in files_of(config.prepare.corpus)[1].values()) / 1e6
    return min(found, config.harvest.megabytes or found)


def row(
    stage: pipeline.Stage, probe: pipeline.Run, config: RunConfig, parts: list[scaling.Part], memory: float, ratios: dict[str, float]
) -> dict[str, Any]:
    """What a stage will take."""
    manifest = read_manifest(probe.artifact(stage.outputs[0]))
    assert manifest is not None
    seconds, doubt = scaling.stretched(manifest.seconds, parts, ratios)
    section = getattr(config, stage.name)
    workers = cluster.plan(section, stage.name).count if isinstance(section, Scaled) else 1
    cost = seconds / 3600 * workers * config.generate.price_per_hour
    return {
        "stage": stage.name,
        "seconds": round(seconds, 1),
        "plus_minus": round(doubt, 1),
        "workers": workers,
        "memory_mb": round(memory),
        "cost": round(cost, 4),
    }


def with_trainings(rows: list[dict[str, Any]], probe: pipeline.Run) -> None:
    """Add to evaluate what its systems train beyond the small run: together about as long as the student itself; half of it is in doubt."""
    by_stage = {r["stage"]: r for r in rows}
    manifest = read_manifest(probe.artifact("student"))
    assert manifest is not None
    more = max(0.0, by_stage["distill"]["seconds"] - manifest.seconds)
    evaluate = by_stage["evaluate"]
    evaluate["cost"] = round(evaluate["cost"] * (1 + more / max(evaluate["seconds"], 1e-9)), 4)
    evaluate["seconds"], evaluate["plus_minus"] = round(evaluate["seconds"] + more, 1), round(evaluate["plus_minus"] + more / 2, 1)


def tokens(probe: pipeline.Run, config: RunConfig) -> tuple[int, int]:
    """Tokens that will be generated, and half a 95 % interval."""
    if not config.generate.rows:
        return 0, 0
    lengths = probe.artifact("generated").read_tables(columns=["tokens"])["tokens"].to_numpy()
    error = 1.96 * float(lengths.std(ddof=1)) / len(lengths) ** 0.5 if len(lengths) > 1 else float(lengths.mean())
    if config.reinforce.steps > probe.config.reinforce.steps:
        error += MOVED * float(lengths.mean())
    return round(float(lengths.mean()) * config.generate.rows), round(error * config.generate.rows)


def total(stages: list[dict[str, Any]], tokens: int, tokens_doubt: int) -> dict[str, Any]:
    return {
        "stages": stages,
        "seconds": round(sum(s["seconds"] for s in stages), 1),
        "plus_minus": round(sum(s["plus_minus"] ** 2 for s in stages) ** 0.5, 1),
        "tokens": tokens,
        "tokens_plus_minus": tokens_doubt,
        "cost": round(sum(s["cost"] for s in stages), 4),
    }


@contextmanager
def watched_memory() -> Iterator[list[float]]:
    """The largest memory in MB that this process and its children had together during the block (proportional set size), as the list's one entry."""
    import psutil

    peak, stop = [0.0], threading.Event()

    def look() -> None:
        while not stop.wait(1.0):
            size = 0
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    size += process.memory_full_info().pss
                except psutil.Error:  # it ended meanwhile
                    continue
            peak[0] = max(peak[0], size / 1e6)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def afterwards(run: pipeline.Run) -> str | None:
    """How far off the estimate of a finished run was; None where there is none, or stages are missing."""
    if not run.folder.exists(FILE):
        return None
    told = run.folder.read_json(FILE)
    manifests = [read_manifest(run.artifact(stage.outputs[0])) for stage in run.stages]
    if not all(manifests):
        return None
    took = sum(m.seconds for m in manifests if m)
    sentence = f"took {took:,.0f} s; estimated {told['seconds']:,.0f} ± {told['plus_minus']:,.0f} s ({told['seconds'] / took - 1:+.0%})"
    if told["tokens"]:
        written = sum(run.artifact("generated").read_tables(columns=["tokens"])["tokens"].to_pylist())
        sentence += f"; {written:,} tokens, estimated {told['tokens']:,} ({told['tokens'] / written - 1:+.0%})"
    return sentence


def show(result: dict[str, Any]) -> None:
    """The table on the terminal."""
    from rich.table import Table

    priced = result["cost"] > 0
    table = Table()
    for name in ("stage", "seconds", "workers", "memory here, MB", *(["cost"] if priced else [])):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for s in result["stages"]:
        figures = [f"{s['seconds']:,.0f} ± {s['plus_minus']:,.0f}", str(s["workers"]), f"{s['memory_mb']:,}"]
        table.add_row(s["stage"], *figures, *([f"{s['cost']:.2f}"] if priced else []))
    table.add_section()
    everything = [f"{result['seconds']:,.0f} ± {result['plus_minus']:,.0f}", "", ""]
    table.add_row("all", *everything, *([f"{result['cost']:.2f}"] if priced else []))
    console.print(table)
    if result["tokens"]:
        console.print(f"{result['tokens']:,} ± {result['tokens_plus_minus']:,} tokens will be generated")

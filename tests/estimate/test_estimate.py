"""The small run and what is said of it. Slow: the figures of a whole small run, and how far off they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from making.tasks import tiny, write_corpus, write_task

from retrikt_ray import config, pipeline
from retrikt_ray.config import RunConfig
from retrikt_ray.estimate.estimate import FILE, MOVED, afterwards, estimate, shrunk, tokens


def test_the_small_run_has_the_same_models_and_fewer_texts_and_passes() -> None:
    full = RunConfig.model_validate({"prepare": {"data": "x", "unlabelled": "train"}, "generate": {"rows": 5000, "max_seconds": 9}})
    small = shrunk(full, 96, 2)
    assert small.generate.rows == 6 * 2 * 120 and small.generate.max_seconds == 0 and small.prepare.unlabelled_rows == 400
    assert (small.teach.prompt_epochs, small.teach.annotator_epochs) == (6, 3)  # at most 128 steps, and 16, of 16 texts
    assert small.teach.max_tokens == full.teach.max_tokens and small.generate.rows_per_shard == full.generate.rows_per_shard
    few = RunConfig.model_validate(
        {"prepare": {"data": "x"}, "generate": {"rows": 50}, "teach": {"prompt_epochs": 1}, "reinforce": {"steps": 0}}
    )
    assert shrunk(few, 4, 2).generate.rows == 50 and shrunk(few, 4, 2).teach.prompt_epochs == 1 and shrunk(few, 4, 2).reinforce.steps == 0


def test_what_more_iterations_may_change_is_in_doubt(run: pipeline.Run) -> None:
    steps = run.config.reinforce.steps
    same, more = (
        run.config.model_copy(update={"reinforce": run.config.reinforce.model_copy(update={"steps": n})}) for n in (steps, steps + 1)
    )
    (count, doubt), (still, wider) = tokens(run, same), tokens(run, more)
    assert still == count and wider - doubt == pytest.approx(MOVED * count, abs=1)


def test_afterwards_the_run_says_how_far_off_it_was(run: pipeline.Run) -> None:
    assert afterwards(run) is None
    rows = run.artifact("generated").read_tables(columns=["tokens"])["tokens"].to_pylist()
    run.folder.write_json(FILE, {"seconds": 1.0, "plus_minus": 0.5, "tokens": 2 * sum(rows)})
    try:
        said = afterwards(run)
    finally:
        run.folder.remove(FILE)
    assert (
        said is not None
        and "estimated 1 ± 0 s (-" in said
        and said.endswith(f"; {sum(rows):,} tokens, estimated {2 * sum(rows):,} (+100%)")
    )


@pytest.mark.slow
def test_an_estimate_names_every_stage_and_leaves_the_run_to_be_made(cluster: None, tiny_lm: str, tmp_path: Path) -> None:
    prepare = {"data": str(write_task(tmp_path / "data")), "n_per_class": 12, "unlabelled": "train", "corpus": str(write_corpus(tmp_path))}
    text = yaml.safe_dump(tiny(tiny_lm, prepare=prepare, generate={"rows": 64, "price_per_hour": 36.0}, harvest={"rows": 8}))
    settings = config.parse(text, "test")
    found = estimate(settings, str(tmp_path / "run"))
    assert [s["stage"] for s in found["stages"]] == [stage.name for stage in pipeline.STAGES]
    assert found["seconds"] > 0 and found["cost"] > 0 and found["tokens"] > 64 and all(s["memory_mb"] > 0 for s in found["stages"])
    opened = pipeline.load_run(str(tmp_path / "run"))
    assert {stage.name: opened.status(stage) for stage in opened.stages} == {
        s.name: "done" if s.name == "prepare" else "missing" for s in opened.stages
    }
    assert not (tmp_path / "run" / ".probe").exists()
    made = pipeline.run(settings, tmp_path / "run")
    assert afterwards(made) is not None

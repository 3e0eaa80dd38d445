"""The whole pipeline on real Ray with a tiny random LM: artifacts, skip and re-run rules, worker counts, object stores, SIGKILL."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from making.tasks import tiny, write_corpus, write_pair_regression
from transformers import AutoModel

from retrikt_ray import config, pipeline
from retrikt_ray.knowledge.knowledge import Knowledge
from retrikt_ray.predictor import Prediction
from retrikt_ray.runtime import artifacts
from retrikt_ray.runtime.folders import ArtifactError, Folder
from retrikt_ray.teacher.annotator import Annotator

REPO = Path(__file__).resolve().parents[1]
INTERRUPTED = signal.getsignal(signal.SIGINT)  # the handler before any run
SYSTEMS = {"retrikt", "student_kd_store", "student_kd_labels", "student_labels", "tfidf_store", "tfidf_labels", "majority"}


def test_ctrl_c_ends_what_follows_a_training(run: pipeline.Run) -> None:
    """Ray Train leaves a handler behind that swallows it."""
    assert signal.getsignal(signal.SIGINT) is INTERRUPTED


def test_every_artifact_is_sealed_and_verifies(run: pipeline.Run) -> None:
    for stage in run.stages:
        for name in stage.outputs:
            manifest = artifacts.check(run.artifact(name), deep=True)
            assert manifest.stage == stage.name and manifest.seconds > 0
        assert run.status(stage) == "done"
    assert not (Path(run.folder.uri) / ".scratch").exists() or not any((Path(run.folder.uri) / ".scratch").iterdir())


def test_report_has_the_contract(run: pipeline.Run) -> None:
    report = run.artifact("report").read_json("report.json")
    assert set(report["systems"]) == SYSTEMS
    for system in report["systems"].values():
        assert set(system) == {"score", "parameters", "latency_ms"} and set(system["score"]) == {"mean", "ci95", "per_seed"}
    assert report["seeds"] == [0] and report["metric"] == "accuracy" and report["rows"]["test"] == 24
    assert set(report["store"]) >= {"generated", "kept", "rejected"}
    store = report["store"]
    assert store["kept"] + sum(store["rejected"].values()) == 24 + 12 + 48  # task rows, unlabelled rows, generated rows
    assert {row["source"] for row in store["rows"]} == {"generated"} and len(store["rows"]) == min(20, store["by_source"]["generated"])
    assert set(store["off_task"]) == set(store["variety"]) == {"task", "unlabelled", "generated"}
    assert len(report["rl"]["steps"]) == 2 and {"fidelity", "diversity", "novelty", "domain", "fluency", "length"} <= set(
        report["rl"]["terms"]
    )
    means = {name: system["score"]["mean"] for name, system in report["systems"].items()}
    assert report["paired"].keys() == {"teacher", *means} - {"retrikt"}
    for name, gap in report["paired"].items():
        theirs = report["teacher"]["score"]["mean"] if name == "teacher" else means[name]
        assert gap["difference"] == pytest.approx(means["retrikt"] - theirs)
    assert b"<html" in run.artifact("report").read_bytes("report.html")


def test_what_rows_teach_is_ahead_of_the_majority_on_a_learnable_task(run: pipeline.Run) -> None:
    """The two classes have disjoint words, so a pipeline that mixed up rows or labels somewhere would show here. (The mixture follows a teacher of
    random weights, which knows hardly more than chance.)"""
    systems = run.artifact("report").read_json("report.json")["systems"]
    assert systems["tfidf_labels"]["score"]["mean"] > 0.9
    for name in ("student_labels", "student_kd_labels", "student_kd_store"):
        assert systems[name]["score"]["mean"] > systems["majority"]["score"]["mean"] + 0.1, name


def test_a_second_call_skips_everything(run: pipeline.Run) -> None:
    before = {n: Path(run.folder.uri, n, "manifest.json").stat().st_mtime_ns for s in run.stages for n in s.outputs}
    pipeline.run_all(run)
    assert before == {n: Path(run.folder.uri, n, "manifest.json").stat().st_mtime_ns for s in run.stages for n in s.outputs}


def test_a_changed_config_makes_its_stage_stale_and_scale_does_not(run: pipeline.Run) -> None:
    changed = pipeline.Run(run.folder, run.config.model_copy(update={"distill": run.config.distill.model_copy(update={"epochs": 2})}))
    states = {s.name: changed.status(s) for s in changed.stages}
    assert states["annotate"] == "done" and states["distill"] == "stale"
    scaled = pipeline.Run(run.folder, run.config.model_copy(update={"generate": run.config.generate.model_copy(update={"workers": 7})}))
    assert scaled.status(pipeline.BY_NAME["generate"]) == "done"


def test_a_row_without_a_label_is_labelled_by_the_adapters_of_the_run(run: pipeline.Run, tmp_path: Path, tiny_lm: str) -> None:
    """The teacher's folder holds no weight of the base, which is found where it was."""
    other = copied(run, tmp_path / "edited", keep=("task", "teacher", "store", "student", "index"))
    written = {f.name for f in (tmp_path / "edited" / "teacher" / "classifier").rglob("*.safetensors")}
    assert written == {"adapter_model.safetensors", "head.safetensors"}
    knowledge = Knowledge.open(other.folder)
    (code,) = knowledge.add([{"text": "storm and cake again"}])
    asked = Annotator.load(run.artifact("teacher")).annotate([("storm and cake again", None)])[0][0]
    found = knowledge.view.row(knowledge.view.find([code])[code])
    assert found["teacher_probs"] == pytest.approx(asked.tolist(), abs=1e-6)
    plain = AutoModel.from_pretrained(tiny_lm).num_parameters()
    assert run.artifact("report").read_json("report.json")["teacher"]["parameters"] == plain + 2 * (3 * 32) + 2  # and the head


def test_one_and_two_workers_make_the_same_store(run: pipeline.Run, tmp_path: Path) -> None:
    other = copied(run, tmp_path / "one", keep=("task", "teacher", "policy"))
    other = pipeline.Run(
        other.folder,
        run.config.model_copy(update={s: getattr(run.config, s).model_copy(update={"workers": 1}) for s in ("generate", "annotate")}),
    )
    pipeline.run_all(other, only="generate")
    two, one = run.artifact("generated"), other.artifact("generated")
    names = [n for n in two.files() if n.endswith(".parquet")]
    assert names == ["part-00000.parquet"] == [n for n in one.files() if n.endswith(".parquet")]
    assert all(two.read_bytes(n) == one.read_bytes(n) for n in names)
    pipeline.run_all(other, only="annotate")
    for name in ("store", "rejected"):
        assert other.artifact(name).read_tables().equals(run.artifact(name).read_tables())


def test_a_corpus_joins_a_run_that_is_finished(run: pipeline.Run, tmp_path: Path) -> None:
    """Only harvest and what hangs on it are redone; the corpus shows in the store; other files make it stale; without it all is as before."""
    other = copied(run, tmp_path / "more", keep=("task", "teacher", "policy", "generated", "store", "rejected"))
    prepare = run.config.prepare.model_copy(update={"corpus": str(write_corpus(tmp_path))})
    settings = run.config.model_copy(update={"prepare": prepare, "harvest": run.config.harvest.model_copy(update={"rows": 30})})
    assert "harvest" not in {stage.name for stage in other.stages} and other.status(pipeline.BY_NAME["annotate"]) == "done"
    other = pipeline.open_run(other.folder.uri, settings)
    assert [s.name for s in other.stages if other.status(s) == "done"] == ["prepare", "teach", "reinforce", "generate"]
    for stage in ("harvest", "annotate"):
        pipeline.run_all(other, only=stage)
    assert [other.status(pipeline.BY_NAME[name]) for name in ("harvest", "annotate")] == ["done", "done"]
    store = other.artifact("store")
    assert store.read_json("store.json")["by_source"]["corpus"] == store.read_tables()["source"].to_pylist().count("corpus") >= 28
    with (tmp_path / "corpus" / "a.txt").open("a") as corpus:
        corpus.write("One more line of text.\n")
    assert other.status(pipeline.BY_NAME["harvest"]) == "stale"
    pipeline.run_all(run, only="harvest")  # says that there is nothing to do
    assert not run.artifact("harvested").exists()


def test_a_corpus_that_cannot_serve_is_refused_before_anything_is_made(run: pipeline.Run, tmp_path: Path) -> None:
    def refused(task: str, corpus: str) -> str:
        prepare = run.config.prepare.model_copy(update={"corpus": corpus})
        made = pipeline.Run(Folder.at(tmp_path), run.config.model_copy(update={"prepare": prepare}))
        made.artifact("task").write_bytes("task.json", task.encode())
        with pytest.raises(ValueError) as error:
            pipeline.preflight(made)
        return str(error.value)

    card = run.artifact("task").read_bytes("task.json").decode()
    assert f"{tmp_path}/nothing: no such corpus" in refused(card, f"{tmp_path}/nothing")
    pairs = json.dumps(json.loads(card) | {"pair": True})
    assert "prepare.corpus: this task compares two texts" in refused(pairs, str(write_corpus(tmp_path)))


def test_the_python_of_the_texts_runs(run: pipeline.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """README's lines and docs/python.md's, one after the other, beside a config and a run that is finished."""
    (tmp_path / "my.yaml").write_bytes(Path(run, "config.yaml").read_bytes())
    monkeypatch.chdir(tmp_path)
    for page in ("README.md", "docs/python.md"):
        shutil.rmtree("runs", ignore_errors=True)
        shutil.copytree(run, "runs/mine")
        names: dict[str, object] = {}
        found = re.findall(r"```python\n(.*?)```", (REPO / page).read_text(), re.S)
        assert found
        for text in found:
            exec(compile(text, page, "exec"), names)
        answer = names["answer"]
        assert isinstance(answer, Prediction) and len(answer.labels) == len(answer.neighbours) > 0


def copied(run: pipeline.Run, target: Path, keep: tuple[str, ...]) -> pipeline.Run:
    """A run directory with only these artifacts of another."""
    target.mkdir()
    shutil.copy(Path(run.folder.uri) / "config.yaml", target)
    for name in keep:
        shutil.copytree(Path(run.folder.uri) / name, target / name)
    return pipeline.Run(Folder.at(target), run.config)


def test_an_altered_input_is_refused_before_anything_is_made_from_it(run: pipeline.Run, tmp_path: Path) -> None:
    other = copied(run, tmp_path / "altered", keep=("task", "teacher", "store", "student"))
    part = sorted(Path(other.folder.uri).glob("store/part-*.parquet"))[0]
    data = part.read_bytes()
    part.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])  # of the same size: only its SHA-256 tells
    with pytest.raises(ArtifactError, match=rf"{part.name} was altered.*Remove .*/store and run again: annotate"):
        pipeline.run_all(other, only="index")
    assert not other.artifact("index").exists()


def kill_and_resume(folder: Path, stage: str, begun: str) -> None:
    """Start the stage in a process of its own, SIGKILL it once a file matching `begun` is there, and run the same command again."""
    command = [sys.executable, "-m", "retrikt_ray", stage, str(folder)]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(folder.glob(begun)):
        assert first.poll() is None, f"{stage} ended before it could be killed"
        assert time.monotonic() < deadline, f"{stage} wrote nothing like {begun}"
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not list(folder.glob(f"{pipeline.BY_NAME[stage].outputs[0]}/manifest.json"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


def test_sigkill_in_generate_resumes_to_the_same_files(run: pipeline.Run, tmp_path: Path) -> None:
    other = copied(run, tmp_path / "killed", keep=("task", "teacher", "policy"))
    kill_and_resume(Path(other.folder.uri), "generate", ".scratch/generate-*/shard-*.parquet")
    assert artifacts.check(other.artifact("generated"), deep=True).content == artifacts.check(run.artifact("generated")).content


def test_sigkill_in_distill_resumes_to_the_same_weights(run: pipeline.Run, tmp_path: Path) -> None:
    other = copied(run, tmp_path / "killed", keep=("task", "teacher", "generated", "store"))
    kill_and_resume(Path(other.folder.uri), "distill", ".scratch/distill-*/student/checkpoint*/state.json")
    assert artifacts.check(other.artifact("student"), deep=True).content == artifacts.check(run.artifact("student")).content


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "keep", "begun"),
    [
        ("teach", ("task",), ".scratch/teach-*/prompt/checkpoint*/state.json"),
        ("teach", ("task",), ".scratch/teach-*/annotator/checkpoint*/state.json"),
        ("reinforce", ("task", "teacher"), ".scratch/reinforce-*/rloo/checkpoint*/state.json"),
        ("annotate", ("task", "teacher", "generated"), ".scratch/annotate-*/part-*.parquet"),
        ("index", ("task", "store", "student"), "index/ngrams.arrow"),
        ("evaluate", tuple(n for n in pipeline.MADE_BY if n not in ("harvested", "report")), "report/draft.json"),
    ],
)
def test_sigkill_in_the_other_stages(run: pipeline.Run, tmp_path: Path, stage: str, keep: tuple[str, ...], begun: str) -> None:
    other = copied(run, tmp_path / "killed", keep=keep)
    kill_and_resume(Path(other.folder.uri), stage, begun)
    output = pipeline.BY_NAME[stage].outputs[0]
    if stage == "evaluate":  # latencies differ from run to run
        scores = [r.artifact(output).read_json("report.json")["systems"] for r in (run, other)]
        assert {n: s["score"] for n, s in scores[0].items()} == {n: s["score"] for n, s in scores[1].items()}
    else:
        assert artifacts.check(other.artifact(output), deep=True).content == artifacts.check(run.artifact(output)).content


def made_twice(run: pipeline.Run, tmp_path: Path, settings: config.RunConfig, stage: str, begun: str) -> artifacts.Manifest:
    """Run a stage after teach undisturbed, and killed and resumed: what both made is the same."""
    whole, killed = (copied(run, tmp_path / name, keep=("task", "teacher")) for name in ("whole", "killed"))
    for other in (whole, killed):
        pipeline.open_run(other.folder.uri, settings)
    pipeline.run_all(pipeline.load_run(whole.folder.uri), only=stage)
    kill_and_resume(Path(killed.folder.uri), stage, begun)
    output = pipeline.BY_NAME[stage].outputs[0]
    made = artifacts.check(killed.artifact(output), deep=True)
    assert made.content == artifacts.check(whole.artifact(output)).content
    return made


@pytest.mark.slow
def test_sigkill_in_reinforcement_by_trl_resumes_to_the_same_prompt(run: pipeline.Run, tmp_path: Path) -> None:
    keys = {"algorithm": "grpo", "steps": 6}
    settings = run.config.model_copy(update={"reinforce": run.config.reinforce.model_copy(update=keys)})
    made_twice(run, tmp_path, settings, "reinforce", ".scratch/reinforce-*/grpo/checkpoint*/state.json")


@pytest.mark.slow
def test_sigkill_in_harvest_resumes_to_the_same_passages(run: pipeline.Run, tmp_path: Path) -> None:
    """12 MB: three pieces."""
    corpus, numbers = tmp_path / "large.txt", range(110_000)
    corpus.write_text(
        "".join(f"Minister {i} spoke of rain and snow. We saw {i % 997} cakes and {i} soups. So it was in {i}.\n" for i in numbers)
    )
    prepare = run.config.prepare.model_copy(update={"corpus": str(corpus)})
    settings = run.config.model_copy(update={"prepare": prepare, "harvest": run.config.harvest.model_copy(update={"candidates": 1500})})
    assert made_twice(run, tmp_path, settings, "harvest", ".scratch/harvest-*/sifted-*.parquet").rows["part"] > 500


def test_pairs_and_regression_with_an_encoder_on_an_object_store(
    cluster: None, s3: str, tiny_lm: str, tiny_encoder: str, tmp_path: Path
) -> None:
    """STS-B style, two training workers, a transformer student, and a run directory that is a URI."""
    data = write_pair_regression(tmp_path / "data")
    prepare = {"data": str(data), "problem": "regression", "text_column": "a", "text_pair_column": "b", "label_column": "score"}
    more = {
        "teach": {"annotator": tiny_encoder, "workers": 2, "cpus_per_worker": 1},
        "reinforce": {"workers": 2, "cpus_per_worker": 1, "steps": 1},
        "generate": {"rows": 24},
        "distill": {"kind": "transformer", "size": 1.0, "workers": 2, "cpus_per_worker": 1, "batch": 16},
        "index": {"factory": "IVF2,Flat", "shards": 3},
        "evaluate": {"store_fractions": [], "baselines": False},
    }
    text = yaml.safe_dump(tiny(tiny_lm, prepare=prepare, **more))
    run = pipeline.open_run(f"{s3}/pairs", config.parse(text, "test"))
    pipeline.run_all(run)
    report = run.artifact("report").read_json("report.json")
    assert report["metric"] == "pearson" and set(report["systems"]) == {"retrikt", "student_kd_store"}
    assert -1 <= report["systems"]["retrikt"]["score"]["mean"] <= 1
    store = run.artifact("store").read_tables(columns=["text_pair", "teacher_probs"]).to_pylist()
    assert all(r["text_pair"] and len(r["teacher_probs"]) == 1 for r in store)
    assert json.loads(run.artifact("index").read_bytes("index.json"))["factory"] == "IVF2,Flat"
    from retrikt_ray.predictor import Predictor

    found = Predictor.open(run.folder).predict([("the rain was here today", "the sun was here today")])
    assert found.dense is not None and found.answers.shape == (1, 1) and (found.dense.positions >= 0).any()

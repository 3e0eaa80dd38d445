"""`ray job submit` against a local head node, as a user would: working directory, excludes, exit code, logs."""

from __future__ import annotations

import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from making.ports import free_ports
from making.tasks import tiny, write_task

from retrikt_ray.pipeline import STAGES

REPO = Path(__file__).resolve().parent.parent
RAY = str(Path(sys.executable).parent / "ray")


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A head node with a dashboard on free loopback ports, in a process group of its own, so that only it is ended. Yields its environment.

    Three CPUs: one for the worker of a stage and the two that a cluster keeps to spare. Every process that Ray starts takes a second of CPU to
    begin, and that is nearly all that these tests cost.
    """
    gcs, dashboard, agent = free_ports(3)
    env = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
    env.pop("RAY_ADDRESS", None)
    command = [RAY, "start", "--head", "--block", "--num-cpus=3", f"--port={gcs}", "--node-ip-address=127.0.0.1"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    sockets = tempfile.mkdtemp(prefix="head-")  # a path of pytest's own would be too long for the name of a socket
    command += [f"--temp-dir={sockets}", "--disable-usage-stats"]
    log = tmp_path_factory.mktemp("head") / "head.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        wait_until_up(f"http://127.0.0.1:{dashboard}", process, log)
        yield env | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}", "RAY_ADDRESS": f"127.0.0.1:{gcs}"}
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # nothing of it is kept; SIGTERM to the group takes until its timeout
        process.wait()
        shutil.rmtree(sockets, ignore_errors=True)


def wait_until_up(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    import httpx

    deadline = time.monotonic() + 90
    while True:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        try:
            if httpx.get(f"{address}/api/version", timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, tiny_lm: str) -> Path:
    """A working directory as a user has it: the package, the jobs, a config, and a file in runs/ that must not travel.

    The config asks for as little as each stage will take: what the stages make of it is for the tests of the pipeline.
    """
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("retrikt_ray", "jobs"):
        shutil.copytree(REPO / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    config = tiny(
        tiny_lm,
        prepare={"data": str(write_task(folder / "data")), "n_per_class": 8},
        reinforce={"steps": 0},
        generate={"rows": 16, "rows_per_shard": 16},
        evaluate={"baselines": False, "store_fractions": []},
    )
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    (folder / "runs").mkdir()
    (folder / "runs" / "large.bin").write_bytes(os.urandom(1000))
    return folder


def submission(env: dict[str, str], *entrypoint: str) -> list[str]:
    """What a user types in the checkout."""
    command = [RAY, "job", "submit", "--address", env["RAY_API_SERVER_ADDRESS"], "--working-dir", "."]
    return [*command, '--runtime-env-json={"excludes": ["runs", ".git", ".venv"]}', "--", *entrypoint]


@pytest.fixture(scope="module")
def whole_run(head: dict[str, str], checkout: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The whole run as a job, which writes whole.log and run/ in the checkout's runs/.

    Begun by the first test and looked at by the last: much of it is waiting for one process of Ray after the other, and what the tests between
    them ask of the cluster goes on beside it.
    """
    command = submission(head, sys.executable, "jobs/run.py", "tiny.yaml", "--out", str(checkout / "runs" / "run"))
    with open(checkout / "runs" / "whole.log", "wb") as log:
        process = subprocess.Popen(command, cwd=checkout, env=head, stdout=log, stderr=subprocess.STDOUT)
    yield process
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def failed(head: dict[str, str], checkout: Path, whole_run: subprocess.Popen[bytes]) -> subprocess.CompletedProcess[str]:
    """A job that lists its working directory and then runs a stage on a run that is not there, beside the whole run."""
    command = submission(head, "sh", "-c", f"ls && exec {sys.executable} jobs/stage.py generate nothing")
    return subprocess.run(command, cwd=checkout, env=head, capture_output=True, text=True)


def test_a_failing_job_fails_and_says_why(failed: subprocess.CompletedProcess[str]) -> None:
    assert failed.returncode == 1
    assert "nothing is not a run directory" in failed.stdout + failed.stderr


def test_excluded_files_do_not_travel(failed: subprocess.CompletedProcess[str]) -> None:
    listed = failed.stdout.splitlines()
    assert {"data", "jobs", "retrikt_ray", "tiny.yaml"} <= set(listed) and "runs" not in listed


def run_stage_job(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[list[str]]:
    """Run jobs/stage.py in this process; what it gave to the command, call by call."""
    calls: list[list[str]] = []
    monkeypatch.setattr("retrikt_ray.cli.main", calls.append)
    monkeypatch.setattr(sys, "argv", ["jobs/stage.py", *arguments])
    monkeypatch.setattr(sys, "path", list(sys.path))
    runpy.run_path(str(REPO / "jobs" / "stage.py"), run_name="__main__")
    return calls


@pytest.mark.parametrize("stage", [stage.name for stage in STAGES])
def test_a_stage_is_handed_to_the_command_as_it_is(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    arguments = [stage, "s3://bucket/run", "distill.epochs=3"]
    assert run_stage_job(monkeypatch, *arguments) == [arguments]


@pytest.mark.parametrize("arguments", [["generat", "runs/mine"], ["run", "--out", "runs/mine"], []])
def test_what_is_no_stage_is_refused_with_a_list_of_them(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        run_stage_job(monkeypatch, *arguments)
    said = refused.value.code
    assert isinstance(said, str)  # which Python prints to stderr, with exit code 1
    assert all(stage.name in said for stage in STAGES) and (arguments or ["nothing"])[0] in said


def test_a_base_model_is_trained_from_text_files(head: dict[str, str], tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    nouns = ["cat", "dog", "sun"] * 60
    texts.write_text("\n".join(f"the {noun} of number {i} is {'red' if i % 2 else 'blue'}" for i, noun in enumerate(nouns)))
    out = tmp_path / "lm"
    sizes = ["--tokens=4000", "--hidden=64", "--layers=1", "--vocabulary=300", "--batch=4", "--window=32"]
    command = [sys.executable, "jobs/train_base.py", "--out", str(out), *sizes, str(texts)]
    done = subprocess.run(command, cwd=REPO, env=head, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.vocab_size == len(tokenizer) and tokenizer.eos_token_id == 2
    result = json.loads((out / "training.json").read_text())
    assert result["held_out_loss"] < math.log(len(tokenizer)) - 1  # far better than a uniform guess


def test_the_whole_run_as_a_job(whole_run: subprocess.Popen[bytes], checkout: Path) -> None:
    code = whole_run.wait(timeout=400)
    said = (checkout / "runs" / "whole.log").read_text()
    assert code == 0, said
    assert "succeeded" in said
    for stage in STAGES:
        assert re.search(rf"{stage.name} +\d+\.\d s", said), f"no line for {stage.name}:\n{said}"
    assert (checkout / "runs" / "run" / "report" / "report.json").exists()

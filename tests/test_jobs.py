"""`ray job submit` against a local head node, as a user would: working directory, excludes, exit code, logs."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from making.tasks import tiny, write_task

REPO = Path(__file__).resolve().parent.parent
RAY = str(Path(sys.executable).parent / "ray")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A head node with a dashboard on free loopback ports, in the foreground of a process group of its own, so that only it is ended."""
    gcs, dashboard, agent = free_ports(3)
    env = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", "OMP_WAIT_POLICY": "PASSIVE"}
    env.pop("RAY_ADDRESS", None)
    command = [RAY, "start", "--head", "--block", "--num-cpus=4", f"--port={gcs}", "--node-ip-address=127.0.0.1"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    command += [f"--temp-dir={tmp_path_factory.mktemp('ray')}", "--disable-usage-stats"]
    log = open(tmp_path_factory.mktemp("head") / "head.log", "w")  # noqa: SIM115 - closed below
    process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    import httpx

    deadline = time.monotonic() + 90
    while True:
        try:
            if httpx.get(f"{address}/api/version", timeout=2).status_code == 200:
                break
        except httpx.HTTPError:
            pass
        assert process.poll() is None and time.monotonic() < deadline, Path(log.name).read_text()
        time.sleep(0.3)
    yield env | {"RAY_API_SERVER_ADDRESS": address}
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(timeout=8)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    log.close()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, tiny_lm: str) -> Path:
    """A working directory as a user has it: the package, the jobs, a config, and a large file that must not travel."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(REPO / "retrikt_ray", folder / "retrikt_ray", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPO / "jobs", folder / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
    data = write_task(folder / "data")
    config = tiny(tiny_lm, prepare={"data": str(data), "n_per_class": 8})
    config["evaluate"]["store_fractions"] = []
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    (folder / "runs").mkdir()
    (folder / "runs" / "large.bin").write_bytes(os.urandom(1000))
    return folder


def submit(env: dict[str, str], checkout: Path, *entrypoint: str) -> subprocess.CompletedProcess[str]:
    excludes = '{"excludes": ["runs", ".git", ".venv"]}'
    command = [
        RAY,
        "job",
        "submit",
        "--address",
        env["RAY_API_SERVER_ADDRESS"],
        "--working-dir",
        ".",
        f"--runtime-env-json={excludes}",
        "--",
        *entrypoint,
    ]
    return subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, timeout=400)


def test_the_whole_run_as_a_job(head: dict[str, str], checkout: Path, tmp_path: Path) -> None:
    done = submit(head, checkout, sys.executable, "jobs/run.py", "tiny.yaml", "--out", str(tmp_path / "run"))
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "succeeded" in said
    for stage in ("prepare", "teach", "reinforce", "generate", "annotate", "distill", "index", "evaluate"):
        assert re.search(rf"{stage} +\d+\.\d s", said), f"no line for {stage}:\n{said}"
    assert (tmp_path / "run" / "report" / "report.json").exists()


def test_a_failing_job_fails_and_says_why(head: dict[str, str], checkout: Path, tmp_path: Path) -> None:
    done = submit(head, checkout, sys.executable, "jobs/4_generate.py", str(tmp_path / "nothing"))
    assert done.returncode == 1
    assert "is not a run directory" in done.stdout + done.stderr


def test_excluded_files_do_not_travel(head: dict[str, str], checkout: Path) -> None:
    done = submit(head, checkout, sys.executable, "-c", "import os; print('there:', sorted(os.listdir('.')))")
    line = next(x for x in done.stdout.splitlines() if x.startswith("there:"))
    assert "jobs" in line and "runs" not in line


def test_a_base_model_is_trained_from_text_files(tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text(
        "\n".join(f"the {word} of number {i} is {'red' if i % 2 else 'blue'}" for i, word in enumerate(["cat", "dog", "sun"] * 60))
    )
    out = tmp_path / "lm"
    sizes = ["--tokens=4000", "--hidden=64", "--layers=1", "--vocabulary=300", "--batch=4", "--window=32"]
    env = os.environ | {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
    done = subprocess.run(
        [sys.executable, "jobs/train_base.py", "--out", str(out), *sizes, str(texts)], cwd=REPO, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.vocab_size == len(tokenizer) and tokenizer.eos_token_id == 2
    result = json.loads((out / "training.json").read_text())
    assert result["held_out_loss"] < math.log(len(tokenizer)) - 1  # far better than a uniform guess

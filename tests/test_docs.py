"""The texts that users follow: README commands, shipped configs, and the generated key list stay true."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from retrikt_ray import config
from retrikt_ray.bench import settings
from retrikt_ray.cli import main

REPO = Path(__file__).resolve().parent.parent
TEXTS = [REPO / "README.md", *sorted(REPO.glob("docs/*.md")), *sorted(REPO.glob("*/README.md"))]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.S)


def commands(prefix: str) -> list[str]:
    """Command lines of all shell blocks that start with `prefix`, without comments."""
    lines = [line.split("  #")[0].strip() for path in TEXTS for block in blocks(path, "sh") for line in block.splitlines()]
    return sorted({line for line in lines if line.removeprefix(".venv/bin/").startswith(prefix)})


def test_the_key_list_is_up_to_date() -> None:
    assert (REPO / "docs" / "configuration.md").read_text() == config.documentation(), "run `make docs`"


BENCHES = {"bench.yaml", "bench_arms.yaml", "bench_corpus.yaml"}
CONFIGS = sorted(p for p in (*REPO.glob("jobs/*.yaml"), *REPO.glob("retrikt_ray/quickstart/*.yaml")) if p.name not in BENCHES)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_shipped_config_loads(path: Path) -> None:
    assert config.load(str(path)).prepare.data


def test_the_shipped_bench_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETRIKT_DATA", "/somewhere")
    monkeypatch.setenv("RETRIKT_ENCODER", "/an/encoder")
    for name in BENCHES:
        bench = settings.load(str(REPO / "jobs" / name))
        runs = {task: bench.run_config(task, 3) for task in bench.tasks}
        trec = runs["trec-prompt" if name == "bench_arms.yaml" else "trec"]
        assert trec.prepare.data == "/somewhere/data/trec" and trec.seed == 3
        assert {run.teach.annotator for run in runs.values()} == {"/an/encoder"}


def test_configs_in_the_texts_load() -> None:
    found = [b for path in TEXTS for b in blocks(path, "yaml") if re.search(r"^(prepare|teach|distill):", b, re.M)]
    assert found
    for text in found:
        config.parse(text, "README")


def test_make_targets_in_the_texts_exist() -> None:
    found = {
        word for path in TEXTS for word in re.findall(r"make ([a-z][a-z0-9-]*)", path.read_text()) if word not in ("it", "them", "sure")
    }
    assert {"quickstart", "test"} <= found
    for target in sorted(found):
        done = subprocess.run(["make", "-n", target], cwd=REPO, capture_output=True, text=True)
        assert done.returncode == 0, f"make {target}: {done.stderr}"


def test_retrikt_commands_in_the_texts_parse() -> None:
    """Every command is parsed by the real command line, which stops short of doing it."""
    found = commands("retrikt ")
    assert any("serve" in c for c in found) and any("predict" in c for c in found)
    for line in found:
        _, name, *arguments = shlex.split(line.removeprefix(".venv/bin/"))
        command = main.get_command(click.Context(main), name)
        assert command is not None, f"retrikt {name}"
        command.make_context(name, list(arguments), resilient_parsing=False)
        assert CliRunner().invoke(main, [name, "--help"]).exit_code == 0


def test_files_in_the_readme_exist() -> None:
    """The tree names every package and module, and nothing else."""
    tree = re.search(r"## Files\n\n```\n(.*?)```", (REPO / "README.md").read_text(), re.S)
    assert tree
    package = REPO / "retrikt_ray"
    top, _, rest = tree.group(1).partition("  runtime/")
    assert set(re.findall(r"[a-z_]+\.py", top)) == {p.name for p in package.glob("*.py") if not p.name.startswith("__")}
    for line in f"  runtime/{rest}".splitlines():
        name, words = line.split("/")[0].strip(), set(re.findall(r"[a-z_]+(?:\.html)?", line))
        assert (REPO / name).exists() or (package / name).exists(), f"README names {name}/"
        if line.startswith("  ") and name != "quickstart":
            modules = {p.name.removesuffix(".py") for p in (package / name).iterdir() if p.suffix in (".py", ".html")} - {"__init__"}
            assert modules <= words, f"README's line of {name}/ lacks {modules - words}"
    folders = {p.parent.name for p in package.glob("*/__init__.py")}
    assert folders <= set(re.findall(r"^  ([a-z]+)/", rest, re.M)) | {"runtime"}


def test_embedded_model_is_small_enough_to_ship() -> None:
    assert sum(f.stat().st_size for f in (REPO / "retrikt_ray" / "quickstart" / "model").iterdir()) < 15e6

"""The wheel, as a user gets it: every file of the package is in it, and the command works where there is no checkout.

The new environment has the wheel and nothing else of ours. It sees the libraries of the running one by a path file; such a path is not searched for path
files of its own, so that this checkout, installed there as editable, stays out of sight.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

import retrikt_ray

REPO = Path(__file__).resolve().parent.parent
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
# What an installer writes into bin/retrikt: load the entry point and call it.
RETRIKT = "from importlib.metadata import entry_points; (entry,) = entry_points(group='console_scripts', name='retrikt'); entry.load()()"


def files_of(package: Path) -> set[str]:
    return {str(p.relative_to(package)) for p in package.rglob("*") if p.is_file() and p.suffix != ".pyc"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package and the files beside it, without what an earlier build or run left."""
    folder = tmp_path_factory.mktemp("sources")
    shutil.copytree(REPO / "retrikt_ray", folder / "retrikt_ray", ignore=shutil.ignore_patterns("__pycache__"))
    for path in REPO.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    return folder


@dataclass(frozen=True)
class Installed:
    """The wheel in an environment of its own, and a folder elsewhere to run in."""

    site: Path
    python: Path
    home: Path

    def run(self, *arguments: str) -> str:
        """Standard output of its Python."""
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS", "VIRTUAL_ENV")}
        env["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # a process less to start for each training
        done = subprocess.run([self.python, *arguments], cwd=self.home, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def retrikt(self, *arguments: str) -> str:
        return self.run("-c", RETRIKT, *arguments)


@pytest.fixture(scope="module")
def installed(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", folder / "dist", "."], cwd=sources, check=True)
    venv.create(folder / "venv", symlinks=True)
    paths = sysconfig.get_paths(vars={"base": str(folder / "venv"), "platbase": str(folder / "venv")})
    site = Path(paths["purelib"])
    (wheel,) = (folder / "dist").glob("*.whl")
    subprocess.run([*PIP, "install", "--no-deps", "--no-index", "--target", site, wheel], check=True)
    (site / "libraries.pth").write_text("\n".join(sorted({sysconfig.get_path(kind) for kind in ("purelib", "platlib")})))
    (folder / "home").mkdir()
    return Installed(site, Path(paths["scripts"]) / "python", folder / "home")


def test_the_wheel_has_every_file_of_the_package_and_no_other(sources: Path, installed: Installed) -> None:
    assert files_of(installed.site / "retrikt_ray") == files_of(sources / "retrikt_ray")


def test_the_new_environment_runs_the_wheel_and_not_this_checkout(installed: Installed) -> None:
    where = Path(installed.run("-c", "import retrikt_ray; print(retrikt_ray.__file__)").strip())
    assert where == installed.site / "retrikt_ray" / "__init__.py"
    assert retrikt_ray.__version__ in installed.retrikt("--version")


def test_the_quick_start_begins_without_a_checkout(installed: Installed) -> None:
    """Its first two stages, which read the packaged config, task and language model; the second in Ray's own processes."""
    assert "prepare" in installed.retrikt("prepare", "run", "prepare.n_per_class=2")
    quick = ["teach.prompt_epochs=1", "teach.annotator_epochs=1", "teach.max_tokens=16"]
    assert "teach" in installed.retrikt("teach", "run", *quick)
    assert {"task", "teacher"} <= {p.parent.name for p in installed.home.glob("run/*/manifest.json")}

"""The structure of the package: imports run one way, without circles; packages and modules stay small; importing it is quick."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from retrikt_ray.pipeline import STAGES

PACKAGE = Path(__file__).resolve().parents[1] / "retrikt_ray"
BELOW = ("runtime", "task", "teacher")  # what every stage builds on, from below
MAY_IMPORT = {  # beside itself; a module of the top level is a place of its own. policy, store and student meet only in artifacts
    "runtime": (),
    "task": ("runtime",),
    "teacher": ("runtime", "task"),
    "policy": BELOW,
    "store": BELOW,
    "student": BELOW,
    "index": (*BELOW, "store", "student"),
    "knowledge": (*BELOW, "store", "student", "index"),
    "predictor": (*BELOW, "store", "student", "index", "knowledge"),
    "report": (*BELOW, "store", "student", "index", "knowledge", "predictor"),
    "serving": (*BELOW, "store", "student", "index", "knowledge", "predictor", "__init__"),  # __init__: the version
    "config": ("runtime", "task", "teacher", "policy", "store", "student", "index", "report"),
    "bench": (*BELOW, "store", "student", "index", "knowledge", "report", "config", "pipeline"),
    "export": (*BELOW, "student", "index", "knowledge", "predictor", "report", "__init__"),
    "estimate": ("runtime", "task", "student", "config", "pipeline"),
    "pipeline": ("runtime", "task", "config", "report"),
    "client": ("serving",),  # the types of the API
    "__init__": ("client", "config", "pipeline", "predictor", "knowledge"),  # the public face
    "store_cli": ("runtime", "task", "store", "index", "knowledge", "predictor", "pipeline"),
    "cli": (
        "runtime",
        "task",
        "report",
        "predictor",
        "serving",
        "config",
        "pipeline",
        "bench",
        "estimate",
        "export",
        "store_cli",
        "__init__",
    ),
    "__main__": ("cli",),
}
MODULES = {path.relative_to(PACKAGE.parent).with_suffix("").as_posix().replace("/", "."): path for path in sorted(PACKAGE.rglob("*.py"))}


def place(module: str) -> str:
    """The package of a module, or the module itself at the top level."""
    return module.split(".")[1]


def imported(path: Path) -> Iterator[str]:
    """The package's own modules that a file imports: at the top, inside functions, and for type checking alone."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written in full"
            names = [f"{node.module}.{a.name}" for a in node.names]
        for name in names:
            if name.split(".")[0] != "retrikt_ray":
                continue
            candidates = (name, name.rpartition(".")[0])
            found = next((m for c in candidates for m in (c, f"{c}.__init__") if m in MODULES), None)
            assert found, f"{path} imports {name}, which is not there"
            yield found


ARROWS = {module: set(imported(path)) - {module} for module, path in MODULES.items()}


def test_imports_run_upward() -> None:
    wrong = [
        f"{module} imports {other}"
        for module, others in ARROWS.items()
        for other in others
        if place(other) != place(module) and place(other) not in MAY_IMPORT[place(module)]
    ]
    assert not wrong


def test_there_are_no_circles() -> None:
    """Modules whose imports were all seen are taken away until nothing is left; what is left lies on a circle, or above one."""
    left = {module: set(others) for module, others in ARROWS.items()}
    while free := [module for module, others in left.items() if not others & left.keys()]:
        for module in free:
            del left[module]
    assert not left


def test_a_stage_imports_no_other_stage() -> None:
    stages = {f"retrikt_ray.{stage.package}.{stage.name}" for stage in STAGES}
    assert stages <= MODULES.keys()
    for module in stages:
        assert not ARROWS[module] & (stages - {module})


def test_packages_are_empty_and_small() -> None:
    for init in PACKAGE.rglob("*/__init__.py"):
        assert init.read_text() == "", f"{init} pulls modules in that its importers may not want"
        names = [p.name for p in init.parent.glob("*.py") if p != init]
        assert len(names) <= 9, f"{init.parent.name} has {len(names)} modules"


@pytest.mark.parametrize("module", MODULES)
def test_modules_and_functions_are_short(module: str) -> None:
    text = MODULES[module].read_text()
    assert len(text.splitlines()) <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None and node.end_lineno - node.lineno < 80, f"{node.name} is too long"


def test_importing_the_package_is_quick_and_light() -> None:
    code = "import sys, time; t = time.perf_counter(); import retrikt_ray; s = time.perf_counter() - t; print(s, *sys.modules)"
    seconds, *modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert float(seconds) < 0.1
    assert not {"torch", "ray", "numpy", "pydantic"} & set(modules)


def test_the_config_and_the_command_do_without_torch() -> None:
    code = "import sys; import retrikt_ray.config, retrikt_ray.pipeline, retrikt_ray.cli; print(*sys.modules)"
    began = time.perf_counter()
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert time.perf_counter() - began < 5
    assert not {"torch", "transformers", "ray"} & set(modules)


def test_the_public_face() -> None:
    import retrikt_ray

    assert set(retrikt_ray.__all__) == set(retrikt_ray.HOMES) <= set(dir(retrikt_ray))
    for name in retrikt_ray.__all__:
        assert getattr(retrikt_ray, name).__name__ == name
    with pytest.raises(AttributeError, match="'Student'"):
        retrikt_ray.Student  # noqa: B018

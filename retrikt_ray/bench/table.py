"""What a bench found, as Markdown: scores by task, and paired differences with their intervals."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean
from typing import Any

from retrikt_ray.task.metrics import seeds_ci95

OURS = "retrikt"
Scores = dict[tuple[str, int], dict[str, float]]  # (task, seed) -> system -> score


def by_run(cells: Iterable[dict[str, Any]], protocol: str) -> Scores:
    """Scores x 100 of a protocol."""
    found: Scores = {}
    for cell in cells:
        if cell["protocol"] == protocol:
            scores = {name: 100 * value for name, value in cell["scores"].items()}
            found.setdefault((cell["task"], cell["seed"]), {}).update(scores)
    return found


def differences(scores: Scores, other: str) -> list[float]:
    """Ours less another system's, by task and seed."""
    return [s[OURS] - s[other] for _, s in sorted(scores.items()) if {OURS, other} <= s.keys()]


def shown(value: float, half: float) -> str:
    return f"{value:.1f}" if half != half else f"{value:.1f} ± {half:.1f}"


def markdown(cells: list[dict[str, Any]], protocol: str) -> str:
    """One table of a protocol: a line a system, a column a task; mean over the seeds, and over tasks; ours less the system's."""
    scores = by_run(cells, protocol)
    tasks = list(dict.fromkeys(task for task, _ in scores))
    systems = list(dict.fromkeys(name for found in scores.values() for name in found))
    numbers: dict[str, list[int]] = {}
    for cell in cells:
        for name, count in cell["numbers"].items() if cell["protocol"] == protocol else ():
            numbers.setdefault(name, []).append(count)
    lines = ["| system | " + " | ".join(tasks) + f" | mean | {OURS} less this | numbers |", "|---" * (len(tasks) + 4) + "|"]
    for name in systems:
        columns = [[s[name] for (task, _), s in scores.items() if task == column and name in s] for column in tasks]
        values = [shown(fmean(c), seeds_ci95(c)) if c else "-" for c in columns]
        gaps = differences(scores, name)
        gap = "" if name == OURS else shown(fmean(gaps), seeds_ci95(gaps)) if gaps else "-"
        mean = f"{fmean(fmean(c) for c in columns if c):.1f}" if all(columns) else "-"
        lines.append(f"| {name} | " + " | ".join(values) + f" | {mean} | {gap} | {round(fmean(numbers[name])):,} |")
    return "\n".join(lines)


def markdown_all(cells: list[dict[str, Any]]) -> str:
    """All protocols of a bench."""
    seeds = sorted({cell["seed"] for cell in cells})
    head = f"Scores x 100 on test, mean and 95 % interval over the seeds {', '.join(map(str, seeds))}; differences are paired by task and seed."
    parts = [f"### {protocol}\n\n{markdown(cells, protocol)}" for protocol in dict.fromkeys(cell["protocol"] for cell in cells)]
    return "\n\n".join([head, *parts]) + "\n"

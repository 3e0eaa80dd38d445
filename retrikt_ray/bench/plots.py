"""What a bench found, a plot a question: RetriKT less other systems, as points with their intervals (SVG, no library)."""

from __future__ import annotations

from html import escape
from statistics import fmean
from typing import Any

from retrikt_ray.bench.table import OURS, by_run, differences
from retrikt_ray.task.metrics import seeds_ci95

QUESTIONS: dict[
    str, tuple[str, tuple[str, ...]]
] = {  # file: the question, and the systems that it is about, by the beginning of their names
    "cheaper": (
        "How far ahead is RetriKT of cheaper ways to spend the same teacher?",
        ("student_", "tfidf_", "static_", "ensemble", "majority"),
    ),
    "teacher": ("How far behind its teacher?", ("teacher", "setfit", "model")),
    "voices": ("What does each voice, and fitting on held-out rows, add?", ("no_", "gold_fit", "student_kd_store")),
    "student": ("What does each part and loss of the student add?", ("loss_", "kind_")),
    "size": ("What does a student of another size, or a part of the store, cost?", ("size_", "store_")),
}
WIDTH, LEFT, ROW, TOP = 760, 170, 22, 54


def plots(cells: list[dict[str, Any]]) -> dict[str, str]:
    """SVG by name, PROTOCOL-QUESTION, of the questions that the cells answer."""
    found = {}
    for protocol in dict.fromkeys(cell["protocol"] for cell in cells):
        scores = by_run(cells, protocol)
        systems = list(dict.fromkeys(name for run in scores.values() for name in run if name != OURS))
        for question, (title, begins) in QUESTIONS.items():
            gaps = {name: gap for name in systems if name.startswith(begins) and (gap := differences(scores, name))}
            if gaps:
                found[f"{protocol}-{question}"] = intervals(f"{title} ({protocol})", gaps)
    return found


def intervals(title: str, gaps: dict[str, list[float]]) -> str:
    """A line a system: its mean difference in points, with the 95 % interval over tasks and seeds; each run as a small point."""
    halves = {name: half if (half := seeds_ci95(gap)) == half else 0.0 for name, gap in gaps.items()}
    ends = (
        [fmean(gap) + sign * halves[name] for name, gap in gaps.items() for sign in (-1, 1)]
        + [v for gap in gaps.values() for v in gap]
        + [0.0]
    )
    low, high = min(ends), max(ends)
    scale = (WIDTH - LEFT - 90) / max(high - low, 1e-9)

    def x(value: float) -> float:
        return round(LEFT + (value - low) * scale, 1)

    height = TOP + ROW * len(gaps) + 14
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/><text x="10" y="20" font-size="14">{escape(title)}</text>',
        f'<text x="10" y="38" fill="#666">{OURS} less the system, points; mean and 95 % interval over tasks and seeds</text>',
        f'<line x1="{x(0)}" x2="{x(0)}" y1="{TOP - 8}" y2="{height - 10}" stroke="#999"/>',
    ]
    for i, (name, gap) in enumerate(gaps.items()):
        y, mean, half = TOP + ROW * i + 8, fmean(gap), halves[name]
        parts.append(f'<text x="{LEFT - 12}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        parts += [f'<circle cx="{x(value)}" cy="{y}" r="2" fill="#bbb"/>' for value in gap]
        parts.append(f'<line x1="{x(mean - half)}" x2="{x(mean + half)}" y1="{y}" y2="{y}" stroke="#1f5fa8" stroke-width="2"/>')
        parts.append(f'<circle cx="{x(mean)}" cy="{y}" r="4" fill="#1f5fa8"/>')
        parts.append(f'<text x="{WIDTH - 10}" y="{y + 4}" text-anchor="end">{mean:+.1f}</text>')
    return "".join(parts) + "</svg>\n"

"""The report of a run as one HTML page, and the merging of several seeds' reports into one.

The page needs no network and no script: styles and figures are inside it. Figures are drawn in placeholder colours that become CSS
variables, so that they follow the reader's light or dark scheme.
"""

from __future__ import annotations

import io
import re
from importlib.resources import files
from statistics import fmean
from typing import Any

from jinja2 import Environment
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from retrikt_ray.index.mixture import NAMES
from retrikt_ray.report.systems import BY_NAME
from retrikt_ray.task.metrics import seeds_ci95

METRICS = {"macro_f1": "macro F1", "matthews": "Matthews correlation", "pearson": "Pearson correlation", "spearman": "Spearman correlation"}
INK, MUTED, LINE, ACCENT, WARM = "#010101", "#020202", "#030303", "#040404", "#050505"
VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)", ACCENT: "var(--accent)", WARM: "var(--warm)"}
STYLE: dict[Any, Any] = {"svg.fonttype": "none", "text.parse_math": False, "font.size": 8, "axes.grid": True, "axes.axisbelow": True}
STYLE |= {"figure.constrained_layout.use": True, "figure.figsize": (4.2, 3), "axes.spines.top": False, "axes.spines.right": False}
STYLE |= dict.fromkeys(("xtick.major.size", "ytick.major.size", "xtick.minor.size", "ytick.minor.size"), 0) | {"text.color": INK}
STYLE |= dict.fromkeys(("axes.labelcolor", "xtick.color", "ytick.color"), MUTED) | dict.fromkeys(("axes.edgecolor", "grid.color"), LINE)


def merge(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """One report of several seeds of the same task.

    Scores get the mean over seeds and the half-width of Student's 95 % t interval; parameters and latency (ms) get their mean. What
    belongs to a single run (examples, curves, store, seconds) is the first report's. Raises ValueError for reports that differ.
    """
    for what in ("task", "metric", "systems"):
        found = sorted({", ".join(sorted(r[what])) if what == "systems" else r[what] for r in reports})
        if len(found) != 1:
            raise ValueError(f"the reports differ in {what}: found {' and '.join(map(repr, found)) or 'no report'}, expected one")
    seeds = [seed for r in reports for seed in r["seeds"]]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"the reports repeat a seed: found {seeds}; a run counted twice would make the interval too narrow")
    first = reports[0]
    if len(reports) == 1:
        return first
    systems = {name: _merge_system([r["systems"][name] for r in reports]) for name in first["systems"]}
    teacher = first["teacher"] | _merge_system([r["teacher"] for r in reports])
    ours, paired = systems["retrikt"]["score"]["per_seed"], {}
    for name in first["paired"]:
        theirs = (systems | {"teacher": teacher})[name]["score"]["per_seed"]
        gap = _over_seeds([a - b for a, b in zip(ours, theirs, strict=True)])
        paired[name] = {"difference": gap["mean"], "ci95": gap["ci95"]}
    return first | {"seeds": seeds, "teacher": teacher, "systems": systems, "paired": paired, "ci95_of": "seeds"}


def _merge_system(runs: list[dict[str, Any]]) -> dict[str, Any]:
    score = _over_seeds([s for run in runs for s in run["score"]["per_seed"]])
    parameters, latency = (fmean(run[key] for run in runs) for key in ("parameters", "latency_ms"))
    return {"score": score, "parameters": round(parameters), "latency_ms": latency}


def _over_seeds(values: list[float]) -> dict[str, Any]:
    return {"mean": fmean(values), "ci95": seeds_ci95(values), "per_seed": values}


def render(report: dict[str, Any]) -> str:
    """The report (content of report.json) as a self-contained HTML page; optional parts that are missing or empty are left out."""
    metric = METRICS.get(report["metric"], report["metric"])
    scale, digits, unit = (100, 1, "%") if report["metric"] in ("accuracy", "macro_f1") else (1, 3, "")
    systems = [report["teacher"] | {"key": "teacher", "title": "Teacher", "description": report["teacher"]["name"]}]
    for name, system in sorted(report["systems"].items(), key=lambda item: -item[1]["score"]["mean"]):
        contender = BY_NAME.get(name)  # None: of a report by another version
        title, description = (contender.title, contender.description) if contender else (name, "")
        systems.append(system | {"key": name, "title": title, "description": description})
    template = (files("retrikt_ray.report") / "page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)  # texts are user data: all are escaped
    environment.filters |= {
        "score": lambda v: f"{scale * v:.{digits}f}{unit}",
        "plain": lambda v: f"{scale * v:.{digits}f}",
        "signed": lambda v: f"{scale * v:+.{digits}f}",
        "count": _count,
        "ms": lambda v: f"{v:,.0f} ms" if v >= 100 else f"{v:.3g} ms",
        "answer": lambda v: f"{v:.3g}" if isinstance(v, float) else v,
        "sure": lambda v: f" ({v:.0%})" if report["problem"] == "classification" else "",  # in regression it repeats the answer
    }
    return environment.from_string(template).render(
        report=report,
        metric=metric,
        points=" points" if unit else "",
        systems=systems,
        rival=next((s for s in systems[1:] if s["key"] in report["paired"]), None),  # the best of the others: systems are sorted
        figures=_figures(report, systems, f"{metric} (%)" if unit else metric, scale),
        voices=_shares(report.get("mixture") or {}),
        share=_share,
        duration=lambda s: f"{s:.1f} s" if s < 60 else f"{round(s) // 60} min {round(s) % 60} s",
    )


def _count(n: float) -> str:
    return next((f"{n / size:.3g} {unit}" for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if n >= 0.9995 * size), f"{n:.3g}")


def _shares(mixture: dict[str, Any]) -> dict[str, float]:
    """The voices' weights as shares of their sum; a report by another version may have fewer voices."""
    weights = {name: mixture[name] for name in NAMES if name in mixture}
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def _share(part: float, whole: float) -> str:
    if whole <= 0:  # a teacher's correlation may be
        return "–"
    share = 100 * part / whole
    return "<0.01%" if 0 < share < 0.01 else f"{share:.2f}%" if 0 < share < 1 else f"{share:.1f}%"


@rc_context(STYLE)
def _figures(report: dict[str, Any], systems: list[dict[str, Any]], metric: str, scale: int) -> dict[str, Any]:
    """Inline SVG by name (of reward terms and watched quantities: by group and name); a figure without data is absent."""
    figures: dict[str, Any] = {}
    for key, cost in (("parameters", "parameters (log scale)"), ("latency_ms", "latency in ms (log scale)")):
        axes = Figure().subplots()
        axes.set(xscale="log", xlabel=cost, ylabel=metric)
        axes.xaxis.set(major_formatter=lambda value, _: _count(value), minor_formatter=NullFormatter())
        figures[key] = _draw_systems(axes, systems, key, scale)
    rl = report.get("rl") or {}
    for group in ("terms", "watch"):
        figures[group] = {}
        for name, values in sorted(rl.get(group, {}).items(), key=lambda item: item[0] != "reward"):  # the sum of the terms comes first
            axes = Figure(figsize=(2, 1.3)).subplots()
            axes.plot(rl.get("watch_steps", rl["steps"]) if group == "watch" else rl["steps"], values, ".-", color=ACCENT, lw=1.2, ms=3)
            axes.axvline(rl["best_step"], color=WARM, lw=1, ls="--")
            axes.locator_params(nbins=4)
            figures[group][name] = _svg(axes, f"{group}-{name}")
    if sizes := report.get("store_size"):
        axes = Figure(figsize=(3.4, 2.6)).subplots()
        axes.plot([s["rows"] for s in sizes], [scale * s["score"] for s in sizes], "o-", color=ACCENT, lw=1.4, ms=4)
        axes.set(xlabel="rows in the store", ylabel=metric)
        figures["store_size"] = _svg(axes, "store_size")
    if shares := (report.get("store") or {}).get("confidence"):
        axes = Figure(figsize=(3.4, 2.6)).subplots()
        for (kind, values), colour in zip(shares.items(), (WARM, ACCENT) if len(shares) > 1 else (ACCENT,), strict=True):
            axes.stairs([100 * v for v in values], [i / len(values) for i in range(len(values) + 1)], label=kind, color=colour, lw=1.4)
        axes.set(xlabel="top probability", ylabel="% of rows")
        axes.legend(loc="upper left", frameon=False, labelcolor=INK)
        figures["confidence"] = _svg(axes, "confidence")
    if bins := [b for b in report.get("reliability") or [] if b["count"]]:
        axes = Figure(figsize=(3.4, 2.6)).subplots()
        confidence, accuracy, count = ([b[key] for b in bins] for key in ("confidence", "accuracy", "count"))
        axes.plot([0, 1], [0, 1], color=MUTED, lw=1, ls="--")
        axes.scatter(confidence, accuracy, s=[10 + 110 * n / max(count) for n in count], color=ACCENT, zorder=3)
        axes.set(xlabel="confidence", ylabel="share that was right", xlim=(min(confidence) - 0.05, 1.03))
        figures["reliability"] = _svg(axes, "reliability")
    return figures


def _draw_systems(axes: Axes, systems: list[dict[str, Any]], key: str, scale: int) -> Markup:
    """Score with its interval against a cost, names in the right margin. What costs nothing has no place on a log axis: a line."""
    for s in systems:
        s["colour"], s["y"] = {"teacher": WARM, "retrikt": ACCENT}.get(s["key"], MUTED), scale * s["score"]["mean"]
        if s[key] > 0:
            axes.errorbar(s[key], s["y"], scale * s["score"]["ci95"], fmt="o", ms=4.5, color=s["colour"], elinewidth=1.2)
        else:
            axes.axhline(s["y"], color=s["colour"], lw=1, ls=":")
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())  # fixed: the leaders below are drawn in fractions of the axes
    to_axes = axes.transData + axes.transAxes.inverted()
    order = sorted(systems, key=lambda s: s["y"])
    points = [to_axes.transform((s[key] or axes.get_xlim()[1], s["y"])) for s in order]
    heights: list[float] = []
    for _, y in points:  # names keep their distance: pushed upwards, then back below the top
        heights.append(max(y, heights[-1] + 0.08) if heights else y)
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], heights[i + 1] - 0.08 if i + 1 < len(heights) else 1)
    for s, (x, y), height in zip(order, points, heights, strict=True):
        axes.plot([x, 1.04], [y, height], transform=axes.transAxes, color=s["colour"], lw=0.5, alpha=0.6, clip_on=False, zorder=1)
        axes.annotate(s["title"], (1.05, height), xycoords="axes fraction", va="center", color=INK if s["colour"] == MUTED else s["colour"])
    return _svg(axes, key)


def _svg(axes: Axes, name: str) -> Markup:
    """The figure as an <svg> that takes its font and colours from the page; `name` keeps ids of different figures apart."""
    assert isinstance(axes.figure, Figure)
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": name}):
        axes.figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = re.sub(r"^.*?<svg [^>]*(viewBox=\"[^\"]*\")[^>]*>", r'<svg \1 aria-hidden="true">', svg, flags=re.DOTALL)
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|(?<=<g) id=\"[^\"]*\"", "", svg, flags=re.DOTALL)
    return Markup(re.sub("|".join(VARIABLES), lambda match: VARIABLES[match[0]], svg))  # safe: matplotlib has escaped the texts

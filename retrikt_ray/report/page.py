"""The report of a run as one HTML page, and the merging of several seeds' reports into one.

The page needs no network and no script: styles and figures are inside it. Figures are drawn in placeholder colours that become CSS
variables, so that they follow the reader's light or dark scheme.
"""

from __future__ import annotations

import io
import re
from statistics import fmean, stdev
from typing import Any

from jinja2 import Environment
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from scipy.stats import t as student_t

METRICS = {"macro_f1": "macro F1", "matthews": "Matthews correlation", "pearson": "Pearson correlation", "spearman": "Spearman correlation"}
SYSTEMS = {  # name in report.json -> name on the page, description
    "retrikt": ("RetriKT", "tiny student with retrieval from the teacher-labelled store"),
    "student_kd_store": ("Student, KD on store", "the same student distilled on the store, without retrieval"),
    "student_kd_labels": ("Student, KD on labels", "distilled on the labelled rows: no generated texts, no retrieval"),
    "student_labels": ("Student, labels only", "trained on the labelled rows: no teacher either"),
    "tfidf_store": ("TF-IDF on store", "linear model of words, taught by the teacher's labels of the store"),
    "tfidf_labels": ("TF-IDF on labels", "linear model of words, taught by the labelled rows"),
    "majority": ("Majority", "one answer for every text: the commonest label, or the mean"),
}
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
    n = len(values)
    return {"mean": fmean(values), "ci95": float(student_t.ppf(0.975, n - 1)) * stdev(values) / n**0.5, "per_seed": values}


def render(report: dict[str, Any]) -> str:
    """The report (content of report.json) as a self-contained HTML page; optional parts that are missing or empty are left out."""
    metric = METRICS.get(report["metric"], report["metric"])
    scale, digits, unit = (100, 1, "%") if report["metric"] in ("accuracy", "macro_f1") else (1, 3, "")
    systems = [report["teacher"] | {"key": "teacher", "title": "Teacher", "description": report["teacher"]["name"]}]
    for name, system in sorted(report["systems"].items(), key=lambda item: -item[1]["score"]["mean"]):
        title, description = SYSTEMS.get(name, (name, ""))
        systems.append(system | {"key": name, "title": title, "description": description})
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
    return environment.from_string(PAGE).render(
        report=report,
        metric=metric,
        points=" points" if unit else "",
        systems=systems,
        rival=next((s for s in systems[1:] if s["key"] in report["paired"]), None),  # the best of the others: systems are sorted
        figures=_figures(report, systems, f"{metric} (%)" if unit else metric, scale),
        share=_share,
        duration=lambda s: f"{s:.1f} s" if s < 60 else f"{round(s) // 60} min {round(s) % 60} s",
    )


def _count(n: float) -> str:
    return next((f"{n / size:.3g} {unit}" for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if n >= 0.9995 * size), f"{n:.3g}")


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


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{{ report.task }} – RetriKT report</title>
<style>
:root { --bg: #f6f7f9; --card: #fff; --ink: #1b2430; --muted: #5b6675; --line: #dde2e8; --accent: #0b6b74; --warm: #b4530a;
  --tint: #e7f2f2; --good: #1c6b3a; --bad: #b3261e }
@media (prefers-color-scheme: dark) { :root { --bg: #12161c; --card: #1a2029; --ink: #e6eaf0; --muted: #9aa6b5; --line: #303a47;
  --accent: #5cc4cb; --warm: #f0a35e; --tint: #173034; --good: #74cf97; --bad: #ff8f86 } }
* { box-sizing: border-box } main { max-width: 1060px; margin: 0 auto; padding: 2.5rem 1rem 4rem }
body { margin: 0; background: var(--bg); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", "DejaVu Sans", sans-serif }
h1 { font-size: clamp(1.7rem, 5vw, 2.4rem); line-height: 1.2; margin: 0 } h2 { font-size: 1.25rem; margin: 2.8rem 0 .7rem }
h3, figcaption { font-size: .92rem; font-weight: 600; margin: 0 0 .4rem } p { max-width: 68ch } small, .note { color: var(--muted) }
.note { font-size: .92rem } .verdict { font-size: 1.15rem } h1, p, li, th, blockquote { overflow-wrap: break-word }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19.5rem), 1fr)) }
.small { grid-template-columns: repeat(auto-fill, minmax(max(9.5rem, 23%), 1fr)); gap: .8rem; margin-bottom: 1.4rem }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .9rem 1rem; margin: 0 0 .8rem; min-width: 0 }
.grid .card { margin: 0 } .small .card { padding: .6rem } svg { display: block; width: 100% } svg text { font-family: inherit !important }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .5rem .5rem; border-top: 1px solid var(--line); white-space: nowrap; vertical-align: top }
th:first-child { text-align: left; white-space: normal; font-weight: 600 } th small { display: block; font-weight: 400; min-width: 11rem }
tr:first-child > * { border: 0 } thead th { color: var(--muted); font-size: .85rem; vertical-align: bottom } li small { display: block }
.retrikt { background: var(--tint) } .right { color: var(--good) } .wrong { color: var(--bad) } .off { color: var(--warm) }
.bar { width: 40% } .bar i { display: block; height: .7rem; margin-top: .4rem; border-radius: 3px; background: var(--accent) }
blockquote { margin: .5rem 0; padding-left: .8rem; border-left: 3px solid var(--line) } ul { padding-left: .9rem; list-style: none }
li { margin: .5rem 0 } summary { cursor: pointer; color: var(--accent); margin-top: .5rem } .card th { font-size: .95rem }
</style>
{% macro figure(svg, caption, about="") %}
<figure class="card"><figcaption>{{ caption }}</figcaption>{{ svg }}{% if about %}<small>{{ about }}</small>{% endif %}</figure>
{% endmacro %}
{% macro bars(title, values, format="{:,}".format) %}
{% if values %}<div class="card"><h3>{{ title }}</h3><table>{% for name, value in values %}
<tr><th scope="row">{{ name }}</th><td class="bar"><i style="width: {{ 100 * value / ((values|map("last")|max) or 1) }}%"></i></td>
<td>{{ format(value) }}</td></tr>
{% endfor %}</table></div>{% endif %}
{% endmacro %}
{% macro texts(row) %}{{ row.text }}{% if row.text_pair is not none %} <b>‖</b> {{ row.text_pair }}{% endif %}{% endmacro %}
{% set ours, top = report.systems.retrikt, report.teacher %}
<main>
<header><small>RetriKT report</small><h1>{{ report.task }}</h1>
<p class="verdict">RetriKT reaches {{ share(ours.score.mean, top.score.mean) if top.score.mean > 0 else "no meaningful share" }}
of the teacher's {{ metric }} ({{ ours.score.mean|score }} against {{ top.score.mean|score }}) with
{{ share(ours.parameters, top.parameters) }} of its parameters ({{ ours.parameters|count }} against {{ top.parameters|count }}).
{% if rival %}{% set gap = report.paired[rival.key] %}{% set clear = gap.difference|abs > gap.ci95 %}
It {{ ("beats" if gap.difference > 0 else "loses to") if clear else "does not clearly beat" }} the strongest baseline, “{{ rival.title }}”:
it is {{ gap.difference|abs|plain }}{{ points }} {{ "ahead" if gap.difference > 0 else "behind" }} (95% interval of the difference:
{{ (gap.difference - gap.ci95)|signed }} to {{ (gap.difference + gap.ci95)|signed }}{% if not clear %}, which includes zero{% endif %}).
{% endif %}</p>
<p class="note">{{ report.problem|capitalize }}, measured by {{ metric }} on test rows.
Rows: {% for name, n in report.rows.items() %}{{ "{:,}".format(n) }} {{ name }}{{ "." if loop.last else ", " }}{% endfor +%}
{{ "Seeds" if report.seeds|length > 1 else "Seed" }}: {{ report.seeds|join(", ") }}.</p></header>
<section><h2>Results</h2><div class="card scroll" tabindex="0" role="region" aria-label="Results"><table>
<thead><tr><th scope="col">System</th><th scope="col">Score</th><th scope="col">Share of<br>teacher's</th>
<th scope="col">RetriKT<br>minus it</th><th scope="col">Parameters</th><th scope="col">Share of<br>teacher's</th>
<th scope="col">Latency</th></tr></thead>
{% for s in systems %}{% set gap = report.paired[s.key] %}
<tr{% if s.key == "retrikt" %} class="retrikt"{% endif %}><th scope="row">{{ s.title }}<small>{{ s.description }}</small></th>
<td>{{ s.score.mean|score }} <small>± {{ s.score.ci95|plain }}</small></td><td>{{ share(s.score.mean, top.score.mean) }}</td>
<td>{% if gap %}{{ gap.difference|signed }} <small>± {{ gap.ci95|plain }}</small>{% else %}–{% endif %}</td>
<td>{{ s.parameters|count }}</td><td>{{ share(s.parameters, top.parameters) }}</td><td>{{ s.latency_ms|ms }}</td></tr>
{% endfor %}</table></div></section>
<section><h2>What a score costs</h2><div class="grid">
{{ figure(figures.parameters, "Score against size", "Up is better, left is smaller.") }}
{{ figure(figures.latency_ms, "Score against latency", "Up is better, left is faster.") }}
</div></section>
{% if report.rl %}
<section><h2>Training of the generator</h2>
<p class="note">Over PPO steps. The dashed line marks step {{ report.rl.best_step }}, whose generator was kept.
{%- if report.rl.collapse %} Training stopped early at a collapse: {{ report.rl.collapse }}.{% endif %}</p>
{% for group, title in (("terms", "Reward and its terms"), ("watch", "Watched on held-out texts")) if figures[group] %}
<h3>{{ title }}</h3>
<div class="grid small">{% for name, svg in figures[group].items() %}{{ figure(svg, name|replace("_", " ")) }}{% endfor %}</div>
{% endfor %}</section>{% endif %}
{% if report.store %}
<section><h2>The store</h2><div class="grid">
{{ bars("Rows", [("generated", report.store.generated), ("kept", report.store.kept)]) }}
{{ bars("Rejected, by reason", report.store.rejected.items()|list) }}
{{ bars("Kept, by source", report.store.by_source.items()|list) }}
</div></section>{% endif %}
{% if figures.store_size or figures.reliability or report.mixture %}
<section><h2>How the answers come about</h2><div class="grid">
{% if figures.store_size %}{{ figure(figures.store_size, "Score against store size", "Trained on a part of it.") }}{% endif %}
{% if figures.reliability %}{{ figure(figures.reliability, "Reliability",
  "On the dashed line, confidence is right; larger dots, more rows. Expected calibration error: %.3f."|format(report.ece)) }}{% endif +%}
{% if report.mixture %}{{ bars("Weight in an answer" ~ (" (%d neighbours)"|format(report.mixture.k) if report.mixture.k),
  report.mixture.items()|selectattr(0, "in", ("student", "dense", "lexical"))|list, "{:.2f}".format) }}{% endif +%}
</div></section>{% endif %}
{% if report.examples %}
<section><h2>Examples with their neighbours</h2>
{% for e in report.examples %}
<article class="card"><blockquote>{{ texts(e) }}</blockquote>
{% if report.problem == "regression" %}
<b class="off">off by {{ "%.3g"|format((e.label|float - e.predicted|float)|abs) }}</b>
{% else %}
<b class="{{ "right" if e.label == e.predicted else "wrong" }}">{{ "✓ right" if e.label == e.predicted else "✗ wrong" }}</b>
{% endif %}
· predicted <b>{{ e.predicted|answer }}</b><small>{{ e.score|sure }}</small> · label <b>{{ e.label|answer }}</b>
{% if e.neighbours %}<details{% if loop.first %} open{% endif %}><summary>Neighbours in the store: {{ e.neighbours|length }}</summary><ul>
{% for n in e.neighbours %}
<li>{{ texts(n) }}<small>similarity {{ "%.2f"|format(n.similarity) }} · {{ n.source }} · {{ n.label|answer }}{{ n.score|sure }}</small></li>
{% endfor %}</ul></details>{% endif %}</article>
{% endfor %}</section>{% endif %}
{% if report.seconds %}
<section><h2>Where the time went</h2>{{ bars("Stages", report.seconds.items()|list, duration) }}</section>{% endif %}
<section><h2>How to read this page</h2><p>
{% if report.ci95_of == "seeds" %}
± is the half-width of a 95% t interval over {{ report.seeds|length }} seeds: how far the mean would move with other seeds. Scores,
parameters and latency are means over the seeds; all other sections show the run of seed {{ report.seeds[0] }} alone.
{% else %}
± is the half-width of a 95% bootstrap interval over test rows: how far the score would move with other test rows. It comes from one
seed and says nothing about other seeds or another draw of training rows.
{% endif %}
“RetriKT minus it” compares two systems on the same test rows{{ ", in percentage points" if points }}; where its interval includes zero,
they cannot be told apart.</p></section></main></html>
"""

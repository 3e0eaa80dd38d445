"""The result table of a report: on a terminal, in a notebook, in Markdown."""

from __future__ import annotations

from html import escape
from typing import Any

from rich.table import Table

COLUMNS = ("of teacher", "parameters", "ms a text")  # beside the system and its score


def lines(report: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Per system: its name, score and interval, share of the teacher's score, parameters, and time of one text."""
    whole = report["teacher"]["score"]["mean"]
    found = []
    for name, system in [("teacher", report["teacher"]), *report["systems"].items()]:
        score = system["score"]
        share = f"{score['mean'] / whole:.1%}" if whole > 0 else "-"
        found.append(
            (name, f"{score['mean']:.3f} ± {score['ci95']:.3f}", share, f"{system['parameters']:,}", f"{system['latency_ms']:.2f}")
        )
    return found


def title(report: dict[str, Any]) -> str:
    return f"{report['task']}: {report['metric']} on {report['rows']['test']:,} test rows, {report['rows']['train']:,} labelled rows"


def as_table(report: dict[str, Any]) -> Table:
    """For a terminal."""
    table = Table(title=title(report))
    table.add_column("system")
    for name in (report["metric"], *COLUMNS):
        table.add_column(name, justify="right")
    for cells in lines(report):
        table.add_row(*cells, style="bold" if cells[0] == "retrikt" else None)
    return table


def as_html(report: dict[str, Any]) -> str:
    """For a notebook."""
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>" for cells in lines(report))
    head = "".join(f"<th>{escape(name)}</th>" for name in ("system", report["metric"], *COLUMNS))
    return f"<table><caption>{escape(title(report))}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def as_markdown(report: dict[str, Any]) -> str:
    """For documents."""
    rows = [("system", report["metric"], *COLUMNS), ("---",) * (len(COLUMNS) + 2), *lines(report)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)

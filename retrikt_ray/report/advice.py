"""What a run's figures mean for its owner, and what to do next. Rules over report.json; each says what was measured and what to change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MANY_CLASSES = 1.5  # times chance that generated rows must reach in agreement with the label they were asked for
BEGINNINGS = 0.05  # by how much fewer generated than labelled texts may begin with a letter or number
LITTLE = 0.005  # a gain that nobody would miss
FEW_ROWS = 100  # validation rows below which a choice made on them is mostly noise

Report = dict[str, Any]
Rule = Callable[[Report], str | None]


def points(value: float) -> str:
    """A score or difference as people say it."""
    return f"{100 * value:.1f}"


def gap(report: Report, system: str) -> tuple[float, float] | None:
    """RetriKT's score less another system's, and half of its 95 % interval; None where the report lacks it."""
    found = report["paired"].get(system)
    return (found["difference"], found["ci95"]) if found else None


def teacher_no_better(report: Report) -> str | None:
    """The annotator against TF-IDF on the same labelled rows."""
    found = report["teacher_over_tfidf"]
    if found is None or found["difference"] > found["ci95"]:
        return None
    difference, half = found["difference"], found["ci95"]
    return (
        f"The annotator is no better than TF-IDF on the same {report['rows']['train']} labelled rows ({points(difference)} ± {points(half)} points): "
        "it has little to teach. Name a pre-trained encoder or a larger LLM in teach.annotator."
    )


def generated_off_label(report: Report) -> str | None:
    """Generated rows that the teacher labels as asked, against chance."""
    agreement, classes = report["store"].get("agreement"), len(report["labels"])
    if agreement is None or classes < 2 or agreement >= MANY_CLASSES / classes:
        return None
    return (
        f"Only {agreement:.0%} of the generated texts are what they were asked to be (chance: {1 / classes:.0%}): the generator hardly knows the "
        "labels. Give them readable names (prepare.label_names), a template that says more (prepare.template), or a larger LLM (teach.base)."
    )


def generated_off_task(report: Report) -> str | None:
    """How generated texts begin, against the labelled ones."""
    begin = report["store"].get("begin_with_a_letter", {})
    if not {"generated", "task"} <= begin.keys() or begin["task"] - begin["generated"] <= BEGINNINGS:
        return None
    return (
        f"{begin['generated']:.0%} of the generated texts begin with a letter or number, {begin['task']:.0%} of the labelled ones do: look at the "
        "store (`retrikt store search`). A larger LLM (teach.base), or unlabelled texts of your own (prepare.unlabelled), would be closer to the task."
    )


def store_adds_nothing(report: Report) -> str | None:
    """RetriKT against a student of the labelled rows alone."""
    found = gap(report, "student_labels")
    if not found or found[0] > found[1]:
        return None
    return (
        f"The store adds nothing that can be measured to the labelled rows alone ({points(found[0])} ± {points(found[1])} points). Unlabelled texts of "
        "the domain (prepare.unlabelled) are the first thing to try, then a larger LLM (teach.base)."
    )


def retrieval_adds_nothing(report: Report) -> str | None:
    """RetriKT against its student alone: whether, at best, it gains little."""
    found = gap(report, "student_kd_store")
    if not found or (found[0] > -found[1] and found[0] + found[1] > 0.005):
        return None
    return (
        f"Retrieval adds nothing to the student's own answer here ({points(found[0])} ± {points(found[1])} points). It still gives the evidence; for "
        "the quickest answers take the student alone."
    )


def cheaper_is_better(report: Report) -> str | None:
    """The best of the systems that cost less to make or serve."""
    names = ("student_labels", "tfidf_store", "tfidf_labels", "majority")
    behind = [(g[0], name) for name in names if (g := gap(report, name)) and g[0] < -g[1]]
    if not behind:
        return None
    difference, name = min(behind)
    return f"{name} is {points(-difference)} points ahead of RetriKT, beyond its interval: use that, and see what follows for the reason."


def too_few_rows(report: Report) -> str | None:
    """Validation rows, which the mixture and the weights are chosen on."""
    count = report["rows"]["validation"]
    if count >= FEW_ROWS:
        return None
    return f"Validation has {count} rows, so a score on it is good to ± {points((0.25 / max(1, count)) ** 0.5 * 1.96)} points at best: label more, if any."


RULES: tuple[Rule, ...] = (
    cheaper_is_better,
    teacher_no_better,
    store_adds_nothing,
    generated_off_label,
    generated_off_task,
    retrieval_adds_nothing,
    too_few_rows,
)


def advise(report: Report) -> list[dict[str, str]]:
    """{rule, text} of every rule that applies, the weightiest first."""
    return [{"rule": rule.__name__, "text": text} for rule in RULES if (text := rule(report))]

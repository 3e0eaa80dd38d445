"""What a run's figures mean for its owner, and what to do next. Rules over report.json; each says what was measured and what to change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MANY_CLASSES = 1.5  # times chance that generated rows must reach in agreement with the label they were asked for
BEGINNINGS = 0.05  # by how much fewer generated than labelled texts may begin with a letter or number
OFF_TASK = 0.7  # share of generated rows that may be off the task: of other texts of the domain it is 0.1 to 0.6
REPEATED = 0.1  # share of generated texts that may repeat earlier rows
LOST = 0.5  # share of generated texts that may be rejected
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
    """How far generated rows are from the labelled ones, as the teacher embeds them."""
    share = report["store"].get("off_task", {}).get("generated")
    if share is None or share <= OFF_TASK:
        return None
    return (
        f"{share:.0%} of the generated rows are farther from the labelled ones than 95% of these are from each other: they are of another domain, as the "
        "rows drawn below may show. A template that says what the texts are (prepare.template), unlabelled texts of your own (prepare.unlabelled), or "
        "a base that has read such texts (teach.base) would bring them closer."
    )


def generated_lost(report: Report) -> str | None:
    """Generated texts that did not become rows."""
    store = report["store"]
    made, kept = store.get("generated", 0), store.get("by_source", {}).get("generated", 0)
    if made - kept <= LOST * made:
        return None
    reason, count = max(store["rejected"].items(), key=lambda item: item[1])
    return (
        f"Only {kept:,} of {made:,} generated texts became rows; most were rejected as {reason} ({count:,}). Look at them in rejected/, or with "
        "`retrikt store card`: a pair that is cut before its second text is empty (teach.max_tokens), and the filters are keys of `annotate:`."
    )


def generator_repeats_itself(report: Report) -> str | None:
    """Generated texts that were rejected because an earlier row says the same."""
    share = report["store"].get("repeated")
    if share is None or share <= REPEATED:
        return None
    return (
        f"{share:.0%} of the generated texts repeat earlier rows: the generator knows no more to say as it is asked. Raise generate.temperature or "
        "generate.top_k, ask for fewer rows (generate.rows), or give the reward's novelty and diversity more weight (reinforce.weights)."
    )


def generated_begin_otherwise(report: Report) -> str | None:
    """How generated texts begin, against the labelled ones."""
    begin = report["store"].get("begin_with_a_letter", {})
    if not {"generated", "task"} <= begin.keys() or begin["task"] - begin["generated"] <= BEGINNINGS:
        return None
    return (
        f"{begin['generated']:.0%} of the generated texts begin with a letter or number, {begin['task']:.0%} of the labelled ones do: look at the "
        "store (`retrikt store card`). A template after which a text begins as yours do (prepare.template), or a larger LLM (teach.base), would help."
    )


def others_not_learnt(report: Report) -> str | None:
    """Whether student and n-grams did better on unseen rows when they learnt from the domain's own alone."""
    student, ngrams = report["learnt"]["student"], report["learnt"]["ngrams"]
    if not student["sources"] or not ngrams["sources"]:
        return None
    losses, count = student["loss"], report["rows"]["unlabelled"]
    made = report["store"].get("by_source", {}).get("generated", 0)
    next_step = (
        "`generate.rows=0` saves their time, and a larger LLM (teach.base) may write some that are worth it"
        if made
        else "another corpus may hold some that are worth it (prepare.corpus)"
    )
    return (
        f"Beside your {count:,} unlabelled texts nothing is learnt from those that were {'generated or ' * bool(made)}found: the student's loss on unseen "
        f"rows is {min(losses.values()):.3f} without them, {losses['all']:.3f} with them. They remain as evidence; {next_step}."
    )


def store_adds_nothing(report: Report) -> str | None:
    """RetriKT against a student of the labelled rows alone."""
    found = gap(report, "student_labels")
    if not found or found[0] > found[1]:
        return None
    return (
        f"The store adds nothing that can be measured to the labelled rows alone ({points(found[0])} ± {points(found[1])} points). Unlabelled texts of "
        "the domain (prepare.unlabelled) are the first thing to try, then general text (prepare.corpus) and a larger LLM (teach.base)."
    )


def retrieval_adds_nothing(report: Report) -> str | None:
    """RetriKT against its student alone, on validation and held-out rows of the store: where it does not gain beyond noise."""
    found, mixture = report["unseen"], report["mixture"]
    if found["gain"] > found["ci95"]:
        return None
    gain = f"{points(found['gain'])} ± {points(found['ci95'])} points" if report["labels"] else "no smaller error"
    speaks = any(mixture[name] for name in ("dense", "lexical", "ngrams"))
    alone = "`index.voices=[student]` serves the student alone, the quickest" if speaks else "RetriKT is its student alone here"
    return (
        f"On {found['rows']:,} rows that nothing was trained on, retrieval adds nothing to the student's own answer ({gain}): {alone}. "
        "Rows and words are found as evidence all the same."
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
    others_not_learnt,
    generated_lost,
    generated_off_label,
    generated_off_task,
    generated_begin_otherwise,
    generator_repeats_itself,
    retrieval_adds_nothing,
    too_few_rows,
)


def advise(report: Report) -> list[dict[str, str]]:
    """{rule, text} of every rule that applies, the weightiest first."""
    return [{"rule": rule.__name__, "text": text} for rule in RULES if (text := rule(report))]

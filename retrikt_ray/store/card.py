"""The data card of a store: what is in it, in figures and in rows drawn by seed, so that a person sees rubbish at once.

Everything is told by source, since the task's own rows say how the others should look.
"""

from __future__ import annotations

from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.tables import matrix, names
from retrikt_ray.task.card import Task
from retrikt_ray.task.texts import joined, texts_of
from retrikt_ray.task.words import distinct, self_bleu, words

if TYPE_CHECKING:
    from rich.table import Table

SHOWN, SHOWN_REJECTED = 20, 3  # rows, of a source and of each reason
SAMPLE = (
    500  # rows of a source at most that variety and nearness are told of: distinct-n falls with their number, so all sources give as many
)
NEIGHBOURS = 5
FAR = 5  # percentile of the labelled rows' nearness to each other below which a row is off the task
BINS = 10  # of the confidences
COLUMNS = ["id", "text", "text_pair", "asked_label", "condition", "teacher_probs", "source"]


def store_card(store: Folder, rejected: Folder, task: Task, seed: int) -> dict[str, Any]:
    """The card, as it stands in report.json; what a task or a store does not have (confidences in regression, generated rows) is empty or None.

    generated, kept: rows; by_source, rejected: rows by source, by reason; repeated: share of generated texts that equal or nearly equal an earlier row;
    agreement: share of generated rows that the teacher labels as asked; classes: by label its rows by source (as the teacher labels them), and
    those asked for; lengths, variety: by source; begin_with_a_letter, off_task: shares by source; confidence: by source, share of rows by
    tenths of the top probability; rows, rejected_rows: drawn ones, of texts that were generated or harvested where there are such.
    """
    table = store.read_tables(columns=COLUMNS)
    answers, source = matrix(table["teacher_probs"]), names(table["source"])
    condition = table["condition"].fill_null(-1).to_numpy()
    kinds = [kind for kind in ("task", "unlabelled", "corpus", "generated") if (source == kind).any()]
    doubted = [kind for kind in kinds if kind in ("corpus", "generated")] or kinds[-1:]  # sources to look at
    rng = np.random.default_rng([seed, 11])
    size = min(SAMPLE, *(int((source == kind).sum()) for kind in kinds))
    samples = {kind: np.sort(rng.choice(np.flatnonzero(source == kind), size, replace=False)) for kind in kinds}
    begins = pc.utf8_is_alnum(pc.utf8_slice_codeunits(table["text"], 0, 1)).to_numpy(zero_copy_only=False)
    certain = not task.regression
    counts, out = store.read_json("store.json"), rejected.read_tables(columns=["id", "text", "text_pair", "source", "reason"])
    return {key: counts[key] for key in ("generated", "kept", "by_source", "rejected")} | {
        "repeated": repeated(out, counts["generated"]),
        "agreement": agreement(answers, condition, source == "generated") if certain else None,
        "classes": classes(task, answers, condition, source, kinds) if certain else bins(task, answers, condition, source == "generated"),
        "begin_with_a_letter": {kind: float(begins[source == kind].mean()) for kind in kinds},
        "lengths": {kind: lengths(table.filter(pa.array(source == kind))) for kind in kinds},
        "variety": {kind: variety(table.take(index)) for kind, index in samples.items()},
        "off_task": off_task(store, samples),
        "confidence": {k: histogram(answers[source == k].max(1)) for k in kinds if k != "task"} if certain else {},
        "rows": [row for kind in doubted for row in drawn(table, task, answers, np.flatnonzero(source == kind), rng)],
        "rejected_rows": drawn_rejected(out, rng),
    }


def repeated(rejected: pa.Table, generated: int) -> float | None:
    """Share of so many generated texts that were rejected as duplicates or near duplicates."""
    said = pc.and_(pc.equal(rejected["source"], "generated"), pc.is_in(rejected["reason"], pa.array(["duplicate", "near_duplicate"])))
    return (pc.sum(said).as_py() or 0) / generated if generated else None


def agreement(answers: np.ndarray, condition: np.ndarray, rows: np.ndarray) -> float | None:
    """Share of some rows (a mask) that the teacher labels as asked; None where there are none."""
    return float((answers[rows].argmax(1) == condition[rows]).mean()) if rows.any() else None


def classes(task: Task, answers: np.ndarray, condition: np.ndarray, source: np.ndarray, kinds: list[str]) -> list[dict[str, Any]]:
    """By label: rows that the teacher gives it, by source; generated rows that were asked to be it, and the share of these that are."""
    label, generated, found = answers.argmax(1), source == "generated", []
    for i, name in enumerate(task.labels):
        asked = generated & (condition == i)
        rows = {kind: int(((source == kind) & (label == i)).sum()) for kind in kinds}
        found.append({"label": name, "rows": rows, "asked": int(asked.sum()), "agreement": agreement(answers, condition, asked)})
    return found


def bins(task: Task, answers: np.ndarray, condition: np.ndarray, generated: np.ndarray) -> list[dict[str, Any]]:
    """Regression's classes: by condition the generated rows that were asked for, and the mean of the teacher's values."""
    asked = [generated & (condition == i) for i in range(len(task.conditions))]
    values = [float(answers[rows, 0].mean()) if rows.any() else None for rows in asked]
    return [{"label": n, "asked": int(r.sum()), "value": v} for n, r, v in zip(task.conditions, asked, values, strict=True)]


def lengths(table: pa.Table) -> dict[str, float]:
    """Words of a text (of both sides in pairs): 5th percentile, median, 95th percentile."""
    low, middle, high = np.percentile([len(words(joined(text, " "))) for text in texts_of(table)], [5, 50, 95])
    return {"low": float(low), "median": float(middle), "high": float(high)}


def variety(table: pa.Table) -> dict[str, float]:
    """distinct-1, distinct-2 and mean self-BLEU of some rows, and how many they are."""
    texts = [joined(text, " ") for text in texts_of(table)]
    return {
        "rows": len(texts),
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "self_bleu": float(self_bleu(texts).mean()),
    }


def histogram(confidence: np.ndarray) -> list[float]:
    """Share of rows by tenths of the top probability."""
    return [float(n) / len(confidence) for n in np.histogram(confidence, BINS, (0, 1))[0]]


def off_task(store: Folder, samples: dict[str, np.ndarray]) -> dict[str, float]:
    """By source, the share of rows that are farther from the labelled ones than 95 % of these are from each other, as the teacher embeds them.

    Nearness is the mean cosine to the NEIGHBOURS nearest labelled rows; of a labelled row, to others than itself.
    """
    if "task" not in samples or len(samples["task"]) <= NEIGHBOURS:
        return {}
    index = np.concatenate(list(samples.values()))
    vectors = matrix(store.read_tables(columns=["teacher_embedding"])["teacher_embedding"].take(index))
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-9)
    parts = dict(zip(samples, np.split(vectors, np.cumsum([len(s) for s in samples.values()])[:-1]), strict=True))
    own = parts["task"] @ parts["task"].T
    np.fill_diagonal(own, -np.inf)
    nearness = {kind: np.sort(own if kind == "task" else part @ parts["task"].T)[:, -NEIGHBOURS:].mean(1) for kind, part in parts.items()}
    limit = np.percentile(nearness["task"], FAR)
    return {kind: float((near < limit).mean()) for kind, near in nearness.items()}


def drawn(table: pa.Table, task: Task, answers: np.ndarray, index: np.ndarray, rng: np.random.Generator) -> list[dict[str, Any]]:
    """SHOWN of some rows at random, the conditions in turn (the teacher's labels where nothing was asked), the classes together."""
    order = rng.permutation(index)
    named = [task.named(answers[i]) for i in order]
    asked = table["asked_label"].take(order).to_pylist()
    queues: dict[str, list[int]] = {}
    for place, (wanted, (label, _)) in enumerate(zip(asked, named, strict=True)):
        queues.setdefault(wanted or (label if task.labels else ""), []).append(place)
    mixed = [queues[name] for name in rng.permutation(sorted(queues))]
    turns = [place for turn in zip_longest(*mixed) for place in turn if place is not None][:SHOWN]
    place_of = {place: name for name, places in queues.items() for place in places}
    rows = []
    for place in sorted(turns, key=lambda place: place_of[place]):
        row = table.slice(int(order[place]), 1).to_pylist()[0]
        label, score = named[place]
        agrees = None if asked[place] is None or task.regression else row["condition"] == int(answers[order[place]].argmax())
        shown = {key: row[key] for key in ("id", "text", "text_pair", "source")}
        rows.append(shown | {"asked": asked[place], "label": label, "score": score, "agrees": agrees})
    return rows


def drawn_rejected(table: pa.Table, rng: np.random.Generator) -> list[dict[str, Any]]:
    """SHOWN_REJECTED rows of each reason at random, but for those without a text."""
    reasons, rows = names(table["reason"]), []
    for reason in sorted(set(reasons.tolist()) - {"failed", "empty"}):
        some = np.flatnonzero(reasons == reason)
        rows += table.take(np.sort(rng.choice(some, min(SHOWN_REJECTED, len(some)), replace=False))).to_pylist()
    return rows


def tables(card: dict[str, Any]) -> list[Table]:
    """The card's figures for a terminal: by source, by reason of rejection, by class."""
    from rich.table import Table

    def table(title: str, *columns: str) -> Table:
        made = Table(title=title)
        for i, column in enumerate(columns):
            made.add_column(column, justify="right" if i else "left", no_wrap=not i)
        return made

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.0%}"

    by_source = table("by source", "rows", "kept", "words 5 - 95 %", "distinct 1, 2", "self BLEU", "letter first", "off the task")
    for kind, found in card["variety"].items():
        words_in = card["lengths"][kind]
        several = f"{words_in['median']:.0f} ({words_in['low']:.0f} - {words_in['high']:.0f})"
        variety = f"{found['distinct_1']:.2f}, {found['distinct_2']:.2f}", f"{found['self_bleu']:.2f}"
        shares = share(card["begin_with_a_letter"][kind]), share(card["off_task"].get(kind))
        by_source.add_row(kind, f"{card['by_source'][kind]:,}", several, *variety, *shares)
    reasons = table(f"rejected ({card['generated']:,} texts were generated)", "reason", "rows")
    for reason, count in card["rejected"].items():
        reasons.add_row(reason, f"{count:,}")
    asked = f"; {share(card['agreement'])} of the generated rows are as asked" if card["agreement"] is not None else ""
    kinds = [kind for kind in card["variety"] if "rows" in card["classes"][0]]
    last = "are as asked" if kinds else "mean value"
    by_class = table(f"by class{asked}", "class", *kinds, "asked", last)
    for row in card["classes"]:
        value = share(row["agreement"]) if kinds else "-" if row["value"] is None else f"{row['value']:.3g}"
        by_class.add_row(row["label"], *(f"{row['rows'][kind]:,}" for kind in kinds), f"{row['asked']:,}", value)
    return [by_source, reasons, by_class]

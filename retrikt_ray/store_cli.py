"""The `retrikt store` commands: search, edit, compact and export the knowledge of a finished run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from retrikt_ray.knowledge.knowledge import Knowledge

RAY_ROWS = 50_000  # a smaller store is compacted sooner than Ray has started


@click.group()
def store() -> None:
    """Search and edit what a finished run retrieves from, without training."""


def opened(run: str) -> Knowledge:
    from retrikt_ray.knowledge.knowledge import Knowledge
    from retrikt_ray.runtime import cluster

    cluster.quiet(None)
    return Knowledge.open(run)


def rows_of(file: str | None, row: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a file, or the one that the options give."""
    from retrikt_ray.runtime.settings import ConfigError
    from retrikt_ray.task.files import read_rows

    given = {k: v for k, v in row.items() if v is not None}
    if (file is None) == (not given):
        raise ConfigError("expected either a file of rows or one row by options; see --help")
    return [given] if file is None else read_rows(file)


@contextmanager
def naming(file: str | None) -> Iterator[None]:
    """Errors about a row say which file it is in."""
    from retrikt_ray.runtime.settings import ConfigError
    from retrikt_ray.task.texts import TextError

    try:
        yield
    except (ConfigError, TextError) as error:
        raise ConfigError(f"{file}, {error}") if file and str(error).startswith("row") else error from None


def summary(what: str, ids: list[str], knowledge: Knowledge) -> None:
    """Which rows an edit was about, and what there is now."""
    from retrikt_ray.runtime.progress import console

    for code in ids[:10]:
        console.print(code, markup=False)
    if len(ids) > 10:
        console.print(f"... and {len(ids) - 10:,} more", markup=False)
    console.print(f"{what} {len(ids):,}; {knowledge.count:,} rows, version {knowledge.view.version}", markup=False)


@store.command()
@click.argument("run", metavar="RUN")
@click.argument("file", required=False)
@click.option("--text", help="Text of one row.")
@click.option("--text-pair", help="Its second text, in pair tasks.")
@click.option("--label", help="Its label; without, the teacher gives one.")
def add(run: str, file: str | None, text: str | None, text_pair: str | None, label: str | None) -> None:
    """Add rows: a .jsonl, .csv, .tsv or .parquet FILE with text, text_pair (pair tasks), label or teacher_probs (optional), id (optional)."""
    rows = rows_of(file, {"text": text, "text_pair": text_pair, "label": label})
    knowledge = opened(run)
    with naming(file):
        summary("added", knowledge.add(rows), knowledge)


@store.command()
@click.argument("run", metavar="RUN")
@click.argument("file", required=False)
@click.option("--id", "code", help="Id of one row.")
@click.option("--text", help="Its new text.")
@click.option("--text-pair", help="Its new second text.")
@click.option("--label", help="Its new label; a new text without one gets the teacher's.")
def update(run: str, file: str | None, code: str | None, text: str | None, text_pair: str | None, label: str | None) -> None:
    """Change rows: a FILE as for `add`, with the id of each row and what changes."""
    rows = rows_of(file, {"id": code, "text": text, "text_pair": text_pair, "label": label})
    knowledge = opened(run)
    with naming(file):
        summary("updated", knowledge.update(rows), knowledge)


@store.command()
@click.argument("run", metavar="RUN")
@click.argument("ids", metavar="ID...", nargs=-1)
@click.option("--file", help="A .txt file with the ids, one a line, or a table with a column id.")
def delete(run: str, ids: tuple[str, ...], file: str | None) -> None:
    """Delete rows by id."""
    from retrikt_ray.runtime.settings import ConfigError
    from retrikt_ray.task.files import read_rows

    wanted = list(ids)
    for row in read_rows(file) if file else []:
        code = row.get("id", row.get("text") if str(file).endswith(".txt") else None)
        if code is None:
            raise ConfigError(
                f"{file}: found no column id (the columns are {', '.join(row)}); expected ids, one a line of a .txt, or a column id"
            )
        wanted.append(str(code).strip())
    knowledge = opened(run)
    knowledge.delete(wanted)
    summary("deleted", list(dict.fromkeys(wanted)), knowledge)


@store.command()
@click.argument("run", metavar="RUN")
def compact(run: str) -> None:
    """Fold the edits into a new base. A large store is built by Ray tasks, as in `retrikt index`."""
    from retrikt_ray import pipeline
    from retrikt_ray.knowledge.compact import compact as fold
    from retrikt_ray.knowledge.log import base_of, read_log
    from retrikt_ray.runtime import artifacts, cluster
    from retrikt_ray.runtime.progress import console

    opened_run = pipeline.load_run(run)
    folder, workers = opened_run.folder, None
    seal = artifacts.check(base_of(folder, read_log(folder / "knowledge")) / "store")
    if sum(seal.rows.values()) > RAY_ROWS:
        cluster.connect(opened_run.log_file, opened_run.config.cluster)
        workers = cluster.plan(opened_run.config.index, "index")
    else:
        cluster.quiet(None)
    after = fold(folder, workers)
    console.print("nothing to compact" if after is None else f"compacted to version {after.version}, {after.base}", markup=False)


@store.command()
@click.argument("run", metavar="RUN")
@click.argument("text")
@click.option("-k", default=5, show_default=True, type=click.IntRange(min=1), help="Rows of either kind.")
@click.option("--label", help="Only rows that the teacher gives this label.")
@click.option("--source", help="Only rows of this source: generated, corpus, task, unlabelled or added.")
def search(run: str, text: str, k: int, label: str | None, source: str | None) -> None:
    """The nearest rows of a text, and those that share most words. In pair tasks write TEXT ||| SECOND TEXT."""
    from retrikt_ray.predictor import Predictor
    from retrikt_ray.runtime import cluster
    from retrikt_ray.runtime.progress import console
    from retrikt_ray.task.texts import read_typed, shown

    cluster.quiet(None)
    predictor = Predictor.open(run)
    query, view = [read_typed(text, predictor.task.pair)], predictor.knowledge.view
    near = view.neighbours(predictor.retrieve(query, k, label=label, source=source), "similarity")[0]
    alike = view.neighbours(view.search_words(query, k, label=label, source=source), "bm25")[0]
    for title, value, n in [("similarity", n.similarity, n) for n in near] + [("bm25", n.bm25, n) for n in alike]:
        found = f"{n.label} {n.score:.2f}  {n.id} ({n.source}): {shown((n.text, n.text_pair))}"
        console.print(f"{title} {value:6.3f}  {found}", markup=False)


@store.command()
@click.argument("run", metavar="RUN")
@click.option("--out", required=True, help="File to write, as JSON lines.")
def export(run: str, out: str) -> None:
    """Write the added rows in the form that `add` takes, also of a run that was made anew since."""
    from retrikt_ray.knowledge.edit import added_rows
    from retrikt_ray.runtime.folders import Folder
    from retrikt_ray.runtime.progress import console

    rows = added_rows(Folder.at(run))
    head, _, name = out.rpartition("/")
    Folder.at(head or ".").write_bytes(name, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode())
    console.print(f"{len(rows):,} added rows in {out}", markup=False)


@store.command()
@click.argument("run", metavar="RUN")
@click.option("--seed", type=int, help="Draws the rows that are shown; default: the run's.")
def card(run: str, seed: int | None) -> None:
    """What is in the store as `annotate` wrote it: figures by source and class, and rows at random. Edits do not count."""
    from retrikt_ray import pipeline
    from retrikt_ray.runtime import artifacts
    from retrikt_ray.runtime.progress import console
    from retrikt_ray.store.card import store_card, tables
    from retrikt_ray.task.card import Task
    from retrikt_ray.task.texts import shown

    opened_run = pipeline.load_run(run)
    folders = {name: opened_run.artifact(name) for name in ("task", "store", "rejected")}
    for folder in folders.values():
        artifacts.check(folder)
    found = store_card(folders["store"], folders["rejected"], Task.read(folders["task"]), opened_run.config.seed if seed is None else seed)
    for table in tables(found):
        console.print(table)
    for row in found["rows"]:
        asked = f"asked {row['asked']}, " if row["asked"] else ""
        console.print(
            f"{row['id']}  {asked}teacher {row['label']} {row['score']:.2f}: {shown((row['text'], row['text_pair']))}", markup=False
        )
    for row in found["rejected_rows"]:
        console.print(f"{row['id']}  {row['reason']}: {shown((row['text'], row['text_pair']))}", markup=False)

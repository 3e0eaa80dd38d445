"""One edit: rows that are added, labelled by the teacher where they have no label, and positions that are deleted; and its writing."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from retrikt_ray.index.vectors import StudentVectors
from retrikt_ray.knowledge.log import Log, append, edit_schema, read_edit, read_log, sweep, tagged_log
from retrikt_ray.knowledge.view import View
from retrikt_ray.runtime.artifacts import check
from retrikt_ray.runtime.folders import MANIFEST, ArtifactError, Folder, sealed
from retrikt_ray.runtime.leases.lease import LeaseLost, Right
from retrikt_ray.runtime.settings import ConfigError
from retrikt_ray.task.texts import TEXT_COLUMNS


class UnknownRow(ConfigError):
    """No row has an id."""


@dataclass(frozen=True)
class Change:
    """What an edit did."""

    ids: list[str]  # of rows that were added or put in place of others
    positions: list[int]  # that were deleted
    before: list[dict[str, Any]]  # the rows that were there, in the form that `put` takes: putting them back undoes the edit
    version: int = 0  # of the knowledge after it

    def at(self, version: int) -> Change:
        return replace(self, version=version)


def replacement(view: View, fresh: list[dict[str, Any]]) -> Change:
    """What putting these rows does: those of their ids go."""
    ids = [str(row["id"]) for row in fresh]
    found = view.find(ids)
    return replace(removal(view, [found[i] for i in ids if i in found]), ids=ids)


def removal(view: View, positions: list[int]) -> Change:
    """What deleting these rows does."""
    rows = [view.row(p) for p in positions]
    keys = ("id", "text", "text_pair", "teacher_probs")
    return Change([], positions, [{k: row[k] for k in keys if row[k] is not None} for row in rows])


def listed(rows: Any) -> list[Any]:
    """Rows as a list of objects: one row or several, a row being an object, a text, or a pair of texts."""
    named = (dict(zip(TEXT_COLUMNS, r, strict=False)) if isinstance(r, tuple) else {"text": r} if isinstance(r, str) else r for r in rows)
    return list(named) if isinstance(rows, list) else listed([rows])


def positions_of(view: View, ids: list[str], run: Folder) -> list[int]:
    """Positions of live rows. Raises UnknownRow that names the id that no row has."""
    found = view.find(ids)
    missing = [i for i in ids if i not in found]
    if missing:
        raise UnknownRow(f"{run} has no row with the id {missing[0]!r}" + (f" (and {len(missing) - 1} more)" if missing[1:] else ""))
    return [found[i] for i in ids]


def refuse_known(view: View, fresh: list[dict[str, Any]], run: Folder) -> None:
    """Raises ConfigError where an added row has the id of a live one."""
    known = view.find([row["id"] for row in fresh])
    for i, row in enumerate(fresh):
        if row["id"] in known:
            raise ConfigError(f"row {i + 1}: {run} has a row {row['id']!r} already ({row['text'][:60]!r}); use update")


def labelled(run: Folder, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with teacher_probs and, where the teacher was asked, teacher_embedding."""
    asked = [i for i, r in enumerate(rows) if r["teacher_probs"] is None]
    out = [r | {"teacher_embedding": None} for r in rows]
    if asked:
        from retrikt_ray.teacher.annotator import Annotator

        if not (run / "teacher").files():
            raise ConfigError(f"row {asked[0] + 1}: there is no label, and {run} has no teacher that could give one")
        check(run / "teacher", deep=True)
        probs, embeddings = Annotator.load(run / "teacher").annotate([(rows[i]["text"], rows[i]["text_pair"]) for i in asked], 64)
        for i, p, e in zip(asked, probs.tolist(), embeddings.tolist(), strict=True):
            out[i] |= {"teacher_probs": p, "teacher_embedding": e}
    return out


def table(view: View, run: Folder, student: str, threads: int, fresh: list[dict[str, Any]], gone: list[int]) -> pa.Table:
    """The edit that adds rows and deletes positions, over a view. student: digest of the one that is open."""
    if check(run / "student", deep=True).content != student:
        raise ArtifactError(f"{run}/student was made anew since this process opened it: start the process again")
    width, first = view.base.card["width"], view.rows.num_rows
    schema = edit_schema(view.base.schema, width)
    labels = labelled(run, fresh)
    texts = pa.table({name: pa.array([row[name] for row in labels], pa.string()) for name in TEXT_COLUMNS})
    vectors = StudentVectors(run / "student", width, threads).of(texts)
    origin = {"deleted": False, "source": "added", "created_by": f"edit-{view.version + 1:06d}"}
    records: list[dict[str, Any]] = [{"deleted": True, "position": p} for p in gone]
    records += [row | origin | {"position": first + i, "vector": v} for i, (row, v) in enumerate(zip(labels, vectors, strict=True))]
    return pa.Table.from_pylist([{name: r.get(name) for name in schema.names} for r in records], schema=schema)


def write(view: View, run: Folder, student: str, threads: int, fresh: list[dict[str, Any]], gone: list[int], right: Right) -> Log:
    """Log rows and deletions over a view. right: from `writing`, under which the view was read. Raises LeaseLost where it is not of the log any more.

    1. The edit, in memory.  2. Write it.
    """
    folder = run / "knowledge"
    # 1. the edit
    log = view.log or Log(0, None, view.base.contents, view.base.contents["store"])
    rows = table(view, run, student, threads, fresh, gone)
    # 2. write
    found, tag = tagged_log(folder, right)
    if found != view.log:
        raise LeaseLost(
            f"{folder}/{MANIFEST} was changed by another process while this edit was made, and the edit is not written; run it again"
        )
    if view.log is None:
        tag = right.write(folder, MANIFEST, sealed(asdict(log)), tag)  # from now on a folder without manifest is a damaged one
    sweep(folder, log, right)
    return append(folder, log, rows, right, tag)


def added_rows(run: Folder) -> list[dict[str, Any]]:
    """The rows that edits brought and did not delete, in the form that `add` takes; also where the rest of the run was made anew since.

    A row that an update changed leaves its id behind where the run's store has it, too.
    """
    log = read_log(run / "knowledge")
    if log is None:
        return []
    keys = ["id", "text", "text_pair", "teacher_probs"]
    rows: dict[int, dict[str, Any]] = {}
    if log.base:
        base = (run / "knowledge" / log.base / "store").read_tables(columns=[*keys, "source"])
        positions = pc.indices_nonzero(pc.equal(base["source"], "added"))
        rows = dict(zip(positions.to_pylist(), base.select(keys).take(positions).to_pylist(), strict=True))
    for entry in log.edits:
        for row in read_edit(run / "knowledge", entry).select(["deleted", "position", *keys]).to_pylist():
            if row.pop("deleted"):
                rows.pop(row["position"], None)
            else:
                rows[row.pop("position")] = row
    taken = set((run / "store").read_tables(columns=["id"])["id"].to_pylist()) if (run / "store").exists() else set()
    found = [{k: row[k] for k in keys if row[k] is not None} for _, row in sorted(rows.items())]
    return [{k: v for k, v in row.items() if k != "id" or v not in taken} for row in found]

"""Edits of a finished run's knowledge: a small log beside the store, changed as a whole or not at all.

`RUN/knowledge/` holds one Parquet file per edit (added rows with their vectors, and positions that were deleted) and `manifest.json`, which
names them with their SHA-256 and says which student, store and index they belong to. An edit is there when the manifest that names it is: it
is replaced in one rename, after everything it names is on the disk. What no manifest names was left by a process that died, and goes with
the next edit. Positions go on where the base ends and are never used twice; compaction writes a new base and empties the log.

Two writers are kept apart by a lock or a lease (`runtime/leases`). A lease can end while its holder is at work, so on an object store files carry the
name of their writer, the manifest is replaced only where it is the one that the edit was made over, and nothing is swept that a later edit may name.
What was left out on purpose: merging the edits of two writers. One of them is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from retrikt_ray.runtime.artifacts import check
from retrikt_ray.runtime.folders import MANIFEST, ArtifactError, Folder, sealed
from retrikt_ray.runtime.leases.hold import KNOWLEDGE, hold
from retrikt_ray.runtime.leases.lease import Right

FOLD = 16  # edit files after which they become one
WAIT_S = 120.0  # for another process's edit to end


@dataclass(frozen=True)
class Log:
    """What `manifest.json` says: the base that is edited, and the edits."""

    version: int  # goes up by one with every edit
    base: str | None  # folder below knowledge/ that compaction wrote; None: the run's own store/ and index/
    contents: dict[str, str]  # digests of the student, store and index that the log belongs to
    origin: str  # digest of the run's own store/, which was there first
    edits: list[dict[str, Any]] = field(default_factory=list)  # {file, sha256, bytes, added, deleted}
    previous: str | None = None  # the base before: kept for readers that have it mapped, on a shared disk for one

    @property
    def added(self) -> int:
        return sum(e["added"] for e in self.edits)

    @property
    def deleted(self) -> int:
        return sum(e["deleted"] for e in self.edits)


def edit_schema(store: pa.Schema, width: int) -> pa.Schema:
    """Columns of an edit file: the store's, and before them what happens to which position; in deletions all else is null."""
    extra = [("deleted", pa.bool_()), ("position", pa.int64()), ("vector", pa.list_(pa.float32(), width))]
    return pa.schema([pa.field(n, t) for n, t in extra] + list(store))


def read_log(folder: Folder) -> Log | None:
    """The log of `knowledge/`, or None where nothing is edited. Raises ArtifactError that names the file that is damaged."""
    return tagged_log(folder, Right())[0]


def tagged_log(folder: Folder, right: Right) -> tuple[Log | None, str | None]:
    """The same under the right to write, and the tag to replace it with."""
    data, tag = right.read(folder, MANIFEST)
    if data is None:
        left = folder.files()
        if left:
            raise ArtifactError(f"{folder}/{MANIFEST} is missing, but {folder}/{left[0]} is there")
        return None, None
    try:
        log = Log(**folder.unsealed(MANIFEST, data))
    except TypeError as error:
        raise ArtifactError(f"{folder}/{MANIFEST} is not a manifest of this version ({error})") from None
    return (log if log.base or log.edits else None), tag  # None: a first edit that did not come to its end


def read_edit(folder: Folder, edit: dict[str, Any]) -> pa.Table:
    """One edit file. Raises ArtifactError that names it when it is missing, cut or altered."""
    name = edit["file"]
    if not folder.exists(name):
        raise ArtifactError(f"{folder}/{name} is missing; {MANIFEST} names it")
    if folder.size(name) != edit["bytes"]:
        raise ArtifactError(f"{folder}/{name} has {folder.size(name)} bytes, {MANIFEST} says {edit['bytes']}: truncated or altered")
    if folder.sha256(name) != edit["sha256"]:
        raise ArtifactError(f"{folder}/{name} was altered: its SHA-256 is not the one in {MANIFEST}")
    return folder.read_table(name)


def append(folder: Folder, log: Log, edit: pa.Table, right: Right, tag: str | None) -> Log:
    """Write one more edit; when this returns, it is there to stay. right: from `writing`; tag: of the manifest that `log` is.

    Raises LeaseLost, and leaves the knowledge as it is, where somebody else edited it meanwhile.
    """
    tables, edits = [edit], list(log.edits)
    if len(edits) >= FOLD:
        tables, edits = [*(read_edit(folder, e) for e in edits), edit], []
    name = f"edit-{log.version + 1:06d}{right.mark}.parquet"
    table = pa.concat_tables(tables)
    folder.write_table(name, table)
    gone = int(np.count_nonzero(table["deleted"].to_numpy(zero_copy_only=False)))
    card = {"file": name, "sha256": folder.sha256(name), "bytes": folder.size(name), "added": table.num_rows - gone, "deleted": gone}
    after = replace(log, version=log.version + 1, edits=[*edits, card])
    right.write(folder, MANIFEST, sealed(asdict(after)), tag)
    return after


def sweep(folder: Folder, log: Log, right: Right) -> None:
    """Remove what no manifest names: files of edits that were folded or compacted, or whose process died.

    Under a lease, of edits up to this log's alone: the next one may be another writer's by now.
    """
    keep = {MANIFEST, *(e["file"] for e in log.edits)}
    if folder.is_local and Path(folder.uri).is_dir():  # temporary files are no files of the folder, so `files` does not tell of them
        for path in Path(folder.uri).glob("*.tmp-*"):
            path.unlink()
    for name in {n.split("/")[0] for n in folder.files() if n not in keep}:
        number = re.match(r"(?:edit|base)-(\d+)", name)
        later = bool(right.mark and number and int(number[1]) > log.version)
        if name not in (log.base, log.previous) and not later:
            folder.remove(name)


def base_of(run: Folder, log: Log | None) -> Folder:
    """The folder that holds `store/` and `index/`: the run, or what compaction wrote."""
    return run if log is None or log.base is None else run / "knowledge" / log.base


def check_origin(run: Folder, log: Log) -> None:
    """Raises ArtifactError when the run's own store was made anew since its knowledge was edited."""
    if check(run / "store").content != log.origin:
        raise ArtifactError(
            f"{run}/knowledge/{MANIFEST} holds edits of another store than {run}/store, which was made anew since. Save the added rows with "
            f"`retrikt store export {run} --out added.jsonl`, remove {run}/knowledge, and add them again"
        )


@contextmanager
def writing(run: Folder) -> Iterator[Right]:
    """Hold the right to edit a run's knowledge. Raises LeaseHeld when another process holds it for too long."""
    with hold(run, KNOWLEDGE, WAIT_S) as right:
        yield right

"""Artifacts: folders that are whole or not there at all.

Stages meet only in artifacts. An artifact is a folder with Parquet tables, safetensors weights, JSON, and a `manifest.json` that is written
last and carries its own checksum: the folder is complete exactly if the manifest is there and every file it names has the size it
names. A reader that is about to trust the contents (`check(deep=True)`) compares SHA-256 as well.

What was left out on purpose: versions of an artifact. A run has one config; a changed config clears the folder and writes it anew.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

from retrikt_ray.runtime.folders import MANIFEST, ArtifactError, Folder, digest, sealed
from retrikt_ray.runtime.leases.lease import Right

DRAFT = "draft.json"  # names the fingerprint that the unfinished files of a folder belong to


@dataclass(frozen=True)
class Manifest:
    """What a complete artifact says of itself."""

    stage: str
    fingerprint: str  # of the stage's config, its inputs and its code version
    config: dict[str, Any]
    inputs: dict[str, str]  # artifact name -> content digest of its manifest
    seed: int
    versions: dict[str, str]
    rows: dict[str, int]  # table -> number of rows
    columns: dict[str, list[str]]  # table -> "name: type" in order
    files: dict[str, dict[str, Any]]  # name -> {sha256, bytes}
    started: str  # UTC, ISO 8601
    seconds: float
    summary: dict[str, Any] = field(default_factory=dict)  # the stage's own figures, shown by `retrikt status`

    @property
    def content(self) -> str:
        """Digest of what readers see: a re-run that gives the same files leaves readers valid."""
        return digest({name: f["sha256"] for name, f in self.files.items()})


def read_manifest(folder: Folder) -> Manifest | None:
    """The manifest of a complete artifact, or None where the artifact is not there or not finished."""
    data = folder.read_if_there(MANIFEST)
    if data is None:
        return None
    try:
        return Manifest(**folder.unsealed(MANIFEST, data))
    except TypeError as error:
        raise ArtifactError(f"{folder}/{MANIFEST} is not a manifest of this version ({error})") from None


def check(folder: Folder, deep: bool = False, only: list[str] | None = None) -> Manifest:
    """The manifest, after every file it names (or of them those in `only`) was found with its size and, when deep, its SHA-256.

    Raises ArtifactError that names the first file that is missing, cut, or altered.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise ArtifactError(f"{folder} is not complete: it has no {MANIFEST}")
    sizes = folder.sizes()
    for name, want in manifest.files.items():
        if only is not None and name not in only:
            continue
        if name not in sizes:
            raise ArtifactError(f"{folder}/{name} is missing; its manifest names it")
        size = sizes[name]
        if size != want["bytes"]:
            raise ArtifactError(f"{folder}/{name} has {size} bytes, its manifest says {want['bytes']}: truncated or altered")
        if deep and folder.sha256(name, size) != want["sha256"]:
            raise ArtifactError(f"{folder}/{name} was altered: its SHA-256 is not the one in the manifest")
    return manifest


def open_draft(folder: Folder, fingerprint: str, right: Right | None = None) -> None:
    """Make the folder ready for writing. Files of an interrupted attempt at the same fingerprint stay, all others go.

    right: to write below the run directory; None: nobody else can know of the folder.
    """
    right = right or Right()
    before, tag = right.read(folder, MANIFEST)
    if before is None and folder.exists(DRAFT) and folder.read_json(DRAFT).get("fingerprint") == fingerprint:
        return
    if before is not None:
        right.remove(folder, MANIFEST, tag)  # first: from here on the folder is not complete
    right.check()
    folder.remove()
    folder.write_json(DRAFT, {"fingerprint": fingerprint})


def seal(
    folder: Folder,
    *,
    stage: str,
    fingerprint: str,
    config: dict[str, Any],
    inputs: dict[str, str],
    seed: int,
    started: float,
    summary: dict[str, Any] | None = None,
    right: Right | None = None,
) -> Manifest:
    """Write the manifest over all files of the folder; from here on it is complete. right: as for `open_draft`."""
    right = right or Right()
    before, tag = right.read(folder, MANIFEST)
    if before is not None:
        right.remove(folder, MANIFEST, tag)
    right.check()
    folder.remove(DRAFT)
    files: dict[str, dict[str, Any]] = {}
    rows: dict[str, int] = {}
    columns: dict[str, list[str]] = {}
    for name, size in sorted(folder.sizes().items()):
        files[name] = {"sha256": folder.sha256(name, size), "bytes": size}
        if name.endswith(".parquet"):
            with folder.parquet(name, size) as file:
                meta = file.metadata
            table = name.rsplit("/", 1)[-1].removesuffix(".parquet").split("-")[0]
            rows[table] = rows.get(table, 0) + meta.num_rows
            columns[table] = [f"{f.name}: {f.type}" for f in meta.schema.to_arrow_schema()]
    manifest = Manifest(
        stage=stage,
        fingerprint=fingerprint,
        config=config,
        inputs=inputs,
        seed=seed,
        versions=versions(),
        rows=rows,
        columns=columns,
        files=files,
        started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        seconds=round(time.time() - started, 3),
        summary=summary or {},
    )
    right.publish(folder, MANIFEST, sealed(asdict(manifest)))
    return manifest


def versions() -> dict[str, str]:
    """Versions of the libraries whose change can change an artifact; told, not part of a fingerprint."""
    from importlib.metadata import version

    names = ("retrikt-ray", "ray", "torch", "transformers", "faiss-cpu", "pyarrow")
    return {name: version(name) for name in names}

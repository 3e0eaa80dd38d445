"""Artifacts: folders that are whole or not there at all.

Stages meet only in artifacts. An artifact is a folder on any filesystem that fsspec knows (a local disk, file://, s3://, gs://, memory://)
with Parquet tables, safetensors weights, JSON, and a `manifest.json` that is written last: the folder is complete exactly if the manifest
is there and every file it names has the size it names. A reader that is about to trust the contents (`check(deep=True)`) compares
SHA-256 as well. On a local disk a file is written aside and renamed; an object store shows an object only when it is whole.

What was left out on purpose: versions of an artifact. A run has one config; a changed config clears the folder and writes it anew.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import posixpath
import tempfile
import time
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

MANIFEST = "manifest.json"
DRAFT = "draft.json"  # names the fingerprint that the unfinished files of a folder belong to


class ArtifactError(ValueError):
    """An artifact is missing, incomplete or not what its manifest says. The text names the file."""


def canonical(value: Any) -> str:
    """JSON with one spelling per value, so that equal configs have equal fingerprints."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def digest(value: Any) -> str:
    """SHA-256 hex digest of a JSON-able value."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


@dataclass(frozen=True)
class Folder:
    """A folder by URI. Holds no open handle, so it travels to Ray workers as it is."""

    uri: str

    @staticmethod
    def at(uri: str | os.PathLike[str]) -> Folder:
        """A local path becomes absolute: a worker's working directory is not the driver's."""
        text = os.fspath(uri)
        if text.startswith("file://"):
            text = text[len("file://") :]
        return Folder(text.rstrip("/") if "://" in text else str(Path(text).expanduser().absolute()))

    @property
    def is_local(self) -> bool:
        return "://" not in self.uri

    def _fs(self, name: str = "") -> tuple[fsspec.AbstractFileSystem, str]:
        return fsspec.core.url_to_fs(posixpath.join(self.uri, name) if name else self.uri)

    def __truediv__(self, name: str) -> Folder:
        return Folder(posixpath.join(self.uri, name))

    def __str__(self) -> str:
        return self.uri

    def exists(self, name: str = "") -> bool:
        fs, path = self._fs(name)
        return bool(fs.exists(path))

    def size(self, name: str) -> int:
        fs, path = self._fs(name)
        return int(fs.size(path))

    def files(self) -> list[str]:
        """Names of all files below, relative, sorted; temporary files of an interrupted write are not among them."""
        fs, path = self._fs()
        if not fs.exists(path):
            return []
        fs.invalidate_cache()
        root = path.rstrip("/") + "/"
        return sorted(name for name in (f[len(root) :] for f in fs.find(path)) if ".tmp-" not in name)

    def read_bytes(self, name: str) -> bytes:
        fs, path = self._fs(name)
        try:
            with fs.open(path, "rb") as handle:
                return handle.read()
        except FileNotFoundError:
            raise ArtifactError(f"{self.uri}/{name} is missing") from None

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write whole or not at all."""
        fs, path = self._fs(name)
        fs.makedirs(posixpath.dirname(path), exist_ok=True)
        if not self.is_local:
            fs.pipe_file(path, data)
            return
        aside = f"{path}.tmp-{uuid.uuid4().hex[:8]}"
        with open(aside, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(aside, path)

    def read_json(self, name: str) -> Any:
        data = self.read_bytes(name)
        try:
            return json.loads(data)
        except ValueError as error:
            raise ArtifactError(f"{self.uri}/{name} is not JSON ({error})") from None

    def write_json(self, name: str, value: Any) -> None:
        self.write_bytes(name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """One Parquet file. Raises ArtifactError that names the file when it cannot be read as Parquet."""
        data = self.read_bytes(name)
        try:
            return pq.read_table(io.BytesIO(data), columns=columns)
        except (pa.ArrowInvalid, OSError, KeyError) as error:
            raise ArtifactError(f"{self.uri}/{name} is not a readable Parquet file ({error})") from None

    def read_tables(self, prefix: str = "part-", columns: list[str] | None = None) -> pa.Table:
        """All Parquet files whose name starts with `prefix`, in the order of their names, as one table."""
        names = [n for n in self.files() if n.startswith(prefix) and n.endswith(".parquet")]
        if not names:
            raise ArtifactError(f"{self.uri} holds no {prefix}*.parquet")
        return pa.concat_tables([self.read_table(n, columns) for n in names])

    def write_table(self, name: str, table: pa.Table) -> None:
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        self.write_bytes(name, buffer.getvalue())

    def remove(self, name: str = "") -> None:
        fs, path = self._fs(name)
        if fs.exists(path):
            fs.rm(path, recursive=True)

    def local(self) -> Path:
        """A local directory with these files: itself on a disk, else a copy in a cache that is keyed by the manifest."""
        if self.is_local:
            return Path(self.uri)
        key = digest([self.uri, self.read_bytes(MANIFEST).decode() if self.exists(MANIFEST) else time.time()])[:20]
        target = Path(tempfile.gettempdir()) / f"retrikt-{os.getuid()}" / key
        if not target.exists():
            aside = target.with_name(f"{key}.tmp-{uuid.uuid4().hex[:8]}")
            for name in self.files():
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                (aside / name).write_bytes(self.read_bytes(name))
            try:
                aside.rename(target)
            except OSError:  # another process of this machine was first; its copy is the same
                if not target.exists():
                    raise
        return target

    def upload(self, source: Path) -> None:
        """Copy every file below a local directory into this folder, each one whole or not at all."""
        for path in sorted(p for p in source.rglob("*") if p.is_file()):
            self.write_bytes(path.relative_to(source).as_posix(), path.read_bytes())


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
    if not folder.exists(MANIFEST):
        return None
    data = folder.read_json(MANIFEST)
    try:
        return Manifest(**data)
    except TypeError as error:
        raise ArtifactError(f"{folder}/{MANIFEST} is not a manifest of this version ({error})") from None


def check(folder: Folder, deep: bool = False) -> Manifest:
    """The manifest, after every file it names was found with its size and, when deep, its SHA-256.

    Raises ArtifactError that names the first file that is missing, cut, or altered.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise ArtifactError(f"{folder} is not complete: it has no {MANIFEST}")
    for name, want in manifest.files.items():
        if not folder.exists(name):
            raise ArtifactError(f"{folder}/{name} is missing; its manifest names it")
        size = folder.size(name)
        if size != want["bytes"]:
            raise ArtifactError(f"{folder}/{name} has {size} bytes, its manifest says {want['bytes']}: truncated or altered")
        if deep and hashlib.sha256(folder.read_bytes(name)).hexdigest() != want["sha256"]:
            raise ArtifactError(f"{folder}/{name} was altered: its SHA-256 is not the one in the manifest")
    return manifest


def open_draft(folder: Folder, fingerprint: str) -> None:
    """Make the folder ready for writing. Files of an interrupted attempt at the same fingerprint stay, all others go."""
    if folder.exists(DRAFT) and not folder.exists(MANIFEST) and folder.read_json(DRAFT).get("fingerprint") == fingerprint:
        return
    folder.remove(MANIFEST)  # first: from here on the folder is not complete
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
) -> Manifest:
    """Write the manifest over all files of the folder; from here on it is complete."""
    folder.remove(DRAFT)
    folder.remove(MANIFEST)  # of an interrupted sealing of a sibling output
    files: dict[str, dict[str, Any]] = {}
    rows: dict[str, int] = {}
    columns: dict[str, list[str]] = {}
    for name in folder.files():
        data = folder.read_bytes(name)
        files[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        if name.endswith(".parquet"):
            meta = pq.read_metadata(io.BytesIO(data))
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
    folder.write_json(MANIFEST, asdict(manifest))
    return manifest


def versions() -> dict[str, str]:
    """Versions of the libraries whose change can change an artifact; told, not part of a fingerprint."""
    from importlib.metadata import version

    names = ("retrikt-ray", "ray", "torch", "transformers", "faiss-cpu", "pyarrow")
    return {name: version(name) for name in names}

"""Folders by URI: the same code on a local disk and on an object store, and files that are whole or not there.

A `Folder` is a folder on any filesystem that fsspec knows (a local disk, file://, s3://, gs://, memory://). On a local disk a file is written
aside, flushed to the disk and renamed; an object store shows an object only when it is whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import posixpath
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from retrikt_ray.runtime import copies
from retrikt_ray.runtime.settings import ConfigError

PACKAGED = Path(__file__).parents[1] / "quickstart"  # the task and the language model that come with the package
OBJECT_STORES = ("s3://", "s3a://", "gs://", "gcs://", "az://", "abfs://", "abfss://")  # which know no directories
S3 = ("s3://", "s3a://")
S3_ONCE = {"max_concurrency": 1}  # else it asks for the size first, to see whether it should ask for pieces side by side
PIECE = 8 << 20  # bytes that are asked for at a time, and held
MANIFEST = "manifest.json"  # written last: the folder is complete


class ArtifactError(ValueError):
    """An artifact is missing, incomplete or not what its manifest says. The text names the file."""


def canonical(value: Any) -> str:
    """JSON with one spelling per value, so that equal configs have equal fingerprints."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def digest(value: Any) -> str:
    """SHA-256 hex digest of a JSON-able value."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def as_json(value: Any) -> bytes:
    """Readable JSON in UTF-8, ending with a newline."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def sealed(value: dict[str, Any]) -> bytes:
    """JSON that carries the digest of itself."""
    return as_json(value | {"checksum": digest(value)})


def stamp(info: dict[str, Any]) -> list[Any]:
    """Size and time or tag of a file, from what a filesystem tells of it."""
    return [int(info["size"]), *(str(info[key]) for key in ("mtime", "ETag", "etag", "LastModified", "last_modified") if info.get(key))]


@dataclass(frozen=True)
class Folder:
    """A folder by URI. Holds no open handle, so it travels to Ray workers as it is."""

    uri: str

    @staticmethod
    def at(uri: str | os.PathLike[str]) -> Folder:
        """A local path becomes absolute: a worker's working directory is not the driver's."""
        text = os.fspath(uri).removeprefix("file://")
        return Folder(text.rstrip("/") if "://" in text else str(Path(text).expanduser().absolute()))

    @property
    def is_local(self) -> bool:
        return "://" not in self.uri

    def place(self, name: str = "") -> tuple[fsspec.AbstractFileSystem, str]:
        """The filesystem, and the path on it. Raises ConfigError where the library of a kind of place is not installed."""
        # Without a cache of listings: another process may have written what was not there a moment ago.
        try:
            return fsspec.core.url_to_fs(posixpath.join(self.uri, name) if name else self.uri, use_listings_cache=False)
        except ImportError as error:
            raise ConfigError(f"{self.uri}: {error} (pip install 'retrikt-ray[s3]', for gs:// 'retrikt-ray[gcs]')") from None

    def __truediv__(self, name: str) -> Folder:
        return Folder(posixpath.join(self.uri, name))

    def __str__(self) -> str:
        return self.uri

    def arrow(self) -> tuple[pyarrow.fs.FileSystem | None, str]:
        """For libraries that write by themselves: pyarrow's filesystem (None: the local disk) and the path on it."""
        fs, path = self.place()
        return None if self.is_local else pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs)), path

    def signature(self, name: str) -> list[Any] | None:
        """Changes whenever the file is replaced; None where it is not there."""
        try:
            if self.is_local:  # it is asked before every batch of answers
                return [(found := os.stat(os.path.join(self.uri, name))).st_mtime_ns, found.st_ino, found.st_size]
            fs, path = self.place(name)
            info = fs.info(path)
        except FileNotFoundError:
            return None
        return [info.get(key) for key in ("mtime", "ino", "size", "ETag", "LastModified")]

    def stamps(self) -> dict[str, list[Any]]:
        """Of each file below, its size and, as text, what else changes when it is replaced. One listing, whatever the number of files."""
        fs, path = self.place()
        root = len(path.rstrip("/")) + 1  # the folder itself is among them where its first file comes just now
        return {n[root:]: stamp(info) for n, info in fs.find(path, detail=True).items() if n[root:] and ".tmp-" not in n[root:]}

    def stamp(self, name: str) -> list[Any] | None:
        """The same of one file; None where it is not there."""
        fs, path = self.place(name)
        return stamp(fs.info(path)) if fs.exists(path) else None

    def exists(self, name: str = "") -> bool:
        fs, path = self.place(name)
        return bool(fs.exists(path))

    def size(self, name: str) -> int:
        fs, path = self.place(name)
        return int(fs.size(path))

    def files(self) -> list[str]:
        """Names of all files below, relative, sorted; temporary files of an interrupted write are not among them."""
        return sorted(self.sizes())

    def sizes(self) -> dict[str, int]:
        """Of each file below, its size. One listing."""
        return {name: tags[0] for name, tags in self.stamps().items()}

    def read_bytes(self, name: str) -> bytes:
        if (found := self.read_if_there(name)) is not None:
            return found
        raise ArtifactError(f"{self.uri}/{name} is missing")

    def read_if_there(self, name: str) -> bytes | None:
        """A file's bytes, None where it is not there: one request."""
        fs, path = self.place(name)
        try:
            return bytes(fs.cat_file(path, **(S3_ONCE if self.uri.startswith(S3) else {})))
        except FileNotFoundError:
            return None

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write whole or not at all."""
        if self.is_local:
            with self.create(name) as aside:
                aside.write_bytes(data)
        else:
            fs, path = self.place(name)
            if not self.uri.startswith(OBJECT_STORES):
                fs.makedirs(posixpath.dirname(path), exist_ok=True)
            fs.pipe_file(path, data)

    @contextmanager
    def create(self, name: str) -> Iterator[Path]:
        """A local path to write a file to; when the block ends well, the file is there under `name`, whole and flushed to the disk."""
        fs, path = self.place(name)
        if not self.uri.startswith(OBJECT_STORES):
            fs.makedirs(posixpath.dirname(path), exist_ok=True)
        if self.is_local:
            aside = Path(f"{path}.tmp-{uuid.uuid4().hex[:8]}")
        else:
            aside = Path(tempfile.mkdtemp(prefix="retrikt-")) / posixpath.basename(path)
        try:
            yield aside
            if self.is_local:
                with open(aside, "rb") as handle:
                    os.fsync(handle.fileno())
                os.replace(aside, path)
                directory = os.open(os.path.dirname(path), os.O_RDONLY)
                try:
                    os.fsync(directory)  # else a power cut may forget the new name
                finally:
                    os.close(directory)
            else:
                fs.put_file(str(aside), path)
        finally:
            aside.unlink(missing_ok=True)
            if not self.is_local:
                aside.parent.rmdir()

    def open(self, name: str, size: int | None = None, **how: Any) -> BinaryIO:
        """A seekable handle for reading. size: of the file, where it is known; how: for fsspec. Raises ArtifactError when the file is missing."""
        fs, path = self.place(name)
        try:
            if size is None or not self.uri.startswith(S3):
                return fs.open(path, "rb", **how)
            handle = fs.open(path, "rb", size=size, **how)
            handle.details = {"name": path, "size": size, "type": "file"}  # else it asks for them
            return handle
        except FileNotFoundError:
            raise ArtifactError(f"{self.uri}/{name} is missing") from None

    def sha256(self, name: str, size: int | None = None) -> str:
        """SHA-256 hex digest of a file, read piece by piece. size: as for `open`."""
        fs, path = self.place(name)
        size, found = self.size(name) if size is None else size, hashlib.sha256()
        for start in range(0, size, PIECE):
            found.update(fs.cat_file(path, start=start, end=min(start + PIECE, size)))
        return found.hexdigest()

    def read_json(self, name: str) -> Any:
        return self._json(name, self.read_bytes(name))

    def _json(self, name: str, data: bytes) -> Any:
        try:
            return json.loads(data)
        except ValueError as error:
            raise ArtifactError(f"{self.uri}/{name} is not JSON ({error})") from None

    def write_json(self, name: str, value: Any) -> None:
        self.write_bytes(name, as_json(value))

    def write_sealed(self, name: str, value: dict[str, Any]) -> None:
        """JSON that carries the digest of itself, so that a reader sees any change of it."""
        self.write_bytes(name, sealed(value))

    def read_sealed(self, name: str) -> dict[str, Any]:
        """What `write_sealed` wrote. Raises ArtifactError where a single byte is not as it was written."""
        return self.unsealed(name, self.read_bytes(name))

    def unsealed(self, name: str, data: bytes) -> dict[str, Any]:
        """The same of the contents of a file."""
        value = self._json(name, data)
        if not isinstance(value, dict) or "checksum" not in value:
            raise ArtifactError(f"{self.uri}/{name} has no checksum: cut, or written by another version")
        body = {k: v for k, v in value.items() if k != "checksum"}
        if value["checksum"] != digest(body) or as_json(value) != data:
            raise ArtifactError(f"{self.uri}/{name} was altered: it does not fit its own checksum")
        return body

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """One Parquet file. Raises ArtifactError that names the file when it cannot be read as Parquet."""
        try:
            return pq.read_table(io.BytesIO(self.read_bytes(name)), columns=columns)
        except (pa.ArrowInvalid, OSError, KeyError) as error:
            raise ArtifactError(f"{self.uri}/{name} is not a readable Parquet file ({error})") from None

    @contextmanager
    def parquet(self, name: str, size: int | None = None, footer: pq.FileMetaData | None = None) -> Iterator[pq.ParquetFile]:
        """A Parquet file to read row groups of, of an object store by a request each. size: as for `open`; footer: where it is known. Raises ArtifactError."""
        exactly = {"cache_type": "none"} if self.uri.startswith(OBJECT_STORES) else {}  # else megabytes beyond are read, too
        with self.open(name, size, **exactly) as handle:
            try:
                yield pq.ParquetFile(handle, metadata=footer, pre_buffer=bool(exactly))
            except (pa.ArrowInvalid, OSError) as error:
                raise ArtifactError(f"{self.uri}/{name} is not a readable Parquet file ({error})") from None

    def read_tables(self, prefix: str = "part-", columns: list[str] | None = None) -> pa.Table:
        """All Parquet files whose name starts with `prefix`, in the order of their names, as one table."""
        if not (names := [n for n in self.files() if n.startswith(prefix) and n.endswith(".parquet")]):
            raise ArtifactError(f"{self.uri} holds no {prefix}*.parquet")
        return pa.concat_tables([self.read_table(n, columns) for n in names])

    def write_table(self, name: str, table: pa.Table) -> None:
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd", row_group_size=8192)  # small beside a process, large beside a request
        self.write_bytes(name, buffer.getvalue())

    def remove(self, name: str = "") -> None:
        fs, path = self.place(name)
        if fs.exists(path):
            fs.rm(path, recursive=True)

    def local(self) -> Path:
        """A local directory with these files: itself on a disk, else a copy in the cache of this machine (`copies.py`), compared with the manifest.

        Without a manifest (a part of an artifact) it is known by its files' tags. Raises ArtifactError when a file is not what the manifest says.
        """
        if self.is_local:
            return Path(self.uri)
        wanted = self.unsealed(MANIFEST, data)["files"] if (data := self.read_if_there(MANIFEST)) is not None else None
        tags = {} if wanted else self.stamps()

        def fill(target: Path) -> None:
            for name in sorted(wanted or tags):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                fs, path = self.place(name)
                fs.get_file(path, str(target / name))
            if wanted and (differs := copies.differs(target, wanted)):
                raise ArtifactError(f"{self.uri}/{differs} was altered: its SHA-256 is not the one in the manifest")

        told = all(len(tag) > 1 for tag in tags.values())  # else only sizes are known, and a copy serves once
        content = {name: file["sha256"] for name, file in wanted.items()} if wanted else [self.uri, tags, told or uuid.uuid4().hex]
        return copies.directory(digest(content)[:20], fill, lambda target: not wanted or copies.differs(target, wanted) is None)

    def upload(self, source: Path) -> None:
        """Copy every file below a local directory into this folder, each one whole or not at all."""
        for path in sorted(p for p in source.rglob("*") if p.is_file()):
            self.write_bytes(path.relative_to(source).as_posix(), path.read_bytes())

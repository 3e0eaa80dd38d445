"""Tables in Parquet files, whatever their columns: written and read a row group at a time, and columns of lists as matrices."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from retrikt_ray.runtime.folders import ArtifactError, Folder


@dataclass(frozen=True)
class Source:
    """A table in Parquet files, cut into row groups."""

    folder: Folder
    groups: tuple[tuple[str, int, int, int], ...]  # (file, row group in it, position of its first row, rows)
    sizes: dict[str, int]  # of the files
    footers: dict[str, pq.FileMetaData] = field(default_factory=dict, compare=False, repr=False)  # of those opened in this process

    @staticmethod
    def of(folder: Folder, prefix: str = "part-") -> Source:
        """All files whose names start with `prefix`, in the order of their names. Reads their footers only."""
        groups, first, sizes, footers = [], 0, folder.sizes(), {}
        for name, size in sorted(sizes.items()):
            if name.startswith(prefix) and name.endswith(".parquet"):
                with folder.parquet(name, size) as file:
                    footers[name] = file.metadata
                for i in range(footers[name].num_row_groups):
                    rows = footers[name].row_group(i).num_rows
                    groups.append((name, i, first, rows))
                    first += rows
        if not groups:
            raise ArtifactError(f"{folder} holds no {prefix}*.parquet with rows")
        return Source(folder, tuple(groups), {name: sizes[name] for name, *_ in groups}, footers)

    def __reduce__(self) -> Any:
        """It travels without the footers, which are read again where they are wanted."""
        return Source, (self.folder, self.groups, self.sizes)

    @property
    def rows(self) -> int:
        return self.groups[-1][2] + self.groups[-1][3]

    @property
    def schema(self) -> pa.Schema:
        """The columns, as the first file has them."""
        with self.parquet(self.groups[0][0]) as file:
            return file.schema_arrow

    @contextmanager
    def parquet(self, name: str) -> Iterator[pq.ParquetFile]:
        """One of the files, opened."""
        with self.folder.parquet(name, self.sizes[name], self.footers.get(name)) as file:
            self.footers.setdefault(name, file.metadata)
            yield file

    def read(self, low: int, high: int, columns: tuple[str, ...]) -> Iterator[tuple[int, pa.Table]]:
        """(position of the first row, rows) of the positions low .. high - 1, a row group at a time."""
        start = max(0, bisect_right(self.groups, low, key=lambda group: group[2]) - 1)
        for name, group, first, rows in islice(self.groups, start, None):
            if first >= high:
                break
            begin, end = max(low - first, 0), min(high - first, rows)
            if begin < end:
                with self.parquet(name) as file:
                    yield first + begin, file.read_row_group(group, columns=list(columns)).slice(begin, end - begin)


@contextmanager
def writing(folder: Folder, name: str, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """A file that is written table by table, each a row group, in the memory of one: whole and there when the block ends well."""
    with folder.create(name) as path, pq.ParquetWriter(str(path), schema, compression="zstd") as writer:
        yield writer


def matrix(column: Any) -> np.ndarray:
    """A column of equally long lists as (n, C) float32."""
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return np.asarray(column.flatten(), dtype=np.float32).reshape(len(column), -1)


def names(column: Any) -> np.ndarray:
    """A column of few different texts as (n,) references to them: 8 bytes a row."""
    column = (column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column).dictionary_encode()
    return np.array(column.dictionary.to_pylist(), object)[column.indices.to_numpy()]


def write_arrays(folder: Folder, name: str, arrays: dict[str, np.ndarray], **numbers: int) -> None:
    """Arrays of any lengths, and whole numbers, as one Arrow file with one row, so that reading it maps the arrays into memory."""
    columns = {k: pa.LargeListArray.from_arrays(pa.array([0, len(v)], pa.int64()), pa.array(v)) for k, v in arrays.items()}
    table = pa.table(columns | {k: pa.array([v], pa.int64()) for k, v in numbers.items()})
    with folder.create(name) as path, pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def read_arrays(path: str, names: tuple[str, ...], number: str) -> tuple[dict[str, Any], int]:
    """Arrays of a file that `write_arrays` wrote, by name, and one of its numbers. Raises KeyError and pa.ArrowInvalid for another file."""
    table = pa.ipc.open_file(pa.memory_map(path)).read_all()
    return {k: table[k].chunk(0).values.to_numpy() for k in names}, table[number][0].as_py()

"""Where the vectors of a table come from: a column of it, or the student that reads its texts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from retrikt_ray.runtime import artifacts
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.tables import matrix
from retrikt_ray.task.texts import TEXT_COLUMNS, texts_of


class Vectors(Protocol):
    """Travels to Ray tasks, so it holds names, not models."""

    @property
    def columns(self) -> tuple[str, ...]: ...

    @property
    def width(self) -> int: ...

    def of(self, table: pa.Table) -> np.ndarray:
        """Unit vectors (n, width) float32 of rows that have `columns`."""
        ...


@dataclass(frozen=True)
class Column:
    """Vectors that lie in a column of fixed-size lists."""

    name: str
    width: int

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.name,)

    def of(self, table: pa.Table) -> np.ndarray:
        return matrix(table[self.name])


@dataclass(frozen=True)
class StudentVectors:
    """Vectors that a student makes of a table's texts."""

    student: Folder
    width: int
    threads: int
    columns: tuple[str, ...] = TEXT_COLUMNS

    def of(self, table: pa.Table) -> np.ndarray:
        """Unit vectors (n, width) float32."""
        texts = texts_of(table)
        return self.load()[0].encode(texts)[1].numpy() if texts else np.zeros((0, self.width), np.float32)

    def load(self) -> Any:
        return loaded(self.student, (artifacts.read_manifest(self.student) or artifacts.check(self.student)).content, self.threads)


@lru_cache(maxsize=1)
def loaded(folder: Folder, content: str, threads: int) -> tuple[Any, str]:
    """A worker loads a student once, not once a row group; `content` tells a student from another in the same folder."""
    import torch

    from retrikt_ray.student.model import Student

    torch.set_num_threads(threads)
    return Student.load(str(folder.local())), content


def validation_vectors(task: Folder, student: Folder, threads: int) -> np.ndarray:
    """The student's vectors (Q, width) of the validation rows (a Ray task)."""
    return StudentVectors(student, 0, threads).of(task.read_table("validation.parquet", [*TEXT_COLUMNS]))

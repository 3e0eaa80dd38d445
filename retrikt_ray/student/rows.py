"""Rows that students are trained on: in memory, or in a store that is read as the training goes, so that memory does not grow with it.

Some of a store's rows are held out: the student does not train on them. With the teacher's labels they choose the student's weights and
the mixture of its voices (`index/mixture.py`), for which the few validation rows of a low-resource task are not enough. They also say whether
texts that a model wrote are worth learning from where there are unlabelled ones of the domain (`courses`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.tables import Source, matrix, names
from retrikt_ray.runtime.training import dealt
from retrikt_ray.task.metrics import one_hot
from retrikt_ray.task.texts import TEXT_COLUMNS, Text, texts_of

COLUMNS = (*TEXT_COLUMNS, "teacher_probs", "teacher_embedding", "value")
HELD_SHARE, MOST_HELD = 0.1, 1000  # of the rows that may be held out
ENOUGH = 500  # unlabelled rows
OWN = ("task", "unlabelled")  # sources of the domain's own texts
MOST_TIMES = 8  # that a row is repeated
READERS = 8  # row groups that are read side by side
WINDOW = 64  # row groups that an epoch shuffles together and keeps in memory: 32,768 rows of a store as `annotate` writes it


@dataclass
class Rows:
    """Rows as arrays."""

    texts: list[Text]
    teacher: torch.Tensor  # (N, C) probabilities, or (N, 1) values
    embeddings: torch.Tensor | None  # (N, D) the teacher's, or None: no relation loss
    truth: torch.Tensor  # (N,) true class id or value; NaN where unknown

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def distinct(self) -> int:
        """Rows, repeated ones counted once."""
        return len(set(self.texts))

    def take(self, index: list[int]) -> Rows:
        return Rows(
            [self.texts[i] for i in index],
            self.teacher[index],
            None if self.embeddings is None else self.embeddings[index],
            self.truth[index],
        )

    def batches(self, batch: int, epochs: int, seed: int) -> Batches:
        return Batches([np.arange(len(self))], batch, epochs, seed)


def joined_rows(parts: list[Rows]) -> Rows:
    """Several rows as one."""
    embeddings = [p.embeddings for p in parts if p.embeddings is not None]
    return Rows(
        [t for p in parts for t in p.texts],
        torch.cat([p.teacher for p in parts]),
        torch.cat(embeddings) if len(embeddings) == len(parts) else None,
        torch.cat([p.truth for p in parts]),
    )


class StoreRows:
    """The rows of a store at some positions, read a row group at a time; the last WINDOW groups stay in memory."""

    def __init__(self, store: Folder, positions: np.ndarray) -> None:
        """positions: sorted, some perhaps repeated; row i of this is the store's row positions[i]."""
        self.source, self.positions = Source.of(store), positions
        self.firsts = np.array([first for _, _, first, _ in self.source.groups])
        self.kept: OrderedDict[int, Rows] = OrderedDict()

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def distinct(self) -> int:
        """Rows, repeated ones counted once."""
        return len(np.unique(self.positions))

    @cached_property
    def groups(self) -> list[np.ndarray]:
        """Row numbers by row group."""
        cuts = np.searchsorted(self.positions, self.firsts[1:])
        return [part for part in np.split(np.arange(len(self)), cuts) if len(part)]

    @cached_property
    def nothing(self) -> Rows:
        """No row, with the columns of all."""
        return self.read(0).take([])

    def read(self, number: int) -> Rows:
        first, count = self.source.groups[number][2:]
        _, table = next(self.source.read(first, first + count, COLUMNS))
        return rows_of(table)

    def loaded(self, numbers: Sequence[int]) -> list[Rows]:
        """Some row groups. Those that are not in memory are read side by side: of an object store each takes a few round trips."""
        missing = [n for n in numbers if n not in self.kept]
        new = {}
        if missing:
            with ThreadPoolExecutor(len(missing)) as readers:
                new = dict(zip(missing, readers.map(self.read, missing), strict=True))
        found = {n: new[n] if n in new else self.kept.pop(n) for n in numbers}
        self.kept |= found
        while len(self.kept) > WINDOW:
            self.kept.popitem(last=False)
        return list(found.values())

    def take(self, index: list[int]) -> Rows:
        if not index:
            return self.nothing
        positions = self.positions[index]
        numbers = np.searchsorted(self.firsts, positions, side="right") - 1
        order = np.argsort(numbers, kind="stable")
        each, cuts = np.unique(numbers[order], return_index=True)
        places = np.split(positions[order], cuts[1:])
        parts = []
        for low in range(0, len(each), READERS):
            some = each[low : low + READERS]
            for rows, number, place in zip(self.loaded(some.tolist()), some, places[low : low + READERS], strict=True):
                parts.append(rows.take((place - self.firsts[number]).tolist()))
        return joined_rows(parts).take(np.argsort(order).tolist())

    def batches(self, batch: int, epochs: int, seed: int) -> Batches:
        return Batches(self.groups, batch, epochs, seed)


class Batches:
    """Row numbers of every step of a training. Each epoch has an order of its own, which depends on (seed, epoch) alone.

    Groups of rows are drawn in a random order, and the rows of WINDOW groups that follow each other are shuffled together: an epoch reads each
    group once. With no more groups than that it is a plain shuffle.

    Several workers deal a batch out one row after another as long as each keeps all groups in memory. Of more groups each worker has its own, drawn
    in turn, and of a batch the rows that lie in them: no group is read twice in an epoch, whatever the number of workers. Their shares of a batch
    then differ by chance.
    """

    def __init__(self, groups: list[np.ndarray], batch: int, epochs: int, seed: int) -> None:
        self.groups, self.batch, self.seed = groups, batch, seed
        self.per_epoch = -(-sum(len(g) for g in groups) // batch)
        self.count = epochs * self.per_epoch
        self.firsts = np.array([group[0] for group in groups if len(group)])
        self.order: tuple[int, np.ndarray, np.ndarray] = (-1, np.zeros(0, int), np.zeros(0, int))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, step: int) -> list[int]:
        epoch, place = divmod(step, self.per_epoch)
        rows: list[int] = self.drawn(epoch)[0][place * self.batch : (place + 1) * self.batch].tolist()
        return rows

    def drawn(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers in the order of an epoch, (N,), and the place of each group in it, (groups,)."""
        if self.order[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            order = rng.permutation(len(self.groups))
            drawn = [self.groups[i] for i in order]
            windows = [np.concatenate(drawn[low : low + WINDOW]) for low in range(0, len(drawn), WINDOW)]
            self.order = epoch, np.concatenate([rng.permutation(w) for w in windows]), np.argsort(order)
        return self.order[1:]

    def parts(self, step: int, workers: int) -> list[list[int]]:
        """Row numbers of a step's batch by worker."""
        batch = self[step]
        if len(self.groups) <= WINDOW:
            return dealt(batch, workers)
        places = self.drawn(step // self.per_epoch)[1]
        rows = np.array(batch)
        owners = places[np.searchsorted(self.firsts, rows, "right") - 1] % workers
        return [rows[owners == rank].tolist() for rank in range(workers)]


def rows_of(table: object) -> Rows:
    """Rows from a table with COLUMNS."""
    truth = [float("nan") if v is None else v for v in table["value"].to_pylist()]  # type: ignore[index]
    teacher, embeddings = (torch.tensor(matrix(table[name])) for name in ("teacher_probs", "teacher_embedding"))  # type: ignore[index]
    return Rows(texts_of(table), teacher, embeddings, torch.tensor(truth, dtype=torch.float32))


def load_rows(store: Folder) -> Rows:
    """The rows of a store, in memory."""
    return rows_of(store.read_tables(columns=[*COLUMNS]))


def load_validation(task: Folder, outputs: int) -> Rows:
    """The validation rows of a task. Their true labels stand in for the teacher's, which is not asked."""
    table = task.read_table("validation.parquet")
    truth = np.array(table["value"].to_pylist(), dtype=np.float32)
    return Rows(texts_of(table), torch.tensor(one_hot(truth, outputs), dtype=torch.float32), None, torch.tensor(truth))


def sources_of(store: Folder) -> np.ndarray:
    """Where each row comes from, (N,): generated, task or unlabelled."""
    files = [name for name in store.files() if name.startswith("part-")]
    return np.concatenate([names(store.read_table(name, ["source"])["source"]) for name in files])


def drawn(sources: np.ndarray, seed: int) -> np.ndarray:
    """Positions, sorted, of a tenth of the rows that may be held out, at most MOST_HELD. sources (N,): of each row.

    Texts of the domain are as queries will be, so unlabelled ones are taken where there are enough; else generated ones; never the task's.
    """
    eligible = np.flatnonzero(sources == "unlabelled")
    if len(eligible) < ENOUGH:
        eligible = np.flatnonzero(sources != "task")
    count = min(MOST_HELD, int(len(eligible) * HELD_SHARE))
    return np.sort(np.random.default_rng([seed, 7]).choice(eligible, count, replace=False))


def balanced(positions: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """The positions, sorted, with those of texts of the domain repeated until they are half of all, MOST_TIMES at most.

    Generated texts of a small LM are of the domain in part; where they are the many, a student learns to answer them. sources (N,): of each row.
    """
    own = np.isin(sources[positions], OWN)
    times = min(MOST_TIMES, max(1, round((~own).sum() / max(1, own.sum()))))
    return np.sort(np.concatenate([positions, np.repeat(positions[own], times - 1)]))


def courses(sources: np.ndarray) -> list[tuple[str, ...]]:
    """Which rows a voice may learn from, by their sources; none named: from all. sources (N,): of each row.

    Where there are enough unlabelled texts beside others, it is tried with the domain's own alone, too, and held-out rows choose: what a small LM
    writes, or a corpus holds, may be worth less than nothing beside them.
    """
    if (sources == "unlabelled").sum() < ENOUGH or np.isin(sources, OWN).all():
        return [()]
    return [(), OWN]


def among(sources: np.ndarray, named: Sequence[str]) -> np.ndarray:
    """(N,) bool: which rows are of the named sources; none named: all. sources (N,)."""
    return np.isin(sources, named) if len(named) else np.ones(len(sources), bool)


def load_store(store: Folder, seed: int, named: Sequence[str] = ()) -> tuple[StoreRows, Rows]:
    """The rows that a student trains on, of the named sources or all, and those that are held out."""
    sources = sources_of(store)
    held = drawn(sources, seed)
    rows = StoreRows(store, balanced(np.setdiff1d(np.flatnonzero(among(sources, named)), held), sources))
    return rows, StoreRows(store, held).take(list(range(len(held))))

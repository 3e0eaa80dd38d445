"""Stage 5, harvest: the passages of a corpus that are most like the labelled rows. They become rows of the store, `source: corpus`.

Every passage is weighed cheaply, piece by piece, each piece leaving one file with its best; the best of all are read by the encoder and labelled
by the annotator; of these the nearest are taken, as many of each label as there are. Memory holds one piece's best, then `candidates`
passages, whatever the size of the corpus. What is chosen depends on the files and the config alone, not on the workers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from retrikt_ray.runtime.cluster import Workers, plan, pool
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.progress import track
from retrikt_ray.runtime.settings import Scaled
from retrikt_ray.runtime.tables import matrix
from retrikt_ray.store.duplicates import HeldOut, near_duplicates, shingles
from retrikt_ray.store.rows import HARVESTED
from retrikt_ray.task.card import Task
from retrikt_ray.task.corpus import Piece, documents, pieces_of
from retrikt_ray.task.passages import band, passages
from retrikt_ray.task.texts import DataError, Text, texts_of
from retrikt_ray.task.words import words

VERSION = 1
CHUNK = 512  # passages that an actor ranks at a time
AT_ONCE = 2048  # passages that are weighed at a time
SAMPLED, FROM = 500, 16  # passages of a piece, and pieces, that say what the corpus is like
BINS = 5  # of the labelled rows' values, in regression, of which equally many passages are taken
REPEATED = 0.8  # of words and word pairs: passages that share as much with a better one are left out, as `annotate` would
MOST_UNREADABLE = 0.01  # share of documents
SIFTED = pa.schema([("nearness", pa.float32()), ("text", pa.string()), ("file", pa.string())])


class HarvestConfig(Scaled):
    """Which passages of `prepare.corpus` become rows of the store. Without a corpus this stage is left out."""

    rows: int = Field(3000, ge=1, description="Passages to choose, as many of each label as there are.")
    candidates: int = Field(
        12000, ge=1, description="Passages that the encoder ranks and the annotator labels: the nearest by averages of token vectors."
    )
    megabytes: float = Field(0, ge=0, description="Read about so much of the corpus, in pieces of 4 MB drawn over all of it. 0: all of it.")
    text_column: str = Field("text", description="Column with the text, in .jsonl and .parquet.")
    batch: int = Field(64, ge=1, description="Passages per forward pass.")


def passages_of(piece: Piece, lengths: list[int], column: str, rng: random.Random) -> Iterator[tuple[str, str] | DataError]:
    """(passage, file) of each passage of a piece; where a document cannot be read, what is wrong with it."""
    for span in piece:
        for document in documents(span, column):
            if isinstance(document, DataError):
                yield document
            else:
                yield from ((passage, str(span)) for passage in passages(document, lengths, rng))


class Best:
    """The `most` texts with the highest scores of those that were added, equal ones once; of equal scores the earlier. Holds twice as many."""

    def __init__(self, most: int) -> None:
        self.most, self.rows = most, list[tuple[float, str, str]]()

    def add(self, scores: np.ndarray, found: list[tuple[str, str]]) -> None:
        self.rows += [(score, *text) for score, text in zip(scores.tolist(), found, strict=True)]
        if len(self.rows) > 2 * self.most:
            self.shrink()

    def shrink(self) -> list[tuple[float, str, str]]:
        """The best, the highest first."""
        seen: set[str] = set()
        self.rows.sort(key=lambda row: -row[0])
        self.rows = [row for row in self.rows if (text := row[1].lower()) not in seen and not seen.add(text)][: self.most]  # type: ignore[func-returns-value]
        return self.rows


class Sifter:
    """A Ray Data actor: weighs every passage of a piece, and writes the best."""

    def __init__(
        self,
        config: HarvestConfig,
        pieces: list[Piece],
        inputs: dict[str, Folder],
        scratch: Folder,
        general: list[str],
        weights: np.ndarray,
    ) -> None:
        import torch

        from retrikt_ray.store.nearness import Averaged, encoder_of

        torch.set_num_threads(1)
        self.config, self.pieces, self.scratch = config, pieces, scratch
        texts = [text for text, _ in texts_of(inputs["task"].read_table("train.parquet"))]
        self.lengths = lengths_of(inputs["task"])
        self.near = Averaged(encoder_of(inputs["teacher"]), texts, general)
        self.near.weights = weights

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        pieces = [int(number) for number in batch["piece"]]
        return {"piece": pieces, "passages": [self.write(number) for number in pieces]}

    def write(self, number: int) -> int:
        """Write one piece's best. Returns how many passages it has."""
        best, count, errors = Best(self.config.candidates), 0, list[str]()
        found = passages_of(self.pieces[number], self.lengths, self.config.text_column, random.Random(number))
        while some := list(islice(found, AT_ONCE)):
            fine = [one for one in some if not isinstance(one, DataError)]
            errors += [str(one) for one in some if isinstance(one, DataError)]
            count += len(fine)
            if fine:
                best.add(self.near([text for text, _ in fine]), fine)
        told = {"passages": count, "unreadable": len(errors), "first": errors[:1]}
        self.scratch.write_table(chunk_name("sifted", number), table_of(best.shrink(), told))
        return count


class Ranker:
    """A Ray Data actor: the encoder's nearness of a chunk of candidates, and the annotator's answers."""

    def __init__(self, config: HarvestConfig, inputs: dict[str, Folder], scratch: Folder, threads: int) -> None:
        import torch

        from retrikt_ray.store.nearness import Encoded, encoder_of
        from retrikt_ray.teacher.annotator import Annotator

        torch.set_num_threads(threads)
        self.config, self.scratch = config, scratch
        self.near = Encoded(encoder_of(inputs["teacher"]), texts_of(inputs["task"].read_table("train.parquet")))
        self.annotator = Annotator.load(inputs["teacher"])

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        return {"rows": [self.write(int(number)) for number in batch["chunk"]]}

    def write(self, number: int) -> int:
        table = self.scratch.read_table(chunk_name("candidates", number))
        texts: list[Text] = [(text, None) for text in table["text"].to_pylist()]
        answers = pa.array(self.annotator.annotate(texts, self.config.batch)[0].tolist(), pa.list_(pa.float32()))
        scores = pa.array(self.near(texts, self.config.batch), pa.float32())
        ranked = table.set_column(table.column_names.index("nearness"), "nearness", scores).append_column("answers", answers)
        self.scratch.write_table(chunk_name("ranked", number), ranked)
        return len(table)


def harvest(config: HarvestConfig, inputs: dict[str, Folder], out: dict[str, Folder], *, seed: int) -> dict[str, Any]:
    """Write `harvested/`: part-NNNNN.parquet, the nearest passages first. inputs: task, teacher, and the corpus.

    1. Sift the pieces that an interrupted run left undone.  2. Rank what came through.  3. Choose.  4. Write.
    """
    # 1. sift
    pieces = pieces_of(inputs["corpus"].uri, config.megabytes, seed)
    told = sift(config, pieces, inputs, out["scratch"])
    # 2. rank
    ranked = rank(config, len(pieces), inputs, out["scratch"])
    # 3. choose
    table = ranked.take(choose(config, ranked, inputs["task"]))
    # 4. write
    columns = {name: table[name] for name in ("text", "file", "nearness")}
    columns |= {"id": [f"corpus-{i:06d}" for i in range(len(table))], "text_pair": [None] * len(table)}
    found = pa.table([columns[name] for name in HARVESTED.names], schema=HARVESTED)
    for number, start in enumerate(range(0, len(found), CHUNK)):
        out["harvested"].write_table(chunk_name("part", number), found.slice(start, CHUNK))
    return {"rows": len(found), "candidates": len(ranked)} | told


def lengths_of(task: Folder) -> list[int]:
    """Words of each labelled row."""
    return [len(words(text)) for text, _ in texts_of(task.read_table("train.parquet"))]


def sift(config: HarvestConfig, pieces: list[Piece], inputs: dict[str, Folder], scratch: Folder) -> dict[str, int]:
    """Weigh every passage of the pieces. Returns how many there are. Raises DataError where too much could not be read."""
    complete = set(scratch.files())
    missing = [number for number in range(len(pieces)) if chunk_name("sifted", number) not in complete]
    if missing:
        size = [sum(span.size for span in piece) / 1e6 for piece in pieces]
        workers = plan(config, "harvest")
        general = sample(config, pieces, lengths_of(inputs["task"]))
        arguments = (config, pieces, inputs, scratch, general, fitted(config, inputs, general, workers))
        with track("harvest: passages", round(sum(size), 1), "MB") as progress:
            progress.set(sum(size) - sum(size[number] for number in missing))
            for row in pool(Sifter, arguments, [{"piece": number} for number in missing], workers):
                progress.advance(size[int(row["piece"])])
    told = []
    for number in range(len(pieces)):
        with scratch.parquet(chunk_name("sifted", number)) as file:
            told.append(json.loads(file.schema_arrow.metadata[b"told"]))
    passages, unreadable = (sum(one[key] for one in told) for key in ("passages", "unreadable"))
    if unreadable > MOST_UNREADABLE * passages:
        first = next(one["first"][0] for one in told if one["first"])
        raise DataError(f"the corpus: {unreadable:,} documents could not be read, and {passages:,} passages were; the first: {first}")
    return {"passages": passages} | ({"unreadable": unreadable} if unreadable else {})


def fitted(config: HarvestConfig, inputs: dict[str, Folder], general: list[str], workers: Workers) -> np.ndarray:
    """The weights with which averages of token vectors tell what the encoder finds; on one thread, so that sums are the same everywhere."""
    import ray

    from retrikt_ray.store.nearness import weights_of

    task = ray.remote(num_cpus=1, num_gpus=workers.gpus)(weights_of)
    found: np.ndarray = ray.get(task.remote(inputs["teacher"], inputs["task"], general, config.batch))
    return found


def sample(config: HarvestConfig, pieces: list[Piece], lengths: list[int]) -> list[str]:
    """Passages from the beginning of pieces all over the corpus. Raises what cannot be read where there are none."""
    spread = pieces[:: -(-len(pieces) // FROM)]
    found = [one for piece in spread for one in islice(passages_of(piece, lengths, config.text_column, random.Random(0)), SAMPLED)]
    fine = [one[0] for one in found if not isinstance(one, DataError)]
    if not fine:
        low, high = band(lengths)
        raise found[0] if found else DataError(f"the corpus has no passage of {low} to {high} words, as the labelled rows have")  # type: ignore[misc]
    return fine


def rank(config: HarvestConfig, count: int, inputs: dict[str, Folder], scratch: Folder) -> pa.Table:
    """The candidates of so many pieces, with the encoder's nearness and the annotator's answers."""
    best = Best(config.candidates)
    for number in range(count):
        table = scratch.read_table(chunk_name("sifted", number))
        best.add(table["nearness"].to_numpy(), list(zip(table["text"].to_pylist(), table["file"].to_pylist(), strict=True)))
    found = table_of(best.shrink())
    chunks = range(-(-len(found) // CHUNK))
    complete = set(scratch.files())
    missing = [number for number in chunks if chunk_name("ranked", number) not in complete]
    for number in missing:
        scratch.write_table(chunk_name("candidates", number), found.slice(number * CHUNK, CHUNK))
    if missing:
        workers = plan(config, "harvest")
        with track("harvest: candidates", len(found), "rows") as progress:
            progress.set(len(found) - min(len(found), len(missing) * CHUNK))
            for row in pool(Ranker, (config, inputs, scratch, workers.threads), [{"chunk": number} for number in missing], workers):
                progress.advance(int(row["rows"]))
    return pa.concat_tables([scratch.read_table(chunk_name("ranked", number)) for number in chunks])


def choose(config: HarvestConfig, ranked: pa.Table, task: Folder) -> list[int]:
    """Positions of the passages that become rows, the nearest first: copies of held-out texts and near duplicates are left out, labels balanced."""
    order = np.argsort(-ranked["nearness"].to_numpy(), kind="stable")
    held_out = HeldOut([t for split in ("validation", "test") for t in texts_of(task.read_table(f"{split}.parquet"))])
    texts: list[Text] = [(text, None) for text in ranked["text"].take(order).to_pylist()]
    new = np.array([not held_out.equals(text) and not held_out.copied(text) for text in texts])
    own = texts_of(task.read_table("train.parquet"))
    places = np.flatnonzero(new)
    fixed = np.arange(len(own) + len(places)) < len(own)
    twins = near_duplicates([shingles(text) for text in [*own, *(texts[i] for i in places)]], fixed, REPEATED)[len(own) :]
    order = order[places[twins < 0]]
    if not len(order):
        raise DataError(f"the corpus: all {len(texts):,} candidates are copies of the task's own texts")
    return order[balanced(labels_of(matrix(ranked["answers"])[order], task), config.rows)].tolist()


def labels_of(answers: np.ndarray, task: Folder) -> np.ndarray:
    """Class ids (N,) of the annotator's answers; in regression the quantile of the labelled rows' values."""
    if not Task.read(task).regression:
        return np.asarray(answers.argmax(1))
    values = np.array(task.read_table("train.parquet")["value"].to_pylist())
    return np.searchsorted(np.quantile(values, np.arange(1, BINS) / BINS), answers[:, 0])


def balanced(labels: np.ndarray, count: int) -> np.ndarray:
    """Positions, ascending, of `count` rows: the first of each label, equally many; what a label lacks the others share. labels: (N,)."""
    left, taken = count, []
    groups = sorted((np.flatnonzero(labels == label) for label in np.unique(labels)), key=len)
    for i, rows in enumerate(groups):
        taken.append(rows[: left // (len(groups) - i)])
        left -= len(taken[-1])
    return np.sort(np.concatenate(taken))


def chunk_name(kind: str, number: int) -> str:
    return f"{kind}-{number:05d}.parquet"


def table_of(rows: list[tuple[float, str, str]], told: dict[str, Any] | None = None) -> pa.Table:
    """(nearness, text, file) of each row as a table, with what is told of them all."""
    schema = SIFTED.with_metadata({"told": json.dumps(told)})
    return pa.Table.from_pylist([dict(zip(SIFTED.names, row, strict=True)) for row in rows], schema)

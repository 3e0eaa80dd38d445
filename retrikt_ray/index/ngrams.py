"""The n-gram memory: what each word, and each pair of words side by side, says of the label. A table, key n-gram, value class weights.

A text's answer is softmax of bias + sum over its n-grams of their weights / sqrt(n), n being how many of them the table knows; in regression
the sum itself. The weights are those of a multinomial logistic regression on n-grams weighted by inverse document frequency, learnt from the
store by the teacher's labels (`learning.py`). They see what a student of 1 % of its teacher cannot hold: thousands of turns of phrase.

On the disk a table is sorted hashes beside quantised weights, in one Arrow file that is mapped into memory: an answer touches the few
pages that hold its n-grams. No n-gram is kept as text; what spoke for an answer is named from the text that was asked.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from retrikt_ray.index.words.compiled import compiled
from retrikt_ray.runtime.folders import ArtifactError, Folder
from retrikt_ray.runtime.tables import read_arrays, write_arrays
from retrikt_ray.task.metrics import answers_of
from retrikt_ray.task.texts import Text
from retrikt_ray.task.words import WORD

FILE = "ngrams.arrow"
ARRAYS = ("keys", "idf", "scales", "starts", "classes", "steps", "bias")  # of a table, on the disk
MARKED = re.compile(rf"{WORD}|[^\w\s]")  # words and marks
BETWEEN = "\x1f"  # stands between the texts of a pair
SHARES = 10  # steps in which the share of a text is told that its other text has, too
SMALLEST = 1 / 64  # weights below this share of their n-gram's largest are left out
FACTOR, LAST_FACTOR = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)  # of splitmix64
STEPS = 127  # of a quantised weight, to either side


@dataclass(frozen=True)
class Spoken:
    """An n-gram of a text, and what it adds to the log-odds of a label (to the value, in regression)."""

    ngram: str
    weight: float


def words_of(text: Text) -> list[str]:
    """Words and marks of a text in lower case, in order."""
    first, second = text
    return MARKED.findall(first.lower()) + ([BETWEEN, *MARKED.findall(second.lower())] if second else [])


def compared(text: Text) -> dict[str, str]:
    """What the texts of a pair have in common, as words of their own, each with how it reads: every word by whether both texts have it or one
    alone, and of each text the share that the other has, too. Empty for a single text.

    "not" in one text alone, another number: what sets an answer apart from a paraphrase does not show in either text.
    """
    if not text[1]:
        return {}
    first, second = (set(MARKED.findall(part.lower())) for part in (text[0], text[1]))
    both = first & second
    found = {f"{BETWEEN}={w}": f"{w} (in both)" for w in both}
    for mark, side, name in (("<", first, "first"), (">", second, "second")):
        found |= {f"{BETWEEN}{mark}{w}": f"{w} (in the {name} alone)" for w in side - both}
        share = SHARES * len(both) // max(1, len(side))
        found[f"{BETWEEN}{mark}{BETWEEN}{share}"] = f"{share} of {SHARES} words of the {name} in both"
    return found


@lru_cache(maxsize=2**17)
def word_key(word: str) -> int:
    return int.from_bytes(blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


@compiled
def pair_keys(first: Any, second: Any) -> Any:
    """Keys of word pairs from those of their words, uint64, one or (n,). The order counts (splitmix64's last steps)."""
    mixed = first * FACTOR + second
    mixed = (mixed ^ (mixed >> np.uint64(30))) * LAST_FACTOR
    return mixed ^ (mixed >> np.uint64(31))


def keys_of(texts: list[Text]) -> tuple[np.ndarray, np.ndarray]:
    """The distinct n-grams of each text: keys (G,) uint64, and which text each belongs to (G,), ascending by text, then key."""
    words, crossed = [words_of(text) for text in texts], [compared(text) for text in texts]
    single, more = (np.array([word_key(w) for some in found for w in some], np.uint64) for found in (words, crossed))
    row, more_row = (np.repeat(np.arange(len(texts)), [len(some) for some in found]) for found in (words, crossed))
    inside = row[1:] == row[:-1]
    keys = np.concatenate([single, pair_keys(single[:-1], single[1:])[inside], more])
    rows = np.concatenate([row, row[1:][inside], more_row])
    order = np.lexsort((keys, rows))
    keys, rows = keys[order], rows[order]
    first = np.ones(len(keys), bool)
    first[1:] = (keys[1:] != keys[:-1]) | (rows[1:] != rows[:-1])
    return keys[first], rows[first]


def named(text: Text) -> dict[int, str]:
    """The n-grams of a text by key, as they read."""
    words = words_of(text)
    keys = np.array([word_key(w) for w in words], np.uint64)
    pairs = pair_keys(keys[:-1], keys[1:]).tolist()
    shown = {k: f"{a} {b}" for k, (a, b) in zip(pairs, pairwise(words), strict=True) if BETWEEN not in (a, b)}
    shown |= {k: w for k, w in zip(keys.tolist(), words, strict=True) if w != BETWEEN}
    return shown | {word_key(w): read for w, read in compared(text).items()}


def hashed(found: Sequence[Collection[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Keys of the words of one text after another, and where those of each text end, (Q,)."""
    return np.array([word_key(w) for some in found for w in some], np.uint64), np.array([*accumulate(map(len, found))], np.int64)


@compiled
def add(
    words: Any, ends: Any, more: Any, more_ends: Any, keys: Any, starts: Any, classes: Any, steps: Any, scales: Any, sums: Any, found: Any
) -> None:
    """Add what a table says of the n-grams of Q texts to `sums` (Q, C), and how many it knows to `found` (Q,).

    words, more: keys as `hashed` has those of `words_of` and of `compared`; each n-gram counts once, in the order of the keys.
    """
    low = more_low = 0
    for q in range(len(ends)):
        count = ends[q] - low
        pairs = max(0, count - 1)
        own = np.empty(count + pairs + more_ends[q] - more_low, np.uint64)
        own[:count] = words[low : ends[q]]
        for i in range(pairs):
            own[count + i] = pair_keys(own[i], own[i + 1])
        own[count + pairs :] = more[more_low : more_ends[q]]
        own.sort()
        for i in range(len(own)):
            if i and own[i] == own[i - 1]:
                continue
            at = np.searchsorted(keys, own[i])
            if at < len(keys) and keys[at] == own[i]:
                found[q] += 1
                for entry in range(starts[at], starts[at + 1]):
                    sums[q, classes[entry]] += steps[entry] * np.float64(scales[at])
        low, more_low = ends[q], more_ends[q]


@dataclass(frozen=True)
class Memory:
    """A table of n-grams. Entries starts[i] .. starts[i + 1] - 1 are those of n-gram i."""

    keys: np.ndarray  # (G,) uint64, sorted
    idf: np.ndarray  # (G,) float32, inverse document frequency
    scales: np.ndarray  # (G,) float32, weight of one step
    starts: np.ndarray  # (G + 1,) int64
    classes: np.ndarray  # (E,) int16
    steps: np.ndarray  # (E,) int8
    bias: np.ndarray  # (C,) float64
    rows: int  # that it was learnt from

    def __post_init__(self) -> None:
        for name in ARRAYS:  # none is written to, whether mapped or made here: the compiled loop has one kind of table
            array = getattr(self, name).view()
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    @staticmethod
    def of(keys: np.ndarray, idf: np.ndarray, weights: np.ndarray, bias: np.ndarray, rows: int) -> Memory:
        """Quantise and prune dense weights (G, C); keys sorted.

        A constant over the classes of an n-gram says nothing (softmax), so one is taken away first that leaves most weights near 0: their
        median, or the first of two.
        """
        classes = weights.shape[1]
        common = np.median(weights, 1) if classes > 2 else weights[:, 0] if classes == 2 else np.zeros(len(weights))
        dense = weights - common[:, None]
        largest = np.abs(dense).max(1, initial=0)
        scales = (largest / STEPS).astype(np.float32)
        steps = np.rint(dense / np.maximum(scales, 1e-30)[:, None].astype(np.float64)).clip(-STEPS, STEPS).astype(np.int8)
        held = (np.abs(dense) >= SMALLEST * largest[:, None]) & (steps != 0)
        gram, classes = np.nonzero(held)
        starts = np.searchsorted(gram, np.arange(len(keys) + 1)).astype(np.int64)
        return Memory(keys, idf.astype(np.float32), scales, starts, classes.astype(np.int16), steps[held], bias, rows)

    @property
    def numbers(self) -> int:
        """Weights in the table."""
        return len(self.steps) + len(self.bias)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Where each key is in the table, -1 where it is not. (n,)"""
        if not len(self.keys):
            return np.full(len(keys), -1)
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[at] == keys, at, -1)

    def entries(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The entries of some n-grams, one after the other: which of `places` each belongs to, its class, its weight."""
        low, counts = self.starts[places], self.starts[places + 1] - self.starts[places]
        which = np.repeat(np.arange(len(places)), counts)
        flat = np.arange(len(which)) + np.repeat(low - (np.cumsum(counts) - counts), counts)
        return which, self.classes[flat], self.steps[flat] * self.scales[places][which].astype(np.float64)

    def dense(self, places: np.ndarray) -> np.ndarray:
        """Weights (n, C) of some n-grams."""
        out = np.zeros((len(places), len(self.bias)))
        which, classes, weights = self.entries(places)
        out[which, classes] = weights
        return out

    def logits(self, texts: list[Text]) -> tuple[np.ndarray, np.ndarray]:
        """Of Q texts: (Q, C) log-odds, or values; and how many n-grams of each the table knows, (Q,)."""
        sums, found = np.zeros((len(texts), len(self.bias))), np.zeros(len(texts), np.int64)
        asked = *hashed(list(map(words_of, texts))), *hashed(list(map(compared, texts)))
        add(*asked, self.keys, self.starts, self.classes, self.steps, self.scales, sums, found)
        return self.bias + sums / np.sqrt(np.maximum(found, 1))[:, None], found

    def answers(self, texts: list[Text]) -> tuple[np.ndarray, np.ndarray]:
        """(Q, C) probabilities, or values; and 1 for a text with a known n-gram, else 0, (Q, 1)."""
        logits, found = self.logits(texts)
        return answers_of(logits), (found > 0).astype(np.float64)[:, None]

    def spoken(self, text: Text, label: int, most: int) -> list[Spoken]:
        """The n-grams of a text that say most for or against a label, strongest first.

        A weight is taken against the mean over the labels, so that the sum over n-grams is what they say of this label beside the others.
        """
        keys, _ = keys_of([text])
        places = self.find(keys)
        keys, places = keys[places >= 0], places[places >= 0]
        dense, shown = self.dense(places) / np.sqrt(max(1, len(places))), named(text)
        says = dense[:, label] - (dense.mean(1) if dense.shape[1] > 1 else 0)
        order = [i for i in np.argsort(-np.abs(says), kind="stable") if says[i] and int(keys[i]) in shown]
        return [Spoken(shown[int(keys[i])], float(says[i])) for i in order[:most]]

    def changed(self, keys: np.ndarray, idf: np.ndarray, more: np.ndarray) -> Memory:
        """The table with weights (n, C) added to those of some n-grams; keys sorted, idf (n,): theirs."""
        places = self.find(keys)
        old = places >= 0
        weights = np.array(more, np.float64)
        weights[old] += self.dense(places[old])
        stay = np.ones(len(self.keys), bool)
        stay[places[old]] = False
        return merged([self.part(np.flatnonzero(stay)), Memory.of(keys, idf, weights, self.bias, self.rows)])

    def part(self, places: np.ndarray) -> Memory:
        """Of some n-grams alone; places ascending."""
        counts = self.starts[places + 1] - self.starts[places]
        held = np.arange(counts.sum()) + np.repeat(self.starts[places] - (np.cumsum(counts) - counts), counts)
        starts = np.append(0, np.cumsum(counts))
        return Memory(
            self.keys[places], self.idf[places], self.scales[places], starts, self.classes[held], self.steps[held], self.bias, self.rows
        )

    def write(self, folder: Folder) -> None:
        write_arrays(folder, FILE, {k: getattr(self, k) for k in ARRAYS}, learnt_from=self.rows)

    @staticmethod
    def unsealed(folder: Folder) -> Memory:
        """Map a table into memory that this process has just verified, or its own job has just written."""
        try:
            arrays, rows = read_arrays(str(folder.local() / FILE), ARRAYS, "learnt_from")
        except (OSError, pa.ArrowInvalid, KeyError) as error:
            raise ArtifactError(f"{folder} has no n-gram memory of this version ({error}); run `retrikt index` for its run") from None
        return Memory(**arrays, rows=rows)


def merged(parts: list[Memory]) -> Memory:
    """Tables of different n-grams as one."""
    flat = {n: np.concatenate([getattr(p, n) for p in parts]) for n in ("keys", "idf", "scales", "classes", "steps")}
    starts = np.append(0, np.cumsum(np.concatenate([np.diff(p.starts) for p in parts])))
    whole = Memory(**flat, starts=starts, bias=parts[0].bias, rows=parts[0].rows)
    return whole.part(np.argsort(whole.keys, kind="stable"))

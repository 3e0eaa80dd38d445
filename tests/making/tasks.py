"""Tiny tasks and configs for tests of the whole pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

WORDS = {
    "weather": ["rain", "sun", "storm", "wind", "cloud", "snow"],
    "food": ["soup", "bread", "cheese", "apple", "rice", "cake"],
}
FRAMES = ["the {} was here today", "we saw {} again", "no {} this time", "{} all over town", "i like {} a lot", "so much {} and {}"]


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    """`count` rows of the two classes in turn, all different as long as count + start <= 72."""
    out = []
    for i in range(start, start + count):
        label = ("weather", "food")[i % 2]
        j = i // 2
        word = WORDS[label][j % 6]
        out.append({"text": FRAMES[j // 6 % 6].format(word, WORDS[label][(j + 1) % 6]), "label": label})
    return out


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")


def write_task(folder: Path, train: int = 36, validation: int = 12, test: int = 24) -> Path:
    """A two-class task of single texts."""
    write_jsonl(folder / "train.jsonl", rows(train))
    write_jsonl(folder / "validation.jsonl", rows(validation, train))
    write_jsonl(folder / "test.jsonl", rows(test, train + validation))
    return folder


def corpus_documents() -> list[tuple[str, str, str]]:
    """36 documents of three sentences of five words, of which the middle one is about the task; one of these is there seven times."""
    pairs = [(first, second) for some in WORDS.values() for first in some for second in some if first < second]
    middle = [f"We saw {first} and {second}." for first, second in [*pairs, *pairs[:1] * 6]]
    names = [first + second for first in "lmnopq" for second in "aeiouy"]
    return [(f"Minister {n} spoke for hours.", text, f"Nobody heard {n} speak there.") for n, text in zip(names, middle, strict=True)]


def write_corpus(folder: Path) -> Path:
    """The documents of a corpus, in turn as lines of text, JSON and Parquet."""
    (folder / "corpus").mkdir(parents=True)
    documents = [" ".join(some) for some in corpus_documents()]
    (folder / "corpus" / "a.txt").write_text("\n".join(documents[::3]) + "\n")
    write_jsonl(folder / "corpus" / "b.jsonl", [{"text": text} for text in documents[1::3]])
    pq.write_table(pa.table({"text": documents[2::3]}), folder / "corpus" / "c.parquet", row_group_size=5)
    return folder / "corpus"


def write_pair_regression(folder: Path) -> Path:
    """Sentence pairs with a similarity from 0 to 5, in the style of STS-B."""
    records = []
    some = rows(40)
    for i, row in enumerate(some):
        other = some[(i + (0 if i % 3 == 0 else i % 7 + 1)) % len(some)]
        same = len(set(row["text"].split()) & set(other["text"].split())) / 3
        records.append(
            {"a": row["text"], "b": other["text"] + (" now" if i % 2 else ""), "score": round(min(5.0, 1.5 * same + i % 3 * 0.2), 2)}
        )
    for name, part in (("train", records[:24]), ("validation", records[24:32]), ("test", records[32:])):
        write_jsonl(folder / f"{name}.jsonl", part)
    return folder


def tiny(base: str, **more: Any) -> dict[str, Any]:
    """A run config that takes seconds a stage; `more` are whole sections that replace keys."""
    config: dict[str, Any] = {
        "teach": {"base": base, "prompt_epochs": 1, "annotator_epochs": 1, "max_tokens": 12, "shared_tokens": 2, "class_tokens": 2},
        "reinforce": {"steps": 2, "texts": 8, "minibatch": 4, "epochs": 1, "watch_every": 1, "watch_texts": 8},
        "generate": {"rows": 48, "rows_per_shard": 8},
        "distill": {"epochs": 1, "size": 0.2},
        "evaluate": {"store_fractions": [0.5], "examples": 2, "latency_texts": 3},
    }
    for section, keys in more.items():
        config[section] = config.get(section, {}) | keys if isinstance(keys, dict) else keys
    return config

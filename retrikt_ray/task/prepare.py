"""Stage 1, prepare: from task files to a checked, low-resource sample with fixed splits.

Left out on purpose: balancing, cleaning, augmentation. The rows are the user's; a row that cannot be used is an error, not a silent drop.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from typing import Any, ClassVar, Literal

import pyarrow as pa
from pydantic import Field, model_validator

from retrikt_ray.runtime.folders import PACKAGED, Folder
from retrikt_ray.runtime.settings import ConfigError, Section
from retrikt_ray.task import files
from retrikt_ray.task.card import Task
from retrikt_ray.task.files import HUB, Columns
from retrikt_ray.task.texts import DataError

VERSION = 2  # raise when the same config would give other files
REGRESSION_BINS = 5  # generation is conditioned on a class; for regression, on one of this many quantile bins

TASK_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("text", pa.string()),
        ("text_pair", pa.string()),  # null for single-text tasks
        ("label", pa.string()),  # class name, or the number as text; null for unlabelled rows
        ("condition", pa.int32()),  # what a generated text is asked to be: class id, or quantile bin in regression
        ("value", pa.float64()),  # class id, or the number in regression
    ]
)


class PrepareConfig(Section):
    """The task: where its rows are, what they mean, and how many of them are used."""

    data: str = Field(
        "quickstart",
        description="Folder with train/validation/test files (.jsonl .csv .tsv .parquet), one such file, hf://datasets/OWNER/NAME, or `quickstart`.",
    )
    name: str | None = Field(None, description="Name shown in reports. Default: the last part of `data`.")
    subset: str | None = Field(None, description="Configuration name of a hub dataset, e.g. `sst2` of nyu-mll/glue.")
    revision: str | None = Field(None, description="Revision of a hub dataset.")
    text_column: str = Field("text", description="Column with the text.")
    text_pair_column: str | None = Field(
        None, description="Column with the second text of a pair. Default: `text_pair` where the data has it."
    )
    label_column: str = Field("label", description="Column with the label.")
    problem: Literal["classification", "regression"] = Field("classification", description="Regression takes numbers as labels.")
    label_names: dict[str, str] = Field({}, description="Readable names for labels, used in the template, e.g. {HUM: a person}.")
    template: str = Field("{label}: ", description="Readable start of every generated text; {label} is the readable name of the label.")
    metric: Literal["auto", "accuracy", "matthews", "macro_f1", "pearson", "spearman"] = Field(
        "auto", description="auto: accuracy, or Pearson correlation in regression."
    )
    n_per_class: int | None = Field(None, ge=1, description="Labelled training rows per class; default all.")
    n_rows: int | None = Field(None, ge=2, description="Labelled training rows in all (drawn without regard to class); default all.")
    validation_rows: int | None = Field(
        None, ge=2, description="Validation rows used. Default: no more than there are training rows, as a low-resource user has no more."
    )
    unlabelled: str | None = Field(
        None,
        description="Unlabelled texts of the domain (a file, .txt allowed), or `train`: the texts of the train rows that were not drawn.",
    )
    unlabelled_rows: int | None = Field(None, ge=1, description="At most this many unlabelled texts; default all.")
    corpus: str | None = Field(
        None,
        description="General text of any size, whose passages most like the labelled rows become rows of the store (see `harvest`): a folder, file or URI of .txt (a document a line), .jsonl or .parquet.",
    )
    not_in_fingerprint: ClassVar[frozenset[str]] = frozenset({"corpus"})  # `harvest` reads it

    @model_validator(mode="after")
    def _check(self) -> PrepareConfig:
        if self.n_per_class and self.n_rows:
            raise ValueError("give n_per_class or n_rows, not both")
        if self.n_per_class and self.problem == "regression":
            raise ValueError("n_per_class needs classes; use n_rows in regression")
        return self


def data_uri(config: PrepareConfig) -> str:
    """The folder of the packaged task for `quickstart`, else what the config says."""
    return str(PACKAGED / "task") if config.data == "quickstart" else config.data


def source_digest(config: PrepareConfig) -> dict[str, str]:
    """SHA-256 of every input file: an edited task file makes the run stale. A hub dataset counts by its name and revision."""
    if config.data.startswith(HUB):
        uris: dict[str, str] = {}
    else:
        uris = files.find_splits(data_uri(config))
    if config.unlabelled not in (None, "train"):
        uris["unlabelled"] = str(config.unlabelled)
    digests = {}
    for split, uri in uris.items():
        head, _, name = uri.rpartition("/")
        folder = Folder.at(head or ".")
        if not folder.exists(name):
            raise DataError(f"{uri}: no such file")
        digests[split] = hashlib.sha256(folder.read_bytes(name)).hexdigest()
    return digests


def sample(rows: list[dict[str, Any]], config: PrepareConfig, rng: random.Random) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Draw the labelled training rows. Returns (drawn, rest), each in file order."""
    order = list(range(len(rows)))
    rng.shuffle(order)
    if config.n_per_class:
        have = Counter(r["label"] for r in rows)
        short = [f"{label} ({n})" for label, n in sorted(have.items()) if n < config.n_per_class]
        if short and len(short) == len(have):
            raise ConfigError(f"prepare.n_per_class={config.n_per_class}: every class has fewer train rows: {', '.join(short[:6])}")
        taken: Counter[str] = Counter()
        chosen = []
        for i in order:
            if taken[rows[i]["label"]] < config.n_per_class:
                taken[rows[i]["label"]] += 1
                chosen.append(i)
    else:
        if config.n_rows and config.n_rows > len(rows):
            raise ConfigError(f"prepare.n_rows={config.n_rows}: the train split has only {len(rows)} rows")
        chosen = order[: config.n_rows] if config.n_rows else order
    keep = set(chosen)
    return [rows[i] for i in sorted(keep)], [rows[i] for i in range(len(rows)) if i not in keep]


def quantile_bins(values: list[float], bins: int) -> list[float]:
    """Upper edges (all but the last bin's) of `bins` bins with about equal counts; shape (bins - 1,)."""
    ranked = sorted(values)
    return [ranked[min(len(ranked) - 1, len(ranked) * (b + 1) // bins)] for b in range(bins - 1)]


def bin_of(value: float, edges: list[float]) -> int:
    return sum(value >= edge for edge in edges)


def prepare(config: PrepareConfig, inputs: dict[str, Folder], out: dict[str, Folder], *, seed: int) -> dict[str, Any]:
    """Write `task/`: train, validation, test, unlabelled tables and task.json (`Task`).

    1. Read and check the splits.  2. Cut a validation (20 % of train) or test split where the data has none.
    3. Draw the low-resource sample.  4. Name the conditions of generation.  5. Write.
    """
    # 1. read and check
    uri = data_uri(config)
    if config.data.startswith(HUB):
        raw = files.read_hub(config.data, config.subset, config.revision, config.label_column)
    else:
        raw = {split: files.read_rows(path) for split, path in files.find_splits(uri).items()}
    pair = config.text_pair_column or ("text_pair" if raw["train"] and "text_pair" in raw["train"][0] else None)
    columns = Columns(config.text_column, pair, config.label_column)
    splits = {split: files.check_rows(rows, columns, f"{config.data} ({split})") for split, rows in raw.items()}
    labels = files.check_labels(splits, config.problem, config.data)
    unknown = sorted(set(config.label_names) - set(labels))
    if unknown:
        raise ConfigError(f"prepare.label_names: {unknown[0]!r} is not a label; the labels are {', '.join(labels[:8])}")

    # 2. missing splits
    rng = random.Random(f"{seed}:splits")
    for split in ("test", "validation"):
        if split not in splits:
            rest, order = splits["train"], list(range(len(splits["train"])))
            rng.shuffle(order)
            cut = set(order[: max(1, len(order) // 5)])
            splits[split] = [r for i, r in enumerate(rest) if i in cut]
            splits["train"] = [r for i, r in enumerate(rest) if i not in cut]
            files.check_labels(splits, config.problem, f"{config.data} (no {split} file: cut from train)")

    # 3. the low-resource sample
    rng = random.Random(f"{seed}:sample")
    train, rest = sample(splits["train"], config, rng)
    want = config.validation_rows or len(train)
    validation = rng.sample(splits["validation"], min(want, len(splits["validation"])))
    unlabelled: list[dict[str, Any]] = []
    if config.unlabelled == "train":
        unlabelled = [r | {"label": None} for r in rest]
    elif config.unlabelled:
        found = files.read_rows(config.unlabelled)
        unlabelled = files.check_rows(found, Columns(config.text_column, pair, None), config.unlabelled)
    if config.unlabelled_rows and len(unlabelled) > config.unlabelled_rows:
        unlabelled = rng.sample(unlabelled, config.unlabelled_rows)

    # 4. conditions
    if config.problem == "regression":
        values = [float(r["label"]) for r in train]
        edges = quantile_bins(values, REGRESSION_BINS)
        groups = [[v for v in values if bin_of(v, edges) == b] or [values[0]] for b in range(REGRESSION_BINS)]
        names = [f"{sum(g) / len(g):.2f}" for g in groups]
    else:
        edges = []
        names = [config.label_names.get(label, label.replace("_", " ")) for label in labels]
    index = {label: i for i, label in enumerate(labels)}

    # 5. write
    def table(rows: list[dict[str, Any]], prefix: str) -> pa.Table:
        records = []
        for i, row in enumerate(rows):
            value = None if row["label"] is None else float(row["label"]) if config.problem == "regression" else float(index[row["label"]])
            condition = None if value is None else bin_of(value, edges) if config.problem == "regression" else int(value)
            records.append(row | {"id": f"{prefix}-{i:06d}", "value": value, "condition": condition})
        return pa.Table.from_pylist(records, schema=TASK_SCHEMA)

    task = out["task"]
    for name, rows in (("train", train), ("validation", validation), ("test", splits["test"]), ("unlabelled", unlabelled)):
        task.write_table(f"{name}.parquet", table(rows, name))
    metric = config.metric if config.metric != "auto" else ("pearson" if config.problem == "regression" else "accuracy")
    Task(
        name=config.name or config.data.rstrip("/").rpartition("/")[2].split(".")[0],
        problem=config.problem,
        labels=tuple(labels),
        conditions=tuple(names),
        template=config.template,
        pair=pair is not None,
        metric=metric,
    ).write(task)
    counts = {"train": len(train), "validation": len(validation), "test": len(splits["test"]), "unlabelled": len(unlabelled)}
    return counts | {"classes": len(labels)}

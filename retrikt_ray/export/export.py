"""`retrikt export RUN DIR`: a folder that answers as the run does, with numpy, tokenizers and faiss alone.

The code that answers (`standalone.py`) goes along as `answer.py`. The rows are those of the run's knowledge as it is now, edits included;
they are searched exactly, whatever kind of index the run has.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from retrikt_ray import __version__
from retrikt_ray.index.ngrams import ARRAYS, Memory
from retrikt_ray.predictor import Predictor
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.settings import ConfigError
from retrikt_ray.task.texts import texts_of

KINDS = ("static", "convolution")
BATCH = 4096  # rows that are encoded at a time


def export(run: str, out: str) -> dict[str, Any]:
    """Write the folder; returns {rows, files, bytes}. Raises ConfigError where the folder has files, or the student is of another kind."""
    folder = Path(out)
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{out} is not empty; export writes into a new folder")
    predictor = Predictor.open(run)
    config = predictor.student.model.config
    if config.kind not in KINDS:
        raise ConfigError(
            f"{run} has a student of the kind {config.kind}; export takes {' and '.join(KINDS)} students: a {config.kind} loads in transformers"
        )
    folder.mkdir(parents=True, exist_ok=True)
    rows = write_store(predictor, folder)
    labels = predictor.knowledge.view.labels[predictor.knowledge.view.alive]
    arrays: dict[str, Any] = weights(predictor) | table(predictor.knowledge.view.ngrams) | {"labels": labels}
    np.savez(folder / "weights.npz", **arrays)
    predictor.student.tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    task = predictor.task
    model: Any = predictor.student.model
    card = {
        "task": task.name,
        "problem": task.problem,
        "labels": list(task.labels),
        "pair": task.pair,
        "max_tokens": config.max_tokens,
        "shift": float(model.shift),
        "scale": float(model.scale),
        "parameters": model.parameter_count,
        "mixture": asdict(predictor.mixture),
        "made_by": f"retrikt_ray {__version__}",
    }
    (folder / "model.json").write_text(json.dumps(card, indent=1, ensure_ascii=False), encoding="utf-8")
    (folder / "answer.py").write_text((files("retrikt_ray.export") / "standalone.py").read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "README.md").write_text(readme(card, rows, run), encoding="utf-8")
    names = sorted(p.name for p in folder.iterdir())
    return {"rows": rows, "files": names, "bytes": sum((folder / n).stat().st_size for n in names)}


def write_store(predictor: Predictor, folder: Path) -> int:
    """store.jsonl and vectors.faiss: the rows that can be found."""
    import faiss
    import pyarrow as pa

    view = predictor.knowledge.view
    rows = view.rows.filter(pa.array(view.alive))
    labels = view.labels[view.alive]
    index: Any = None
    with (folder / "store.jsonl").open("w", encoding="utf-8") as file:
        for first in range(0, len(rows), BATCH):
            part = rows.slice(first, BATCH)
            vectors = predictor.student.encode(texts_of(part))[1].numpy()
            index = index or faiss.IndexFlatIP(vectors.shape[1])
            index.add(vectors)
            columns = part.select(["id", "text", "text_pair", "source"]).to_pylist()
            for row, answer in zip(columns, labels[first : first + BATCH], strict=True):
                label, score = predictor.task.named(answer)
                kept = {name: value for name, value in row.items() if value is not None}
                file.write(json.dumps(kept | {"label": label, "score": round(score, 4)}, ensure_ascii=False) + "\n")
    faiss.write_index(index, str(folder / "vectors.faiss"))
    return len(rows)


def weights(predictor: Predictor) -> dict[str, np.ndarray]:
    """The student's, by the names that `standalone.py` reads."""
    model: Any = predictor.student.model
    found = {
        "token_map": model.token_map,
        "embedding": model.embedding.weight,
        "importance": model.importance.weight[:, 0],
        "head": model.head.weight,
        "head_bias": model.head.bias,
    }
    if model.config.kind == "convolution":
        found |= {"filters": model.filters.weight, "filters_bias": model.filters.bias}
    return {name: tensor.detach().numpy() for name, tensor in found.items()}


def table(memory: Memory) -> dict[str, np.ndarray]:
    """The n-gram memory's arrays, which only edits read left out."""
    return {f"ngram_{name}": getattr(memory, name) for name in ARRAYS if name != "idf"}


def readme(card: dict[str, Any], rows: int, run: str) -> str:
    """How to use the folder, and what is in it: a model card, with the scores where the run has a report."""
    shown = '("a text", "its second text")' if card["pair"] else '"a text"'
    lines = [
        f"# {card['task']}: a RetriKT student",
        "",
        f"{card['problem'].capitalize()}"
        + (f" into {', '.join(card['labels'])}." if card["labels"] else ".")
        + f" A student of {card['parameters']:,} parameters that retrieves from {rows:,} rows, labelled by its teacher.",
        "",
        "```bash",
        "pip install numpy tokenizers faiss-cpu",
        f"python answer.py {'...  # pairs: from Python' if card['pair'] else shown}",
        "```",
        "",
        "```python",
        "from answer import Model",
        "",
        "model = Model()",
        f"print(model.predict([{shown}]))",
        "```",
        "",
        "`weights.npz` student and n-gram memory, `vectors.faiss` and `store.jsonl` the rows that it retrieves, `tokenizer.json`, `model.json`,",
        "`answer.py` the code. An answer names the nearest rows and the n-grams that spoke for or against it.",
        "",
    ]
    report = Folder.at(run) / "report"
    if report.exists("report.json"):
        from retrikt_ray.report.table import as_markdown

        found = report.read_json("report.json")
        lines += ["## Scores", "", f"{found['metric']} on {found['rows']['test']:,} test rows.", "", as_markdown(found), ""]
    lines += [
        "## Limits",
        "",
        "The student says what its teacher would say: the teacher's mistakes and biases are its own, and texts unlike those of the task are",
        f"answered, too. Made by {card['made_by']}.",
        "",
    ]
    return "\n".join(lines)

"""Stage 6, distill: train the student on the store (Ray Train, one or more workers).

Four losses: KD to the teacher's soft labels, the relation of the batch's embeddings, the label that neighbours would vote for, and the
true labels of the task rows. The student is built, trained and saved here; baselines train theirs with the same `fit`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from retrikt_ray.runtime.cluster import plan
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.settings import Scaled

if TYPE_CHECKING:
    import torch

    from retrikt_ray.runtime.training import Solo
    from retrikt_ray.student.model import Student
    from retrikt_ray.teacher.annotator import Text

VERSION = 3
HEAD_RATE = 3.0  # learning rate of the head, as a multiple of the body's: it starts from nothing, the body from the teacher
LOOKS = 16  # times that a training looks at validation


class DistillConfig(Scaled):
    """The student and its training."""

    kind: Literal["static", "transformer"] = Field("static", description="static: averaged token embeddings; transformer: a small BERT.")
    size: float = Field(0.01, gt=0, le=1, description="Parameters of the student as a share of the annotator's.")
    layers: int = Field(2, ge=1, description="Layers of a transformer student.")
    model: str | None = Field(
        None,
        description="Pre-trained encoder (folder or hub id) as a transformer student, whatever its size; `size` and `layers` do not apply.",
    )
    epochs: int = Field(
        30, ge=1, description="Passes over the store, but never fewer than 300 steps; the best of 16 looks at validation is kept."
    )
    batch: int = Field(128, ge=4, description="Rows per step, over all workers.")
    learning_rate: float = Field(
        0, ge=0, description="Peak learning rate. 0: 5e-3 for static, 1e-3 for transformer, 5e-5 for a pre-trained model."
    )
    kd: float = Field(1.0, ge=0, description="Weight of the KD loss.")
    relation: float = Field(0.3, ge=0, description="Weight of the relation loss.")
    retrieval: float = Field(1.0, ge=0, description="Weight of the retrieval loss.")
    labels: float = Field(0.5, ge=0, description="Weight of the true labels of the task rows.")
    tau: float = Field(0.05, gt=0, description="Temperature of similarities in the relation and retrieval losses.")
    token_dropout: float = Field(0.1, ge=0, lt=1, description="Share of a text's tokens that a training step hides from a static student.")


@dataclass
class Rows:
    """Training rows as arrays."""

    texts: list[Text]
    teacher: torch.Tensor  # (N, C) probabilities, or (N, 1) values
    embeddings: torch.Tensor | None  # (N, D) the teacher's, or None: no relation loss
    truth: torch.Tensor  # (N,) true class id or value; NaN where unknown

    def take(self, index: list[int]) -> Rows:
        return Rows(
            [self.texts[i] for i in index],
            self.teacher[index],
            None if self.embeddings is None else self.embeddings[index],
            self.truth[index],
        )


def load_validation(task: Folder) -> Rows:
    """The validation rows of a task; the teacher says nothing of them."""
    import torch

    rows = task.read_table("validation.parquet").to_pylist()
    truth = torch.tensor([r["value"] for r in rows], dtype=torch.float32)
    return Rows([(r["text"], r["text_pair"]) for r in rows], truth[:, None], None, truth)


def load_rows(store: Folder) -> Rows:
    """The rows of a store."""
    import numpy as np
    import torch

    table = store.read_tables(columns=["text", "text_pair", "teacher_probs", "teacher_embedding", "value"])
    embeddings = np.stack([np.asarray(v, dtype=np.float32) for v in table["teacher_embedding"].to_pylist()])
    return Rows(
        list(zip(table["text"].to_pylist(), table["text_pair"].to_pylist(), strict=True)),
        torch.tensor(table["teacher_probs"].to_pylist(), dtype=torch.float32),
        torch.from_numpy(embeddings),
        torch.tensor([float("nan") if v is None else v for v in table["value"].to_pylist()], dtype=torch.float32),
    )


def fit(
    student: Student,
    rows: Rows,
    validation: Rows,
    config: DistillConfig,
    seed: int,
    session: Callable[[torch.optim.Optimizer, dict[str, torch.Tensor], int], Solo],
) -> None:
    """Train the student in place, and leave it with the weights that had the smallest loss on validation's true labels.

    `session` makes the training's session from (optimizer, tensors to checkpoint, steps).
    """
    import torch
    from torch.nn.functional import cross_entropy, mse_loss

    from retrikt_ray.runtime import training
    from retrikt_ray.student import losses

    model, device = student.model, student.model.head.weight.device
    regression = model.config.outputs == 1
    teacher, truth = rows.teacher.to(device), rows.truth.to(device)
    if regression:  # the student's outputs are standardised
        teacher, truth = (teacher - model.shift) / model.scale, (truth - model.shift) / model.scale
    rate = config.learning_rate or (5e-5 if config.model else 5e-3 if config.kind == "static" else 1e-3)
    head = list(model.head.parameters())
    body = [p for n, p in model.named_parameters() if not n.startswith("head.")]
    optimizer = torch.optim.AdamW([{"params": body, "lr": rate}, {"params": head, "lr": HEAD_RATE * rate}], weight_decay=0.01)
    per_epoch = -(-len(rows.texts) // config.batch)
    epochs = max(config.epochs, -(-300 // per_epoch))
    batches = list(training.epoch_batches(len(rows.texts), config.batch, epochs, seed))
    best = {k: v.detach().clone() for k, v in model.state_dict().items()}
    tensors = dict(model.state_dict(keep_vars=True)) | {f"best.{k}": v for k, v in best.items()}
    work = session(optimizer, tensors | {"best_loss": (best_loss := torch.tensor(float("inf"), dtype=torch.float64))}, len(batches))
    look_every = max(1, len(batches) // LOOKS)
    for step in range(work.start, len(batches)):
        mine = work.mine(batches[step])
        work.set_rate(step)
        training.seed_everything(seed, step, work.rank)
        note = ""
        if mine:
            model.train()
            inputs = student.tensors([rows.texts[i] for i in mine])
            if config.kind == "static" and config.token_dropout:
                for name in [n for n in inputs if n.endswith("mask")]:
                    inputs[name] = inputs[name] * (torch.rand(inputs[name].shape, device=device) >= config.token_dropout)
            logits, vectors = model(**inputs)
            loss = config.kd * losses.kd(logits, teacher[mine])
            if len(mine) > 1:
                if config.retrieval:
                    loss = loss + config.retrieval * losses.retrieval(vectors, teacher[mine], config.tau)
                if config.relation and rows.embeddings is not None:
                    loss = loss + config.relation * losses.relation(vectors, rows.embeddings[mine].to(device), config.tau)
            known = ~torch.isnan(truth[mine])
            if config.labels and known.any():
                target = truth[mine][known]
                own = mse_loss(logits[known][:, 0], target) if regression else cross_entropy(logits[known], target.long())
                loss = loss + config.labels * known.float().mean() * own
            loss.backward()
            note = f"loss {loss.item():.3f}"
        work.update(len(mine) / len(batches[step]))
        if (step + 1) % look_every == 0 or step + 1 == len(batches):
            now = validation_loss(student, validation)
            if now < best_loss.item():
                best_loss.fill_(now)
                for k, v in model.state_dict().items():
                    best[k].copy_(v)
        work.done(step + 1, note)
    model.load_state_dict(best)
    model.eval()


def validation_loss(student: Student, validation: Rows) -> float:
    """The student's own loss on the true labels of validation, as the mixture's (`predictor.loss`)."""
    from retrikt_ray.predictor import loss

    return loss(validation.truth.numpy(), student.encode(validation.texts)[0].numpy())


def build(config: DistillConfig, teacher: Folder, rows: Rows, pair: bool, seed: int) -> Student:
    """The untrained student that this config, teacher and store ask for."""
    from retrikt_ray.runtime import training
    from retrikt_ray.student.inherit import new_student
    from retrikt_ray.teacher.annotator import Classifier

    training.seed_everything(seed, "student")
    annotator = Classifier.load(teacher)
    budget = int(config.size * annotator.parameters_in_all)
    kind = "transformer" if config.model else config.kind
    return new_student(kind, annotator, rows.texts, budget, config.layers, pair, config.model)


def distill_loop(config: dict[str, Any]) -> None:
    """Train the student in a Ray Train worker; rank 0 writes `student/`."""
    import torch

    from retrikt_ray.runtime.training import Session
    from retrikt_ray.teacher.lm import pick_device

    torch.set_num_threads(config["threads"])
    c = DistillConfig(**config["section"])
    rows = load_rows(Folder(config["store_uri"]))
    student = build(c, Folder(config["teacher_uri"]), rows, config["pair"], config["seed"])
    torch.nn.Module.to(student.model, pick_device())
    holder: list[Session] = []

    def session(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], total: int) -> Session:
        holder.append(Session(config, optimizer, tensors, total))
        return holder[0]

    fit(student, rows, load_validation(Folder(config["task_uri"])), c, config["seed"], session)
    if holder[0].rank == 0:
        with tempfile.TemporaryDirectory() as name:
            student.save(name)
            Folder(config["out_uri"]).upload(Path(name))


def distill(config: DistillConfig, inputs: dict[str, Folder], out: dict[str, Folder], *, seed: int) -> dict[str, Any]:
    """Write `student/` in Hugging Face layout (config.json, model.safetensors, tokenizer files)."""
    from retrikt_ray.runtime.training import launch

    task = inputs["task"].read_json("task.json")
    common = {
        "section": config.model_dump(),
        "pair": task["pair"],
        "task_uri": inputs["task"].uri,
        "store_uri": inputs["store"].uri,
        "teacher_uri": inputs["teacher"].uri,
        "out_uri": out["student"].uri,
        "seed": seed,
    }
    launch(distill_loop, common, plan(config, "distill", cpus=2, grow=False), out["scratch"], "student", "distill: student")
    from retrikt_ray.student.model import Student

    model = Student.load(str(out["student"].local())).model
    teacher = inputs["teacher"].read_json("teacher.json")["parameters"]
    return {
        "parameters": model.parameter_count,
        "of_teacher": f"{model.parameter_count / teacher:.2%}",
        "rows": inputs["store"].read_json("store.json")["kept"],
    }

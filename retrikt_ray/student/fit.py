"""Fitting a student to rows with soft labels: the config, and the training that `distill` and the student baselines share.

Four losses: KD to the teacher's soft labels, the relation of the batch's embeddings, the label that neighbours would vote for, and the
true labels of the task rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.settings import Scaled

if TYPE_CHECKING:
    from collections import Counter

    import torch

    from retrikt_ray.runtime.training import Solo
    from retrikt_ray.student.model import Student
    from retrikt_ray.student.rows import Rows, StoreRows

HEAD_RATE = 3.0  # learning rate of the head, as a multiple of the body's: it starts from nothing, the body from the teacher
LOOKS = 16  # times that a training looks at the rows that it does not train on
MIN_STEPS = 300


class DistillConfig(Scaled):
    """The student and its training."""

    kind: Literal["static", "convolution", "transformer"] = Field(
        "convolution",
        description="static: averaged token embeddings; convolution: these and filters over three tokens, which see word order; transformer: a small BERT.",
    )
    size: float = Field(0.01, gt=0, le=1, description="Parameters of the student as a share of the annotator's.")
    layers: int = Field(2, ge=1, description="Layers of a transformer student.")
    model: str | None = Field(
        None,
        description="Pre-trained encoder (folder or hub id) as a transformer student, whatever its size; `size` and `layers` do not apply.",
    )
    epochs: int = Field(
        30, ge=1, description="Passes over the store, but never fewer than 300 steps; the best of 16 looks at held-out rows is kept."
    )
    batch: int = Field(128, ge=4, description="Rows per step, over all workers.")
    learning_rate: float = Field(
        0,
        ge=0,
        description="Peak learning rate. 0: 5e-3 for static, 2e-3 for convolution, 1e-3 for transformer, 5e-5 for a pre-trained model.",
    )
    kd: float = Field(1.0, ge=0, description="Weight of the KD loss.")
    relation: float = Field(0.3, ge=0, description="Weight of the relation loss.")
    retrieval: float = Field(1.0, ge=0, description="Weight of the retrieval loss.")
    labels: float = Field(0.5, ge=0, description="Weight of the true labels of the task rows.")
    tau: float = Field(0.05, gt=0, description="Temperature of similarities in the relation and retrieval losses.")
    token_dropout: float = Field(0.1, ge=0, lt=1, description="Share of a text's tokens that a training step hides from a static student.")


def fit(
    student: Student,
    rows: Rows | StoreRows,
    unseen: Rows,
    config: DistillConfig,
    seed: int,
    session_of: Callable[[torch.optim.Optimizer, dict[str, torch.Tensor], int], Solo],
) -> Solo:
    """Train the student in place, and leave it with the weights that had the smallest loss on rows that it did not train on.

    unseen: validation rows with their true labels, and held-out rows of the store with the teacher's.
    session_of(optimizer, tensors to checkpoint, steps) makes the training's session, which is returned.
    """
    import torch

    from retrikt_ray.runtime import training

    model = student.model
    rate = config.learning_rate or model.kind.rate
    head = list(model.head.parameters())
    body = [p for n, p in model.named_parameters() if not n.startswith("head.")]
    optimizer = torch.optim.AdamW([{"params": body, "lr": rate}, {"params": head, "lr": HEAD_RATE * rate}], weight_decay=0.01)
    per_epoch = -(-len(rows) // config.batch)
    passes = -(-config.epochs * rows.distinct // len(rows))  # over the rows as they are repeated
    batches = rows.batches(config.batch, max(passes, -(-MIN_STEPS // per_epoch)), seed)
    best = {k: v.detach().clone() for k, v in model.state_dict().items()}
    best_loss = torch.tensor(float("inf"), dtype=torch.float64)
    tensors = dict(model.state_dict(keep_vars=True)) | {f"best.{k}": v for k, v in best.items()} | {"best_loss": best_loss}
    session = session_of(optimizer, tensors, len(batches))
    every = max(1, len(batches) // LOOKS)

    def keep_best(steps: int) -> None:
        if steps % every and steps != len(batches):
            return
        now = unseen_loss(student, unseen)
        if now < best_loss.item():
            best_loss.fill_(now)
            for k, v in model.state_dict().items():
                best[k].copy_(v)

    loss_of = distillation(student, rows, config, session, lambda step: [len(part) for part in batches.parts(step, session.world)])
    training.run(session, batches, loss_of, keep_best, together=True)
    model.load_state_dict(best)
    model.eval()
    return session


def distillation(
    student: Student, rows: Rows | StoreRows, config: DistillConfig, session: Solo, sizes_of: Callable[[int], list[int]]
) -> Callable[[int, list[int]], tuple[torch.Tensor, str]]:
    """The loss of some of the rows, as `training.run` asks for it. sizes_of(step): rows of the batch by worker.

    Relation and retrieval are losses of the whole batch: the vectors of all workers are gathered, since a worker's share of a batch may be two
    rows, which say nothing of each other. Their sum over the workers is what one worker would have (to the order of sums).
    """
    import torch
    from torch.nn.functional import cross_entropy, mse_loss

    from retrikt_ray.student import losses

    model, device = student.model, student.model.head.weight.device
    regression = model.config.outputs == 1

    def standardised(values: torch.Tensor) -> torch.Tensor:
        """As the student's outputs are."""
        return (values.to(device) - model.shift) / model.scale if regression else values.to(device)

    def loss_of(step: int, index: list[int]) -> tuple[torch.Tensor, str]:
        model.train()
        part, sizes = rows.take(index), sizes_of(step)
        count = sum(sizes)
        teacher, truth = standardised(part.teacher), standardised(part.truth)
        if not index:  # a batch may have no rows for a worker; what the others gather needs an answer all the same
            logits, vectors = torch.zeros(0, model.config.outputs, device=device), torch.zeros(0, model.head.in_features, device=device)
        else:
            inputs = student.tensors(part.texts)
            if model.kind.token_dropout and config.token_dropout:
                for name in [n for n in inputs if n.endswith("mask")]:
                    inputs[name] = inputs[name] * (torch.rand(inputs[name].shape, device=device) >= config.token_dropout)
            logits, vectors = model(**inputs)
        gathered = [vectors, teacher] + ([] if part.embeddings is None else [part.embeddings.to(device)])
        everyone = session.gather(sizes, *gathered) if count > 1 and (config.retrieval or config.relation) else ()
        if not index:
            return torch.zeros((), device=device, requires_grad=True), ""
        times = count / len(index)  # a worker's gradient counts by its share of the rows; a loss of the whole batch has to count once
        loss, whole = config.kd * losses.kd(logits, teacher), torch.zeros(())
        if everyone and config.retrieval:
            whole = config.retrieval * losses.retrieval(everyone[0], everyone[1], config.tau)
            loss = loss + times * whole
        if len(everyone) > 2 and config.relation:
            relation = config.relation * losses.relation(everyone[0], everyone[2], config.tau)
            loss, whole = loss + times * relation, whole + relation
        known = ~torch.isnan(truth)
        if config.labels and known.any():
            target = truth[known]
            own = mse_loss(logits[known][:, 0], target) if regression else cross_entropy(logits[known], target.long())
            loss = loss + config.labels * known.float().mean() * own
        return loss, f"loss {loss.item() - (times - 1) * whole.item():.3f}"

    return loss_of


def unseen_loss(student: Student, rows: Rows) -> float:
    """The student's own loss on labels that it was not trained on."""
    from retrikt_ray.task.metrics import losses

    return float(losses(student.encode(rows.texts)[0].numpy(), rows.teacher.numpy()).mean())


def untrained(config: DistillConfig, teacher: Folder, counts: Counter[int], pair: bool, seed: int) -> Student:
    """The student that this config, teacher and store ask for, before training.

    counts: how often each token occurs in all the store, whatever it trains on: what was inherited of a token that it does not train on is worth
    more than nothing. A pre-trained model asks for none.
    """
    from retrikt_ray.runtime.training import seed_everything
    from retrikt_ray.student.inherit import new_student, pretrained_student
    from retrikt_ray.teacher.annotator import Annotator

    seed_everything(seed, "student")
    annotator = Annotator.load(teacher)
    if config.model:
        return pretrained_student(config.model, annotator, pair)
    return new_student(config.kind, annotator, counts, int(config.size * annotator.parameter_count), config.layers, pair)

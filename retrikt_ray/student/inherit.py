"""A student before training: how large it may be, which tokens it keeps, and token vectors inherited from the teacher.

A token's vector is what the fine-tuned annotator makes of that token alone, reduced by PCA (the idea of model2vec, Minish Lab 2024): it
already knows the task, so the student starts as a bag-of-words copy of its teacher.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from retrikt_ray.student.kinds import KINDS, StudentConfig
from retrikt_ray.student.model import Student, StudentModel
from retrikt_ray.task.texts import Text
from retrikt_ray.teacher.annotator import Annotator


def count_tokens(tokenizer: object, chunks: Iterable[list[Text]]) -> Counter[int]:
    """How often each token of the full tokenizer occurs in texts, special tokens of its pair format included."""
    counts: Counter[int] = Counter()
    for texts in chunks:
        for row in tokenizer([t for text in texts for t in text if t])["input_ids"]:  # type: ignore[operator]
            counts.update(row)
    return counts


@torch.inference_mode()
def token_vectors(teacher: Annotator, tokens: list[int], batch: int = 256) -> Tensor:
    """The teacher's embedding of each token alone, between the special tokens that its tokenizer puts around a text. (V, width)"""
    marker = teacher.tokenizer("a")["input_ids"]
    plain = teacher.tokenizer("a", add_special_tokens=False)["input_ids"]
    at = next((i for i in range(len(marker)) if marker[i : i + len(plain)] == plain), 0)
    before, after = marker[:at], marker[at + len(plain) :]
    rows = torch.tensor([[*before, t, *after] for t in tokens], device=teacher.device)
    return torch.cat([teacher(part, torch.ones_like(part))[1].cpu() for part in rows.split(batch)])


def reduce(vectors: Tensor, dim: int) -> Tensor:
    """PCA to `dim` columns, scaled so that rows have norm about 1. (V, width) -> (V, dim); zero columns where width < dim."""
    centred = vectors.double() - vectors.double().mean(0)
    _, axes = torch.linalg.eigh(centred.T @ centred)
    # An eigenvector's sign is arbitrary: fix it, so that two machines give one student.
    axes = axes.flip(1)[:, :dim]
    axes = axes * torch.sign(axes.gather(0, axes.abs().argmax(0, keepdim=True)))
    out = (centred @ axes).float()
    out = out / out.norm(dim=1).mean().clamp(min=1e-9)
    return torch.nn.functional.pad(out, (0, dim - out.shape[1])) if out.shape[1] < dim else out


def new_student(kind: str, teacher: Annotator, counts: Counter[int], budget: int, layers: int, pair: bool) -> Student:
    """A student of about `budget` parameters for texts with these tokens. Row 0 of its table is for tokens outside its vocabulary."""
    outputs = teacher.head.out_features
    sizes: dict[str, Any] = {"outputs": outputs, "pair": pair, "layers": layers, "max_tokens": teacher.max_tokens}
    dim, vocabulary = KINDS[kind].size(budget, len(counts) + 1, **sizes)
    kept = sorted(t for t, _ in sorted(counts.items(), key=lambda x: (-x[1], x[0]))[: vocabulary - 1])
    config = StudentConfig(kind=kind, vocabulary=len(kept) + 1, full_vocabulary=len(teacher.tokenizer), dim=dim, **sizes)
    model = standardised(StudentModel(config), teacher)
    model.token_map[torch.tensor(kept)] = torch.arange(1, len(kept) + 1, dtype=torch.int32)
    vectors = reduce(token_vectors(teacher, kept), dim)
    total = sum(counts.values())
    with torch.no_grad():
        model.kind.inherit(model, vectors, torch.tensor([counts[t] / total for t in kept]))
    return Student(model, teacher.tokenizer)


def pretrained_student(name: str, teacher: Annotator, pair: bool) -> Student:
    """A student that is a pre-trained encoder. name: its folder or hub id."""
    from transformers import AutoModel, AutoTokenizer

    encoder, tokenizer = AutoModel.from_pretrained(name, dtype=torch.float32), AutoTokenizer.from_pretrained(name)
    config = StudentConfig(
        kind="pretrained",
        outputs=teacher.head.out_features,
        pair=pair,
        max_tokens=teacher.max_tokens,
        full_vocabulary=1,
        backbone=encoder.config.to_dict(),
    )
    model = standardised(StudentModel(config), teacher)
    model.backbone.load_state_dict(encoder.state_dict())
    return Student(model, tokenizer)


def standardised(model: StudentModel, teacher: Annotator) -> StudentModel:
    """The model, with the teacher's scale of a regression's values."""
    model.shift.copy_(teacher.shift)
    model.scale.copy_(teacher.scale)
    return model

"""A student before training: how large it may be, which tokens it keeps, and token vectors inherited from the teacher.

A token's vector is what the fine-tuned annotator makes of that token alone, reduced by PCA (the idea of model2vec, Minish Lab 2024): it
already knows the task, so the student starts as a bag-of-words copy of its teacher.
"""

from __future__ import annotations

import math
from collections import Counter

import torch
from torch import Tensor

from retrikt_ray.student.model import Student, StudentConfig, StudentModel
from retrikt_ray.teacher.annotator import Classifier, Text

MIN_TOKENS = 256  # a student that knows fewer tokens is not worth having; the budget gives way


def size_for(budget: int, tokens: int, outputs: int, pair: bool) -> tuple[int, int]:
    """(dim, vocabulary) of a static student of about `budget` parameters, `tokens` being the tokens there are.

    Dimension grows with the square root of budget / 128, between 8 and 256; the rest goes into tokens. What tokens leave over goes back into dimension.
    """
    dim = min(256, max(8, 8 * round(math.sqrt(budget / 128) / 8)))
    head = lambda d: outputs * (d * (4 if pair else 1) + 1)  # noqa: E731
    vocabulary = max(MIN_TOKENS, (budget - head(dim)) // (dim + 1))
    if vocabulary > tokens:
        vocabulary = tokens
        dim = max(8, min(256, int((budget - vocabulary - outputs) / (vocabulary + outputs * (4 if pair else 1)))))
    return dim, int(vocabulary)


def count_tokens(tokenizer: object, texts: list[Text]) -> Counter[int]:
    """How often each token of the full tokenizer occurs, special tokens of its pair format included."""
    counts: Counter[int] = Counter()
    for row in tokenizer([t for text in texts for t in text if t])["input_ids"]:  # type: ignore[operator]
        counts.update(row)
    return counts


@torch.inference_mode()
def token_vectors(teacher: Classifier, tokens: list[int], batch: int = 256) -> Tensor:
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


def new_student(kind: str, teacher: Classifier, texts: list[Text], budget: int, layers: int, pair: bool, backbone: str | None) -> Student:
    """A student of about `budget` parameters for these texts. Row 0 of its table is for tokens outside its vocabulary.

    backbone: path or hub id of a pre-trained encoder that is fine-tuned instead, whatever its size.
    """
    outputs = teacher.head.out_features
    if backbone is not None:
        from transformers import AutoModel, AutoTokenizer

        encoder, tokenizer = AutoModel.from_pretrained(backbone, dtype=torch.float32), AutoTokenizer.from_pretrained(backbone)
        config = StudentConfig(
            kind="transformer",
            outputs=outputs,
            pair=pair,
            max_tokens=teacher.max_tokens,
            full_vocabulary=1,
            backbone=encoder.config.to_dict(),
        )
        model = StudentModel(config)
        model.backbone.load_state_dict(encoder.state_dict())
        model.shift.copy_(teacher.shift)
        model.scale.copy_(teacher.scale)
        return Student(model, tokenizer)
    counts = count_tokens(teacher.tokenizer, texts)
    if kind == "static":
        dim, vocabulary = size_for(budget, len(counts) + 1, outputs, pair)
    else:
        # A layer of a BERT has 12 dim^2 weights; a third of the budget goes into layers, the rest into tokens.
        dim = max(32, 32 * int(math.sqrt(budget / 3 / (12 * layers)) / 32))
        places = 2 * teacher.max_tokens + 8
        vocabulary = min(len(counts) + 1, max(MIN_TOKENS, (budget - layers * 12 * dim * dim - places * dim) // dim))
    kept = sorted(t for t, _ in sorted(counts.items(), key=lambda x: (-x[1], x[0]))[: vocabulary - 1])
    config = StudentConfig(
        kind=kind,
        vocabulary=len(kept) + 1,
        full_vocabulary=len(teacher.tokenizer),
        dim=dim,
        outputs=outputs,
        pair=pair,
        max_tokens=teacher.max_tokens,
        layers=layers,
    )
    model = StudentModel(config)
    model.token_map[torch.tensor(kept)] = torch.arange(1, len(kept) + 1, dtype=torch.int32)
    model.shift.copy_(teacher.shift)
    model.scale.copy_(teacher.scale)
    vectors = reduce(token_vectors(teacher, kept), dim)
    table = model.embedding if kind == "static" else model.backbone.embeddings.word_embeddings
    with torch.no_grad():
        table.weight.zero_()
        table.weight[1:] = vectors * (1.0 if kind == "static" else 0.5)
        if kind == "static":
            # Smooth inverse frequency (Arora et al. 2017): log of a / (a + p), a = 1e-3
            total = sum(counts.values())
            frequency = torch.tensor([counts[t] / total for t in kept])
            model.importance.weight.fill_(math.log(0.1))
            model.importance.weight[1:, 0] = torch.log(1e-3 / (1e-3 + frequency))
    return Student(model, teacher.tokenizer)

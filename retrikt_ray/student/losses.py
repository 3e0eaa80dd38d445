"""Losses of distillation. Pure functions of tensors.

Notation: B rows, C classes (or 1 value in regression, standardised), d dimensions. Every loss is a mean over rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, normalize


def soft_cross_entropy(log_p: Tensor, target: Tensor) -> Tensor:
    """KL(target || p) = sum target (log target - log p), mean over rows. log_p, target (B, C)."""
    return (torch.xlogy(target, target) - target * log_p).sum(-1).mean()


def kd(logits: Tensor, teacher: Tensor) -> Tensor:
    """KL of the student's distribution to the teacher's (Hinton et al. 2015, temperature 1); squared error where C = 1."""
    return ((logits - teacher) ** 2).mean() if logits.shape[1] == 1 else soft_cross_entropy(log_softmax(logits, -1), teacher)


def similarities(vectors: Tensor) -> Tensor:
    """Cosine similarities of a batch with itself; the diagonal is -inf, so that no row is its own neighbour. (B, d) -> (B, B)"""
    unit = normalize(vectors, dim=-1)
    own = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    return (unit @ unit.T).masked_fill(own, float("-inf"))


def relation(vectors: Tensor, teacher_vectors: Tensor, tau: float) -> Tensor:
    """Listwise: KL between softmax(sim / tau) over the other rows of the batch, teacher's to student's (RankCSE, ACL 2023, ListNet)."""
    own = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    log_p = log_softmax(similarities(vectors) / tau, -1).masked_fill(own, 0.0)
    target = torch.softmax(similarities(teacher_vectors) / tau, -1)
    return soft_cross_entropy(log_p, target)


def retrieval(vectors: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """KL between the teacher's label and the similarity-weighted labels of the other rows of the batch (leave-one-out, ReAugKD, ACL 2023).

    vectors (B, d); teacher (B, C) probabilities, or (B, 1) values: then the squared error.
    """
    vote = torch.softmax(similarities(vectors) / tau, -1) @ teacher
    return ((vote - teacher) ** 2).mean() if teacher.shape[1] == 1 else soft_cross_entropy(torch.log(vote.clamp(min=1e-6)), teacher)

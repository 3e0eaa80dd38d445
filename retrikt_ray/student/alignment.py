"""What the two texts of a pair have in common, token by token: soft alignment (after Parikh et al., EMNLP 2016). Pure functions.

Each token is matched by the most similar token of the other text (cosine of their vectors). What is left unmatched, and how important it is,
is what entailment and paraphrase turn on, and what two averages do not show: "not", a name, a number.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

GRID = 2048  # steps of a unit vector's components, see `units`
FIGURES = 4  # a direction's, see `matched`
WEIGHT = 8.0  # of these shares beside the components of vectors, which are some tenths: the head learns both at one rate


class Side(NamedTuple):
    """One text of each of B pairs."""

    ids: Tensor  # (B, T) of the full tokenizer
    rows: Tensor  # (B, T) of the student's table
    mask: Tensor  # (B, T)
    unit: Tensor  # (B, T, d) the tokens' vectors, of length GRID
    weights: Tensor  # (B, T) importance, 0 where the mask is


def units(vectors: Tensor) -> Tensor:
    """Vectors (..., d) at length GRID, rounded to whole numbers.

    Their inner products are sums of whole numbers below 2^24, which float32 has exactly whatever the order of summation: a pair's features are
    the same to the last bit in any batch, by any library.
    """
    return torch.round(normalize(vectors, dim=-1) * GRID)


def compared(a: Side, b: Side, table: Tensor) -> Tensor:
    """Features of B pairs, (B, 2 d + 2 FIGURES): what of each text the other lacks. table: the student's vectors (V, d)."""
    both = (a.mask[:, :, None] * b.mask[:, None, :]) > 0
    same = (a.ids[:, :, None] == b.ids[:, None, :]) & both  # (B, Ta, Tb)
    similar = (a.unit @ b.unit.transpose(1, 2) / GRID**2).clamp(0, 1).masked_fill(~both, 0.0).masked_fill(same, 1.0)
    return torch.cat([matched(a, similar.amax(2), same.any(2), table), matched(b, similar.amax(1), same.any(1), table)], -1)


def matched(side: Side, best: Tensor, same: Tensor, table: Tensor) -> Tensor:
    """One text's features, (B, d + FIGURES). best: (B, T) similarity of each token's match; same: (B, T) whether the other text has that very token.

    Mean of what is unmatched, as a vector; the share of the text that is matched, and by the same token; the largest and the weightiest miss.
    All sums go token by token, see `Static.average`.
    """
    total = summed(side.weights).clamp(min=1e-6)
    missed = side.weights * (1 - best)
    vector = embedding_bag(side.rows, table, per_sample_weights=missed, mode="sum") / total
    worst = (1 - best).masked_fill(side.mask == 0, 0.0).amax(1, keepdim=True)
    figures = [summed(side.weights * best) / total, summed(side.weights * same) / total, worst, missed.amax(1, keepdim=True)]
    return torch.cat([vector, WEIGHT * torch.cat(figures, -1)], -1)


def summed(values: Tensor) -> Tensor:
    """Sums of rows (B, T) in their order, (B, 1)."""
    return torch.cumsum(values, 1)[:, -1:]

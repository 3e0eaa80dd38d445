"""Prefixes: what stands before every text of a condition, soft tokens and then a readable template ("positive: ").

It is the same for all texts of a condition, so its keys and values are computed once per condition. Gradients flow through them, so that SFT and
PPO pay for the prefix once per condition too, not once per text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from retrikt_ray.teacher.base import Base, start_of


@dataclass
class Prefix:
    """The prefixes of C conditions, left-padded to one length P."""

    embeds: Tensor  # (C, P, d)
    mask: Tensor  # (C, P)
    layers: list[tuple[Tensor, Tensor]] | None  # per layer: keys and values (C, H, P, D); None: the model keeps something else
    last_logits: Tensor  # (C, V): the distribution of the first text token
    last_hidden: Tensor  # (C, d): the state that predicts it

    def gather(self, rows: Tensor) -> DynamicCache:
        """A cache for a batch of rows, each with the prefix of its condition. rows: (B,) indices into C."""
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self.layers or []):
            # Not keys[rows]: with several threads, its gradients are summed in whatever order the threads come.
            cache.update(keys.index_select(0, rows), values.index_select(0, rows), layer)
        return cache


def prefix_embeddings(base: Base, soft: Tensor, templates: list[str]) -> list[Tensor]:
    """[soft tokens, <bos>, template] of each condition as vectors, (P_i, d) each. soft: (C, S, d). Soft tokens come first, as in PEFT."""
    out = []
    for prompt, template in zip(soft, templates, strict=True):
        hard = base.embed(torch.tensor(base.head(template), dtype=torch.long, device=base.device))
        out.append(torch.cat([prompt.to(hard.dtype), hard]))
    return out


def run_prefix(base: Base, soft: Tensor, templates: list[str]) -> Prefix:
    """One forward pass over the prefixes of all conditions. soft: (C, S, d). Differentiable in `soft`.

    Left padding keeps the last prefix token at the same place for all; the pads are masked out.
    """
    rows = prefix_embeddings(base, soft, templates)
    width = max(len(r) for r in rows)
    embeds = torch.stack([torch.nn.functional.pad(r, (0, 0, width - len(r), 0)) for r in rows])  # (C, P, d)
    mask = torch.zeros((len(rows), width), dtype=torch.long, device=base.device)
    for i, row in enumerate(rows):
        mask[i, width - len(row) :] = 1
    # The last place alone meets the vocabulary: with 150 conditions and 152,000 tokens all places would be gigabytes.
    out, hidden = base(inputs_embeds=embeds, attention_mask=mask, position_ids=places_of(mask), use_cache=True, logits_to_keep=1)
    return Prefix(embeds, mask, plain_layers(out, width), out.logits[:, -1].float(), hidden[:, -1].float())


def places_of(mask: Tensor) -> Tensor:
    """Position of each token in its row, which begins behind the pads. mask: (B, P)"""
    return (mask.cumsum(1) - 1).clamp(min=0)


def plain_layers(out: Any, width: int) -> list[tuple[Tensor, Tensor]] | None:
    """Keys and values of each layer, if every layer keeps those of all places and nothing else (no state, no window)."""
    kept: list[Any] = getattr(getattr(out, "past_key_values", None), "layers", [])
    plain = bool(kept) and all(issubclass(type(layer), DynamicLayer) and layer.keys.shape[2] == width for layer in kept)
    return [(layer.keys, layer.values) for layer in kept] if plain else None


def begin_like(base: Base, prefix: Prefix, starts: dict[str, int], temperature: float) -> Prefix:
    """The same prefix, but texts drawn behind it at this temperature begin as the labelled rows do: as often with a capital, a quotation mark, a number.

    starts: labelled rows by `start_of`. A kind that none of them has keeps as much probability as one row shared out by the model's own. Within a
    kind the model chooses. So few rows do not teach a prompt the first token, and what it takes from the base's corpus (dialogue, headings) would stay.
    """
    begun = [start_of(piece) for piece in base.pieces]
    kinds = sorted(set(begun))
    kind = torch.tensor([kinds.index(start) for start in begun], device=prefix.last_logits.device)
    probs = torch.softmax(prefix.last_logits.double() / temperature, -1)  # (C, V)
    own = torch.zeros((len(probs), len(kinds)), dtype=probs.dtype, device=probs.device).index_add_(1, kind, probs).clamp(min=1e-30)
    counts = torch.tensor([starts.get(name, 0) for name in kinds], dtype=probs.dtype, device=probs.device)
    wanted = (counts + own) / (counts.sum() + 1)
    logits = prefix.last_logits + temperature * (wanted.log() - own.log()).index_select(1, kind).float()
    return replace(prefix, last_logits=logits)


def run_prefix_of(base: Base, soft: Tensor, templates: list[str], *conditions: Tensor) -> tuple[Prefix, list[Tensor]]:
    """The prefixes of those conditions alone that occur in a batch, and the batch's conditions renumbered to them.

    With 77 classes and 16 texts a step, the prefixes of all classes would cost more than the texts.
    """
    used = torch.unique(torch.cat(conditions))
    prefix = run_prefix(base, soft.index_select(0, used), [templates[i] for i in used.tolist()])
    return prefix, [torch.searchsorted(used, c) for c in conditions]

"""The frozen base LM at work behind prefixes: scoring texts, and writing them."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from retrikt_ray.teacher import decode
from retrikt_ray.teacher.base import Base
from retrikt_ray.teacher.prefix import Prefix, places_of
from retrikt_ray.teacher.sampling import Draw, Sampling, uniforms

log = logging.getLogger(__name__)


def score(base: Base, prefix: Prefix, rows: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Logits that predict each token of the texts, and the hidden states they come from.

    rows: (B,) condition of each text; ids, mask: (B, T) right-padded. Returns (B, T, V) and (B, T, d), float32.
    """
    before = prefix.mask[rows]
    places = before.sum(1, keepdim=True) + torch.arange(ids.shape[1], device=ids.device)[None]
    inputs: dict[str, Any] = {"attention_mask": torch.cat([before, mask], 1)}
    if prefix.layers is not None:
        inputs |= {"input_ids": ids, "position_ids": places, "past_key_values": prefix.gather(rows), "use_cache": True}
    else:  # the prefix is read anew for each text
        embeds = torch.cat([prefix.embeds.index_select(0, rows), base.embed(ids).to(prefix.embeds.dtype)], 1)
        inputs |= {"inputs_embeds": embeds, "position_ids": torch.cat([places_of(before), places], 1), "use_cache": False}
    out, states = base(**inputs)
    logits, hidden = out.logits[:, -ids.shape[1] : -1].float(), states[:, -ids.shape[1] : -1].float()
    logits = torch.cat([prefix.last_logits.index_select(0, rows)[:, None], logits], 1)
    hidden = torch.cat([prefix.last_hidden.index_select(0, rows)[:, None], hidden], 1)
    return logits, hidden


def log_probs_of(logits: Tensor, ids: Tensor) -> Tensor:
    """log p of the tokens that were chosen. logits (B, T, V), ids (B, T) -> (B, T)."""
    return torch.log_softmax(logits, -1).gather(-1, ids[..., None]).squeeze(-1)


@torch.no_grad()
def sample(base: Base, prefix: Prefix, rows: Tensor, seeds: list[int], max_tokens: int, sampling: Sampling, lines: int) -> list[list[int]]:
    """Write one text per row. rows: (B,) conditions; seeds: B row seeds; lines: after how many of them a text ends (`Base.ends`).

    Returns tokens, the one that ended the text included.
    """
    if base.shares is not False:
        try:
            if base.shares is None:
                decode.check(base, prefix)
            base.shares = True
            return decode.decode(base, prefix, rows.tolist(), seeds, max_tokens, sampling, lambda ids: base.ends(ids, lines))
        except decode.Unshared as reason:
            log.warning("%s: texts are written by `generate`, without shared prefixes: %s", type(base.model).__name__, reason)
            base.shares = False
    out = base.model.generate(
        inputs_embeds=prefix.embeds[rows],
        attention_mask=prefix.mask[rows],
        max_new_tokens=max_tokens,
        do_sample=False,
        logits_processor=LogitsProcessorList([Draw(uniforms(seeds, max_tokens), sampling)]),
        pad_token_id=base.eos,
        eos_token_id=sorted(base.stops),
    )
    return [next((ids[:n] for n in range(1, len(ids)) if base.ends(ids[:n], lines)), ids) for ids in out.tolist()]

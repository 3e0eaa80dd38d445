"""The frozen base LM at work behind prefixes: scoring texts, and writing them."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import LogitsProcessorList

from retrikt_ray.teacher import decode, graphs
from retrikt_ray.teacher.base import Base
from retrikt_ray.teacher.prefix import Prefix, places_of
from retrikt_ray.teacher.sampling import Draw, Sampling, uniforms

log = logging.getLogger(__name__)

LOGITS = 4_000_000  # numbers at a time where a text's tokens meet the vocabulary
ACTIVATIONS = 96 * 2**20  # bytes that a micro-batch may take beside the base, or a quarter of the base's weights where that is more


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


def score_tokens(base: Base, prefix: Prefix, rows: Tensor, ids: Tensor, mask: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """log p of each token at this temperature, the entropy it was drawn from (nats, without a gradient), and the states behind both.

    rows: (B,) condition of each text; ids, mask: (B, T) right-padded. Returns (B, T), (B, T) and (B, T, d), float32. The logits, (B, T, V), are never
    there at once: a part of the tokens meets the vocabulary at a time, and once more when gradients flow back (Chen et al. 2016, arXiv 1604.06174).
    """
    if prefix.layers is None or not base.plain_head:  # then the model alone knows how
        logits, hidden = score(base, prefix, rows, ids, mask)
        log_p = torch.log_softmax(logits / temperature, -1)
        return log_p.gather(-1, ids[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1).detach(), hidden
    before = prefix.mask[rows]
    places = before.sum(1, keepdim=True) + torch.arange(ids.shape[1], device=ids.device)[None]
    states = base.model.base_model(
        input_ids=ids, attention_mask=torch.cat([before, mask], 1), position_ids=places, past_key_values=prefix.gather(rows), use_cache=True
    ).last_hidden_state
    hidden = torch.cat([prefix.last_hidden.index_select(0, rows)[:, None].to(states.dtype), states[:, :-1]], 1)
    flat, chosen = hidden.flatten(0, 1), ids.flatten()
    head = base.model.get_output_embeddings()

    def part(states: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        log_p = torch.log_softmax(head(states).float() / temperature, -1)
        return log_p.gather(-1, chosen[:, None])[:, 0], -(log_p.detach().exp() * log_p.detach()).sum(-1)

    size = max(1, LOGITS // head.weight.shape[0])
    pairs = zip(flat.split(size), chosen.split(size), strict=True)
    again = torch.is_grad_enabled()  # then a part is computed once more when gradients flow back
    parts = [checkpoint(part, h, c, use_reentrant=False) if again else part(h, c) for h, c in pairs]
    log_probs, entropies = (torch.cat(x).view(ids.shape) for x in zip(*parts, strict=True))
    return log_probs, entropies, hidden.float()


def micro_batches(base: Base, rows: list[int], lengths: list[int], width: int, gradients: bool = False) -> list[list[int]]:
    """Rows cut so that what a part takes stays small beside the base. lengths: of all rows' texts, in tokens; width: of the prefixes.

    A layer takes about 17 numbers a token and dimension (Korthikanti et al. 2022, arXiv 2205.05198, section 4.1); for gradients all layers keep theirs.
    """
    config, weight = base.model.config, base.embed.weight
    per_token = 17 * weight.element_size() * config.hidden_size * (config.num_hidden_layers if gradients else 2)
    room = max(ACTIVATIONS, base.model.get_memory_footprint() // 4) // per_token
    parts: list[list[int]] = []
    tokens = 0
    for row in sorted(rows, key=lengths.__getitem__):
        tokens += width + lengths[row]
        if not parts or tokens > room:
            parts.append([])
            tokens = width + lengths[row]
        parts[-1].append(row)
    return parts


@torch.no_grad()
def sample(
    base: Base, prefix: Prefix, rows: Tensor, seeds: list[int], max_tokens: int, sampling: Sampling, lines: int, slots: int = 0
) -> list[list[int]]:
    """Write one text per row. rows: (B,) conditions; seeds: B row seeds; lines: after how many of them a text ends (`Base.ends`).

    slots: how many are written side by side; 0: as many as the device likes. On a GPU the bits of a text depend on that number. Returns tokens, the one that ended the text included.
    """
    if base.shares is not False:
        try:
            if base.shares is None:
                decode.check(base, prefix)
            base.shares = True
            write = graphs.decode if base.device.type == "cuda" else decode.decode
            return write(base, prefix, rows.tolist(), seeds, max_tokens, sampling, lambda ids: base.ends(ids, lines), slots)
        except decode.Unshared as reason:
            log.warning("%s: texts are written by `generate`, without shared prefixes: %s", type(base.model).__name__, reason)
            base.shares = False
    found: list[list[int]] = []
    size = slots or decode.SLOTS
    for start in range(0, len(seeds), size):
        some, u = rows[start : start + size], uniforms(seeds[start : start + size], max_tokens)
        out = base.model.generate(
            inputs_embeds=prefix.embeds[some],
            attention_mask=prefix.mask[some],
            max_new_tokens=max_tokens,
            do_sample=False,
            logits_processor=LogitsProcessorList([Draw(u, sampling)]),
            pad_token_id=base.eos,
            eos_token_id=sorted(base.stops),
        )
        found += [next((ids[:n] for n in range(1, len(ids)) if base.ends(ids[:n], lines)), ids) for ids in out.tolist()]
    return found

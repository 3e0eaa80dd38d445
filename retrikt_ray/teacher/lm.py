"""The frozen base LM: loading, prefixes whose keys and values are computed once, scoring and sampling.

A text is generated after a prefix: soft tokens, then a readable template ("positive: "). The prefix is the same for all texts of a
condition, so its keys and values are computed once per condition and gathered per row. Gradients flow through them, so that SFT
and PPO pay for the prefix once per condition too, not once per text.

Sampling inverts the cumulative distribution with one uniform number per row and step, drawn from a generator that is keyed by the row's
own seed: a row's text does not depend on the batch it is generated in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from retrikt_ray.runtime.folders import PACKAGED


def model_path(name: str) -> str:
    """`embedded` is the small LM inside the package; anything else is a local folder or a hub id."""
    return str(PACKAGED / "model") if name == "embedded" else name


def pick_device() -> torch.device:
    """The GPU that Ray gave to this worker, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 on a GPU, float32 on a CPU (where bfloat16 is slower and less repeatable)."""
    return (torch.bfloat16 if device.type == "cuda" else torch.float32) if name == "auto" else getattr(torch, name)


@dataclass
class Base:
    """A frozen causal LM with its tokenizer."""

    model: Any
    tokenizer: Any
    device: torch.device

    @staticmethod
    def load(name: str, dtype: str = "auto") -> Base:
        device = pick_device()
        path = model_path(name)
        tokenizer = AutoTokenizer.from_pretrained(path)
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=pick_dtype(dtype, device))
        model.to(device).eval()
        # A checkpoint's own habits (repetition penalty, least length) would make texts of another distribution than `score` tells.
        model.generation_config = GenerationConfig()
        model.requires_grad_(False)
        return Base(model, tokenizer, device)

    @property
    def embed(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    @property
    def dim(self) -> int:
        return int(self.embed.weight.shape[1])

    @property
    def eos(self) -> int:
        return int(self.tokenizer.eos_token_id)

    def encode(self, texts: list[str], max_tokens: int, end: bool = True, after: str = "") -> tuple[Tensor, Tensor]:
        """Token ids and mask, right-padded: two (B, T) tensors. With `end`, texts that fit are closed by <eos>.

        after: the readable start that the texts follow, "positive: ", whose last space is the texts' first (`head_of`). They get the tokens that
        they have behind it; those of the start itself are not among them.
        """
        rows = self.tokenizer([after + text for text in texts], add_special_tokens=False)["input_ids"]
        head = self.tokenizer(head_of(after), add_special_tokens=False)["input_ids"] if after else []
        if any(row[: len(head)] != head for row in rows):  # a token reaches over the boundary: then as a text of its own
            rows, head = self.tokenizer([after[len(head_of(after)) :] + text for text in texts], add_special_tokens=False)["input_ids"], []
        rows = [row[len(head) :] for row in rows]
        rows = [([*r, self.eos] if end else r)[:max_tokens] or [self.eos] for r in rows]
        return pad_rows(rows, self.eos, self.device)

    def decode(self, ids: Tensor, mask: Tensor) -> list[str]:
        return [self.tokenizer.decode(row[m.bool()].tolist(), skip_special_tokens=True) for row, m in zip(ids, mask, strict=True)]


def head_of(template: str) -> str:
    """A template without the space at its end. Tokenizers keep a space with the word behind it: left with the template it is a token that no
    text was ever written after, and what a language model then writes begins with rubbish."""
    return template.rstrip(" ")


def pad_rows(rows: list[list[int]], value: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(len(r) for r in rows)
    ids = torch.full((len(rows), width), value, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids.to(device), mask.to(device)


@dataclass
class Prefix:
    """Keys and values of the prefixes of C conditions, left-padded to one length P."""

    layers: list[tuple[Tensor, Tensor]]  # per layer: keys and values (C, H, P, D)
    mask: Tensor  # (C, P)
    last_logits: Tensor  # (C, V): the distribution of the first text token
    last_hidden: Tensor  # (C, d): the state that predicts it

    def gather(self, rows: Tensor) -> tuple[DynamicCache, Tensor]:
        """A cache for a batch of rows, each with the prefix of its condition. rows: (B,) indices into C."""
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self.layers):
            # Not keys[rows]: with several threads, its gradients are summed in whatever order the threads come.
            cache.update(keys.index_select(0, rows), values.index_select(0, rows), layer)
        return cache, self.mask[rows]


def prefix_embeddings(base: Base, soft: Tensor, templates: list[str]) -> list[Tensor]:
    """[soft tokens, <bos>, template] of each condition as vectors, (P_i, d) each. soft: (C, S, d). Soft tokens come first, as in PEFT."""
    bos = [base.tokenizer.bos_token_id] if base.tokenizer.bos_token_id is not None else []
    out = []
    for prompt, template in zip(soft, templates, strict=True):
        ids = torch.tensor(
            bos + base.tokenizer(head_of(template), add_special_tokens=False)["input_ids"], dtype=torch.long, device=base.device
        )
        hard = base.embed(ids)
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
    places = torch.zeros_like(mask)
    for i, row in enumerate(rows):
        mask[i, width - len(row) :] = 1
        places[i, width - len(row) :] = torch.arange(len(row), device=base.device)
    out = base.model(inputs_embeds=embeds, attention_mask=mask, position_ids=places, use_cache=True, output_hidden_states=True)
    layers = [(layer.keys, layer.values) for layer in out.past_key_values.layers]
    return Prefix(layers, mask, out.logits[:, -1].float(), out.hidden_states[-1][:, -1].float())


def run_prefix_of(base: Base, soft: Tensor, templates: list[str], *conditions: Tensor) -> tuple[Prefix, list[Tensor]]:
    """The prefixes of those conditions alone that occur in a batch, and the batch's conditions renumbered to them.

    With 77 classes and 16 texts a step, the prefixes of all classes would cost more than the texts.
    """
    used = torch.unique(torch.cat(conditions))
    prefix = run_prefix(base, soft.index_select(0, used), [templates[i] for i in used.tolist()])
    return prefix, [torch.searchsorted(used, c) for c in conditions]


def score(base: Base, prefix: Prefix, rows: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Logits that predict each token of the texts, and the hidden states they come from.

    rows: (B,) condition of each text; ids, mask: (B, T) right-padded. Returns (B, T, V) and (B, T, d), float32.
    """
    cache, before = prefix.gather(rows)
    places = before.sum(1, keepdim=True) + torch.arange(ids.shape[1], device=ids.device)[None]
    out = base.model(
        input_ids=ids,
        attention_mask=torch.cat([before, mask], 1),
        position_ids=places,
        past_key_values=cache,
        use_cache=True,
        output_hidden_states=True,
    )
    logits = torch.cat([prefix.last_logits.index_select(0, rows)[:, None], out.logits[:, :-1].float()], 1)
    hidden = torch.cat([prefix.last_hidden.index_select(0, rows)[:, None], out.hidden_states[-1][:, :-1].float()], 1)
    return logits, hidden


def log_probs_of(logits: Tensor, ids: Tensor) -> Tensor:
    """log p of the tokens that were chosen. logits (B, T, V), ids (B, T) -> (B, T)."""
    return torch.log_softmax(logits, -1).gather(-1, ids[..., None]).squeeze(-1)


def uniforms(seeds: list[int], steps: int) -> Tensor:
    """One uniform number in [0, 1) per row and step, from a Philox generator keyed by the row's seed. (B, steps), float64."""
    return torch.from_numpy(np.stack([np.random.Generator(np.random.Philox(key=s)).random(steps) for s in seeds]))


class InverseCDF(LogitsProcessor):
    """Turns greedy decoding into sampling: leaves only the token at which the cumulative distribution passes the row's uniform."""

    def __init__(self, u: Tensor, start: int) -> None:
        self.u, self.start = u, start  # (B, steps); length of input_ids at the first step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cdf = torch.softmax(scores.float(), -1).cumsum(-1, dtype=torch.float64)
        u = self.u[:, input_ids.shape[1] - self.start].to(scores.device)
        token = (cdf <= (u * cdf[:, -1])[:, None]).sum(-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, float("-inf")).scatter(-1, token, 0.0)


@torch.no_grad()
def sample(
    base: Base,
    prefix: Prefix,
    rows: Tensor,
    seeds: list[int],
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Generate one text per row. rows: (B,) conditions; seeds: B row seeds. Returns ids and mask, (B, T), T <= max_tokens.

    The mask covers the tokens up to and including <eos>.
    """
    cache, before = prefix.gather(rows)
    u = uniforms(seeds, max_tokens)
    width = before.shape[1]
    # The first text token comes from the prefix's own last distribution: generate() needs at least one token to feed.
    warpers = LogitsProcessorList()
    if temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(temperature))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    nothing: Any = torch.empty((len(seeds), 0), dtype=torch.long)
    first = InverseCDF(u, 0)(nothing, warpers(nothing, prefix.last_logits[rows].clone())).argmax(-1, keepdim=True)  # (B, 1)
    if max_tokens > 1:
        placeholder = torch.full((len(seeds), width), base.eos, dtype=torch.long, device=base.device)
        out = base.model.generate(
            input_ids=torch.cat([placeholder, first], 1),
            attention_mask=torch.cat([before, torch.ones_like(first)], 1),
            past_key_values=cache,
            max_new_tokens=max_tokens - 1,
            do_sample=False,
            logits_processor=LogitsProcessorList([*warpers, InverseCDF(u, width)]),
            pad_token_id=base.eos,
            eos_token_id=base.eos,
        )
        ids = out[:, width:]
    else:
        ids = first
    ended = (ids == base.eos).cumsum(1)
    mask = ((ended == 0) | ((ended == 1) & (ids == base.eos))).long()
    return ids, mask

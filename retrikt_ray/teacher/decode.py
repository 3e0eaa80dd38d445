"""Writing many texts at once behind shared prefixes: one forward pass a token over a fixed number of slots. On a GPU: `graphs.py`.

The model's own layers run as they are; only the memory and the attention are ours. Keys and values of a prefix are held once a condition, and all
slots of that condition ask them in one matrix product; those of the texts lie in buffers that are laid out once. A slot whose text has ended
takes the next one. What happens in which order depends on the given rows alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, Cache
from transformers.cache_utils import CacheLayerMixin

from retrikt_ray.teacher.base import Base
from retrikt_ray.teacher.prefix import Prefix, places_of
from retrikt_ray.teacher.sampling import Sampling, draw, uniforms

ATTENTION = "retrikt_decode"
SLOTS = 64  # more would only wait for memory
NOBODY = -1
FIRST = 256  # first tokens that are drawn at once
KEPT = 0.75  # fewer slots than this share at work, and none to come: the others are let go


class Unshared(Exception):
    """The model's attention is of a kind that `attend` does not know."""


class Writing(Protocol):
    """What the model's cache and attention ask of the texts that are being written."""

    at: dict[int, Tensor]  # by number of heads H: (B H,), the rows of a layer's buffer, (B H T, D), in which each slot writes now
    width: int  # places of the buffers that are looked at
    reach: int  # most tokens of a prefix and its text together

    def mix(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, softcap: float | None) -> Tensor:
        """Attention of one new token a slot. query (B, H, R, D), keys and values (B, H, width, D), mask (B, 1, 1, width). Returns (B, H, R, D)."""


class TextLayer(CacheLayerMixin):
    """One layer's keys and values of the slots' texts, (B, H, T, D) each: a slot writes at its own place."""

    is_sliding = False
    keys: Any  # tensors; the parent's may be None
    values: Any

    def __init__(self, slots: Writing, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.slots, self.is_initialized = slots, True
        self.keys, self.values = keys, values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        rows = self.slots.at[self.keys.shape[1]]
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            kept.view(-1, kept.shape[3]).index_copy_(0, rows, new.reshape(len(rows), -1))
        return self.keys[:, :, : self.slots.width], self.values[:, :, : self.slots.width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots.width, 0

    def get_seq_length(self) -> int:
        return self.slots.width

    def get_max_length(self) -> int:
        return int(self.keys.shape[2])


class Slots:
    """B texts on their way. conditions: (B,) into the prefix's C; steps: most tokens that a text is fed."""

    def __init__(self, base: Base, prefix: Prefix, conditions: list[int], steps: int) -> None:
        if prefix.layers is None:
            raise Unshared("it does not keep keys and values of all places alone")
        self.base, self.prefix, self.steps, self.conditions = base, prefix, steps, conditions
        self.lengths = torch.zeros(len(conditions), dtype=torch.long, device=base.device)  # tokens fed so far
        self.before, self.used = prefix.mask.sum(1), list[int]()
        self.reach = prefix.mask.shape[1] + steps
        self.layers: list[Any] = [TextLayer(self, *map(self.buffer, layer)) for layer in prefix.layers]
        self.cache = Cache(layers=self.layers)
        self.group()

    @property
    def count(self) -> int:
        return len(self.conditions)

    def buffer(self, like: Tensor) -> Tensor:
        return like.new_zeros((self.count, like.shape[1], self.steps, like.shape[3]))

    def restart(self, slots: list[int], conditions: list[int]) -> None:
        """New texts in these slots."""
        for slot, condition in zip(slots, conditions, strict=True):
            self.conditions[slot] = condition
        self.lengths[slots] = 0
        self.group()

    def keep(self, slots: list[int]) -> None:
        """Let go of all other slots."""
        chosen = torch.tensor(slots, device=self.base.device)
        self.conditions, self.lengths = [self.conditions[slot] for slot in slots], self.lengths[chosen]
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[chosen], layer.values[chosen]
        self.group()

    def group(self) -> None:
        """Lay the slots out by condition: G groups of as many places as the largest has, so that each group's prefix is asked at once."""
        used = sorted(set(self.conditions))
        groups = [[s for s, c in enumerate(self.conditions) if c == condition] for condition in used]
        most = max(map(len, groups))
        device = self.base.device
        self.shape = (len(used), most)
        pick = torch.tensor([group + group[:1] * (most - len(group)) for group in groups], device=device)  # (G, m)
        where = {s: (g, i) for g, group in enumerate(groups) for i, s in enumerate(group)}
        group_of, place = torch.tensor([where[s] for s in range(self.count)], device=device)[:, :, None].unbind(1)  # (B, 1) each
        self.out, self.back, self.first = {}, {}, {}  # by number of heads: rows of (B H, ...) by condition, and of (G H m, ...) by slot
        for heads in {layer.keys.shape[1] for layer in self.layers}:
            head = torch.arange(heads, device=device)
            self.out[heads] = (pick[:, None] * heads + head[:, None]).flatten()
            self.back[heads] = ((group_of * heads + head) * most + place).flatten()
            self.first[heads] = torch.arange(self.count * heads, device=device).view(-1, heads) * self.steps
        self.offsets = self.before[torch.tensor(self.conditions, device=device)]
        if used == self.used:
            return
        self.used, chosen = used, torch.tensor(used, device=device)
        self.fronts = [(keys[chosen], values[chosen]) for keys, values in self.prefix.layers or []]  # (G, H, P, D)
        self.front_mask = penalty(self.prefix.mask[chosen] == 0, self.fronts[0][0].dtype)[:, None, None]  # (G, 1, 1, P)

    def spread(self, x: Tensor) -> Tensor:
        """(B, H, R, E) -> (G, H, m R, E): by condition."""
        (groups, most), (_, heads, repeats, size) = self.shape, x.shape
        return x.flatten(0, 1).index_select(0, self.out[heads]).view(groups, heads, most * repeats, size)

    def gather(self, x: Tensor) -> Tensor:
        """(G, H, m R, E) -> (B, H, R, E): back again."""
        _, heads, places, size = x.shape
        return x.view(-1, places // self.shape[1], size).index_select(0, self.back[heads]).view(self.count, heads, -1, size)

    def step(self, tokens: Tensor) -> Tensor:
        """Feed one token a slot, (B,); the logits of the next, (B, V) float32."""
        self.at = {heads: (first + self.lengths[:, None]).flatten() for heads, first in self.first.items()}
        self.width = int(self.lengths.max()) + 1
        unseen = torch.arange(self.width, device=tokens.device)[None] > self.lengths[:, None]
        out = self.base.model(
            input_ids=tokens[:, None],
            attention_mask=penalty(unseen, self.fronts[0][0].dtype)[:, None, None],  # 4-D: handed to `attend` as it is
            position_ids=(self.offsets + self.lengths)[:, None],
            past_key_values=self.cache,
            use_cache=True,
            slots=self,
        )
        # An ended slot without a successor is fed on; what it says is not heard.
        self.lengths = (self.lengths + 1).clamp(max=self.steps - 1)
        return out.logits[:, -1].float()

    def mix(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, softcap: float | None) -> Tensor:
        """Attention to the prefix and to the slot's own text: one softmax over the scores of both."""
        query = query * scale
        front_keys, front_values = self.fronts[layer]
        own, front = query @ keys.transpose(2, 3), self.spread(query) @ front_keys.transpose(2, 3)
        if softcap is not None:
            own, front = softcap * torch.tanh(own / softcap), softcap * torch.tanh(front / softcap)
        scores = torch.cat([self.gather(front + self.front_mask), own + mask], -1)
        weights = torch.softmax(scores, -1, dtype=torch.float32).to(values.dtype)
        width = front_keys.shape[2]
        return weights[..., width:] @ values + self.gather(self.spread(weights[..., :width]) @ front_values)


def penalty(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where something is seen, -inf where it is hidden."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    slots: Writing | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """Attention of one new token a slot, as `slots` does it.

    query (B, H R, 1, D), key and value (B, H, L, D), attention_mask (B, 1, 1, L). Returns (B, 1, H R, D). Raises Unshared.
    """
    unknown = [name for name in ("s_aux", "position_bias", "head_mask") if other.get(name) is not None]
    if slots is None or unknown or query.shape[2] != 1:
        raise Unshared(f"it has {' and '.join(unknown)}" if unknown else "it does not pass arguments on to its attention")
    if sliding_window is not None and sliding_window < slots.reach:
        raise Unshared(f"its window of {sliding_window} is less than the {slots.reach} tokens of the prefix and a text")
    count, heads, _, size = query.shape
    scale = size**-0.5 if scaling is None else scaling
    out = slots.mix(module.layer_idx, query.view(count, key.shape[1], -1, size), key, value, attention_mask, scale, softcap)
    return out.reshape(count, 1, heads, value.shape[3]), None


AttentionInterface.register(ATTENTION, attend)


@contextmanager
def attending(model: Any) -> Iterator[None]:
    """The model with `attend` for its attention. Raises Unshared where the model takes no other."""
    usual = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        if model.config._attn_implementation != ATTENTION:
            raise Unshared("its attention cannot be replaced")
        yield
    finally:
        model.set_attn_implementation(usual)


@torch.no_grad()
def check(base: Base, prefix: Prefix) -> None:
    """Two tokens by `attend` and by the model's own attention. Raises Unshared where the logits differ by more than rounding."""
    rows = sorted({0, len(prefix.mask) - 1})
    first = prefix.last_logits[rows].argmax(-1)
    tokens = torch.stack([first, first.flip(0)], 1)  # (B, 2)
    mask = torch.cat([prefix.mask[rows], torch.ones_like(tokens)], 1)
    embeds = torch.cat([prefix.embeds[rows], base.embed(tokens).to(prefix.embeds.dtype)], 1)
    wanted = base.model(inputs_embeds=embeds, attention_mask=mask, position_ids=places_of(mask), use_cache=False)
    with attending(base.model):
        slots = Slots(base, prefix, rows, 2)
        got = torch.stack([slots.step(column) for column in tokens.unbind(1)], 1)
    off = float((got - wanted.logits[:, -2:].float()).abs().max() / wanted.logits[:, -2:].float().std())
    if not off < (1e-3 if embeds.dtype == torch.float32 else 0.3):
        raise Unshared(f"logits by shared prefixes differ from the model's own by {off:.2g} standard deviations")


def first_tokens(prefix: Prefix, conditions: Tensor, u: Tensor, sampling: Sampling) -> Tensor:
    """Each row's first token, which its prefix alone decides. conditions, u: (N,). Returns (N,)."""
    some = zip(conditions.split(FIRST), u.split(FIRST), strict=True)
    return torch.cat([draw(prefix.last_logits[rows], chances, sampling) for rows, chances in some])


@torch.inference_mode()  # a tenth less time than no_grad: the steps are of many small operations
def decode(
    base: Base,
    prefix: Prefix,
    conditions: Sequence[int],
    seeds: Sequence[int],
    max_tokens: int,
    sampling: Sampling,
    ends: Callable[[list[int]], bool],
    slots: int = 0,
) -> list[list[int]]:
    """The tokens of one text per row. conditions and seeds: one a row; ends: whether a text, given its tokens, ends with the last of them.

    slots: how many texts are written side by side; 0: `SLOTS`. Raises Unshared.
    """
    u = uniforms(list(seeds), max_tokens)
    texts = [[token] for token in first_tokens(prefix, torch.tensor(conditions), u[:, 0], sampling).tolist()]
    # By condition: then the slots at work are of few of them, and their prefixes are asked by larger products.
    order = sorted(range(len(conditions)), key=conditions.__getitem__)
    queue = deque(row for row in order if max_tokens > 1 and not ends(texts[row]))
    rows = [queue.popleft() for _ in range(min(slots or SLOTS, len(queue)))]  # by slot; NOBODY: its text has ended, and none waits
    if not rows:
        return texts
    at_work = Slots(base, prefix, [conditions[row] for row in rows], max_tokens - 1)
    with attending(base.model):
        while True:
            last = [texts[row][-1] if row != NOBODY else 0 for row in rows]
            logits = at_work.step(torch.tensor(last, device=base.device))
            busy = [slot for slot, row in enumerate(rows) if row != NOBODY]
            now = [rows[slot] for slot in busy]
            chances = logits if len(busy) == len(rows) else logits[busy]
            for row, token in zip(now, draw(chances, u[now, [len(texts[row]) for row in now]], sampling).tolist(), strict=True):
                texts[row].append(token)
            ended = [slot for slot, row in zip(busy, now, strict=True) if len(texts[row]) == max_tokens or ends(texts[row])]
            fresh = ended[: len(queue)]
            for slot in ended:
                rows[slot] = queue.popleft() if queue else NOBODY
            if fresh:
                at_work.restart(fresh, [conditions[rows[slot]] for slot in fresh])
            left = [slot for slot, row in enumerate(rows) if row != NOBODY]
            if not left:
                return texts
            if len(left) <= KEPT * len(rows):
                rows = [rows[slot] for slot in left]
                at_work.keep(left)

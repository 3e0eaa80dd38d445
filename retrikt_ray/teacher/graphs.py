"""Writing texts on a GPU: a step of one fixed shape over all slots, recorded once as a CUDA graph and replayed.

A step of a small model is a thousand kernels of a few microseconds, and Python launches them slower than a GPU runs them; a graph is one launch.
For its shapes to be fixed, a copy of its prefix lies in front of each slot's text, and all places are looked at always, those still unwritten with
weight zero. Tokens are drawn on the GPU; the host reads one number a slot and step, and by then the GPU is at work on the next step, so that a slot
whose text has ended is fed once more before another text takes it.

Since every step has the same shape, the bits of a text do not depend on the texts beside it, nor on which slot it is written in.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache

from retrikt_ray.teacher.base import Base
from retrikt_ray.teacher.decode import NOBODY, TextLayer, Unshared, attending, first_tokens, penalty
from retrikt_ray.teacher.prefix import Prefix
from retrikt_ray.teacher.sampling import Sampling, draw, uniforms

log = logging.getLogger(__name__)
SLOTS = 512  # more make a step of a model of 0.5B no quicker by the text
MEMORY = 0.5  # of what is free, for the slots; the rest is for what a step computes on the way


class Shape(NamedTuple):
    """What a recorded step is good for."""

    slots: int  # B
    layers: int
    heads: int  # of keys and values, H
    front: int  # tokens of the longest prefix, P
    size: int  # of a head, D
    steps: int  # most tokens that a text is fed
    sampling: Sampling

    @property
    def width(self) -> int:
        """Places of a slot. A multiple of 8, as fused attention kernels like it."""
        return -(-(self.front + self.steps) // 8) * 8

    @staticmethod
    def of(prefix: Prefix, count: int, steps: int, sampling: Sampling) -> Shape:
        """Raises Unshared."""
        if prefix.layers is None:
            raise Unshared("it does not keep keys and values of all places alone")
        shapes = {kept.shape for layer in prefix.layers for kept in layer}
        if len(shapes) > 1:
            raise Unshared("the keys and values of its layers are of several sizes")
        _, heads, front, size = shapes.pop()
        return Shape(count, len(prefix.layers), heads, front, size, steps, sampling)


class Board:
    """B slots in which texts are written. Its buffers stay where they are, as a recorded step reads and writes them."""

    def __init__(self, base: Base, shape: Shape, dtype: torch.dtype) -> None:
        self.base, self.shape, self.reach, self.width = base, shape, shape.front + shape.steps, shape.width
        device, count = base.device, shape.slots
        self.kept = torch.zeros((shape.layers, 2, count, shape.heads, shape.width, shape.size), dtype=dtype, device=device)
        self.cache = Cache(layers=[TextLayer(self, keys, values) for keys, values in self.kept])
        self.places = torch.arange(shape.width, device=device)
        self.tokens, self.lengths, self.first = (torch.zeros(count, dtype=torch.long, device=device) for _ in range(3))
        self.begin = torch.arange(count * shape.heads, device=device).view(count, shape.heads) * shape.width
        self.u = torch.zeros((count, shape.steps + 1), dtype=torch.float64, device=device)  # a slot's uniforms
        self.graph: Any = None

    def lay(self, prefix: Prefix, conditions: Sequence[int], seeds: Sequence[int], max_tokens: int) -> list[int]:
        """The rows of a call: what `start` will copy from. Returns each row's first token, which the prefix alone decides."""
        device = self.base.device
        self.fronts = torch.stack([torch.stack(layer) for layer in prefix.layers or []])  # (L, 2, C, H, P, D)
        self.firsts = self.shape.front - prefix.mask.sum(1)  # (C,) where its prefix begins
        self.conditions = torch.tensor(conditions, device=device)
        self.chances = torch.nn.functional.pad(uniforms(list(seeds), max_tokens), (0, self.u.shape[1] - max_tokens)).to(device)
        self.begun = first_tokens(prefix, self.conditions, self.chances[:, 0], self.shape.sampling)
        return self.begun.tolist()

    def start(self, slots: list[int], rows: list[int]) -> None:
        """Put the texts of these rows into these slots."""
        both = torch.tensor([slots, rows])
        at, row = both.pin_memory().to(self.base.device, non_blocking=True) if self.base.device.type == "cuda" else both
        condition = self.conditions[row]
        self.kept[:, :, at, :, : self.shape.front] = self.fronts.index_select(2, condition)
        self.first[at], self.lengths[at], self.tokens[at], self.u[at] = self.firsts[condition], 0, self.begun[row], self.chances[row]

    def feed(self) -> None:
        """Feed each slot its token, and draw the next in its place."""
        here = self.shape.front + self.lengths
        self.at = {self.shape.heads: (self.begin + here[:, None]).flatten()}
        hidden = (self.places < self.first[:, None]) | (self.places > here[:, None])  # (B, width)
        out = self.base.model(
            input_ids=self.tokens[:, None],
            attention_mask=penalty(hidden, self.kept.dtype)[:, None, None],  # 4-D: handed to `attend` as it is
            position_ids=(here - self.first)[:, None],
            past_key_values=self.cache,
            use_cache=True,
            slots=self,
        )
        u = self.u.gather(1, self.lengths[:, None] + 1)[:, 0]
        self.tokens.copy_(draw(out.logits[:, -1], u, self.shape.sampling))
        self.lengths.add_(1).clamp_(max=self.shape.steps - 1)  # an ended slot is fed on; what it says is not heard

    def mix(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, softcap: float | None) -> Tensor:
        """Attention to all that lies in a slot. The R queries that share a key and value head are asked as if they were R tokens."""
        if softcap is None:
            return torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
        scores = softcap * torch.tanh(query @ keys.transpose(2, 3) * scale / softcap) + mask
        return torch.softmax(scores, -1, dtype=torch.float32).to(values.dtype) @ values

    def record(self) -> None:
        """Make a graph of `feed`. A model that asks the GPU something on the way cannot be recorded; it is fed kernel by kernel."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries set themselves up at their first calls
            for _ in range(2):
                self.feed()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.feed()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as reason:
            log.warning("%s: its steps cannot be recorded as a CUDA graph: %s", type(self.base.model).__name__, reason)
            return
        self.graph = graph

    def step(self) -> Callable[[], list[int]]:
        """Set the next step going. Returns what waits for it and tells the tokens that it drew."""
        if self.graph is None:
            self.feed()
        else:
            self.graph.replay()
        if self.base.device.type == "cpu":
            return self.tokens.clone().tolist
        drawn, event = self.tokens.to("cpu", non_blocking=True), torch.cuda.Event()
        event.record()

        def tell() -> list[int]:
            event.synchronize()
            return drawn.tolist()

        return tell


def room(base: Base, prefix: Prefix, max_tokens: int, share: float = 1.0) -> int:
    """How many slots this GPU has memory for: a power of two, since free memory is never quite the same. share: of the GPU, ours."""
    numbers = sum(kept.shape[1] * kept.shape[3] for layer in prefix.layers or [] for kept in layer) * (prefix.mask.shape[1] + max_tokens)
    # In bytes, with 16 for each token of the vocabulary, which is what drawing from all of it takes on the way.
    each = numbers * prefix.embeds.element_size() + 16 * prefix.last_logits.shape[1]
    ours = 0 if base.board is None else base.board.kept.nbytes  # it makes room for the next one
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated() + ours
    fit = max(1, int(MEMORY * share * free / each))
    return min(SLOTS, 1 << fit.bit_length() - 1)


def board_of(base: Base, prefix: Prefix, count: int, steps: int, sampling: Sampling) -> Board:
    """The base's board, where it is of this shape; else a new one in its place. Raises Unshared."""
    shape = Shape.of(prefix, count, steps, sampling)
    if base.board is None or base.board.shape != shape:
        base.board = None  # its memory first
        base.board = Board(base, shape, prefix.embeds.dtype)
        if base.device.type == "cuda":
            base.board.record()
    return base.board


@torch.no_grad()
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
    """The tokens of one text per row, as `decode.decode` has them. slots: how many texts are written side by side; 0: as many as there are rows
    and memory. Raises Unshared."""
    count = slots or min(1 << (len(conditions) - 1).bit_length(), room(base, prefix, max_tokens))
    with attending(base.model):
        board = board_of(base, prefix, count, max(max_tokens - 1, 1), sampling)
        texts = [[token] for token in board.lay(prefix, conditions, seeds, max_tokens)]
        queue = deque(row for row, text in enumerate(texts) if max_tokens > 1 and not ends(text))
        rows, since = [NOBODY] * count, [0] * count  # by slot: whose text it is, and the first step of it
        step, before = 0, None  # what the step before this one drew
        while True:
            free = [slot for slot, row in enumerate(rows) if row == NOBODY][: len(queue)]
            if free:
                for slot in free:
                    rows[slot], since[slot] = queue.popleft(), step
                board.start(free, [rows[slot] for slot in free])
            if all(row == NOBODY for row in rows):
                return texts
            drawn = board.step()
            if before is not None:
                hear(before(), step - 1, rows, since, texts, lambda text: len(text) == max_tokens or ends(text))
            before, step = drawn, step + 1


def hear(
    tokens: list[int], step: int, rows: list[int], since: list[int], texts: list[list[int]], ended: Callable[[list[int]], bool]
) -> None:
    """Add to the texts what a step drew, and free the slots of those that have ended."""
    for slot, row in enumerate(rows):
        if row != NOBODY and since[slot] <= step:
            texts[row].append(tokens[slot])
            if ended(texts[row]):
                rows[slot] = NOBODY

"""Inference engines of the generate stage: transformers (default, CPU and GPU) and vLLM (extra `vllm`, GPU).

Both write one text per (condition, row seed) behind the same prefixes. The engines sample from the same distribution, but not the same
texts: a run that changes its engine generates anew.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from retrikt_ray.teacher import graphs, lm
from retrikt_ray.teacher.base import Base, Chat, model_path, pack
from retrikt_ray.teacher.prefix import begin_like, prefix_embeddings, run_prefix
from retrikt_ray.teacher.sampling import Sampling

GPU_SHARE = 0.9  # of a GPU's memory that vLLM may take


class Order(NamedTuple):
    """What is to be written, and on what."""

    base: str  # checkpoint
    dtype: str
    chat: Chat
    soft: Tensor  # (C, S, d) soft prompts
    templates: list[str]  # C readable starts
    max_tokens: int
    lines: int  # of a text
    sampling: Sampling
    gpus: float  # of this worker
    starts: dict[str, int]  # labelled rows by how they begin (`start_of`)


class Generated(NamedTuple):
    """A text, its number of tokens (the one that ended it included), and whether it ended by itself."""

    text: str
    tokens: int
    finished: bool


class Engine(Protocol):
    def generate(self, conditions: list[int], seeds: list[int]) -> list[Generated]:
        """One text per row; conditions and seeds have one entry per row."""


class TransformersEngine:
    """The base in this process; prefixes' keys and values are computed once."""

    def __init__(self, order: Order) -> None:
        self.order, self.base = order, Base.load(order.base, order.dtype, order.chat)
        pack(self.base.model, exact=order.dtype != "auto")
        with torch.no_grad():
            prefix = run_prefix(self.base, order.soft.to(self.base.device), order.templates)
            self.prefix = begin_like(self.base, prefix, order.starts, order.sampling.temperature)
        # Once for all: on a GPU the bits of a text depend on how many are written side by side.
        self.slots = graphs.room(self.base, self.prefix, order.max_tokens, min(order.gpus, 1)) if self.base.device.type == "cuda" else 0

    def generate(self, conditions: list[int], seeds: list[int]) -> list[Generated]:
        rows, lines = torch.tensor(conditions, device=self.base.device), self.order.lines
        written = lm.sample(self.base, self.prefix, rows, seeds, self.order.max_tokens, self.order.sampling, lines, self.slots)
        texts = self.base.tokenizer.batch_decode(written, skip_special_tokens=True)
        return [Generated(t, len(ids), self.base.ends(ids, lines)) for t, ids in zip(texts, written, strict=True)]


class VllmEngine:
    """vLLM with prompt embeddings: it has no prompt adapters any more, but takes the prefix as vectors and caches it."""

    def __init__(self, order: Order) -> None:
        from vllm import LLM

        base = Base.hollow(order.base, order.chat)
        self.order, self.stops = order, sorted(base.stops)
        self.prefixes = [prefix.detach() for prefix in prefix_embeddings(base, order.soft, order.templates)]
        self.llm = LLM(
            model=model_path(order.base),
            dtype=order.dtype,
            enable_prompt_embeds=True,
            max_model_len=max(map(len, self.prefixes)) + order.max_tokens,
            tensor_parallel_size=max(1, int(order.gpus)),
            gpu_memory_utilization=GPU_SHARE * min(order.gpus or 1, 1),  # workers may share a GPU
        )

    def generate(self, conditions: list[int], seeds: list[int]) -> list[Generated]:
        from vllm import SamplingParams

        o = self.order
        common: dict[str, Any] = {"temperature": o.sampling.temperature, "top_k": o.sampling.top_k or -1, "top_p": o.sampling.top_p}
        common |= {"max_tokens": o.max_tokens, "stop_token_ids": self.stops, "stop": ["\n"] if o.lines == 1 else []}
        prompts = [{"prompt_embeds": self.prefixes[i]} for i in conditions]
        params = [SamplingParams(seed=s >> 1, **common) for s in seeds]
        outputs = [out.outputs[0] for out in self.llm.generate(prompts, params, use_tqdm=False)]
        return [Generated(out.text, len(out.token_ids), out.finish_reason == "stop") for out in outputs]


ENGINES: dict[str, Any] = {"transformers": TransformersEngine, "vllm": VllmEngine}

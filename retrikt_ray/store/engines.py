"""Inference engines of the generate stage: transformers (default, CPU and GPU) and vLLM (extra `vllm`, GPU).

Both write one text per (condition, row seed) behind the same prefixes. The engines sample from the same distribution, but not the same
texts: a run that changes its engine generates anew.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from retrikt_ray.teacher import lm


class Sampling(NamedTuple):
    """How a token is drawn."""

    temperature: float
    top_k: int  # 0: among all tokens
    top_p: float


class Generated(NamedTuple):
    """A text, its number of tokens (<eos> included), and whether it ended by itself."""

    text: str
    tokens: int
    finished: bool


class Engine(Protocol):
    def generate(self, conditions: list[int], seeds: list[int]) -> list[Generated]:
        """One text per row; conditions and seeds have one entry per row."""


class TransformersEngine:
    """The base in this process; prefixes' keys and values are computed once."""

    def __init__(self, base: str, dtype: str, soft: Tensor, templates: list[str], max_tokens: int, sampling: Sampling) -> None:
        self.base, self.max_tokens, self.sampling = lm.Base.load(base, dtype), max_tokens, sampling
        with torch.no_grad():
            self.prefix = lm.run_prefix(self.base, soft.to(self.base.device), templates)

    def generate(self, conditions: list[int], seeds: list[int]) -> list[Generated]:
        rows = torch.tensor(conditions, device=self.base.device)
        ids, mask = lm.sample(self.base, self.prefix, rows, seeds, self.max_tokens, *self.sampling)
        finished = ((ids == self.base.eos) & mask.bool()).any(1).tolist()
        texts = self.base.decode(ids, mask)
        return [Generated(t, int(n), f) for t, n, f in zip(texts, mask.sum(1).tolist(), finished, strict=True)]


class VllmEngine:
    """vLLM with prompt embeddings: it has no prompt adapters any more, but takes the prefix as vectors and caches it."""

    def __init__(self, base: str, dtype: str, soft: Tensor, templates: list[str], max_tokens: int, sampling: Sampling) -> None:
        from vllm import LLM

        self.max_tokens, self.sampling = max_tokens, sampling
        table = lm.Base.load(base, "float32")  # only its embeddings are needed; let go of before vLLM takes the GPU's memory
        self.eos = table.eos
        self.prefixes = lm.prefix_embeddings(table, soft.to(table.device), templates)
        self.prefixes = [p.detach().cpu() for p in self.prefixes]
        del table
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.llm = LLM(model=lm.model_path(base), dtype=dtype, enable_prompt_embeds=True)

    def generate(self, conditions: list[int], seeds: list[int]) -> list[Generated]:
        from vllm import SamplingParams

        c = self.sampling
        prompts = [{"prompt_embeds": self.prefixes[i]} for i in conditions]
        params = [
            SamplingParams(temperature=c.temperature, top_k=c.top_k or -1, top_p=c.top_p, max_tokens=self.max_tokens, seed=s >> 1)
            for s in seeds
        ]
        outputs = [o.outputs[0] for o in self.llm.generate(prompts, params, use_tqdm=False)]
        return [Generated(o.text, len(o.token_ids), o.finish_reason == "stop") for o in outputs]


ENGINES: dict[str, Any] = {"transformers": TransformersEngine, "vllm": VllmEngine}

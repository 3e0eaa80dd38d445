"""Engines: transformers on a tiny LM, and what the vLLM engine asks of vLLM (a stand-in with its interface: vLLM itself needs a GPU)."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch

from retrikt_ray.store.engines import Order, TransformersEngine, VllmEngine
from retrikt_ray.teacher.base import Base
from retrikt_ray.teacher.prefix import prefix_embeddings
from retrikt_ray.teacher.sampling import Sampling

TEMPLATES = ["positive: ", "a much longer label: "]


@pytest.fixture
def soft() -> torch.Tensor:
    return torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))


def test_a_text_depends_on_its_condition_and_seed_alone(tiny_lm: str, soft: torch.Tensor) -> None:
    engine = TransformersEngine(Order(tiny_lm, "float32", False, soft, TEMPLATES, 10, 1, Sampling(0.9, 20, 1.0), 0, {"Ll": 3}))
    together = engine.generate([0, 1, 0, 1], [5, 6, 7, 8])
    assert engine.generate([1], [6]) == [together[1]] and engine.generate([0], [7]) == [together[2]]
    assert len({g.text for g in together}) == 4 and all(1 <= g.tokens <= 10 for g in together)
    assert all(g.finished or g.tokens == 10 for g in together)


def test_what_the_vllm_engine_asks_for(tiny_lm: str, soft: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    class LLM:
        def __init__(self, **options: Any) -> None:
            asked["options"] = options

        def generate(self, prompts: list[dict[str, Any]], params: list[Any], use_tqdm: bool) -> list[Any]:
            asked["prompts"], asked["params"] = prompts, params
            one = types.SimpleNamespace(text="hello", token_ids=[4, 5, 2], finish_reason="stop")
            cut = types.SimpleNamespace(text="cut", token_ids=[4] * 10, finish_reason="length")
            return [types.SimpleNamespace(outputs=[o]) for o in (one, cut)]

    fake = types.ModuleType("vllm")
    fake.LLM, fake.SamplingParams = LLM, types.SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", fake)
    engine = VllmEngine(Order(tiny_lm, "auto", False, soft, TEMPLATES, 10, 1, Sampling(0.7, 0, 0.9), 0.5, {}))
    seeds = [2**64 - 2, 3]
    found = engine.generate([1, 0], seeds)
    assert [(g.text, g.tokens, g.finished) for g in found] == [("hello", 3, True), ("cut", 10, False)]
    want = prefix_embeddings(Base.load(tiny_lm, "float32"), soft, TEMPLATES)
    assert asked["options"] == {
        "model": tiny_lm,
        "dtype": "auto",
        "enable_prompt_embeds": True,
        "max_model_len": len(want[1]) + 10,
        "tensor_parallel_size": 1,
        "gpu_memory_utilization": 0.45,  # of half a GPU
    }
    assert torch.equal(asked["prompts"][0]["prompt_embeds"], want[1]) and torch.equal(asked["prompts"][1]["prompt_embeds"], want[0])
    assert torch.equal(want[0][:3], soft[0]) and len(want[0]) < len(want[1])
    assert all(p.stop == ["\n"] and p.stop_token_ids == [2] for p in asked["params"])
    assert [(p.temperature, p.top_k, p.top_p, p.max_tokens, p.seed) for p in asked["params"]] == [
        (0.7, -1, 0.9, 10, 2**63 - 1),  # seeds are signed 64-bit numbers there
        (0.7, -1, 0.9, 10, 1),
    ]

"""Shared prefixes and slots, against greedy decoding without a cache, over families of models with random weights."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig

from retrikt_ray.teacher import decode, lm
from retrikt_ray.teacher.base import Base, pad_rows
from retrikt_ray.teacher.packed import PackedLinear, pack
from retrikt_ray.teacher.prefix import Prefix, run_prefix
from retrikt_ray.teacher.sampling import Sampling

GREEDY = Sampling(1.0, 1)
TEMPLATES = ["good: ", "a much longer label: ", "bad: "]
CONDITIONS = [0, 1, 2, 1, 1, 0, 2, 0, 1]
TOKENS = 24
SIZES: dict[str, Any] = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"max_position_embeddings": 128, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 8}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "qwen3": ("Qwen3Config", GROUPED),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "gpt-neox": ("GPTNeoXConfig", SIZES),
    "gemma2": ("Gemma2Config", GROUPED),  # soft caps on its scores
    "mistral": ("MistralConfig", GROUPED | {"sliding_window": 100}),
    "opt": (
        "OPTConfig",
        {"vocab_size": 300, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
}
OTHERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "narrow window": ("MistralConfig", GROUPED | {"sliding_window": 40}, "window of 40"),
    "no exchangeable attention": ("BloomConfig", {"vocab_size": 300, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "cannot be replaced"),
    "state space": (
        "MambaConfig",
        {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
        "does not keep keys and values",
    ),
}


def random_base(tiny_lm: str, config: str, sizes: dict[str, Any]) -> Base:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(getattr(transformers, config)(**sizes)).eval().requires_grad_(False)
    model.generation_config = GenerationConfig()
    return replace(Base.load(tiny_lm, "float32"), model=model)


def greedy(base: Base, prefix: Prefix, condition: int) -> list[int]:
    """The likeliest tokens, each by a pass of its own over everything before it, without padding and without a cache."""
    front, ids = prefix.embeds[condition][prefix.mask[condition].bool()], []  # type: tuple[torch.Tensor, list[int]]
    while len(ids) < TOKENS and not (ids and base.ends(ids, 1)):
        embeds = torch.cat([front, base.embed(torch.tensor(ids, dtype=torch.long))])[None]
        ids.append(int(base.model(inputs_embeds=embeds, use_cache=False).logits[0, -1].argmax()))
    return ids


def prefix_of(base: Base) -> Prefix:
    soft = 0.5 * torch.randn(3, 5, base.dim, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return run_prefix(base, soft, TEMPLATES)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_the_models_own(family: str, tiny_lm: str) -> None:
    base = random_base(tiny_lm, *FAMILIES[family])
    prefix = prefix_of(base)
    wanted = [greedy(base, prefix, condition) for condition in range(3)]
    got = lm.sample(base, prefix, torch.tensor(CONDITIONS), list(range(9)), TOKENS, GREEDY, 1)
    assert base.shares is True and got == [wanted[condition] for condition in CONDITIONS]
    assert len({tuple(ids) for ids in wanted}) == 3
    assert base.model.config._attn_implementation != decode.ATTENTION  # as it was
    pack(base.model)
    if family != "gpt2":  # whose layers are no nn.Linear, but for the last
        assert any(isinstance(module, PackedLinear) for module in base.model.modules())
    assert lm.sample(base, prefix, torch.tensor(CONDITIONS), list(range(9)), TOKENS, GREEDY, 1) == got


@pytest.mark.parametrize("family", OTHERS)
def test_other_models_write_by_generate_and_the_log_says_so(family: str, tiny_lm: str, caplog: pytest.LogCaptureFixture) -> None:
    config, sizes, reason = OTHERS[family]
    base = random_base(tiny_lm, config, sizes)
    prefix = prefix_of(base)
    with caplog.at_level(logging.WARNING, logger="retrikt_ray"):
        got = lm.sample(base, prefix, torch.tensor(CONDITIONS), list(range(9)), TOKENS, GREEDY, 1)
    assert base.shares is False and reason in caplog.text and "generate" in caplog.text
    assert got == [greedy(base, prefix, condition) for condition in CONDITIONS]
    ids, mask = pad_rows(got, base.eos, base.device)
    with torch.no_grad():
        logits, hidden = lm.score(base, prefix, torch.tensor(CONDITIONS), ids, mask)
    assert hidden.shape == (*ids.shape, 32)
    assert (logits.argmax(-1) == ids)[mask.bool()].all()  # what was likeliest when it was written is likeliest when it is scored


def test_an_attention_that_answers_otherwise_is_found_out(
    tiny_lm: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base = Base.load(tiny_lm, "float32")
    prefix = prefix_of(base)
    assert prefix.layers is not None
    prefix = replace(prefix, layers=[(keys * 1.1, values) for keys, values in prefix.layers])
    with caplog.at_level(logging.WARNING, logger="retrikt_ray"):
        got = lm.sample(base, prefix, torch.tensor([0, 1]), [1, 2], TOKENS, GREEDY, 1)
    assert base.shares is False and "differ from the model's own by" in caplog.text
    assert got == [greedy(base, prefix, condition) for condition in (0, 1)]


@pytest.mark.parametrize("slots", [1, 2, 5, 40])
def test_ended_texts_make_room(slots: int, tiny_lm: str) -> None:
    """Forty texts of all lengths, some of one token: as each alone, however many are written side by side."""
    base = Base.load(tiny_lm, "float32")
    prefix = prefix_of(base)
    base.model.lm_head.weight[base.eos] *= 2  # some ends here and there
    prefix.last_logits[:, base.eos] = prefix.last_logits.amax(-1)
    conditions, seeds = [i % 3 for i in range(40)], list(range(40))

    def ends(ids: list[int]) -> bool:
        return base.ends(ids, 1)

    alone = [decode.decode(base, prefix, [c], [s], 12, Sampling(), ends)[0] for c, s in zip(conditions, seeds, strict=True)]
    lengths = {len(ids) for ids in alone}
    assert {1, 12} < lengths and len(lengths) > 4
    fed: list[int] = []
    step = decode.Slots.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode.Slots, "step", lambda self, tokens: (fed.append(len(tokens)), step(self, tokens))[1])
        assert decode.decode(base, prefix, conditions, seeds, 12, Sampling(), ends, slots) == alone
    assert max(fed) <= slots and sum(fed) >= sum(len(ids) - 1 for ids in alone)
    if slots == 5:  # full nearly all the time, though the texts are of all lengths
        assert sum(fed) <= 1.5 * sum(len(ids) - 1 for ids in alone)


def test_one_token(tiny_lm: str) -> None:
    base = Base.load(tiny_lm, "float32")
    prefix = prefix_of(base)
    assert [len(ids) for ids in lm.sample(base, prefix, torch.tensor([0, 1]), [1, 2], 1, Sampling(), 1)] == [1, 1]

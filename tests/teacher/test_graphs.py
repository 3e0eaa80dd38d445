"""A step of fixed shape, fed kernel by kernel on a CPU, and recorded on a GPU, against the decoder that shares prefixes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from retrikt_ray.teacher import decode, graphs, lm
from retrikt_ray.teacher.base import Base
from retrikt_ray.teacher.prefix import Prefix, run_prefix
from retrikt_ray.teacher.sampling import Sampling

TEMPLATES = ["good: ", "a much longer label: ", "bad: "]
CONDITIONS, SEEDS = [i % 3 for i in range(40)], list(range(40))
TOKENS = 12


def prefix_of(base: Base) -> Prefix:
    soft = 0.5 * torch.randn(3, 5, base.dim, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return run_prefix(base, soft.to(base.device), TEMPLATES)


@pytest.fixture
def base(tiny_lm: str) -> Base:
    """Two query heads share a key head; some texts end here and there, some with their first token."""
    torch.manual_seed(1)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_key_value_heads=2, initializer_range=0.3)).eval()
    model.generation_config = GenerationConfig()
    base = replace(Base.load(tiny_lm, "float32"), device=torch.device("cpu"), model=model.requires_grad_(False))
    base.model.lm_head.weight[base.eos] *= 3
    return base


def ends(base: Base) -> Callable[[list[int]], bool]:
    return lambda ids: base.ends(ids, 1)


@pytest.mark.parametrize("slots", [1, 3, 16, 64])
@pytest.mark.parametrize("sampling", [Sampling(1.0, 1), Sampling(0.9, 20), Sampling(1.1, 0, 0.9)])
def test_the_fixed_step_writes_what_the_shared_prefixes_do(slots: int, sampling: Sampling, base: Base) -> None:
    prefix = prefix_of(base)
    if sampling.top_k != 1:
        prefix.last_logits[:, base.eos] = prefix.last_logits.amax(-1)
    wanted = decode.decode(base, prefix, CONDITIONS, SEEDS, TOKENS, sampling, ends(base))
    assert graphs.decode(base, prefix, CONDITIONS, SEEDS, TOKENS, sampling, ends(base), slots) == wanted
    lengths = {len(text) for text in wanted}
    assert ({TOKENS} <= lengths) if sampling.top_k == 1 else ({1, TOKENS} < lengths and len(lengths) > 4)
    assert base.model.config._attn_implementation != decode.ATTENTION  # as it was


def test_a_board_serves_the_next_prompts_too(base: Base) -> None:
    """The same shape: the same buffers, with nothing left over of the texts before."""
    first, sampling = prefix_of(base), Sampling(0.9, 20)
    with torch.no_grad():
        other = run_prefix(base, torch.randn(3, 5, base.dim, generator=torch.Generator().manual_seed(4)), TEMPLATES)
    wanted = decode.decode(base, other, CONDITIONS, SEEDS, TOKENS, sampling, ends(base))
    graphs.decode(base, first, CONDITIONS, SEEDS, TOKENS, sampling, ends(base), 8)
    board = base.board
    assert graphs.decode(base, other, CONDITIONS, SEEDS, TOKENS, sampling, ends(base), 8) == wanted
    assert base.board is board
    graphs.decode(base, other, CONDITIONS, SEEDS, TOKENS + 1, sampling, ends(base), 8)
    assert base.board is not board


def test_soft_caps(base: Base) -> None:
    """The attention of a slot, against a softmax over capped scores written out."""
    board = graphs.Board(base, graphs.Shape(2, 3, 2, 5, 8, 11, Sampling()), torch.float32)
    query, keys, values = torch.randn(2, 2, 2, 8), torch.randn(2, 2, 16, 8), torch.randn(2, 2, 16, 8)
    mask = decode.penalty(torch.rand(2, 16) < 0.4, torch.float32)[:, None, None]
    capped = 5 * torch.tanh(torch.einsum("bhrd,bhld->bhrl", query, keys) * 0.3 / 5)
    wanted = torch.einsum("bhrl,bhld->bhrd", torch.softmax(capped + mask, -1), values)
    torch.testing.assert_close(board.mix(0, query, keys, values, mask, 0.3, 5.0), wanted)
    plain = torch.softmax(torch.einsum("bhrd,bhld->bhrl", query, keys) * 0.3 + mask, -1)
    torch.testing.assert_close(board.mix(0, query, keys, values, mask, 0.3, None), torch.einsum("bhrl,bhld->bhrd", plain, values))


def test_layers_of_several_sizes_are_refused(base: Base) -> None:
    prefix = prefix_of(base)
    assert prefix.layers is not None
    odd = replace(prefix, layers=[*prefix.layers[:2], tuple(kept[..., :4] for kept in prefix.layers[2])])  # type: ignore[list-item]
    with pytest.raises(decode.Unshared, match="several sizes"):
        graphs.decode(base, odd, [0], [0], TOKENS, Sampling(), ends(base), 1)


def test_slots_are_as_many_as_free_memory_holds(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot: 3 layers of keys and values, 2 heads of 8 numbers at each of P + 12 places, 4 bytes each; and 16 bytes for each of 300 tokens."""
    prefix = prefix_of(base)
    each = 3 * 2 * 2 * 8 * (prefix.mask.shape[1] + TOKENS) * 4 + 16 * 300
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1000)
    for free, share, wanted in (
        (2 * each * 9, 1.0, 8),
        (2 * each * 16 - 1, 1.0, 8),
        (2 * each * 16, 1.0, 16),
        (2 * each * 16, 0.5, 8),
        (9, 1.0, 1),
    ):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, 10**12))
        assert graphs.room(base, prefix, TOKENS, share) == wanted
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**11, 10**12))
    assert graphs.room(base, prefix, TOKENS) == graphs.SLOTS


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_recorded_step_writes_what_the_fed_one_does(dtype: str, base: Base) -> None:
    """The same kernels, so the same bits; and a text is the same whatever is written beside it."""
    device = torch.device("cuda")
    base = replace(base, device=device, model=base.model.to(device, getattr(torch, dtype)))
    prefix, sampling = prefix_of(base), Sampling(0.9, 20)
    rows = torch.tensor(CONDITIONS, device=device)
    recorded = lm.sample(base, prefix, rows, SEEDS, TOKENS, sampling, 1, 8)
    assert base.board.graph is not None
    assert lm.sample(base, prefix, rows.flip(0), SEEDS[::-1], TOKENS, sampling, 1, 8) == recorded[::-1]
    assert lm.sample(base, prefix, rows[17:18], [17], TOKENS, sampling, 1, 8) == recorded[17:18]
    base.board.graph = None
    assert lm.sample(base, prefix, rows, SEEDS, TOKENS, sampling, 1, 8) == recorded
    if dtype == "float32":
        assert decode.decode(base, prefix, CONDITIONS, SEEDS, TOKENS, sampling, ends(base)) == recorded

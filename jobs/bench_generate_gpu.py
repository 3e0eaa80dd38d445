"""Benchmark of the generation engine on a GPU: `python -m jobs.bench_generate_gpu [--tiny] [--profile]`. The figures of docs/benchmarks.md come from here.

A model of Qwen2.5-0.5B's shape with random weights and a vocabulary of 151,936 in bfloat16, nothing downloaded; prefixes of 56 tokens, texts of 64, 256 side by
side, temperature 0.9, top-k 100. Tokens a second of wall time, median of five after one for warming up, and the most memory that PyTorch held:
PEFT's `generate`, a hand-batched `generate(inputs_embeds)`, and ours: with shared prefixes, with a step of fixed shape, and with that step recorded as a CUDA
graph; then texts that end where they end, so that slots are filled anew. vLLM where it is installed. Also: that greedy tokens in float32 are the same on all
of our ways, and that a text is the same in any company.

It needs torch, transformers, safetensors, pydantic, pyyaml and pyarrow (peft, vllm: where there), and no Ray. --tiny: a small model, on a CPU too.
Results go to the terminal as Markdown, and as JSON to the folder $OUT if that is set.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from retrikt_ray.teacher import decode, graphs
from retrikt_ray.teacher.base import Base, model_path
from retrikt_ray.teacher.prefix import Prefix, run_prefix
from retrikt_ray.teacher.sampling import Sampling, draw

SAMPLING = Sampling(0.9, 100)
EVERY = 48  # texts end with each token whose id this divides: after 34 tokens on average, of 64 at most
QWEN = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


class Size(NamedTuple):
    shape: dict[str, int]
    vocabulary: int
    slots: int
    front: int  # tokens of a prefix
    tokens: int  # of a text
    rounds: int


def never(ids: list[int]) -> bool:
    return False


def here_and_there(ids: list[int]) -> bool:
    return ids[-1] % EVERY == 0


def random_base(size: Size, dtype: torch.dtype, device: torch.device) -> Base:
    """Random weights; the packaged tokenizer, which only says <bos>."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=size.vocabulary, tie_word_embeddings=True, initializer_range=0.05, **size.shape))
    model.to(dtype).eval().requires_grad_(False)
    model.generation_config = GenerationConfig()
    return Base(model, AutoTokenizer.from_pretrained(model_path("embedded")), device, frozenset([2]))


def prefix_of(base: Base, size: Size) -> tuple[Prefix, Tensor]:
    soft = base.embed.weight[torch.arange(size.front - 1, device=base.device) + 100][None]  # and <bos> behind it, as PEFT has it
    with torch.no_grad():
        return run_prefix(base, soft, [""]), soft


def synchronized(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measured(run: Callable[[], int], base: Base, rounds: int) -> dict[str, float]:
    """Tokens a second, median of `rounds` after one for warming up, and peak memory in MB."""
    cuda = base.device.type == "cuda"
    base.board = None
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    rates = []
    for turn in range(rounds + 1):
        torch.manual_seed(turn)
        began = synchronized(base.device)
        tokens = run()
        if turn:
            rates.append(tokens / (synchronized(base.device) - began))
    peak = torch.cuda.max_memory_allocated() / 1e6 if cuda else 0.0
    return {"tokens_per_s": statistics.median(rates), "lowest": min(rates), "highest": max(rates), "peak_mb": peak}


def counted(ids: Tensor) -> int:
    """Tokens of a batch up to the one that ends each text."""
    ends = (ids % EVERY == 0).cumsum(1)
    return int(((ends == 0) | ((ends == 1) & (ids % EVERY == 0))).sum())


def sides(base: Base, prefix: Prefix, soft: Tensor, size: Size) -> dict[str, Callable[[], int]]:
    """What is measured, by its name in the table: functions that write texts and return how many tokens they wrote."""
    sampled: dict[str, Any] = {"do_sample": True, "temperature": 0.9, "top_k": 100, "pad_token_id": 0, "max_new_tokens": size.tokens}
    ending = list(range(0, size.vocabulary, EVERY))
    full, twice = size.slots, 2 * size.slots

    def batched(eos: list[int] | None = None) -> int:
        embeds = prefix.embeds.expand(size.slots, -1, -1)
        mask = torch.ones_like(embeds[..., 0]).long()
        with torch.no_grad():
            ids = base.model.generate(inputs_embeds=embeds, attention_mask=mask, eos_token_id=eos, **sampled)
        return counted(ids) if eos else ids.numel()

    def peft() -> int:
        start = torch.full((size.slots, 1), base.tokenizer.bos_token_id, device=base.device)
        with torch.no_grad():
            ids = tuned.generate(input_ids=start, attention_mask=torch.ones_like(start), **sampled)
        return int(ids[:, 1:].numel())

    def shared(rows: int, ends: Callable[[list[int]], bool]) -> int:
        return sum(map(len, decode.decode(base, prefix, [0] * rows, range(rows), size.tokens, SAMPLING, ends, size.slots)))

    def fixed(rows: int, ends: Callable[[list[int]], bool], recorded: bool, slots: int = size.slots) -> int:
        with decode.attending(base.model):
            board = graphs.board_of(base, prefix, slots, size.tokens - 1, SAMPLING)
        if not recorded:
            board.graph = None
        elif board.graph is None and base.device.type == "cuda":
            raise SystemExit("the step could not be recorded")
        return sum(map(len, graphs.decode(base, prefix, [0] * rows, range(rows), size.tokens, SAMPLING, ends, slots)))

    found: dict[str, Callable[[], int]] = {
        f"ours, recorded, {full} texts": lambda: fixed(full, never, True),
        f"`generate(inputs_embeds)`, {full} texts": batched,
        f"ours, fixed shape, kernel by kernel, {full} texts": lambda: fixed(full, never, False),
        f"ours, shared prefixes, {full} texts": lambda: shared(full, never),
        f"ours, recorded, {twice} texts that end": lambda: fixed(twice, here_and_there, True),
        f"ours, recorded, {8 * full} texts that end": lambda: fixed(8 * full, here_and_there, True),
        f"ours, recorded, {8 * full} texts that end, {twice} slots": lambda: fixed(8 * full, here_and_there, True, twice),
        f"`generate(inputs_embeds)`, {full} texts that end": lambda: batched(ending),
    }
    if importlib.util.find_spec("peft") is not None:
        from peft import PromptTuningConfig, get_peft_model

        tuned: Any = get_peft_model(base.model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=size.front - 1))
        with torch.no_grad():
            tuned.prompt_encoder.default.embedding.weight.copy_(soft[0])
        tuned.to(base.device)
        found[f"`PeftModel.generate`, {full} texts"] = peft
    return found


def vllm_rate(base: Base, soft: Tensor, size: Size) -> dict[str, float] | None:
    """vLLM through our engine, on the same weights; None where it is not installed."""
    if importlib.util.find_spec("vllm") is None or base.device.type != "cuda":
        return None
    from retrikt_ray.store.engines import Order, VllmEngine

    with tempfile.TemporaryDirectory() as folder:
        base.model.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
        engine = VllmEngine(Order(folder, "bfloat16", False, soft.cpu(), [""], size.tokens, 2**30, SAMPLING, 0.4, {}))
        return measured(lambda: sum(made.tokens for made in engine.generate([0] * size.slots, list(range(size.slots)))), base, size.rounds)


def agreement(size: Size, device: torch.device) -> dict[str, bool]:
    """Greedy tokens in float32 by all of our ways, and sampled texts in bfloat16 alone and in company."""
    found = {}
    base = random_base(size, torch.float32, device)
    prefix, _ = prefix_of(base, size)
    rows, slots, greedy = size.slots // 2, size.slots // 4, Sampling(1.0, 1)
    prefix.last_logits = (
        prefix.last_logits.expand(rows, -1) + torch.randn(rows, size.vocabulary, device=device) * 5
    )  # each begins otherwise
    prefix.mask, prefix.embeds = prefix.mask.expand(rows, -1), prefix.embeds.expand(rows, -1, -1)
    prefix.layers = [(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1)) for keys, values in prefix.layers or []]
    asked = (list(range(rows)), [0] * rows, size.tokens, greedy, here_and_there)
    recorded = graphs.decode(base, prefix, *asked, slots)
    base.board.graph = None
    found["float32, greedy: recorded = kernel by kernel"] = graphs.decode(base, prefix, *asked, slots) == recorded
    shared = decode.decode(base, prefix, *asked, slots)
    same = sum(a == b for a, b in zip(shared, recorded, strict=True))
    found[f"float32, greedy: recorded = shared prefixes ({same} of {rows} texts)"] = same == rows
    with torch.no_grad():
        first = torch.tensor([text[:1] for text in recorded], device=device)
        embeds = torch.cat([prefix.embeds, base.embed(first)], 1)
        ids = base.model.generate(
            inputs_embeds=embeds, attention_mask=torch.ones_like(embeds[..., 0]).long(), max_new_tokens=size.tokens - 1, pad_token_id=0
        )
    same = sum(text[1:] == row[: len(text) - 1] for text, row in zip(recorded, ids.tolist(), strict=True))
    found[f"float32, greedy: recorded = `generate` ({same} of {rows} texts)"] = same == rows
    base = random_base(size, torch.bfloat16, device)
    prefix, _ = prefix_of(base, size)
    texts = graphs.decode(base, prefix, [0] * rows, range(rows), size.tokens, SAMPLING, here_and_there, slots)
    turned = graphs.decode(base, prefix, [0] * rows, range(rows)[::-1], size.tokens, SAMPLING, here_and_there, slots)
    found["bfloat16, sampled: the same in any order"] = turned[::-1] == texts
    alone = [graphs.decode(base, prefix, [0], [row], size.tokens, SAMPLING, here_and_there, slots)[0] for row in range(8)]
    found["bfloat16, sampled: the same alone"] = alone == texts[:8]
    return found


def profile(base: Base, prefix: Prefix, size: Size) -> dict[str, Any]:
    """Milliseconds of one step and of its drawing, and the kernels that take longest."""
    with torch.no_grad(), decode.attending(base.model):
        board = graphs.board_of(base, prefix, size.slots, size.tokens - 1, SAMPLING)
        logits, u = torch.randn(size.slots, size.vocabulary, device=base.device, dtype=torch.bfloat16), board.u[:, 0]

        def took(run: Callable[[], Any]) -> float:
            run()
            began = synchronized(base.device)
            for _ in range(20):
                run()
            return round((synchronized(base.device) - began) * 1e3 / 20, 3)

        found: dict[str, Any] = {"step_ms": took(board.step), "draw_ms": took(lambda: draw(logits, u, SAMPLING))}
        if base.device.type == "cuda":
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
                board.step()()
            kernels = sorted(seen.key_averages(), key=lambda k: -k.self_device_time_total)
            found["kernels"] = sum(k.count for k in kernels)
            found["longest"] = [{"kernel": k.key[:90], "count": k.count, "us": round(k.self_device_time_total)} for k in kernels[:16]]
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true", help="a small model; also on a CPU")
    parser.add_argument("--profile", action="store_true", help="the longest kernels of a step, too")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.tiny:
        raise SystemExit("no GPU is seen here; --tiny runs on a CPU")
    size = Size(TINY, 2048, 16, 9, 12, options.rounds) if options.tiny else Size(QWEN, 151_936, 256, 56, 64, options.rounds)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    result: dict[str, Any] = {"device": name, "torch": torch.__version__, "size": size._asdict(), "sides": {}}

    def keep() -> None:
        if "OUT" in os.environ:
            (Path(os.environ["OUT"]) / "bench_generate_gpu.json").write_text(json.dumps(result, indent=1))

    result["agreement"] = agreement(size, device)
    for what, holds in result["agreement"].items():
        print(f"{'yes' if holds else 'NO '}  {what}", flush=True)
    keep()
    base = random_base(size, torch.bfloat16, device)
    prefix, soft = prefix_of(base, size)
    if options.profile:
        result["profile"] = profile(base, prefix, size)
        print(json.dumps(result["profile"], indent=1), flush=True)
    print(f"\n{name}, PyTorch {torch.__version__}, {sum(w.numel() for w in base.model.parameters()) / 1e6:,.0f}M parameters, bfloat16\n")
    print("| | tokens/s | lowest - highest | peak memory, MB |\n|---|---|---|---|", flush=True)
    everything = sides(base, prefix, soft, size)
    for side, run in everything.items():
        found = result["sides"][side] = measured(run, base, size.rounds)
        print(
            f"| {side} | {found['tokens_per_s']:,.0f} | {found['lowest']:,.0f} - {found['highest']:,.0f} | {found['peak_mb']:,.0f} |",
            flush=True,
        )
        keep()
    base.board = None
    by_vllm = vllm_rate(base, soft, size)
    if by_vllm is None:
        print("\nvLLM is not installed here.")
    else:
        result["sides"]["vllm"] = by_vllm
        print(f"| vLLM, {size.slots} texts | {by_vllm['tokens_per_s']:,.0f} | {by_vllm['lowest']:,.0f} - {by_vllm['highest']:,.0f} | |")
    keep()


if __name__ == "__main__":
    main()

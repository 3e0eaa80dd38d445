"""Benchmark of the generation engine: `python -m jobs.bench_generate speed|prefixes|workers`. The figures of docs/benchmarks.md come from here.

speed: tokens a CPU second of one thread, packaged LM, 56 soft tokens, 64 new tokens, beside PEFT and a hand-batched `generate`.
workers RUN: tokens a second of wall time that two workers write beside one, their start included; RUN needs its prompts (`retrikt reinforce RUN`).
prefixes: seconds and memory of the prefixes of 77 and 150 classes with a vocabulary of 152,000 (random weights).
"""

from __future__ import annotations

import argparse
import copy
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

BATCH, SOFT, TOKENS, ROUNDS, TURNS = 32, 56, 64, 5, 3


def speed() -> None:
    from peft import PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from retrikt_ray.teacher.base import Base, model_path, pack
    from retrikt_ray.teacher.decode import decode
    from retrikt_ray.teacher.prefix import run_prefix
    from retrikt_ray.teacher.sampling import Sampling

    torch.set_num_threads(1)
    base = Base.load("embedded", "float32")
    torch.manual_seed(0)
    soft = base.embed.weight[torch.randint(0, len(base.tokenizer), (1, SOFT))].detach()
    plain = AutoModelForCausalLM.from_pretrained(model_path("embedded"), dtype=torch.float32).eval()
    tuned: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_path("embedded"), dtype=torch.float32).eval(),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=SOFT),
    )
    with torch.no_grad():
        tuned.prompt_encoder.default.embedding.weight.copy_(soft[0])
        prefix = run_prefix(base, soft, [""])  # <bos> behind the soft tokens, as PEFT has it
        embeds = prefix.embeds.expand(BATCH, -1, -1).contiguous()
    exact = Base(copy.deepcopy(base.model), base.tokenizer, base.device, base.stops)
    pack(exact.model)
    pack(base.model, exact=False)
    start = torch.full((BATCH, 1), base.tokenizer.bos_token_id)
    sampling = {"do_sample": True, "temperature": 0.9, "top_k": 100, "pad_token_id": 0}

    def count(ids: Tensor) -> int:
        """Tokens up to the first <eos>, over a batch."""
        ended = (ids == base.eos).cumsum(1)
        return int(((ended == 0) | ((ended == 1) & (ids == base.eos))).sum())

    def peft(batches: int, whole: bool) -> int:
        least = {"min_new_tokens": TOKENS} if whole else {}
        mask = torch.ones_like(start)
        with torch.no_grad():
            out = [tuned.generate(input_ids=start, attention_mask=mask, max_new_tokens=TOKENS, **least, **sampling) for _ in range(batches)]
        return sum(count(ids[:, 1:]) for ids in out)

    def batched(batches: int, whole: bool) -> int:
        least = {"min_new_tokens": TOKENS} if whole else {}
        with torch.no_grad():
            out = [
                plain.generate(
                    inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]), max_new_tokens=TOKENS, **least, **sampling
                )
                for _ in range(batches)
            ]
        return sum(map(count, out))

    def ours(base: Base, batches: int, whole: bool) -> int:
        rows = BATCH * batches

        def ends(ids: list[int]) -> bool:
            return not whole and base.ends(ids, 1000)

        found = decode(base, prefix, [0] * rows, range(rows), TOKENS, Sampling(0.9, 100), ends, slots=BATCH)
        return sum(map(len, found))

    sides: dict[str, Callable[[int, bool], int]] = {"PeftModel.generate": peft, "generate(inputs_embeds)": batched}
    sides |= {"ours, products in float32": partial(ours, exact), "ours": partial(ours, base)}  # the same where the CPU has no AMX
    for batches, whole, what in ((1, True, "32 texts of 64 tokens"), (4, False, "128 texts that end where they end")):
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(ROUNDS + 1):
            for name, run in sides.items():
                torch.manual_seed(turn)
                began = time.process_time()
                tokens = run(batches, whole)
                if turn:  # the first is for warming up
                    rates[name].append(tokens / (time.process_time() - began))
        medians = {name: statistics.median(values) for name, values in rates.items()}
        print(what)
        for name, rate in medians.items():
            print(f"  {name:26} {rate:7,.0f} tokens/s   ours / this {medians['ours'] / rate:.2f}")


def prefixes() -> None:
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    from retrikt_ray.teacher.base import Base, model_path
    from retrikt_ray.teacher.prefix import run_prefix

    torch.set_num_threads(1)
    vocabulary = 151_936
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=vocabulary, head_dim=64, **shape)).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(model_path("embedded"))
    base = Base(model, tokenizer, torch.device("cpu"), frozenset([2]))
    for classes in (1, 77, 150):
        soft = torch.randn(classes, 16, base.dim)
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        with torch.no_grad():
            prefix = run_prefix(base, soft, ["a label of some words: "] * classes)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        tokens = prefix.mask.shape[1]
        whole = classes * tokens * vocabulary * 4 / 2**20
        print(
            f"{classes} classes x {tokens} tokens: {time.perf_counter() - began:.2f} s, peak memory +{grown:,.0f} MB (all logits would be {whole:,.0f} MB)"
        )


def workers(run: str) -> None:
    """One worker and two, in turn; the bytes of their shards are compared as well."""
    from retrikt_ray import pipeline
    from retrikt_ray.runtime import cluster
    from retrikt_ray.runtime.folders import Folder
    from retrikt_ray.store.generate import generate

    opened = pipeline.load_run(run)
    inputs = {name: opened.artifact(name) for name in ("task", "teacher", "policy")}
    cluster.connect()
    rates: dict[int, list[float]] = {1: [], 2: []}
    shards: set[tuple[bytes, ...]] = set()
    with tempfile.TemporaryDirectory() as scratch:
        out = {name: Folder.at(f"{scratch}/{name}") for name in ("generated", "scratch")}
        for _ in range(TURNS):
            for count in rates:
                for folder in out.values():
                    folder.remove()
                config = opened.config.generate.model_copy(update={"workers": count, "max_tokens": 0, "max_seconds": 0, "max_cost": 0})
                rates[count].append(generate(config, inputs, out, seed=opened.config.seed)["tokens_per_s"])
                shards.add(tuple(out["scratch"].read_bytes(name) for name in out["scratch"].files()))
                print(f"{count} workers: {rates[count][-1]:,.0f} tokens/s", flush=True)
    one, two = (statistics.median(found) for found in rates.values())
    same = "the same bytes every time" if len(shards) == 1 else f"{len(shards)} DIFFERENT sets of bytes"
    print(f"medians of {TURNS}: {one:,.0f} and {two:,.0f} tokens/s, two workers / one {two / one:.2f}; {same}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["speed", "prefixes", "workers"])
    parser.add_argument("run", nargs="?", default="runs/quickstart")
    options = parser.parse_args()
    if options.what == "workers":
        workers(options.run)
    else:
        {"speed": speed, "prefixes": prefixes}[options.what]()

"""Peak memory and time of reinforcement beside plain generation: `python -m jobs.bench_reinforce [--tiny]`. The figures of docs/benchmarks.md come from here.

A base with random weights and a vocabulary of 151,936, nothing downloaded: about 0.1B parameters in float32 on a CPU, Qwen2.5-0.5B's shape in bfloat16 on a
GPU; two conditions with prefixes of 24 tokens, texts of 64. One side writes the texts and no more; the others do a whole iteration on as many: write,
score, advantages, two passes of clipped updates in minibatches. Each side has a process of its own; memory is what PyTorch held at most on a GPU, and what
the process held at most, less what it held before the base was there, on a CPU. "Four copies" is what policy, reference, critic and reward model would weigh.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

sys.path.append(str(Path(__file__).resolve().parent.parent))

from retrikt_ray.policy import loop
from retrikt_ray.policy.loop import Agent
from retrikt_ray.policy.reward_model import Rewards
from retrikt_ray.runtime.training import Solo
from retrikt_ray.teacher import lm
from retrikt_ray.teacher.base import Base, model_path
from retrikt_ray.teacher.prefix import run_prefix
from retrikt_ray.teacher.sampling import Sampling

VOCABULARY, TOKENS = 151_936, 64
SHAPES = {
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2},
    "0.1B": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
}
SIDES = ("generation", "rloo", "ppo")


def random_base(shape: str, device: torch.device) -> Base:
    """Random weights; the packaged tokenizer."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=VOCABULARY, tie_word_embeddings=True, **SHAPES[shape]))
    torch.set_default_dtype(torch.float32)
    model.eval().requires_grad_(False)
    model.generation_config = GenerationConfig()
    return Base(model, AutoTokenizer.from_pretrained(model_path("embedded")), device, frozenset([2]))


class ByLength:
    """Rewards that need no other model: tokens of a text."""

    def read(self, texts: list[str], conditions: Tensor, ids: Tensor, mask: Tensor) -> list[Any]:
        return mask.sum(1).tolist()

    def judge(self, read: list[Any], *, held_out: bool = False) -> Rewards:
        total = torch.tensor(read).double().numpy() + torch.arange(len(read)).double().numpy()
        return Rewards(total, {})


def held(device: torch.device) -> float:
    """MB at most so far."""
    return torch.cuda.max_memory_allocated() / 1e6 if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def side(what: str, shape: str, texts: int) -> dict[str, float]:
    """One side, here."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    before = held(device)
    base = random_base(shape, device)
    prompt = torch.randn(2, 16, base.dim, generator=torch.Generator().manual_seed(0)).to(device) * 0.02
    asked = loop.schedule(0, texts, 2, 0)
    agent = Agent(base, prompt, ["one: ", "two: "], TOKENS, 1, 0, Sampling(0.9, 100), "rloo" if what == "generation" else what)
    session = Solo(agent.optimizer(0.01, 0.003), 3, 0)
    took = []
    for step in range(2):
        began = time.perf_counter()
        if what == "generation":
            with torch.no_grad():
                prefix = run_prefix(base, prompt, agent.prefixes)
            lm.sample(base, prefix, torch.tensor(asked, device=device), list(range(texts)), TOKENS, agent.sampling, 1)
        else:
            generated = loop.generate(agent, torch.tensor(asked, device=device), list(range(texts)))
            model = ByLength()
            judged = model.judge(model.read(generated.texts, generated.conditions, generated.ids, generated.mask))
            rollout = loop.as_rollout(generated, judged, session)
            advantages, returns = loop.advantages_of(rollout, session, texts, what, 0.1, 1.0, 0.95)
            batches = loop.minibatches(texts, texts // 2, 2, 0, step)
            loop.update(agent, session, rollout, advantages, returns, batches, clip=0.2, stop_kl=1e9)
        if device.type == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - began)
    weights = base.model.get_memory_footprint() / 1e6
    return {"peak_mb": held(device) - before, "seconds": took[-1], "four_copies_mb": 4 * weights}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true", help="a small model")
    parser.add_argument("--side", choices=SIDES, help="one side only, as JSON")
    parser.add_argument("--texts", type=int, default=0, help="of an iteration; 0: 64 on a CPU, 256 on a GPU")
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    shape = "tiny" if options.tiny else "0.5B" if gpu else "0.1B"
    texts = options.texts or (256 if gpu else 64)
    if options.side:
        print(json.dumps(side(options.side, shape, texts)))
        return
    print(f"{torch.cuda.get_device_name() if gpu else 'CPU'}, {shape}, {texts} texts of {TOKENS} tokens\n")
    print("| | peak memory, MB | beside generation | s | four copies, MB |\n|---|---|---|---|---|", flush=True)
    plain = 0.0
    for name in SIDES:
        command = [
            sys.executable,
            "-m",
            "jobs.bench_reinforce",
            "--side",
            name,
            "--texts",
            str(texts),
            *(["--tiny"] if options.tiny else []),
        ]
        # Freed memory goes back at once, so that the most that was held is the most that was in use.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        found = json.loads(done.stdout.splitlines()[-1])
        plain = plain or found["peak_mb"]
        copies = f"{found['four_copies_mb']:,.0f}"
        print(f"| {name} | {found['peak_mb']:,.0f} | {found['peak_mb'] / plain:.2f} | {found['seconds']:.1f} | {copies} |", flush=True)


if __name__ == "__main__":
    main()

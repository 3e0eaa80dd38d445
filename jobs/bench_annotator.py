"""Peak memory, checkpoint and time of tuning an annotator whole and by low-rank adapters: `python -m jobs.bench_annotator [--tiny]`.

A base with random weights, about 0.1B parameters of which 78M are token vectors (`bench_reinforce`), and texts of 64 tokens, 16 a step; two classes. Each side
has a process of its own, on one thread: the annotator is made as `teach` makes it, from a folder of float32 weights, and takes five steps of its training. Memory
is what PyTorch held at most on a GPU; on a CPU what the process held at most, less what it held before the weights were there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModel, AutoTokenizer

sys.path.append(str(Path(__file__).resolve().parent.parent))

from jobs.bench_reinforce import held, random_base
from retrikt_ray.runtime import training
from retrikt_ray.runtime.training import Solo, optimizer_state
from retrikt_ray.teacher.annotator import Annotator
from retrikt_ray.teacher.teach import annotator_optimizer

TOKENS, TEXTS, STEPS = 64, 16, 5
SIDES = (("whole", "float32"), ("adapters", "float32"), ("adapters", "bfloat16"))  # what is tuned, and the base's dtype


def side(folder: str, way: str, dtype: str) -> dict[str, float]:
    """One side, here."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    before = held(device)
    if way == "adapters":
        model = Annotator.start("base", folder, dtype, 2, 0, TOKENS)
    else:
        backbone, tokenizer = AutoModel.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
        model = Annotator(backbone, tokenizer, 2, 0, TOKENS, True).to(device)
    solo = Solo(annotator_optimizer(model, 0), STEPS, 0)
    texts = [(" ".join(f"word{i} {step}" for step in range(TOKENS)), None) for i in range(TEXTS)]
    target = torch.arange(TEXTS, device=device) % 2
    took: list[float] = []

    def loss_of(_: int, rows: list[int]) -> tuple[torch.Tensor, str]:
        took.append(time.perf_counter())
        model.train()
        return cross_entropy(model(*model.encode([texts[row] for row in rows]))[0], target[rows]), ""

    training.run(solo, training.Steps([list(range(TEXTS))] * STEPS), loss_of)
    saved = [*model.trained().values(), *optimizer_state(solo.optimizer).values()]
    return {
        "peak_mb": held(device) - before,
        "parameters": model.parameter_count,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "checkpoint_mb": sum(t.numel() * t.element_size() for t in saved) / 1e6,
        "seconds": min(b - a for a, b in itertools.pairwise(took)),
    }


def make(folder: str, shape: str) -> None:
    base = random_base(shape, torch.device("cpu"))
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)


def apart(*arguments: str) -> str:
    """What this program says, run in a process of its own. One that had held a model would hand the most that it held on to its children."""
    # Freed memory goes back at once, so that the most that was held is the most that was in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    command = [sys.executable, "-m", "jobs.bench_annotator", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true", help="a small model")
    parser.add_argument("--make", nargs=2, metavar=("FOLDER", "SHAPE"), help="write the base")
    parser.add_argument("--side", nargs=3, metavar=("FOLDER", "WAY", "DTYPE"), help="one side only, as JSON")
    options = parser.parse_args()
    if options.make:
        make(*options.make)
        return
    if options.side:
        print(json.dumps(side(*options.side)))
        return
    with tempfile.TemporaryDirectory() as folder:
        apart("--make", folder, "tiny" if options.tiny else "0.1B")
        print(
            "| | trained parameters | peak memory, MB | bytes a parameter of the base | checkpoint, MB | s a step |\n|---|---|---|---|---|---|"
        )
        for way, dtype in SIDES:
            f = json.loads(apart("--side", folder, way, dtype).splitlines()[-1])
            memory = f"{f['peak_mb']:,.0f} | {1e6 * f['peak_mb'] / f['parameters']:.1f}"
            print(f"| {way}, {dtype} | {f['trained']:,} | {memory} | {f['checkpoint_mb']:,.0f} | {f['seconds']:.2f} |", flush=True)


if __name__ == "__main__":
    main()

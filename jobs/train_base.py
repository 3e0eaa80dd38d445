"""Train a small causal LM from text files, such as the embedded one (retrikt_ray/quickstart/model/README.md).

    python jobs/train_base.py --out my-lm texts/*.txt            # one document a line
    python jobs/train_base.py --out tiny --tokens 200000 --hidden 64 --layers 2 texts/*.txt
    python jobs/train_base.py --out my-lm --minutes 6 --batch 256 --window 256 --passages texts/*.txt   # one GPU, in this process

Steps: 1. a byte-level BPE tokenizer on a sample; 2. documents as <bos> text <eos>, packed into windows, with --passages a second time as texts of one
to three sentences, which is what a base is asked to write; 3. a Llama from scratch, on Ray Train (data parallel, resumes after a crash with the same
--out) or, with --minutes, in this process for so long; 4. loss on held-out documents. Writes a Hugging Face folder and training.json.
"""

import json
import math
import random
import re
import sys
import time
from pathlib import Path
from typing import Any

import click

sys.path.append(str(Path(__file__).resolve().parent.parent))

from retrikt_ray.runtime import cluster, training
from retrikt_ray.runtime.folders import Folder, digest
from retrikt_ray.runtime.progress import console
from retrikt_ray.runtime.settings import Scaled

HELD_OUT = 0.01  # share of the documents, but at least 20 of them


def train_tokenizer(documents: list[str], vocabulary: int, out: Path) -> Any:
    """Byte-level BPE with <pad> <bos> <eos> = 0 1 2, saved in Hugging Face layout."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    wrapped.save_pretrained(out)
    return wrapped


def take_tokenizer(folder: str, out: Path) -> Any:
    """A tokenizer that there is already, saved beside the new model. Its <pad> <bos> <eos> have to be 0 1 2."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    special = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    if special != [0, 1, 2]:
        raise click.UsageError(f"--tokenizer {folder}: the ids of its pad, bos and eos tokens are {special}; expected [0, 1, 2]")
    tokenizer.save_pretrained(out)
    return tokenizer


def pack(tokenizer: Any, documents: list[str], window: int) -> Any:
    """Token ids of all documents, one after another, cut into windows: (N, window) int32; the rest is dropped."""
    import numpy as np

    stream: list[Any] = []
    for start in range(0, len(documents), 10_000):
        rows = tokenizer(documents[start : start + 10_000], add_special_tokens=False, verbose=False)["input_ids"]
        stream += [np.array([tokenizer.bos_token_id, *row, tokenizer.eos_token_id], dtype=np.int32) for row in rows]
    ids = np.concatenate(stream)
    return ids[: len(ids) // window * window].reshape(-1, window)


def passages(documents: list[str], seed: int) -> list[str]:
    """The documents again, each cut into texts of one to three sentences."""
    choose, found = random.Random(f"{seed}:passages"), []
    for document in documents:
        sentences = re.split(r"""(?:(?<=[.!?])|(?<=[.!?]["'”’)]))\s+""", document)
        while sentences:
            count = choose.randint(1, 3)
            found.append(" ".join(sentences[:count]))
            del sentences[:count]
    choose.shuffle(found)
    return found


class Training:
    """A Llama from scratch on the windows of a folder, on this process's device."""

    def __init__(self, config: dict[str, Any]) -> None:
        import numpy as np
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from retrikt_ray.teacher.base import pick_device

        self.config, self.folder, self.device = config, Path(config["out"]), pick_device()
        self.windows, self.held_out = np.load(self.folder / "windows.npy", mmap_mode="r"), np.load(self.folder / "held_out.npy")
        training.seed_everything(config["seed"], "base")
        self.model = LlamaForCausalLM(LlamaConfig(**config["model"])).to(self.device)
        # Compiling takes a minute, which a CPU's training does not win back.
        self.forward = torch.compile(self.model) if self.device.type == "cuda" else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config["rate"], betas=(0.9, 0.95), weight_decay=0.1)

    def loss_of(self, windows: Any) -> Any:
        """Mean loss of a token of windows (B, T)."""
        import numpy as np
        import torch

        ids = torch.from_numpy(np.asarray(windows).astype(np.int64)).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16):
            return self.forward(input_ids=ids, labels=ids).loss

    def batches(self, steps: int) -> training.Steps:
        """Rows of each step; an epoch's last, short batch is left out, as long as there are others."""
        size = min(self.config["batch"], len(self.windows))
        epochs = math.ceil(steps / (len(self.windows) // size))
        every = training.epoch_batches(len(self.windows), size, epochs, self.config["seed"])
        return training.Steps([rows for rows in every if len(rows) == size][:steps])

    def step_loss(self, step: int, rows: list[int]) -> tuple[Any, str]:
        loss = self.loss_of(self.windows[sorted(rows)])
        return loss, f"loss {loss.item():.3f}"

    def finish(self, batches: list[list[int]]) -> None:
        """Write the model in bfloat16, and what its training gave."""
        import torch

        self.forward = self.model  # not worth compiling for other shapes
        with torch.no_grad():
            parts = [
                self.loss_of(self.held_out[i : i + 50]).item() * len(self.held_out[i : i + 50]) for i in range(0, len(self.held_out), 50)
            ]
        self.model.to(torch.bfloat16).save_pretrained(self.folder)
        seen = sum(map(len, batches)) * self.windows.shape[1]
        result = {"held_out_loss": sum(parts) / len(self.held_out), "tokens": int(self.windows.size), "tokens_seen": seen}
        (self.folder / "training.json").write_text(json.dumps(result | self.config["model"], indent=2) + "\n")


def loop(config: dict[str, Any]) -> None:
    """The training loop of a Ray Train worker."""
    job = Training(config)
    batches = job.batches(config["steps"])
    tensors = {k: v for k, v in job.model.state_dict(keep_vars=True).items() if k != "lm_head.weight"}
    session = training.Session(config, job.optimizer, tensors, len(batches))
    training.run(session, batches, job.step_loss)
    if session.rank == 0:
        job.finish(batches)


class Talking(training.Solo):
    """Tells how far it is."""

    said = 0.0

    def done(self, step: int, note: str = "") -> None:
        if step == self.total or time.monotonic() - self.said > 10:
            self.said = time.monotonic()
            console.print(f"step {step} of {self.total}: {note}")


def steps_in(job: Training, seconds: float) -> int:
    """How many steps fit: by a few of them, of which nothing is kept."""
    rows = list(range(min(job.config["batch"], len(job.windows))))
    for turn in range(2):  # the first compiles and warms up
        began = time.monotonic()
        for _ in range(5):
            job.step_loss(0, rows)[0].backward()
            job.optimizer.zero_grad()
        took = (time.monotonic() - began) / 5
        console.print(f"turn {turn}: {took:.3f} s a step")
    return max(1, int(seconds / took))


def here(config: dict[str, Any], seconds: float) -> None:
    """The same training in this process, as many steps as fit into the time."""
    job = Training(config)
    batches = job.batches(steps_in(job, seconds))
    training.run(Talking(job.optimizer, len(batches), config["seed"]), batches, job.step_loss)
    job.finish(batches)


@click.command()
@click.argument("texts", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the new model.")
@click.option("--tokens", default=20_000_000, show_default=True, help="Tokens to train on, repeats counted.")
@click.option("--minutes", default=0.0, help="Train in this process, without Ray, for so long; --tokens and --workers do not count then.")
@click.option("--passages", "cut", is_flag=True, help="Train on every document a second time, as texts of one to three sentences.")
@click.option("--tokenizer", "given", type=click.Path(exists=True), help="A tokenizer's folder to take over.  [default: a new one]")
@click.option("--vocabulary", default=8192, show_default=True)
@click.option("--hidden", default=256, show_default=True)
@click.option("--layers", default=6, show_default=True)
@click.option("--window", default=128, show_default=True, help="Tokens per training window.")
@click.option("--batch", default=48, show_default=True, help="Windows per step, over all workers.")
@click.option("--learning-rate", default=3e-3, show_default=True)
@click.option("--workers", default=0, show_default=True, help="0: one per GPU, or one on CPUs.")
@click.option("--seed", default=0, show_default=True)
def main(
    texts: tuple[str, ...],
    out: Path,
    tokens: int,
    minutes: float,
    cut: bool,
    given: str | None,
    vocabulary: int,
    hidden: int,
    layers: int,
    window: int,
    batch: int,
    learning_rate: float,
    workers: int,
    seed: int,
) -> None:
    """Train a small Llama on TEXTS, one document a line."""
    import numpy as np

    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    documents = [line for name in texts for line in Path(name).read_text(encoding="utf-8").splitlines() if line.strip()]
    random.Random(seed).shuffle(documents)
    held = max(min(20, len(documents) // 2), int(len(documents) * HELD_OUT))
    shown = documents[held:]
    tokenizer = take_tokenizer(given, out) if given else train_tokenizer(shown[:50_000], vocabulary, out)
    windows, held_out = (
        pack(tokenizer, shown + (passages(shown, seed) if cut else []), window),
        pack(tokenizer, documents[:held], window)[:1000],
    )
    if not len(windows) or not len(held_out):
        raise click.UsageError(
            f"{len(documents)} documents fill {len(windows)} windows of {window} tokens for training and {len(held_out)} held out; give more text"
        )
    np.save(out / "windows.npy", windows)
    np.save(out / "held_out.npy", held_out)
    model = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": hidden * 21 // 8,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, hidden // 64),
        "max_position_embeddings": 4 * window,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = {"out": str(out), "model": model, "rate": learning_rate, "batch": batch, "seed": seed}
    if minutes:
        here(config, 60 * minutes)
    else:
        config["steps"] = max(1, tokens // (batch * window))
        cluster.connect(out / "ray.log")
        planned = cluster.plan(Scaled(workers=workers), "train_base", cpus=2, grow=False)
        name = f"base-{digest([config, texts])[:12]}"
        training.launch(loop, config, planned, Folder.at(out) / ".scratch", name, "train base")
        Folder.at(out / ".scratch").remove()
    for name in ("windows.npy", "held_out.npy"):
        (out / name).unlink()
    result = json.loads((out / "training.json").read_text())
    console.print(f"{out}: held-out loss {result['held_out_loss']:.3f} nats a token after {result['tokens_seen']:,} tokens")


if __name__ == "__main__":
    main()

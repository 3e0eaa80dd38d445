"""Train a small causal LM from text files with Ray Train, such as the embedded one (retrikt_ray/quickstart/model/README.md).

    python jobs/train_base.py --out my-lm texts/*.txt            # one document a line
    python jobs/train_base.py --out tiny --tokens 200000 --hidden 64 --layers 2 texts/*.txt

Steps: 1. a byte-level BPE tokenizer on a sample; 2. documents as <bos> text <eos>, packed into windows; 3. a Llama from scratch (Ray Train, data
parallel, resumes after a crash with the same --out); 4. loss on held-out documents. Writes a Hugging Face folder and training.json.
"""

import json
import math
import random
import sys
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


def pack(tokenizer: Any, documents: list[str], window: int) -> Any:
    """Token ids of all documents, one after another, cut into windows: (N, window) int32; the rest is dropped."""
    import numpy as np

    stream: list[int] = []
    for start in range(0, len(documents), 1000):
        for row in tokenizer(documents[start : start + 1000], add_special_tokens=False)["input_ids"]:
            stream += [tokenizer.bos_token_id, *row, tokenizer.eos_token_id]
    count = len(stream) // window
    return np.array(stream[: count * window], dtype=np.int32).reshape(count, window)


def loop(config: dict[str, Any]) -> None:
    """The training loop of a Ray Train worker."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from retrikt_ray.teacher.base import pick_device

    folder, device = Path(config["out"]), pick_device()
    windows, held_out = np.load(folder / "windows.npy", mmap_mode="r"), np.load(folder / "held_out.npy")
    training.seed_everything(config["seed"], "base")
    model = LlamaForCausalLM(LlamaConfig(**config["model"])).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["rate"], betas=(0.9, 0.95), weight_decay=0.1)
    epochs = math.ceil(config["steps"] * config["batch"] / len(windows))
    batches = list(training.epoch_batches(len(windows), config["batch"], epochs, config["seed"]))[: config["steps"]]
    tensors = {k: v for k, v in model.state_dict(keep_vars=True).items() if k != "lm_head.weight"}
    session = training.Session(config, optimizer, tensors, len(batches))

    def loss_of(rows: Any) -> Any:
        ids = torch.from_numpy(np.asarray(rows).astype(np.int64)).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            return model(input_ids=ids, labels=ids).loss

    def step_loss(step: int, rows: list[int]) -> tuple[Any, str]:
        loss = loss_of(windows[sorted(rows)])
        return loss, f"loss {loss.item():.3f}"

    training.run(session, batches, step_loss)
    if session.rank == 0:
        with torch.no_grad():
            parts = [loss_of(held_out[i : i + 64]).item() * len(held_out[i : i + 64]) for i in range(0, len(held_out), 64)]
        model.to(torch.bfloat16).save_pretrained(folder)
        seen = sum(map(len, batches)) * windows.shape[1]
        result = {"held_out_loss": sum(parts) / len(held_out), "tokens": int(windows.size), "tokens_seen": seen, **config["model"]}
        (folder / "training.json").write_text(json.dumps(result, indent=2) + "\n")


@click.command()
@click.argument("texts", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the new model.")
@click.option("--tokens", default=20_000_000, show_default=True, help="Tokens to train on, repeats counted.")
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
    cut = max(min(20, len(documents) // 2), int(len(documents) * HELD_OUT))
    tokenizer = train_tokenizer(documents[cut : cut + 50_000], vocabulary, out)
    windows, held_out = pack(tokenizer, documents[cut:], window), pack(tokenizer, documents[:cut], window)[:1000]
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
    steps = max(1, tokens // (batch * window))
    config = {"out": str(out), "model": model, "rate": learning_rate, "steps": steps, "batch": batch, "seed": seed}
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

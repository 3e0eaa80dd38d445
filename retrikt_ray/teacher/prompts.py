"""Soft prompts: trainable vectors in front of a template, one prompt per condition, kept in PEFT's layout.

Each condition's prompt is a few tokens shared by all conditions (the domain) and a few of its own (the label). Saved, each is a
PEFT adapter folder: `PeftModel.from_pretrained(base, "teacher/prompts/000")` loads it.
"""

from __future__ import annotations

import json
import random

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from retrikt_ray.runtime.folders import Folder
from retrikt_ray.teacher.base import Base


class SoftPrompt(nn.Module):
    """shared: (S1, d); own: (C, S2, d). Calling it gives the prompts of all conditions, (C, S1 + S2, d)."""

    def __init__(self, shared: Tensor, own: Tensor) -> None:
        super().__init__()
        self.shared, self.own = nn.Parameter(shared.clone().float()), nn.Parameter(own.clone().float())

    def forward(self) -> Tensor:
        return torch.cat([self.shared[None].expand(len(self.own), -1, -1), self.own], 1)


def split(prompt: Tensor) -> SoftPrompt:
    """The prompts of all conditions, (C, S, d), by what they share: the tokens in front that are the same in all of them."""
    same = (prompt == prompt[:1]).all(-1).all(0)  # (S,)
    shared = int(same.long().cumprod(0).sum())
    return SoftPrompt(prompt[0, :shared], prompt[:, shared:])


def from_texts(base: Base, texts: list[list[str]], shared: int, own: int, seed: int) -> SoftPrompt:
    """Start the prompts at embeddings of tokens drawn from the texts: own tokens from a condition's texts, shared ones from all.

    texts: one list per condition. Lester et al. 2021 (arXiv 2104.08691, section 3.1) found starts from real tokens better than random ones.
    """
    rng = random.Random(f"{seed}:soft-prompt")
    ids = [[t for text in group for t in base.tokenizer(text, add_special_tokens=False)["input_ids"]] or [base.eos] for group in texts]
    pool = [t for group in ids for t in group]

    def embed(tokens: list[int]) -> Tensor:
        return base.embed(torch.tensor(tokens, dtype=torch.long, device=base.device)).detach().float()

    return SoftPrompt(embed(rng.choices(pool, k=shared)), torch.stack([embed(rng.choices(group, k=own)) for group in ids]))


def save_prompts(out: Folder, prompts: Tensor, base_name: str) -> None:
    """One PEFT adapter folder per condition. prompts: (C, S, d)."""
    for i, prompt in enumerate(prompts):
        config = {
            "peft_type": "PROMPT_TUNING",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_name,
            "num_virtual_tokens": prompt.shape[0],
            "token_dim": prompt.shape[1],
            "num_transformer_submodules": 1,
            "prompt_tuning_init": "RANDOM",
            "inference_mode": True,
        }
        out.write_bytes(
            f"prompts/{i:03d}/adapter_model.safetensors",
            save_safetensors({"prompt_embeddings": prompt.detach().float().cpu().contiguous()}),
        )
        out.write_bytes(f"prompts/{i:03d}/adapter_config.json", (json.dumps(config, indent=2) + "\n").encode())


def load_prompts(folder: Folder) -> Tensor:
    """Prompts of all conditions, (C, S, d)."""
    names = [n for n in folder.files() if n.startswith("prompts/") and n.endswith("adapter_model.safetensors")]
    return torch.stack([load_safetensors(folder.read_bytes(n))["prompt_embeddings"] for n in names])

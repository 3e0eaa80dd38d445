"""The annotator: a classifier (or regressor) that labels generated texts and embeds them.

Three kinds behind one face:
  prompt    the frozen base LM, a soft prompt in front of the text, a linear head
  base      the base LM, fine-tuned, with a linear head
  <path>    any encoder or LM (`AutoModel`), fine-tuned, with a linear head: often the best annotator

An encoder is fine-tuned whole, in float32. An LM stays frozen in its own dtype and learns low-rank adapters (LoRA, Hu et al. 2021, arXiv
2106.09685) of all its linear layers: less memory at any size, and better labels at the only one that could be tried.

The head of an encoder reads the mean of its last states. The head of an LM reads three things at once (concat pooling, after Howard & Ruder
2018, section 3.3): the mean token embedding, and the mean and maximum of the states of its middle layer, where an LM knows most of the text
and least of the next token. docs/lab-notes.md has the figures. The layers above are left out where nothing else needs them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import dropout, layer_norm
from transformers import AutoConfig, AutoModel, AutoTokenizer

from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.settings import ConfigError
from retrikt_ray.task.texts import Text, joined
from retrikt_ray.teacher.base import Base, model_path, pick_device, pick_dtype

HEAD_DROPOUT = 0.2
LORA_RANK = 16
TEMPERATURES = [round(0.5 * 1.1**i, 3) for i in range(33)]  # 0.5 to 10.6


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real tokens. hidden (B, T, d), mask (B, T) -> (B, d)."""
    weights = mask.to(hidden.dtype)[..., None]
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


def max_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Maximum over the real tokens, 0 where there is none. hidden (B, T, d), mask (B, T) -> (B, d)."""
    best = hidden.masked_fill(mask[..., None] == 0, torch.finfo(hidden.dtype).min).amax(1)
    return torch.where(mask.any(1, keepdim=True), best, torch.zeros_like(best))


def backbone_path(kind: str, base: str) -> str:
    """Where the annotator's backbone is before training: the base, or what `kind` names."""
    return model_path(base if kind in ("prompt", "base") else kind)


@contextmanager
def backbone_of(teacher: Folder) -> Iterator[str]:
    """Where the backbone of a trained annotator and its tokenizer are. Raises ConfigError where they cannot be read."""
    card, whole = (teacher / "classifier").read_json("classifier.json"), teacher.local() / "classifier" / "backbone"
    path = str(whole) if whole.exists() else backbone_path(card["kind"], card["base"])
    try:
        yield path
    except OSError as error:
        raise ConfigError(f"the annotator of {teacher} stands on {path!r}, which cannot be read here: {error}") from error


def tokenizer_of(teacher: Folder) -> Any:
    """The tokenizer of a trained annotator. Raises ConfigError where it cannot be read."""
    with backbone_of(teacher) as path:
        return AutoTokenizer.from_pretrained(path)


def is_lm(config: Any) -> bool:
    """Whether a checkpoint was trained as a causal LM."""
    return any(name.endswith(("CausalLM", "LMHeadModel")) for name in config.architectures or [])


def cut(backbone: Any) -> int:
    """Leave out, in place, the layers of an LM that its head does not read; returns how many parameters they had.

    One layer above the middle stays: what a model returns as the states of its last layer is normed. A model whose layers are not one list stays whole.
    """
    stacks = [m for m in backbone.modules() if isinstance(m, nn.ModuleList) and len(m) == backbone.config.num_hidden_layers]
    if len(stacks) != 1:
        return 0
    above = stacks[0][middle(backbone) + 1 :]
    del stacks[0][middle(backbone) + 1 :]
    return sum(p.numel() for p in above.parameters())


def middle(backbone: Any) -> int:
    """After how many layers an LM's head reads it."""
    return (int(backbone.config.num_hidden_layers) + 1) // 2


def with_adapters(backbone: Any) -> Any:
    """The backbone, frozen, with float32 adapters of all its linear layers, which change nothing until they are trained."""
    return get_peft_model(backbone, LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules="all-linear"))


def save_adapters(backbone: Any, folder: Path) -> None:
    """In PEFT's layout: `PeftModel.from_pretrained(backbone, folder)` loads them."""
    config = backbone.peft_config["default"].to_dict() | {"inference_mode": True}
    folder.mkdir()
    tensors = get_peft_model_state_dict(backbone, save_embedding_layers=False)
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    config["target_modules"] = sorted(config["target_modules"])  # PEFT has a set there, and an artifact should have one order
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


class Annotator(nn.Module):
    """backbone -> pooling over the text's tokens -> linear head.

    `outputs` is the number of classes, or 1 for regression, whose targets are standardised by `shift` and `scale`.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self, backbone: Any, tokenizer: Any, outputs: int, soft_tokens: int, max_tokens: int, concat: bool, left_out: int = 0
    ) -> None:
        """left_out: parameters of the backbone that are not there, since the head does not read their layers."""
        super().__init__()
        self.backbone, self.tokenizer, self.max_tokens = backbone, tokenizer, max_tokens
        dim = backbone.get_input_embeddings().weight.shape[1]
        self.concat, self.left_out = concat, left_out
        self.temperature = 1.0  # of the softmax of `annotate`, fitted on validation after training
        width = backbone.config.hidden_size * (3 if self.concat else 1)
        self.soft = nn.Parameter(torch.randn(soft_tokens, dim) * 0.02) if soft_tokens else None
        self.head = nn.Linear(width, outputs)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))
        if soft_tokens:
            backbone.requires_grad_(False)

    @staticmethod
    def start(kind: str, base: str, dtype: str, outputs: int, soft_tokens: int, max_tokens: int) -> Annotator:
        """An annotator before training. kind: `prompt`, `base`, or a model folder or hub id."""
        device, path = pick_device(), backbone_path(kind, base)
        prompted, lm = kind == "prompt", is_lm(AutoConfig.from_pretrained(path))
        # Weights that an optimizer updates stay float32.
        backbone = AutoModel.from_pretrained(path, dtype=pick_dtype(dtype, device) if prompted or lm else torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path)
        left_out = cut(backbone) if lm else 0
        backbone = with_adapters(backbone) if lm and not prompted else backbone
        return Annotator(backbone, tokenizer, outputs, soft_tokens if prompted else 0, max_tokens, lm, left_out).to(device)

    @property
    def adapted(self) -> bool:
        """Whether training changes adapters of the backbone, and not the backbone."""
        return hasattr(self.backbone, "peft_config")

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def parameter_count(self) -> int:
        """Of the whole model, adapters merged."""
        return self.left_out + sum(p.numel() for name, p in self.named_parameters() if "lora_" not in name)

    def encode(self, texts: list[Text]) -> tuple[Tensor, Tensor]:
        """Token ids and mask, right-padded, (B, T) each. LMs see a pair as two lines, encoders in their own pair format."""
        tokenizer = self.tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "right"
        firsts, seconds = [t for t, _ in texts], [p for _, p in texts]
        paired = seconds[0] is not None
        if paired and tokenizer.sep_token is None:
            firsts, paired = [joined(t) for t in texts], False
        batch = tokenizer(
            firsts, seconds if paired else None, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        return batch["input_ids"].to(self.device), batch["attention_mask"].to(self.device)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, outputs) and the embedding that the head reads, (B, width); both float32."""
        wanted = {"output_hidden_states": True, "use_cache": False} if self.concat else {}
        if self.soft is None:
            out = self.backbone(input_ids=ids, attention_mask=mask, **wanted)
            skip = 0
        else:
            tokens = self.backbone.get_input_embeddings()(ids)
            skip = len(self.soft)
            full = torch.cat([torch.ones_like(mask[:, :1]).expand(-1, skip), mask], 1)
            embeds = torch.cat([self.soft.to(tokens.dtype)[None].expand(len(ids), -1, -1), tokens], 1)
            out = self.backbone(inputs_embeds=embeds, attention_mask=full, **wanted)
        if self.concat:
            first, states = (out.hidden_states[i][:, skip:].float() for i in (0, middle(self.backbone)))
            parts = (mean_pool(first, mask), mean_pool(states, mask), max_pool(states, mask))
            pooled = torch.cat([layer_norm(p, p.shape[-1:]) for p in parts], -1)
        else:
            pooled = mean_pool(out.last_hidden_state[:, skip:], mask).float()
        return self.head(dropout(pooled, HEAD_DROPOUT, self.training)), pooled

    @torch.inference_mode()
    def annotate(self, texts: list[Text], batch: int = 64) -> tuple[Tensor, Tensor]:
        """Class probabilities (N, C), or the predicted value (N, 1) in regression, and embeddings (N, width); on the CPU.

        Texts of like length share a batch, so that little is padding.
        """
        self.eval()
        order = sorted(range(len(texts)), key=lambda i: len(texts[i][0]) + len(texts[i][1] or ""))
        answers: list[Any] = [None] * len(texts)
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            logits, pooled = self(*self.encode([texts[i] for i in rows]))
            out = torch.softmax(logits / self.temperature, -1) if logits.shape[1] > 1 else logits * self.scale + self.shift
            for i, a, b in zip(rows, out.cpu(), pooled.cpu(), strict=True):
                answers[i] = (a, b)
        return torch.stack([a for a, _ in answers]), torch.stack([b for _, b in answers])

    def calibrate(self, texts: list[Text], truth: Tensor) -> float:
        """Fit the temperature to the true classes of held-out texts by log loss (Guo et al. 2017, section 4.2) and keep it.

        Fine-tuned on a few hundred rows, a classifier is nearly certain of everything; a student learns little from such labels.
        """
        self.temperature = 1.0
        log_p = torch.log(self.annotate(texts)[0].clamp(min=1e-12))
        losses = {t: torch.nn.functional.cross_entropy(log_p / t, truth).item() for t in TEMPERATURES}
        self.temperature = min(losses, key=losses.__getitem__)
        return self.temperature

    def trained(self) -> dict[str, Tensor]:
        """Everything that training changes: all but the weights that are frozen."""
        frozen = {k for k, v in self.named_parameters(remove_duplicate=False) if not v.requires_grad}
        return {k: v for k, v in self.state_dict().items() if k not in frozen}

    def save(self, out: Folder, kind: str, base: str, dtype: str) -> None:
        """`classifier/`: head.safetensors and classifier.json; `backbone/` in Hugging Face layout where it was tuned whole, `adapter/` in PEFT's."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            tensors = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items() if not k.startswith("backbone.")}
            save_file(tensors, folder / "head.safetensors")
            if self.adapted:
                save_adapters(self.backbone, folder / "adapter")
            elif self.soft is None:
                self.backbone.save_pretrained(folder / "backbone")
                self.tokenizer.save_pretrained(folder / "backbone")
            (out / "classifier").upload(folder)
        card = {
            "kind": kind,
            "base": base,
            "dtype": dtype,
            "outputs": self.head.out_features,
            "max_tokens": self.max_tokens,
            "concat": self.concat,
            "temperature": self.temperature,
        }
        (out / "classifier").write_json("classifier.json", card | {"soft_tokens": 0 if self.soft is None else len(self.soft)})

    @staticmethod
    def load(teacher: Folder, base: Base | None = None) -> Annotator:
        """The trained annotator of a `teacher/` artifact. base: its frozen base where it is there already; a `prompt` annotator then reads with it.

        Raises ConfigError where the language model that it stands on is not to be found.
        """
        card = (teacher / "classifier").read_json("classifier.json")
        folder, device = teacher.local() / "classifier", pick_device()
        with backbone_of(teacher) as path:
            tokenizer = AutoTokenizer.from_pretrained(path)
            shared = base is not None and card["kind"] == "prompt"
            backbone = (
                base.model.base_model if base and shared else AutoModel.from_pretrained(path, dtype=pick_dtype(card["dtype"], device))
            )
        left_out = 0 if shared or not card["concat"] else cut(backbone)
        if (folder / "adapter").exists():
            # Merged, they cost a text nothing, and the size of the teacher is the base's.
            backbone = PeftModel.from_pretrained(backbone, folder / "adapter").merge_and_unload()
        sizes = (card["outputs"], card["soft_tokens"], card["max_tokens"], card["concat"], left_out)
        made = Annotator(backbone, tokenizer, *sizes).to(device)
        made.load_state_dict(load_file(folder / "head.safetensors"), strict=False)
        made.temperature = card.get("temperature", 1.0)
        return made.eval().requires_grad_(False)

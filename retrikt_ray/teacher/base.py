"""The frozen base LM as a checkpoint: weights and their layout, tokenizer, how a text begins and ends."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils.hub import cached_file

from retrikt_ray.runtime.folders import PACKAGED
from retrikt_ray.runtime.settings import ConfigError

LEAST_ROWS = 8  # of a product in bfloat16
PACKED_ROWS = 64  # the batch that the layout of packed weights is chosen for; any other works, too


def model_path(name: str) -> str:
    """`embedded` is the small LM inside the package; anything else is a local folder or a hub id."""
    return str(PACKAGED / "model") if name == "embedded" else name


def pick_device() -> torch.device:
    """The GPU that Ray gave to this worker, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 on a GPU, float32 on a CPU (where bfloat16 is slower and less repeatable)."""
    return (torch.bfloat16 if device.type == "cuda" else torch.float32) if name == "auto" else getattr(torch, name)


Chat = bool | Literal["auto"]


def read_tokenizer(name: str, eos: int | list[int] | None, chat: Chat) -> tuple[Any, frozenset[int], bool]:
    """A base's tokenizer, the tokens that end a text, and whether it is talked to in chat. eos: what its generation config says.

    chat "auto": yes, if it has a chat template whose turns end with one of these tokens. Base models often come with the template of their
    instructed sisters, and do not know its end.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_path(name))
    stops = frozenset({tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None})
    if not stops:
        raise ConfigError(f"{name}: neither its tokenizer nor its generation_config.json names an end-of-text token (eos_token)")
    if chat is True and not tokenizer.chat_template:
        raise ConfigError(f"{name}: teach.chat is true, but its tokenizer has no chat template")
    if chat == "auto":
        chat = False
        if tokenizer.chat_template:
            turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            chat = not stops.isdisjoint(tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)[-3:])
    return tokenizer, stops, chat


def read_tensor(path: str, key: str) -> Tensor:
    """One tensor of a checkpoint in safetensors: a local folder or a hub id. Old files may leave out the first part of its name."""
    try:
        files = json.loads(Path(str(cached_file(path, "model.safetensors.index.json"))).read_text())["weight_map"]
    except OSError:  # it is in one file
        files = {}
    names = [key, key.partition(".")[2]]
    file = next((files[name] for name in names if name in files), "model.safetensors")
    with safe_open(str(cached_file(path, file)), "pt") as tensors:
        known = set(tensors.keys())
        found = next((name for name in names if name in known), None)
        if found is None:
            raise ConfigError(f"{path}/{file} has no tensor {key}; expected the token vectors there")
        tensor: Tensor = tensors.get_tensor(found)
    return tensor


@dataclass
class Base:
    """A frozen causal LM with its tokenizer."""

    model: Any
    tokenizer: Any
    device: torch.device
    stops: frozenset[int]  # every token that the checkpoint names as an end of a text
    chat: bool = False  # whether a template is said as a user's message, and a text is the answer
    shares: bool | None = None  # whether `decode` knows its attention; found out at the first text
    board: Any = None  # on a GPU, the recorded step that its last texts were written by (`graphs.Board`)

    @staticmethod
    def load(name: str, dtype: str = "auto", chat: Chat = False) -> Base:
        """Raises ConfigError for a base whose texts cannot end, or that has no chat template where one is asked for."""
        device = pick_device()
        path = model_path(name)
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=pick_dtype(dtype, device))
        model.to(device).eval()
        tokenizer, stops, chat = read_tokenizer(name, model.generation_config.eos_token_id, chat)
        # A checkpoint's own habits (repetition penalty, least length) would make texts of another distribution than `score` tells.
        model.generation_config = GenerationConfig()
        model.requires_grad_(False)
        return Base(model, tokenizer, device, stops, chat)

    @staticmethod
    def hollow(name: str, chat: Chat = False) -> Base:
        """A base of which only tokenizer and token vectors (float32, CPU) are there, for engines that load the weights themselves."""
        path = model_path(name)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
        table = model.get_input_embeddings()
        wanted = next(key for key, weight in model.named_parameters(remove_duplicate=False) if weight is table.weight)
        model.set_input_embeddings(nn.Embedding.from_pretrained(read_tensor(path, wanted).float()))
        try:
            eos = GenerationConfig.from_pretrained(path).eos_token_id
        except OSError:  # a checkpoint need not have that file
            eos = model.config.eos_token_id
        tokenizer, stops, chat = read_tokenizer(name, eos, chat)
        return Base(model, tokenizer, torch.device("cpu"), stops, chat)

    @property
    def embed(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    @property
    def dim(self) -> int:
        return int(self.embed.weight.shape[1])

    @property
    def eos(self) -> int:
        """The end that training texts get."""
        return min(self.stops) if self.tokenizer.eos_token_id is None else int(self.tokenizer.eos_token_id)

    @cached_property
    def pieces(self) -> list[str]:
        """Each token as it stands in a text; nothing, where it is a special one."""
        rows = [[i] for i in range(self.embed.weight.shape[0])]
        return list(self.tokenizer.batch_decode(rows, skip_special_tokens=True))

    @cached_property
    def breaks(self) -> frozenset[int]:
        """Tokens with a line end in them."""
        return frozenset(i for i, piece in enumerate(self.pieces) if "\n" in piece)

    def ends(self, ids: list[int], lines: int) -> bool:
        """Whether a text of these tokens is complete: ended by the model, or after so many lines; empty ones in front do not count."""
        if ids[-1] in self.stops:
            return True
        return ids[-1] in self.breaks and self.tokenizer.decode(ids, skip_special_tokens=True).lstrip().count("\n") >= lines

    def ended(self, ids: Tensor, mask: Tensor, lines: int) -> list[bool]:
        """`ends` for a batch. ids, mask: (B, T)"""
        return [self.ends(row[m.bool()].tolist(), lines) for row, m in zip(ids, mask, strict=True)]

    def __call__(self, **inputs: Any) -> tuple[Any, Tensor]:
        """The model's output, and the hidden states that its logits are made of, (B, T, d). `output_hidden_states` would keep every layer's."""
        seen: list[Tensor] = []
        hook = self.model.get_output_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        try:
            return self.model(**inputs), seen[0]
        finally:
            hook.remove()

    @cached_property
    def plain_head(self) -> bool:
        """Whether the logits are the output embeddings' product with the backbone's last states, and nothing more (no cap, no scale)."""
        with torch.no_grad():
            ids = torch.tensor([[self.eos, self.eos]], device=self.device)
            wanted = self.model(input_ids=ids).logits.float()
            states = self.model.base_model(input_ids=ids).last_hidden_state
            got = self.model.get_output_embeddings()(states).float()
        return got.shape == wanted.shape and torch.allclose(got, wanted, rtol=1e-2, atol=1e-2 * float(wanted.std()))

    def head(self, template: str) -> list[int]:
        """Tokens of the readable start of a text: <bos> and the template, or a chat in which the template is what the user says."""
        if self.chat and template:
            turns = [{"role": "user", "content": template.strip()}]
            ids = self.tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, tokenize=True, return_dict=False, enable_thinking=False
            )
            return list(ids)
        bos = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        return bos + list(self.tokenizer(head_of(template), add_special_tokens=False)["input_ids"])

    def encode(self, texts: list[str], max_tokens: int, end: bool = True, after: str = "") -> tuple[Tensor, Tensor]:
        """Token ids and mask, right-padded: two (B, T) tensors. With `end`, texts that fit are closed by <eos>.

        after: the readable start that the texts follow, "positive: ", whose last space is the texts' first (`head_of`). They get the tokens that
        they have behind it; those of the start itself are not among them.
        """
        after = "" if self.chat else after  # an answer begins anew
        rows = self.tokenizer([after + text for text in texts], add_special_tokens=False)["input_ids"]
        head = self.tokenizer(head_of(after), add_special_tokens=False)["input_ids"] if after else []
        if any(row[: len(head)] != head for row in rows):  # a token reaches over the boundary: then as a text of its own
            rows, head = self.tokenizer([after[len(head_of(after)) :] + text for text in texts], add_special_tokens=False)["input_ids"], []
        rows = [row[len(head) :] for row in rows]
        rows = [([*r, self.eos] if end else r)[:max_tokens] or [self.eos] for r in rows]
        return pad_rows(rows, self.eos, self.device)

    def decode(self, ids: Tensor, mask: Tensor) -> list[str]:
        return [self.tokenizer.decode(row[m.bool()].tolist(), skip_special_tokens=True) for row, m in zip(ids, mask, strict=True)]


def head_of(template: str) -> str:
    """A template without the space at its end. Tokenizers keep a space with the word behind it: left with the template it is a token that no
    text was ever written after, and what a language model then writes begins with rubbish."""
    return template.rstrip(" ")


def start_of(text: str) -> str:
    """The Unicode category of a text's first character that is no space: Lu (capital), Ll, Nd (digit), Pi (opening quotation mark), ...; "" for none."""
    return unicodedata.category(text.lstrip()[0]) if text.strip() else ""


def pad_rows(rows: list[list[int]], value: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(len(r) for r in rows)
    ids = torch.full((len(rows), width), value, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids.to(device), mask.to(device)


class PackedLinear(nn.Module):
    """`nn.Linear` without gradients, on a CPU, its weights laid out once in the blocks that oneDNN multiplies by. (..., in) -> (..., out)

    PyTorch lays them out anew at every call, which takes half the time of a product with a batch of a few dozen rows. products: how oneDNN may
    multiply float32, "ieee" or "bf16" (rounded to bfloat16, summed in float32, which AMX does twice as fast).
    """

    def __init__(self, linear: nn.Linear, products: str = "ieee") -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), PACKED_ROWS)
        self.bias, self.products = linear.bias, products

    def forward(self, x: Tensor) -> Tensor:
        if self.products == "ieee":
            return self.multiply(x)
        missing = max(0, LEAST_ROWS - len(x))  # for one to three rows oneDNN has other kernels, which sum otherwise
        padded = nn.functional.pad(x, [0, 0] * (x.ndim - 1) + [0, missing]) if missing else x
        settings: Any = torch.backends.mkldnn
        usual, settings.matmul.fp32_precision = settings.matmul.fp32_precision, self.products
        try:
            return self.multiply(padded)[: len(x)]
        finally:
            settings.matmul.fp32_precision = usual

    def multiply(self, x: Tensor) -> Tensor:
        packed: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return packed


def pack(model: nn.Module, exact: bool = True) -> None:
    """Replace the model's linear layers in place, where this CPU and build of PyTorch can; elsewhere do nothing. It can only be run then, not trained.

    exact: false lets a CPU with AMX multiply float32 as bfloat16. The bits of a row are the same in any batch either way.
    """
    weight = next(model.parameters())
    known = weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available() or not known:
        return
    products = "bf16" if not exact and torch.cpu.get_capabilities().get("amx_bf16") else "ieee"
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, PackedLinear(child, products))

"""The student: a model of about 1 % of the teacher that gives logits and a query vector in one pass.

What it is made of is the business of its kind (`kinds.py`). Saved in Hugging Face layout: after `import retrikt_ray.student.model`,
`AutoModel.from_pretrained("RUN/student")` loads it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel

from retrikt_ray.student.kinds import KINDS, StudentConfig
from retrikt_ray.task.texts import Text


class StudentModel(PreTrainedModel):
    """Calling it with what its kind reads gives logits (B, outputs) and the query vector (B, width)."""

    config_class = StudentConfig
    base_model_prefix = "student"
    backbone: Any  # of the kinds that have one
    token_map: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(self, config: StudentConfig) -> None:
        super().__init__(config)
        self.register_buffer("token_map", torch.zeros(config.full_vocabulary, dtype=torch.int32))
        self.register_buffer("shift", torch.zeros(()))  # regression targets are standardised
        self.register_buffer("scale", torch.ones(()))
        self.kind = KINDS[config.kind](config)
        modules, width = self.kind.parts()
        for name, module in modules.items():
            self.add_module(name, module)
        self.head = nn.Linear(width, config.outputs)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    @property
    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def forward(self, *inputs: Tensor, **named: Tensor) -> tuple[Tensor, Tensor]:
        """inputs: ids and mask, (B, T) with ids of the full tokenizer; for a static student of pairs pair_ids and pair_mask as well."""
        vector = self.kind.vector(self, *inputs, **named)
        return self.head(vector), vector


AutoConfig.register("retrikt-student", StudentConfig)
AutoModel.register(StudentConfig, StudentModel)


class Student:
    """A student with its tokenizer: texts in, probabilities and unit query vectors out."""

    def __init__(self, model: StudentModel, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "right"

    @staticmethod
    def load(folder: str) -> Student:
        return Student(StudentModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder))

    def save(self, folder: str) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def tensors(self, texts: list[Text]) -> dict[str, Tensor]:
        """What the model takes, on its device."""
        device = self.model.head.weight.device
        return {name: value.to(device) for name, value in self.model.kind.read(self.tokenizer, texts).items()}

    @torch.inference_mode()
    def encode(self, texts: list[Text], batch: int = 256, clock: Callable[[str], None] = lambda phase: None) -> tuple[Tensor, Tensor]:
        """Class probabilities (N, C), or values (N, 1) in regression, and unit query vectors (N, width), float32 on the CPU.

        clock: called with the name of each phase when it has ended.
        """
        if self.model.training:
            self.model.eval()
        answers, vectors = [], []
        for start in range(0, len(texts), batch):
            tensors = self.tensors(texts[start : start + batch])
            clock("tokenise")
            logits, vector = self.model(**tensors)
            answer = torch.softmax(logits, -1) if logits.shape[1] > 1 else logits * self.model.scale + self.model.shift
            answers.append(answer.float().cpu())
            vectors.append(normalize(vector.float(), dim=-1).cpu())
            clock("student")
        return torch.cat(answers), torch.cat(vectors)

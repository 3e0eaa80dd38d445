"""The student: a model of about 1 % of the teacher that gives logits and a query vector in one pass.

  static       token embeddings with learned weights, averaged; a linear head. Micro-seconds on a CPU.
  transformer  a small BERT over the same embeddings, or a pre-trained encoder by path or hub id; mean over tokens; a linear head.

Both keep the teacher's tokenizer, cut to the tokens that the store uses: `token_map` sends a token of the full tokenizer to its row in the
student's table, tokens outside it to row 0 (unknown). Saved in Hugging Face layout: after `import retrikt_ray.student.model`,
`AutoModel.from_pretrained("RUN/student")` loads it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, normalize
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertConfig, BertModel, PretrainedConfig, PreTrainedModel

from retrikt_ray.teacher.annotator import Text, mean_pool


class StudentConfig(PretrainedConfig):
    """kind: static | transformer; vocabulary: rows of the embedding table; full_vocabulary: ids of the tokenizer."""

    model_type = "retrikt-student"

    def __init__(
        self,
        kind: str = "static",
        vocabulary: int = 2,
        full_vocabulary: int = 2,
        dim: int = 8,
        outputs: int = 2,
        pair: bool = False,
        max_tokens: int = 64,
        layers: int = 2,
        backbone: dict[str, Any] | None = None,
        **rest: Any,
    ) -> None:
        self.kind, self.vocabulary, self.full_vocabulary, self.dim = kind, vocabulary, full_vocabulary, dim
        self.outputs, self.pair, self.max_tokens, self.layers, self.backbone = outputs, pair, max_tokens, layers, backbone
        super().__init__(**rest)


class StudentModel(PreTrainedModel):
    """Calling it with token ids and mask gives logits (B, outputs) and the query vector (B, width)."""

    config_class = StudentConfig
    base_model_prefix = "student"
    token_map: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(self, config: StudentConfig) -> None:
        super().__init__(config)
        self.register_buffer("token_map", torch.zeros(config.full_vocabulary, dtype=torch.int32))
        self.register_buffer("shift", torch.zeros(()))  # regression targets are standardised
        self.register_buffer("scale", torch.ones(()))
        width = config.dim
        if config.kind == "static":
            self.embedding = nn.Embedding(config.vocabulary, config.dim)
            self.importance = nn.Embedding(config.vocabulary, 1)
            width = config.dim * (4 if config.pair else 1)
        elif config.backbone is not None:
            self.backbone = AutoModel.from_config(AutoConfig.for_model(**config.backbone))
            width = self.backbone.config.hidden_size
        else:
            heads = max(1, config.dim // 32)
            self.backbone = BertModel(
                BertConfig(
                    vocab_size=config.vocabulary,
                    hidden_size=config.dim,
                    num_hidden_layers=config.layers,
                    num_attention_heads=heads,
                    intermediate_size=config.dim * 4,
                    max_position_embeddings=2 * config.max_tokens + 8,
                    hidden_dropout_prob=0.1,
                ),
                add_pooling_layer=False,
            )
        self.head = nn.Linear(width, config.outputs)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    @property
    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def average(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Importance-weighted mean of token embeddings; importance is exp of a learned number. (B, T) -> (B, dim)

        Summed token by token, so that a text's vector is the same to the last bit whatever it is padded to: an index that is built anew, with
        other texts side by side, must be the same index.
        """
        weights = torch.exp(self.importance(ids)[..., 0]) * mask
        total = torch.cumsum(weights, 1)[:, -1:].clamp(min=1e-6)
        return embedding_bag(ids, self.embedding.weight, per_sample_weights=weights, mode="sum") / total

    def forward(self, ids: Tensor, mask: Tensor, pair_ids: Tensor | None = None, pair_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """ids, mask: (B, T), ids of the full tokenizer; the second text of a pair apart for `static`, inside `ids` for `transformer`."""
        if self.config.backbone is None:
            ids = self.token_map[ids].long()
        if self.config.kind != "static":
            vector = mean_pool(self.backbone(input_ids=ids, attention_mask=mask).last_hidden_state, mask)
        elif pair_ids is None or pair_mask is None:
            vector = self.average(ids, mask)
        else:
            a, b = self.average(ids, mask), self.average(self.token_map[pair_ids].long(), pair_mask)
            vector = torch.cat([a, b, (a - b).abs(), a * b], -1)
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
        """What `StudentModel.forward` takes, on the model's device."""
        config, device = self.model.config, self.model.head.weight.device
        firsts, seconds = [t for t, _ in texts], [p or "" for _, p in texts]

        def ids(a: list[str], b: list[str] | None = None) -> tuple[Tensor, Tensor]:
            special = config.kind == "transformer"
            out = self.tokenizer(
                a,
                b,
                padding=True,
                truncation=True,
                max_length=config.max_tokens * (2 if b else 1),
                add_special_tokens=special,
                return_tensors="pt",
            )
            mask = out["attention_mask"]
            return out["input_ids"].long().to(device), mask.to(device)

        if not config.pair:
            return dict(zip(("ids", "mask"), ids(firsts), strict=True))
        if config.kind == "transformer":
            if self.tokenizer.sep_token is None:
                return dict(zip(("ids", "mask"), ids([f"{a}\n{b}" for a, b in zip(firsts, seconds, strict=True)]), strict=True))
            return dict(zip(("ids", "mask"), ids(firsts, seconds), strict=True))
        return dict(zip(("ids", "mask", "pair_ids", "pair_mask"), (*ids(firsts), *ids(seconds)), strict=True))

    @torch.inference_mode()
    def encode(self, texts: list[Text], batch: int = 256) -> tuple[Tensor, Tensor]:
        """Class probabilities (N, C), or values (N, 1) in regression, and unit query vectors (N, width), float32 on the CPU."""
        self.model.eval()
        answers, vectors = [], []
        for start in range(0, len(texts), batch):
            logits, vector = self.model(**self.tensors(texts[start : start + batch]))
            answers.append(
                (torch.softmax(logits, -1) if logits.shape[1] > 1 else logits * self.model.scale + self.model.shift).float().cpu()
            )
            vectors.append(normalize(vector.float(), dim=-1).cpu())
        return torch.cat(answers), torch.cat(vectors)

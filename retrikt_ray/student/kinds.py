"""The kinds of student: each says what a model of its kind is made of, how it reads texts, and how large it may be.

  static       token embeddings with learned weights, averaged; a linear head. Micro-seconds on a CPU.
  convolution  the same, beside the maxima of filters over three neighbouring tokens, which see the order of words; nearly as quick.
  transformer  a small BERT over the same embeddings; mean over tokens; a linear head.
  pretrained   a pre-trained encoder by path or hub id, whatever its size; mean over tokens; a linear head.

All but the last keep the teacher's tokenizer, cut to the tokens that the store uses: `token_map` sends a token of the full tokenizer to its row in
the student's table, tokens outside it to row 0 (unknown). A new kind is a class here, an entry of KINDS, and its name in `DistillConfig.kind`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, normalize, pad
from transformers import AutoConfig, AutoModel, BertConfig, BertModel, PretrainedConfig

from retrikt_ray.student.alignment import FIGURES, GRID, Side, compared, units
from retrikt_ray.task.texts import Text, joined
from retrikt_ray.teacher.annotator import mean_pool

MIN_TOKENS = 256  # a student that knows fewer tokens is not worth having; the budget gives way


class StudentConfig(PretrainedConfig):
    """kind: a name of KINDS; vocabulary: rows of the embedding table; full_vocabulary: ids of the tokenizer."""

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


def tokenized(tokenizer: Any, first: list[str], second: list[str] | None, max_tokens: int, special: bool) -> tuple[Tensor, Tensor]:
    """Token ids and mask, right-padded, (B, T) each.

    The tokenizer's own core is asked, which takes half of the time that its wrapper in transformers does: that is most of an answer.
    """
    core = tokenizer.backend_tokenizer
    core.no_padding()
    core.enable_truncation(max_tokens)
    texts: list[Any] = first if second is None else list(zip(first, second, strict=True))
    found = [encoding.ids for encoding in core.encode_batch_fast(texts, add_special_tokens=special)]
    lengths = np.array([len(some) for some in found])
    longest = max(1, int(lengths.max()))  # texts without a token, "\u200b" to some tokenizers, get one that does not count
    mask = np.arange(longest) < lengths[:, None]
    ids = np.full(mask.shape, tokenizer.pad_token_id)
    ids[mask] = list(chain.from_iterable(found))
    return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))


class Static:
    """Importance-weighted mean of token embeddings; of a pair the two means, their distance, their product, and what each lacks (`alignment.py`)."""

    rate = 5e-3  # peak learning rate
    token_dropout = True  # whether hiding tokens in training makes sense: an average does without some of them

    def __init__(self, config: StudentConfig) -> None:
        self.config = config
        self.known: dict[str, tuple[Any, Tensor]] = {}  # see `derived`

    def parts(self) -> tuple[dict[str, nn.Module], int]:
        """The model's own modules by name, and the width of its vector."""
        c = self.config
        return {"embedding": nn.Embedding(c.vocabulary, c.dim), "importance": nn.Embedding(c.vocabulary, 1)}, self.width(c.dim, c.pair)

    @classmethod
    def width(cls, dim: int, pair: bool) -> int:
        """Of a vector."""
        return 4 * dim + 2 * (dim + FIGURES) if pair else dim

    def read(self, tokenizer: Any, texts: list[Text]) -> dict[str, Tensor]:
        """What `vector` takes, as keyword arguments: the texts of a pair apart."""
        sides = {"": [t for t, _ in texts]} | ({"pair_": [p or "" for _, p in texts]} if self.config.pair else {})
        found = {}
        for name, some in sides.items():
            found[f"{name}ids"], found[f"{name}mask"] = tokenized(tokenizer, some, None, self.config.max_tokens, special=False)
        return found

    def vector(self, model: Any, ids: Tensor, mask: Tensor, pair_ids: Tensor | None = None, pair_mask: Tensor | None = None) -> Tensor:
        """ids, mask: (B, T), ids of the full tokenizer -> (B, width)."""
        a = self.one(model, model.token_map[ids].long(), mask)
        if pair_ids is None or pair_mask is None:
            return a
        b = self.one(model, model.token_map[pair_ids].long(), pair_mask)
        both = compared(self.side(model, ids, mask), self.side(model, pair_ids, pair_mask), model.embedding.weight)
        return torch.cat([a, b, (a - b).abs(), a * b, both], -1)

    def side(self, model: Any, ids: Tensor, mask: Tensor) -> Side:
        """A text of a pair, token by token. ids: of the full tokenizer, (B, T)"""
        rows = model.token_map[ids].long()
        if model.training:
            unit = normalize(model.embedding(rows), dim=-1) * GRID
        else:
            unit = self.derived("unit", (model.embedding.weight,), units)[rows]
        return Side(ids, rows, mask, unit, self.weights(model, rows) * mask)

    def weights(self, model: Any, rows: Tensor) -> Tensor:
        """Importance of tokens, exp of a learned number. rows: of the student's table, of any shape, as what is returned"""
        if model.training:
            return torch.exp(model.importance(rows)[..., 0])
        return self.derived("weights", (model.importance.weight,), torch.exp)[rows, 0]

    def derived(self, name: str, weights: tuple[Tensor, ...], made: Callable[..., Tensor]) -> Tensor:
        """A table that is made of weights, `made(*weights)`, once for as long as these stay as they are."""
        state = tuple((w.data_ptr(), w._version) for w in weights)
        if name not in self.known or self.known[name][0] != state:
            self.known[name] = state, made(*(w.detach() for w in weights))
        return self.known[name][1]

    def one(self, model: Any, ids: Tensor, mask: Tensor) -> Tensor:
        """The vector of one text. ids: rows of the student's table, (B, T) -> (B, dim)"""
        return self.average(model, ids, mask)

    def average(self, model: Any, ids: Tensor, mask: Tensor) -> Tensor:
        """Importance-weighted mean of token embeddings. (B, T) -> (B, dim)

        Summed token by token, so that a text's vector is the same to the last bit whatever it is padded to: an index that is built anew, with
        other texts side by side, must be the same index.
        """
        weights = self.weights(model, ids) * mask
        total = torch.cumsum(weights, 1)[:, -1:].clamp(min=1e-6)
        return embedding_bag(ids, model.embedding.weight, per_sample_weights=weights, mode="sum") / total

    @classmethod
    def size(cls, budget: int, tokens: int, outputs: int, pair: bool, **_: int) -> tuple[int, int]:
        """(dim, vocabulary) of a student of about `budget` parameters, `tokens` being the tokens there are.

        Dimension grows with the square root of budget / 128, between 8 and 256; the rest goes into tokens. What tokens leave over goes back
        into dimension.
        """
        dim = min(256, max(8, 8 * round(math.sqrt(budget / 128) / 8)))
        vocabulary = max(MIN_TOKENS, (budget - cls.beside_tokens(dim, outputs, pair)) // (dim + 1))
        if vocabulary > tokens:
            vocabulary = tokens
            fits = (d for d in range(256, 8, -1) if tokens * (d + 1) + cls.beside_tokens(d, outputs, pair) <= budget)
            dim = next(fits, 8)
        return dim, int(vocabulary)

    @classmethod
    def beside_tokens(cls, dim: int, outputs: int, pair: bool) -> int:
        """Parameters that do not grow with the vocabulary."""
        return outputs * (cls.width(dim, pair) + 1)

    @staticmethod
    def inherit(model: Any, vectors: Tensor, frequency: Tensor) -> None:
        """Start from the teacher's token vectors (V - 1, dim) and the tokens' relative frequency (V - 1,); row 0 stays zero.

        Importance starts as smooth inverse frequency (Arora et al. 2017): log of a / (a + p), a = 1e-3.
        """
        model.embedding.weight.zero_()
        model.embedding.weight[1:] = vectors
        model.importance.weight.fill_(math.log(0.1))
        model.importance.weight[1:, 0] = torch.log(1e-3 / (1e-3 + frequency))


class Convolution(Static):
    """The static student's mean, beside the maxima over the text of FILTERS filters of three neighbouring tokens (Kim, EMNLP 2014).

    Word order is what a mean does not see: "how many", "not good". Of a pair both texts, their distance and their product.
    """

    FILTERS, SPAN = 64, 3
    rate = 2e-3

    def parts(self) -> tuple[dict[str, nn.Module], int]:
        modules, width = super().parts()
        return modules | {"filters": nn.Linear(self.SPAN * self.config.dim, self.FILTERS)}, width

    @classmethod
    def width(cls, dim: int, pair: bool) -> int:
        return super().width(dim, pair) + cls.FILTERS * (4 if pair else 1)

    def one(self, model: Any, ids: Tensor, mask: Tensor) -> Tensor:
        """Mean and maxima of one text. ids: rows of the student's table, (B, T) -> (B, dim + FILTERS)"""
        found = (self.over_windows if model.training else self.over_table)(model, ids, mask)
        best = found.masked_fill(mask[..., None] == 0, -math.inf).amax(1)
        if not model.training:
            best = best + model.filters.bias
        return torch.cat([self.average(model, ids, mask), torch.relu(best)], -1)

    def over_windows(self, model: Any, ids: Tensor, mask: Tensor) -> Tensor:
        """The filters at each token, a token outside the text being zero. (B, T) -> (B, T, FILTERS)"""
        tokens = pad(model.embedding(ids) * mask[..., None], (0, 0, 1, 1))
        return torch.as_tensor(model.filters(torch.cat([tokens[:, i : i + ids.shape[1]] for i in range(self.SPAN)], -1)))

    def over_table(self, model: Any, ids: Tensor, mask: Tensor) -> Tensor:
        """The same without a product, and without the bias: what each token adds at each place of a filter is looked up.

        Sums of three numbers, so that a text's vector is the same to the last bit in any batch (see `Static.average`).
        """
        table, outside = self.table(model), len(model.embedding.weight)
        places = pad(ids.masked_fill(mask == 0, outside), (1, 1), value=outside).unfold(1, self.SPAN, 1)
        rows = places + torch.arange(self.SPAN, device=ids.device) * (outside + 1)
        return embedding_bag(rows.reshape(-1, self.SPAN), table, mode="sum").view(*ids.shape, -1)

    def table(self, model: Any) -> Tensor:
        """What each token adds to each filter, one place in the window after the other; the last row of each place, of zeros, is for what lies
        outside. (SPAN (V + 1), FILTERS)"""
        return self.derived("table", (model.embedding.weight, model.filters.weight), self.by_place)

    def by_place(self, tokens: Tensor, filters: Tensor) -> Tensor:
        found = tokens @ filters.view(self.FILTERS, self.SPAN, -1).permute(1, 2, 0)
        return pad(found, (0, 0, 0, 1)).reshape(-1, self.FILTERS)

    @classmethod
    def beside_tokens(cls, dim: int, outputs: int, pair: bool) -> int:
        return cls.FILTERS * (cls.SPAN * dim + 1) + super().beside_tokens(dim, outputs, pair)

    @staticmethod
    def inherit(model: Any, vectors: Tensor, frequency: Tensor) -> None:
        Static.inherit(model, vectors, frequency)
        nn.init.normal_(model.filters.weight, std=model.filters.in_features**-0.5)


class Transformer:
    """A small BERT over the cut vocabulary."""

    rate = 1e-3
    token_dropout = False

    def __init__(self, config: StudentConfig) -> None:
        self.config = config

    def parts(self) -> tuple[dict[str, nn.Module], int]:
        c = self.config
        backbone = BertConfig(
            vocab_size=c.vocabulary,
            hidden_size=c.dim,
            num_hidden_layers=c.layers,
            num_attention_heads=max(1, c.dim // 32),
            intermediate_size=c.dim * 4,
            max_position_embeddings=2 * c.max_tokens + 8,
            hidden_dropout_prob=0.1,
        )
        return {"backbone": BertModel(backbone, add_pooling_layer=False)}, c.dim

    def read(self, tokenizer: Any, texts: list[Text]) -> dict[str, Tensor]:
        """A pair in the tokenizer's own pair format, or as two lines where it has none."""
        c = self.config
        first, second = [t for t, _ in texts], [p or "" for _, p in texts] if c.pair else None
        length = c.max_tokens
        if c.pair and tokenizer.sep_token is None:
            first, second = [joined((t, p or "")) for t, p in texts], None
        elif c.pair:
            length *= 2
        return dict(zip(("ids", "mask"), tokenized(tokenizer, first, second, length, special=True), strict=True))

    def vector(self, model: Any, ids: Tensor, mask: Tensor) -> Tensor:
        return mean_pool(model.backbone(input_ids=model.token_map[ids].long(), attention_mask=mask).last_hidden_state, mask)

    @staticmethod
    def size(budget: int, tokens: int, *, layers: int, max_tokens: int, **_: int) -> tuple[int, int]:
        """A layer of a BERT has 12 dim^2 weights; a third of the budget goes into layers, the rest into tokens."""
        dim = max(32, 32 * int(math.sqrt(budget / 3 / (12 * layers)) / 32))
        places = 2 * max_tokens + 8
        return dim, min(tokens, max(MIN_TOKENS, (budget - layers * 12 * dim * dim - places * dim) // dim))

    @staticmethod
    def inherit(model: Any, vectors: Tensor, _: Tensor) -> None:
        table = model.backbone.embeddings.word_embeddings
        table.weight.zero_()
        table.weight[1:] = vectors * 0.5


class Pretrained(Transformer):
    """An encoder with its own tokenizer and weights, which neither shrinks nor inherits."""

    rate = 5e-5

    def parts(self) -> tuple[dict[str, nn.Module], int]:
        backbone = AutoModel.from_config(AutoConfig.for_model(**(self.config.backbone or {})))
        return {"backbone": backbone}, backbone.config.hidden_size

    def vector(self, model: Any, ids: Tensor, mask: Tensor) -> Tensor:
        return mean_pool(model.backbone(input_ids=ids, attention_mask=mask).last_hidden_state, mask)


KINDS: dict[str, Any] = {"static": Static, "convolution": Convolution, "transformer": Transformer, "pretrained": Pretrained}

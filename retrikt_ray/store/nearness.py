"""How near passages are to the texts of a task: the mean cosine to the NEIGHBOURS nearest labelled rows.

Twice: cheaply for every passage of a corpus, by averaged token vectors of the encoder, and by the encoder itself for those that are left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch

from retrikt_ray.runtime.folders import Folder
from retrikt_ray.task.texts import Text, texts_of
from retrikt_ray.teacher.annotator import Annotator

NEIGHBOURS = 5
READ = 2000  # passages that the encoder reads to fit the weights of the averages
PENALTY = 1.0
RARE = 1e-3  # frequency at which a token counts half (Arora et al. 2017, SIF: a / (a + p))


def nearness(vectors: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Mean inner product of unit vectors (N, d) with the NEIGHBOURS nearest of reference (n, d), (N,)."""
    count = min(NEIGHBOURS, len(reference))
    return np.partition(vectors @ reference.T, -count, axis=1)[:, -count:].mean(1)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1; rows of zeros stay."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-9)


def encoder_of(teacher: Folder) -> Annotator:
    """The annotator's encoder before it was tuned on the task, where it is an encoder of its own; else the annotator.

    Tuned on few rows, an encoder tells little but the label: what is near by it may be of any domain.
    """
    card = teacher.read_json("teacher.json")
    if card["annotator"] in ("prompt", "base"):
        return Annotator.load(teacher)
    made = Annotator.start(card["annotator"], card["base"], card["dtype"], 1, 0, card["max_tokens"])
    if made.adapted:  # untrained adapters change nothing, and cost time
        made.backbone = made.backbone.unload()
    return made.eval().requires_grad_(False)


class Encoded:
    """Nearness by an encoder."""

    def __init__(self, encoder: Annotator, texts: list[Text]) -> None:
        self.encoder = encoder
        self.reference = self.vectors(texts)

    def vectors(self, texts: list[Text], batch: int = 64) -> np.ndarray:
        return unit(self.encoder.annotate(texts, batch)[1].numpy())

    def __call__(self, texts: list[Text], batch: int) -> np.ndarray:
        return nearness(self.vectors(texts, batch), self.reference)


class Averaged:
    """Nearness as averages of token vectors tell it, a hundred times as quick as the encoder that they are taken from.

    Plain cosines of averages miss half of what the encoder finds; a ridge regression of its nearness on the averages, over some passages that it
    has read, misses a fifth (docs/lab-notes.md).
    """

    def __init__(self, encoder: Annotator, texts: Sequence[str], general: Sequence[str]) -> None:
        """texts: of the task; general: some of the corpus, which say how frequent tokens are and where its middle lies."""
        self.core = encoder.tokenizer.backend_tokenizer
        self.core.no_padding()
        self.core.enable_truncation(encoder.max_tokens)
        table = encoder.backbone.get_input_embeddings().weight.detach().float().cpu()
        counts = Counter(chain.from_iterable(self.tokens([*general, *texts])))
        seen = np.array([counts[i] for i in range(len(table))])
        self.table = table * torch.tensor(RARE / (RARE + seen / seen.sum()), dtype=torch.float32)[:, None]
        self.middle = np.zeros(table.shape[1], np.float32)
        self.middle = self.vectors(general).mean(0)
        self.reference = self.vectors(texts)
        self.weights = np.append(np.zeros(table.shape[1]), [1.0, 0.0])  # of `features`; until they are fitted, the plain cosines

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in self.core.encode_batch_fast(list(texts), add_special_tokens=False)]

    def vectors(self, texts: Sequence[str]) -> np.ndarray:
        """(N, d) unit vectors, from the middle of the corpus."""
        ids = self.tokens(texts)
        starts = np.cumsum([0, *(len(some) for some in ids[:-1])])
        flat = torch.tensor(list(chain.from_iterable(ids)), dtype=torch.long)
        mean = torch.nn.functional.embedding_bag(flat, self.table, torch.tensor(starts), mode="mean")
        return unit(unit(mean.numpy()) - self.middle)

    def features(self, texts: Sequence[str]) -> np.ndarray:
        """(N, d + 2): the vectors, their nearness, and 1."""
        vectors = self.vectors(texts)
        return np.column_stack([vectors, nearness(vectors, self.reference), np.ones(len(vectors))])

    def fit(self, texts: Sequence[str], scores: np.ndarray) -> None:
        """Take the weights from texts whose nearness is known."""
        found = self.features(texts)
        penalty = np.diag(np.append(np.full(found.shape[1] - 1, PENALTY), 1e-6))
        self.weights = np.linalg.solve(found.T @ found + penalty, found.T @ scores)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        return self.features(texts) @ self.weights


def weights_of(teacher: Folder, task: Folder, general: list[str], batch: int) -> np.ndarray:
    """The weights of `Averaged` for a teacher, a task and a corpus (a Ray task)."""
    torch.set_num_threads(1)
    encoder, texts = encoder_of(teacher), texts_of(task.read_table("train.parquet"))
    averaged = Averaged(encoder, [text for text, _ in texts], general)
    read = general[:: -(-len(general) // READ)]
    averaged.fit(read, Encoded(encoder, texts)([(text, None) for text in read], batch))
    return averaged.weights

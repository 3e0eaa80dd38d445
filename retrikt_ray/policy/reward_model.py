"""The judge of PPO: annotator, base LM and task rows put together into the reward terms of a batch of texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from retrikt_ray.policy import rewards
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.task.files import tidy
from retrikt_ray.teacher import lm
from retrikt_ray.teacher.annotator import Classifier

if TYPE_CHECKING:
    from retrikt_ray.policy.reinforce import ReinforceConfig

RESERVOIR_TEXTS = 512  # earlier texts that novelty is measured against, beside the task rows


def split_pair(text: str, pair: bool) -> tuple[str, str | None]:
    """A generated sequence as text and second text: two lines in pair tasks. A missing second line is an empty text."""
    if not pair:
        return tidy(text), None
    first, _, second = text.strip().partition("\n")
    return tidy(first), tidy(second)


class Judge:
    """Calling it gives the reward of each text (N,) and every term (N,) by name."""

    def __init__(self, base: lm.Base, teacher: Folder, task_folder: Folder, config: ReinforceConfig, task: dict[str, Any]) -> None:
        self.base, self.config, self.task = base, config, task
        self.annotator = Classifier.load(teacher)
        rows = task_folder.read_table("train.parquet").to_pylist()
        texts = [(r["text"], r["text_pair"]) for r in rows]
        self.task_embeddings = self.annotator.annotate(texts)[1].numpy()
        joined = [a if b is None else f"{a}\n{b}" for a, b in texts]
        self.task_grams = {g for t in joined for g in rewards.ngrams(rewards.words(t), 2)}
        lengths = np.array([len(r) + 1 for r in base.tokenizer(joined, add_special_tokens=False)["input_ids"]])
        self.low, self.high = np.percentile(lengths, [5, 95])
        values = np.array([r["value"] for r in rows])
        conditions = np.array([r["condition"] for r in rows])
        self.means = np.array(
            [values[conditions == i].mean() if (conditions == i).any() else values.mean() for i in range(len(task["conditions"]))]
        )
        self.spread = float(values.std()) or 1.0
        self.reservoir: list[str] = []
        # The bare LM: <bos> alone, or <eos> (which ends the document before) for tokenizers without <bos>.
        nothing = torch.zeros((1, 0, base.dim), device=base.device)
        end = base.embed(torch.tensor([[base.eos]], device=base.device))
        self.bare = lm.run_prefix(base, end if base.tokenizer.bos_token_id is None else nothing, [""])

    def __call__(
        self, texts: list[str], conditions: Tensor, ids: Tensor, mask: Tensor, remember: bool
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """texts: N; conditions (N,); ids, mask (N, T). remember: later texts will be compared with these."""
        asked = conditions.cpu().numpy()
        pairs = [split_pair(t, self.task["pair"]) for t in texts]
        probs, embeddings = (x.numpy() for x in self.annotator.annotate(pairs))
        with torch.no_grad():
            logits, _ = lm.score(self.base, self.bare, torch.zeros_like(conditions), ids, mask)
            likelihood = (lm.log_probs_of(logits, ids) * mask).sum(1) / mask.sum(1)
        ended = ((ids == self.base.eos) & mask.bool()).any(1).cpu().numpy()
        seen = self.task_grams | {g for t in self.reservoir for g in rewards.ngrams(rewards.words(t), 2)}
        regression = self.task["problem"] == "regression"
        parts = {
            "fidelity": rewards.closeness(probs[:, 0], self.means[asked], self.spread) if regression else rewards.fidelity(probs, asked),
            "diversity": 1.0 - rewards.self_bleu(texts),
            "novelty": rewards.novelty(texts, seen),
            "domain": rewards.domain(embeddings, self.task_embeddings),
            "fluency": likelihood.cpu().numpy(),
            "length": rewards.length(mask.sum(1).cpu().numpy(), ended, self.low, self.high),
        }
        weights = self.config.weights.model_dump()
        names = [self.task["conditions"][i] for i in asked]
        for path, weight in self.config.custom_rewards.items():
            parts[path], weights[path] = np.asarray(rewards.custom_term(path)(texts, names), dtype=float), weight
            if parts[path].shape != (len(texts),):
                raise ValueError(f"{path} returned shape {parts[path].shape} for {len(texts)} texts; expected ({len(texts)},)")
        if remember:
            self.reservoir = (self.reservoir + texts)[-RESERVOIR_TEXTS:]
        return sum(weights[k] * v for k, v in parts.items()), parts

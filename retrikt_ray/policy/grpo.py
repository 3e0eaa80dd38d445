"""GRPO (Shao et al. 2024, arXiv 2402.03300) by TRL: advantages within groups, clipped updates and the KL in the loss are those of `trl.GRPOTrainer`.

What goes in and comes out is the product's own: an iteration's texts are written and rewarded as those of the other algorithms, and TRL is handed their
tokens and rewards. The model it trains is the soft prompt alone: a prompt of TRL's is one token, the number of a condition, in whose place the condition's
prefix stands. So the head never sees a soft token, nothing has to be kept from being sampled, and there is no second copy of the base.

A trainer lives for one iteration, and all that it does follows from (seed, iteration): the session's checkpoints are enough to resume exactly.
"""

from __future__ import annotations

import copy
import random
import tempfile
import warnings
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import GenerationConfig, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from retrikt_ray.policy.loop import Agent, Generated, divisor
from retrikt_ray.runtime import training
from retrikt_ray.teacher import lm
from retrikt_ray.teacher.prefix import Prefix, run_prefix_of

Scores = tuple[Tensor, Tensor]  # log p and entropy of each token of the texts, (B, T) each


def score(agent: Agent, prefix: Prefix, rows: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Scores:
    """rows: (B,) into the prefix; input_ids, attention_mask: (B, 1 + T), a condition's number and then the text."""
    return lm.score_tokens(agent.base, prefix, rows, input_ids[:, 1:], attention_mask[:, 1:], agent.sampling.temperature)[:2]


def reference_scores(agent: Agent, input_ids: Tensor, attention_mask: Tensor) -> Scores:
    """Those under the supervised prompt."""
    return score(agent, agent.reference, input_ids[:, 0], input_ids, attention_mask)


class PromptedLM(nn.Module):
    """The policy as TRL trains it. Its parameters are those of the soft prompt; the frozen base is no part of it, so that workers do not exchange it."""

    is_gradient_checkpointing = False  # TRL asks

    def __init__(self, agent: Agent, tokenizer: Any) -> None:
        super().__init__()
        self.agent, self.prompt = agent, agent.policy
        ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        self.config, self.generation_config = copy.deepcopy(agent.base.model.config), GenerationConfig(**ends)
        self.config.get_text_config().update(ends)  # TRL would, with a warning

    def add_model_tags(self, tags: list[str]) -> None:
        """Tags are for model cards, of which there are none."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Scores:
        prefix, (rows,) = run_prefix_of(self.agent.base, self.prompt(), self.agent.prefixes, input_ids[:, 0].contiguous())
        return score(self.agent, prefix, rows, input_ids, attention_mask)


class HeldRate(LRScheduler):
    """Leaves the learning rate as the session sets it."""

    def get_lr(self) -> list[float | Tensor]:
        return [group["lr"] for group in self.optimizer.param_groups]


class Trainer(GRPOTrainer):
    """TRL's, of a model that gives log-probabilities itself."""

    def _get_per_token_logps_and_entropies(self, model: Any, input_ids: Tensor, attention_mask: Tensor, *_: Any, **__: Any) -> Any:
        return *model(input_ids, attention_mask), None

    def _send_telemetry(self) -> None:
        """Nobody is told of a run."""


def update(
    agent: Agent,
    session: training.Session,
    generated: Generated,
    rewards: np.ndarray,
    step: int,
    *,
    group: int,
    minibatch: int,
    epochs: int,
    clip: float,
    kl_weight: float,
) -> None:
    """The updates of an iteration.

    generated: this worker's texts. rewards: (N,) of all workers' texts, `group` of a condition one behind the other. minibatch divides N, and the
    number of workers divides it.
    """
    own = [ids[mask.bool()].tolist() for ids, mask in zip(generated.ids, generated.mask, strict=True)]
    rows = session.gather_rows(list(zip(generated.conditions.tolist(), own, strict=True)), len(rewards))

    def rollout(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        """The texts that fall to this process as TRL cuts them: a run of them, not every n-th."""
        part = slice(trainer.accelerator.process_index * len(prompts), (trainer.accelerator.process_index + 1) * len(prompts))
        texts = {"prompt_ids": [[condition] for condition, _ in rows[part]], "completion_ids": [ids for _, ids in rows[part]]}
        return texts | {"logprobs": None, "reward": rewards[part].tolist()}

    each = minibatch // session.world
    micro = lm.micro_batches(agent.base, list(range(each)), [agent.max_tokens] * each, agent.reference.mask.shape[1], gradients=True)
    size = divisor(each, len(micro[0]))
    tokenizer = copy.deepcopy(agent.base.tokenizer)  # TRL writes into it
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.convert_ids_to_tokens(agent.base.eos)
    model: Any = PromptedLM(agent, tokenizer)  # TRL's types ask for more than it uses
    scheduler: Any = HeldRate(session.optimizer)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        for known in ("You are using 'rollout_func'", "`gradient_checkpointing` is deprecated"):  # of TRL and Transformers
            warnings.filterwarnings("ignore", message=known)
        trainer = Trainer(
            model,
            lambda reward, **_: reward,
            GRPOConfig(
                folder,
                num_generations=group,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=each // size,
                steps_per_generation=len(rewards) // (size * session.world),
                num_iterations=epochs,
                max_steps=epochs * len(rewards) // minibatch,
                epsilon=clip,
                max_grad_norm=1.0,  # as in the other algorithms
                seed=random.Random(f"{session.seed}:grpo:{step}").getrandbits(31),
                shuffle_dataset=False,
                use_cpu=agent.base.device.type == "cpu",
                bf16=False,  # the base has a type of its own, and the prompt is float32
                gradient_checkpointing=False,
                dataloader_pin_memory=False,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            Dataset.from_dict({"prompt": [str(number) for number in range(len(rewards) // group)]}),
            processing_class=tokenizer,
            optimizers=(session.optimizer, scheduler),
            rollout_func=rollout,
        )
        trainer.remove_callback(PrinterCallback)
        if kl_weight:  # not by GRPOConfig.beta, for which TRL would load the base once more
            reference: Any = partial(reference_scores, agent)
            trainer.beta, trainer.ref_model = kl_weight, reference
        trainer.train()
    session.optimizer.zero_grad(set_to_none=True)

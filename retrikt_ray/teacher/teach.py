"""Stage 2, teach: tune the generation prompt and the annotator on the labelled rows. Two Ray Train runs.

The generation prompt: soft tokens are trained by the likelihood of the training texts under the frozen base (Lester et al. 2021), and by a
contrast: a text should be likelier under its own condition's prompt than under another's. Likelihood alone gives texts of the domain but
of no particular label, since the label explains little of a text's likelihood.

Left out on purpose: early stopping. Both trainings are a fixed number of epochs, so that the few labelled rows are not spent on stopping.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from retrikt_ray.runtime.cluster import plan
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.settings import Scaled
from retrikt_ray.task.card import Task
from retrikt_ray.task.texts import joined, texts_of

if TYPE_CHECKING:
    import torch

    from retrikt_ray.teacher.annotator import Annotator

VERSION = 6
WORD_DROPOUT = 0.1  # share of tokens that a fine-tuned LM does not see in training: few rows are soon learnt by heart


class TeachConfig(Scaled):
    """The teacher: a frozen base LM, its generation prompt, and the annotator."""

    base: str = Field("embedded", description="Causal LM: a local folder, a hub id, or `embedded` (the 6.8M LM in this package).")
    dtype: str = Field(
        "auto",
        pattern="^(auto|float32|bfloat16|float16)$",
        description="Weights of the frozen base. auto: bfloat16 on GPUs, float32 on CPUs, where those with AMX multiply as bfloat16 while texts are written.",
    )
    chat: bool | Literal["auto"] = Field(
        "auto",
        description="Whether the base is talked to in chat: prepare.template is what the user says, the text what it answers. auto: if its chat template ends a turn as the model ends a text.",
    )
    annotator: str = Field(
        "base",
        description="Who labels the texts: `prompt` (frozen base, soft prompt, head), `base` (frozen base, low-rank adapters, head), or the folder or hub id of an encoder that is fine-tuned.",
    )
    shared_tokens: int = Field(8, ge=1, description="Soft tokens that all conditions share (they learn the domain).")
    class_tokens: int = Field(8, ge=1, description="Soft tokens of each condition (they learn the label).")
    max_tokens: int = Field(64, ge=4, description="Tokens of a text that are used, in the LM and in the annotator.")
    prompt_epochs: int = Field(6, ge=1, description="Passes over the training rows for the generation prompt.")
    prompt_learning_rate: float = Field(0.02, gt=0, description="Peak learning rate of the generation prompt.")
    prompt_batch: int = Field(16, ge=1, description="Texts per step for the generation prompt.")
    contrast: float = Field(
        0.5, ge=0, description="Weight of the contrast between the right and a wrong condition's prompt; 0: likelihood only."
    )
    annotator_epochs: int = Field(10, ge=1, description="Passes over the training rows for the annotator.")
    annotator_learning_rate: float = Field(
        0,
        ge=0,
        description="Peak learning rate of the annotator. 0: 1e-2 for `prompt`; 1e-3 for the adapters of a language model below 100M parameters, 3e-4 above; 1e-4 and 2e-5 for encoders.",
    )
    annotator_batch: int = Field(16, ge=1, description="Texts per step for the annotator.")
    annotator_soft_tokens: int = Field(20, ge=1, description="Soft tokens in front of the text with `annotator: prompt`.")


def prompt_loop(config: dict[str, Any]) -> None:
    """Train the generation prompt (in a Ray Train worker) and write `prompts/`."""
    import torch
    from torch import Tensor
    from torch.nn.functional import softplus

    from retrikt_ray.runtime import training
    from retrikt_ray.teacher import lm, prompts
    from retrikt_ray.teacher.base import Base
    from retrikt_ray.teacher.prefix import Prefix, run_prefix_of

    c, task = TeachConfig(**config["section"]), config["task"]
    table = config["task_folder"].read_table("train.parquet")
    texts, conditions = [joined(t) for t in texts_of(table)], table["condition"].to_pylist()
    base = Base.load(c.base, c.dtype, c.chat)
    prefixes = task.prefixes
    groups = [[t for t, own in zip(texts, conditions, strict=True) if own == i] for i in range(len(prefixes))]
    prompt = prompts.from_texts(base, groups, c.shared_tokens, c.class_tokens, config["seed"]).to(base.device)
    optimizer = torch.optim.AdamW(prompt.parameters(), lr=c.prompt_learning_rate, weight_decay=0.0)
    batches = training.Steps(training.epoch_batches(len(texts), c.prompt_batch, c.prompt_epochs, config["seed"]))
    session = training.Session(config, optimizer, dict(prompt.state_dict(keep_vars=True)), len(batches))

    def text_log_prob(prefix: Prefix, rows: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        logits, _ = lm.score(base, prefix, rows, ids, mask)
        return (lm.log_probs_of(logits, ids) * mask).sum(1)

    def loss_of(step: int, rows: list[int]) -> tuple[Tensor, str]:
        rng = random.Random(f"{config['seed']}:contrast:{step}")  # over the whole batch: a row's rival does not depend on the workers
        rivals = {row: rng.choice([i for i in range(len(prefixes)) if i != conditions[row]]) for row in batches[step]}
        ids, mask = base.encode([texts[row] for row in rows], c.max_tokens, after=prefixes[0])
        right = torch.tensor([conditions[row] for row in rows], device=base.device)
        wrong = torch.tensor([rivals[row] for row in rows], device=base.device)
        prefix, (right, wrong) = run_prefix_of(base, prompt(), prefixes, right, wrong)
        log_p = text_log_prob(prefix, right, ids, mask)
        loss = -(log_p / mask.sum(1)).mean()
        note = f"loss {loss.item():.3f}"
        if c.contrast:
            margin = log_p - text_log_prob(prefix, wrong, ids, mask)
            loss = loss + c.contrast * softplus(-margin).mean()
            note += f", right prompt likelier {(margin > 0).float().mean().item():.0%}"
        return loss, note

    training.run(session, batches, loss_of)
    if session.rank == 0:
        prompts.save_prompts(config["out"], prompt(), c.base)


def annotator_optimizer(model: Annotator, rate: float) -> torch.optim.Optimizer:
    """rate: peak learning rate of the backbone; 0: by how it is tuned."""
    import torch

    large = model.parameter_count >= 100e6
    if not rate and model.soft is not None:
        rate = 1e-2
    elif not rate:
        rate = (3e-4 if large else 1e-3) if model.adapted else (2e-5 if large else 1e-4)
    embeddings = model.backbone.get_input_embeddings().weight
    body = [p for n, p in model.named_parameters() if p.requires_grad and p is not embeddings and not n.startswith("head.")]
    groups = [{"params": body, "lr": rate}, {"params": model.head.parameters(), "lr": max(rate, 3e-3)}]
    if embeddings.requires_grad:
        groups.append({"params": [embeddings], "lr": rate, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, weight_decay=0.01)


def annotator_loop(config: dict[str, Any]) -> None:
    """Fine-tune the annotator (in a Ray Train worker) and write `classifier/`."""
    import torch
    from torch import Tensor
    from torch.nn.functional import cross_entropy, mse_loss

    from retrikt_ray.runtime import training
    from retrikt_ray.teacher.annotator import Annotator

    c, outputs = TeachConfig(**config["section"]), config["task"].outputs
    table = config["task_folder"].read_table("train.parquet")
    texts = texts_of(table)
    training.seed_everything(config["seed"], "annotator")
    model = Annotator.start(c.annotator, c.base, c.dtype, outputs, c.annotator_soft_tokens, c.max_tokens)
    values = torch.tensor(table["value"].to_pylist(), device=model.device)
    if outputs == 1:
        model.shift.copy_(values.mean())
        model.scale.copy_(values.std().clamp(min=1e-6))
    optimizer = annotator_optimizer(model, c.annotator_learning_rate)
    batches = training.Steps(training.epoch_batches(len(texts), c.annotator_batch, c.annotator_epochs, config["seed"]))
    session = training.Session(config, optimizer, model.trained(), len(batches))

    def loss_of(_: int, rows: list[int]) -> tuple[Tensor, str]:
        model.train()
        ids, mask = model.encode([texts[row] for row in rows])
        hidden = torch.rand(mask.shape, device=mask.device) < WORD_DROPOUT
        hidden[:, 0] = False  # something must be left to attend to
        logits, _ = model(ids, mask * ~hidden if model.concat else mask)
        target = values[rows]
        loss = cross_entropy(logits, target.long()) if outputs > 1 else mse_loss(logits[:, 0], (target - model.shift).float() / model.scale)
        return loss, f"loss {loss.item():.3f}"

    training.run(session, batches, loss_of)
    if session.rank == 0:
        model.save(config["out"], c.annotator, c.base, c.dtype)


def teach(config: TeachConfig, inputs: dict[str, Folder], out: dict[str, Folder], *, seed: int) -> dict[str, Any]:
    """Write `teacher/`: prompts/ (PEFT adapters), classifier/, teacher.json.

    1. Train the generation prompt.  2. Train the annotator.  3. Calibrate and assess the annotator on validation.
    """
    import ray

    from retrikt_ray.runtime.training import launch
    from retrikt_ray.teacher.base import start_of

    workers = plan(config, "teach", cpus=2, grow=False)
    teacher, task = out["teacher"], Task.read(inputs["task"])
    common = {
        "section": config.model_dump(),
        "task": task,
        "task_folder": inputs["task"],
        "out": teacher,
        "seed": seed,
    }
    scratch = out["scratch"]

    # 1. the generation prompt
    if not teacher.exists("prompts/000/adapter_config.json") or not teacher.exists(
        f"prompts/{len(task.conditions) - 1:03d}/adapter_config.json"
    ):
        launch(prompt_loop, common, workers, scratch, "prompt", "teach: prompt")
    # 2. the annotator
    if not teacher.exists("classifier/classifier.json"):
        launch(annotator_loop, common, workers, scratch, "annotator", "teach: annotator")

    # 3. calibrate and assess it
    judged = ray.get(ray.remote(num_cpus=workers.cpus, num_gpus=workers.gpus)(assess).remote(teacher, inputs["task"], workers.threads))
    starts = Counter(start_of(joined(text)) for text in texts_of(inputs["task"].read_table("train.parquet")))
    teacher.write_json(
        "teacher.json",
        {
            "base": config.base,
            "dtype": config.dtype,
            "chat": config.chat,
            "starts": starts,
            "annotator": config.annotator,
            "max_tokens": config.max_tokens,
        }
        | judged,
    )
    return {"annotator": config.annotator, "parameters": judged["parameters"], "validation": judged["validation"]}


def assess(teacher: Folder, task: Folder, threads: int) -> dict[str, Any]:
    """Calibrate the annotator on validation, and tell its score there and its size (a Ray task)."""
    import torch

    from retrikt_ray.task.metrics import score
    from retrikt_ray.teacher.annotator import Annotator

    torch.set_num_threads(threads)
    table = task.read_table("validation.parquet")
    texts, truth = texts_of(table), table["value"].to_pylist()
    model = Annotator.load(teacher)
    if model.head.out_features > 1:
        card = (teacher / "classifier").read_json("classifier.json")
        temperature = model.calibrate(texts, torch.tensor([int(v) for v in truth]))
        (teacher / "classifier").write_json("classifier.json", card | {"temperature": temperature})
    probs, _ = model.annotate(texts)
    return {
        "parameters": model.parameter_count,
        "temperature": model.temperature,
        "validation": round(score(Task.read(task).metric, truth, probs.numpy()), 4),
    }

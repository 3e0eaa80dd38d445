"""Training of the generation prompt and the annotator, without Ray: what is learnt, and what is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file

from retrikt_ray.runtime import training
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.training import Session, Solo
from retrikt_ray.task.card import Task
from retrikt_ray.teacher import lm
from retrikt_ray.teacher.annotator import Annotator
from retrikt_ray.teacher.prefix import run_prefix
from retrikt_ray.teacher.prompts import load_prompts
from retrikt_ray.teacher.teach import TeachConfig, annotator_loop, assess, prompt_loop

TASK = Task("films", "classification", ("bad", "good"), ("bad", "good"), "{label}: ", False, "accuracy")
GOOD = ["a fine film with a warm heart", "the cast was very fine, the music warm", "never was a plot so brave and so sharp", "a brave play"]
BAD = ["the play is dull and the cast is weak", "a cold and slow film that nobody needs", "a dull one", "so weak a plot and so slow"]


class Alone(Solo):
    """In place of a Session: no Ray, no checkpoints."""

    def __init__(self, config: dict[str, Any], optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], total: int) -> None:
        super().__init__(optimizer, total, config["seed"])


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "Session", Alone)


@pytest.fixture
def task(tmp_path: Path) -> Folder:
    folder = Folder.at(tmp_path / "task")
    TASK.write(folder)
    texts, values = BAD + GOOD, [0.0] * 4 + [1.0] * 4
    table = pa.table({"text": texts, "text_pair": pa.nulls(8, pa.string()), "condition": [int(v) for v in values], "value": values})
    for split in ("train", "validation"):
        folder.write_table(f"{split}.parquet", table)
    return folder


def settings(task: Folder, out: Folder, **keys: Any) -> dict[str, Any]:
    section = TeachConfig(**({"max_tokens": 16, "shared_tokens": 2, "class_tokens": 2, "prompt_batch": 4, "annotator_batch": 4} | keys))
    return {"section": section.model_dump(), "task": TASK, "task_folder": task, "out": out, "seed": 0}


def test_prompts_are_trained_by_likelihood_and_contrast(
    tiny_lm: str, task: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of the first batch by hand: nats a token, and the contrast's weight times softplus of how much likelier the rival's prompt is."""
    found: dict[float, Any] = {}
    for contrast in (0.0, 2.0):
        with monkeypatch.context() as patch:
            patch.setattr(training, "run", lambda session, batches, loss_of, c=contrast: found.update({c: (batches[0], loss_of)}))
            prompt_loop(settings(task, Folder.at(tmp_path / "teacher"), base=tiny_lm, contrast=contrast))
    batch, loss_of = found[0.0]
    base, soft = lm.Base.load(tiny_lm, "float32"), load_prompts(Folder.at(tmp_path / "teacher"))  # as they were before training
    own = torch.tensor([int(row >= 4) for row in batch])
    ids, mask = base.encode([(BAD + GOOD)[row] for row in batch], 16, after=TASK.prefixes[0])
    prefix = run_prefix(base, soft, TASK.prefixes)
    with torch.no_grad():
        right, wrong = ((lm.log_probs_of(lm.score(base, prefix, c, ids, mask)[0], ids) * mask).sum(1) for c in (own, 1 - own))
        plain, both = loss_of(0, batch)[0], found[2.0][1](0, batch)[0]
    torch.testing.assert_close(plain, -(right / mask.sum(1)).mean(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both - plain, 2 * torch.nn.functional.softplus(wrong - right).mean(), rtol=1e-4, atol=1e-4)


def test_prompts_are_written_as_adapters_that_share_tokens(tiny_lm: str, task: Folder, tmp_path: Path) -> None:
    out = Folder.at(tmp_path / "teacher")
    prompt_loop(settings(task, out, base=tiny_lm, prompt_epochs=2))
    soft = load_prompts(out)
    assert soft.shape == (2, 4, 32) and torch.equal(soft[0, :2], soft[1, :2]) and not torch.equal(soft[0, 2:], soft[1, 2:])
    card = out.read_json("prompts/001/adapter_config.json")
    assert (card["num_virtual_tokens"], card["token_dim"], card["base_model_name_or_path"]) == (4, 32, tiny_lm)


@pytest.mark.parametrize("kind", ["base", "encoder"])
def test_words_are_hidden_from_a_language_model_in_training(
    kind: str, tiny_lm: str, tiny_encoder: str, task: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few rows are soon learnt by heart. The first token always stays, and an encoder sees all."""
    hidden: list[int] = []
    forward = Annotator.forward

    def watched(self: Annotator, ids: torch.Tensor, mask: torch.Tensor) -> Any:
        real = ids != self.tokenizer.pad_token_id
        hidden.append(int((real & (mask == 0)).sum()))
        assert mask[:, 0].all()
        return forward(self, ids, mask)

    monkeypatch.setattr(Annotator, "forward", watched)
    named = kind if kind == "base" else tiny_encoder
    annotator_loop(settings(task, Folder.at(tmp_path / "teacher"), base=tiny_lm, annotator=named, annotator_epochs=4))
    assert len(hidden) == 8 and (sum(hidden) > 0) == (kind == "base")


def test_the_annotator_is_calibrated_and_told_of(tiny_encoder: str, task: Folder, tmp_path: Path) -> None:
    teacher = Folder.at(tmp_path / "teacher")
    annotator_loop(settings(task, teacher, annotator=tiny_encoder, annotator_epochs=12, annotator_learning_rate=0.01))
    assert Annotator.load(teacher).temperature == 1.0
    found = assess(teacher, task, 1)
    model = Annotator.load(teacher)
    assert found["validation"] == 1.0 and found["parameters"] == model.parameter_count
    # On rows that it was trained on it is always right, so the sharpest temperature there is fits best.
    assert found["temperature"] == model.temperature == 0.5


class Killed(Alone):
    """Leaves a checkpoint after some steps, and ends."""

    left: dict[str, torch.Tensor]

    def __init__(self, config: dict[str, Any], optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], total: int) -> None:
        super().__init__(config, optimizer, tensors, total)
        Killed.left, self.folder = tensors, config["out"].local()

    def done(self, step: int, note: str = "") -> None:
        if step == 3:
            save_file({k: v.detach().clone() for k, v in Killed.left.items()}, self.folder / "tensors.safetensors")
            save_file(training.optimizer_state(self.optimizer), self.folder / "optimizer.safetensors")
            (self.folder / "state.json").write_text('{"step": 3, "notes": {}}')
            raise KeyboardInterrupt


class Resumed(Alone):
    """Begins at the checkpoint."""

    def __init__(self, config: dict[str, Any], optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], total: int) -> None:
        super().__init__(config, optimizer, tensors, total)
        self.tensors = tensors
        Session._restore(self, config["out"].local())  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_that_were_killed_and_resumed_are_the_same(
    dtype: str, tiny_lm: str, task: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit; and a checkpoint holds no weight of the base."""
    keys = {"base": tiny_lm, "dtype": dtype, "annotator_epochs": 4, "annotator_learning_rate": 0.01}
    whole, killed = Folder.at(tmp_path / "whole"), Folder.at(tmp_path / "killed")
    (tmp_path / "killed").mkdir()
    annotator_loop(settings(task, whole, **keys))
    monkeypatch.setattr(training, "Session", Killed)
    with pytest.raises(KeyboardInterrupt):
        annotator_loop(settings(task, killed, **keys))
    kept = {n for n in Killed.left if "lora" not in n}
    assert kept == {"head.weight", "head.bias", "shift", "scale"} and len(Killed.left) == 4 + 2 * 14
    monkeypatch.setattr(training, "Session", Resumed)
    annotator_loop(settings(task, killed, **keys))
    for name in ("head.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json", "classifier.json"):
        assert killed.read_bytes(f"classifier/{name}") == whole.read_bytes(f"classifier/{name}"), name
    trained = load_file(tmp_path / "whole/classifier/adapter/adapter_model.safetensors")
    assert any(t.abs().max() > 1e-3 for n, t in trained.items() if "lora_B" in n)  # they begin at 0


def test_adapters_learn(tiny_lm: str, task: Folder, tmp_path: Path) -> None:
    """More than the head alone does: with a rate of nearly nothing for the adapters the loss on the rows stays higher."""
    texts, truth = [(text, None) for text in BAD + GOOD], torch.tensor([0] * 4 + [1] * 4)
    losses = []
    for name, rate in (("head", 1e-9), ("adapters", 3e-3)):  # at which the head has the same rate
        teacher = Folder.at(tmp_path / name)
        annotator_loop(settings(task, teacher, base=tiny_lm, annotator_epochs=16, annotator_learning_rate=rate))
        probs = Annotator.load(teacher).annotate(texts)[0]
        losses.append(torch.nn.functional.nll_loss(probs.log(), truth).item())
    assert losses[1] < 0.5 * losses[0]

"""Soft prompts: their start, their folder, and that PEFT reads them as we do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from retrikt_ray.runtime.folders import Folder
from retrikt_ray.teacher import lm
from retrikt_ray.teacher.base import Base
from retrikt_ray.teacher.prefix import run_prefix
from retrikt_ray.teacher.prompts import SoftPrompt, from_texts, load_prompts, save_prompts


@pytest.fixture(scope="module")
def base(tiny_lm: str) -> Base:
    return Base.load(tiny_lm, "auto")


def test_soft_prompt_joins_shared_and_own_tokens() -> None:
    prompt = SoftPrompt(torch.tensor([[1.0, 2.0]]), torch.tensor([[[3.0, 4.0]], [[5.0, 6.0]]]))
    assert prompt().tolist() == [[[1, 2], [3, 4]], [[1, 2], [5, 6]]]
    prompt().sum().backward()
    assert prompt.shared.grad.tolist() == [[2, 2]] and prompt.own.grad.tolist() == [[[1, 1]], [[1, 1]]]  # shared by both conditions


def test_prompts_start_at_tokens_of_the_texts(base: Base) -> None:
    texts = [["warm", "warm warm"], ["dull"], []]
    prompt = from_texts(base, texts, shared=40, own=4, seed=1)
    assert prompt.shared.shape == (40, 32) and prompt.own.shape == (3, 4, 32)

    def tokens(rows: torch.Tensor) -> set[int]:
        same = (rows.detach()[:, None] == base.embed.weight[None]).all(-1)
        assert same.any(1).all()
        return set(same.int().argmax(1).tolist())

    def spelled(*words: str) -> set[int]:
        return {t for w in words for t in base.tokenizer(w, add_special_tokens=False)["input_ids"]}

    warm, dull = spelled("warm", "warm warm"), spelled("dull")
    assert tokens(prompt.own[0]) <= warm and tokens(prompt.own[1]) <= dull
    assert tokens(prompt.own[2]) == {base.eos}  # a condition without texts
    assert tokens(prompt.shared) <= warm | dull | {base.eos}
    assert all(tokens(prompt.shared) & group for group in (warm, dull, {base.eos}))  # from all conditions
    again, other = from_texts(base, texts, 40, 4, seed=1), from_texts(base, texts, 40, 4, seed=2)
    assert torch.equal(prompt(), again()) and not torch.equal(prompt(), other())


def test_save_and_load(tmp_path: Path) -> None:
    prompts = torch.randn(12, 3, 8, generator=torch.Generator().manual_seed(0))
    folder = Folder.at(tmp_path)
    save_prompts(folder, prompts, "some/base")
    folder.write_json("teacher.json", {})  # other files of the artifact are no prompts
    assert torch.equal(load_prompts(folder), prompts)  # twelve: the order must be that of numbers
    assert sorted(p.name for p in (tmp_path / "prompts").iterdir())[-1] == "011"
    assert (folder / "prompts/004").read_json("adapter_config.json")["base_model_name_or_path"] == "some/base"


def test_peft_reads_the_adapters_and_gives_the_same_logits(base: Base, tiny_lm: str, tmp_path: Path) -> None:
    templates, text = ["good: ", "not so very good: "], "a fine film"
    prompts = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(5))
    save_prompts(Folder.at(tmp_path), prompts, tiny_lm)
    ids, mask = base.encode([text, text], 20)
    with torch.no_grad():
        ours, _ = lm.score(base, run_prefix(base, prompts, templates), torch.tensor([0, 1]), ids, mask)
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    for i, template in enumerate(templates):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_lm), str(tmp_path / "prompts" / f"{i:03d}")).eval()
        head = [tokenizer.bos_token_id, *tokenizer(template.rstrip(), add_special_tokens=False)["input_ids"]]
        line = torch.tensor([head + ids[i].tolist()])
        with torch.no_grad():
            theirs = model(input_ids=line, attention_mask=torch.ones_like(line)).logits[0]
        first = 5 + len(head) - 1  # virtual tokens come first; the last token of the template predicts the first of the text
        assert_close(ours[i], theirs[first:-1], rtol=0, atol=2e-5)
    assert (ours[0] - ours[1]).abs().max() > 0.1

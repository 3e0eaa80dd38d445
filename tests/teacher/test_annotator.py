"""The annotator: pooling by hand, answers that no batch changes, and its folder."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn.functional import layer_norm
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.settings import ConfigError
from retrikt_ray.task.texts import Text
from retrikt_ray.teacher.annotator import Annotator, is_lm, max_pool, mean_pool
from retrikt_ray.teacher.base import Base

TEXTS: list[Text] = [
    ("a fine film", None),
    ("the cast was very weak and the plot so slow that nobody needs a film", None),
    ("dull", None),
    ("never a brave play", None),
    ("warm music", None),
]
PAIRS: list[Text] = [("a fine film", "a warm play"), ("dull", "the cast was very fine and the plot brave"), ("never slow", "cold")]


@pytest.fixture(params=["prompt", "base", "encoder"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def start(tiny_lm: str, tiny_encoder: str):
    """Makes a classifier with a head wide enough for clear answers; returns it and the `kind` of the config."""

    def make(kind: str, outputs: int = 3, max_tokens: int = 16, base: str = tiny_lm, dtype: str = "auto") -> tuple[Annotator, str]:
        torch.manual_seed(4)
        name = tiny_encoder if kind == "encoder" else kind
        model = Annotator.start(name, base, dtype, outputs, 5, max_tokens)
        torch.nn.init.normal_(model.head.weight, std=0.1)
        torch.nn.init.normal_(model.head.bias)
        if model.soft is not None:
            torch.nn.init.normal_(model.soft)
        return model.eval(), name

    return make


def test_mean_pool() -> None:
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]], [[5.0, 7.0], [9.0, 9.0], [9.0, 9.0]]])
    assert mean_pool(hidden, torch.tensor([[1, 1, 0], [1, 0, 0]])).tolist() == [[2.0, 4.0], [5.0, 7.0]]


def test_max_pool() -> None:
    hidden = torch.tensor([[[-1.0, -8.0], [-3.0, -6.0], [0.0, 0.0]]])
    assert max_pool(hidden, torch.tensor([[1, 1, 0]])).tolist() == [[-1.0, -6.0]]  # the padding's 0 is larger, and counts for nothing


def test_is_lm(start) -> None:
    assert [is_lm(start(k)[0].backbone.config) for k in ("prompt", "base", "encoder")] == [True, True, False]


def test_an_encoder_head_reads_the_mean_of_the_last_states(start) -> None:
    model, _ = start("encoder")
    ids, mask = model.encode(TEXTS[:1])
    assert model.tokenizer.convert_ids_to_tokens(ids[0].tolist()) == ["[CLS]", "a", "fine", "film", "[SEP]"]
    with torch.no_grad():
        logits, pooled = model(ids, mask)
        want = model.backbone(input_ids=ids).last_hidden_state[0].mean(0)
    assert_close(pooled[0], want, rtol=0, atol=1e-5)
    assert_close(logits[0], model.head.weight @ want + model.head.bias, rtol=0, atol=1e-5)


def test_an_lm_head_reads_token_embeddings_and_the_middle_layer(start) -> None:
    model, _ = start("base")
    ids, mask = model.encode(TEXTS[:1])
    with torch.no_grad():
        logits, pooled = model(ids, mask)
        states = model.backbone(input_ids=ids, output_hidden_states=True).hidden_states  # embeddings, layer 1, layer 2
        parts = [states[0][0].mean(0), states[1][0].mean(0), states[1][0].max(0).values]
        want = torch.cat([layer_norm(p, (32,)) for p in parts])
    assert pooled.shape == (1, 96)
    assert_close(pooled[0], want, rtol=0, atol=1e-5)
    assert_close(logits[0], model.head.weight @ want + model.head.bias, rtol=0, atol=1e-5)


@pytest.fixture
def tall_lm(tiny_lm: str, tmp_path: Path) -> str:
    """The tiny model with seven layers in place of two."""
    config = AutoConfig.from_pretrained(tiny_lm, num_hidden_layers=7)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "tall")
    AutoTokenizer.from_pretrained(tiny_lm).save_pretrained(tmp_path / "tall")
    return str(tmp_path / "tall")


@pytest.mark.parametrize("kind", ["prompt", "base"])
def test_layers_that_the_head_does_not_read_are_left_out(start, kind: str, tall_lm: str, tmp_path: Path) -> None:
    model, _ = start(kind, base=tall_lm)
    whole = AutoModel.from_pretrained(tall_lm)
    assert len([n for n, _ in model.named_modules() if n.endswith(".self_attn")]) == 5  # the head reads what leaves the fourth
    ids, mask = model.encode(TEXTS[:1])
    with torch.no_grad():
        soft = torch.zeros(0, 32) if model.soft is None else model.soft
        embeds = torch.cat([soft, whole.get_input_embeddings()(ids)[0]])
        states = whole(inputs_embeds=embeds[None], output_hidden_states=True).hidden_states
        tokens, middle = (states[i][0, len(soft) :] for i in (0, 4))
        want = torch.cat([layer_norm(p, (32,)) for p in (tokens.mean(0), middle.mean(0), middle.max(0).values)])
        assert_close(model(ids, mask)[1][0], want, rtol=0, atol=1e-5)

    # the size that is told is of the model that writes the texts, whole; with its own base at hand, no weights are read a second time
    own = model.head.weight.numel() + model.head.bias.numel() + soft.numel()
    assert model.parameter_count == own + sum(p.numel() for p in whole.parameters())
    folder = Folder.at(tmp_path / "teacher")
    model.save(folder, kind, tall_lm, "auto")
    base = Base.load(tall_lm)
    for again in (Annotator.load(folder), Annotator.load(folder, base)):
        assert again.parameter_count == model.parameter_count
        assert_close(again.annotate(TEXTS), model.annotate(TEXTS), rtol=0, atol=2e-5)
    assert len(base.model.model.layers) == 7


def test_soft_tokens_stand_in_front_and_are_not_pooled(start) -> None:
    model, _ = start("prompt")
    ids, mask = model.encode(TEXTS[:1])
    with torch.no_grad():
        _, pooled = model(ids, mask)
        tokens = model.backbone.get_input_embeddings()(ids)
        states = model.backbone(inputs_embeds=torch.cat([model.soft[None], tokens], 1), output_hidden_states=True).hidden_states
        middle = states[1][0, 5:]
        want = torch.cat([layer_norm(p, (32,)) for p in (tokens[0].mean(0), middle.mean(0), middle.max(0).values)])
    assert_close(pooled[0], want, rtol=0, atol=1e-5)


def test_annotate_does_not_depend_on_batch_or_order(start, kind: str) -> None:
    model, _ = start(kind)
    probs, embeddings = model.annotate(TEXTS, batch=64)
    assert probs.shape == (5, 3) and embeddings.shape == (5, 32 if kind == "encoder" else 96)
    assert_close(probs.sum(1), torch.ones(5), rtol=0, atol=1e-5)
    assert (torch.cdist(probs, probs) + torch.eye(5)).min() > 1e-3  # the texts do differ
    model.train()  # no dropout in answers, whatever went before
    for order, batch in (([0, 1, 2, 3, 4], 1), ([4, 2, 0, 1, 3], 2), ([1, 0], 64)):
        again, vectors = model.annotate([TEXTS[i] for i in order], batch=batch)
        assert_close(again, probs[order], rtol=0, atol=1e-5)
        assert_close(vectors, embeddings[order], rtol=0, atol=1e-5)


def test_annotate_by_hand(start) -> None:
    """Weights of zero leave the bias: classes get its softmax, values are scaled and shifted back."""
    model, _ = start("encoder", outputs=2)
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data = torch.tensor([0.0, math.log(3.0)])
    assert_close(model.annotate(TEXTS[:2])[0], torch.tensor([[0.25, 0.75], [0.25, 0.75]]), rtol=0, atol=1e-6)
    model, _ = start("encoder", outputs=1)
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data.fill_(2.0)
    model.shift.fill_(10.0)
    model.scale.fill_(0.5)
    assert model.annotate(TEXTS[:2])[0].tolist() == [[11.0], [11.0]]  # 2 * 0.5 + 10


def test_calibrate_by_hand(start) -> None:
    """Odds of 9 : 1 for class 1, which is right in 3 of 4 texts: odds of 3 : 1 would be right, and 9^(1/2) = 3."""
    model, _ = start("encoder", outputs=2)
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data = torch.tensor([0.0, math.log(9.0)])
    texts, truth = TEXTS[:4], torch.tensor([1, 0, 1, 1])
    # On the grid 0.5 * 1.1^i, the neighbours of 2 are 1.899 (p = 0.7607) and 2.089 (0.7411). Log loss -3/4 log p - 1/4 log(1 - p):
    # 0.205119 + 0.357548 = 0.562667 and 0.224713 + 0.337843 = 0.562556.
    assert model.calibrate(texts, truth) == model.temperature == 2.089
    p = 1 / (1 + 9 ** (-1 / 2.089))
    assert_close(model.annotate(texts[:1])[0], torch.tensor([[1 - p, p]]), rtol=0, atol=1e-6)
    assert model.calibrate(texts, truth) == 2.089  # from the plain answers, whatever was fitted before


def test_pairs(start) -> None:
    encoder, _ = start("encoder")
    ids, mask = encoder.encode(PAIRS[:1])
    assert encoder.tokenizer.decode(ids[0]) == "[CLS] a fine film [SEP] a warm play [SEP]" and mask.all()
    base, _ = start("base")
    assert base.tokenizer.decode(base.encode(PAIRS[:1])[0][0]) == "a fine film\na warm play"  # an LM sees two lines
    for model in (encoder, base):
        probs, _ = model.annotate(PAIRS, batch=2)
        assert_close(model.annotate(PAIRS[::-1], batch=3)[0], probs.flip(0), rtol=0, atol=1e-5)
        other = model.annotate([(a, "weak") for a, _ in PAIRS])[0]
        assert (probs - other).abs().amax(1).min() > 1e-3  # the second text counts


def test_long_texts_are_cut(start, kind: str) -> None:
    model, _ = start(kind, max_tokens=6)
    ids, mask = model.encode([("a fine film " * 20, None), ("dull", None)])
    assert ids.shape == (2, 6) and mask[0].all() and not mask[1].all()
    assert mask[1].tolist() == sorted(mask[1].tolist(), reverse=True)  # padding is on the right


def test_what_is_trained(start, kind: str) -> None:
    model, _ = start(kind)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {"head.weight", "head.bias"} < trainable
    assert any(n.startswith("backbone.") for n in trainable) == (kind != "prompt")
    assert all("lora" in n for n in trainable if n.startswith("backbone.")) == (kind in ("prompt", "base"))
    assert set(model.trained()) == trainable | {"shift", "scale"}
    assert ("soft" in trainable) == (kind == "prompt")
    model.train()
    model(*model.encode(TEXTS))[0].sum().backward()
    assert all(p.grad is not None for p in ([model.soft] if kind == "prompt" else []))


def test_a_text_without_a_single_token_left_gives_finite_numbers(start, kind: str) -> None:
    """Token dropout in training may hide all tokens of a short text."""
    model, _ = start(kind)
    ids, mask = model.encode(TEXTS[2:4])
    mask[0] = 0
    logits, pooled = model(ids, mask)
    assert logits.isfinite().all() and pooled.isfinite().all()
    logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_save_and_load(start, kind: str, where: str, tmp_path: Path, tiny_lm: str) -> None:
    model, name = start(kind)
    with torch.no_grad():  # as if trained
        if kind != "prompt":
            for p in model.backbone.parameters():
                if p.requires_grad:
                    p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    folder = Folder.at(tmp_path / "teacher") if where == "disk" else Folder.at(f"memory://{tmp_path}/teacher")
    model.save(folder, name, tiny_lm, "auto")
    again = Annotator.load(folder)
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    assert_close(again.annotate(TEXTS), model.annotate(TEXTS), rtol=0, atol=2e-5 if kind == "base" else 1e-6)
    assert again.max_tokens == 16 and again.parameter_count == model.parameter_count == sum(p.numel() for p in again.parameters())
    parts = {n.split("/")[1] for n in folder.files() if n.count("/") == 2}  # a frozen backbone is not written again
    assert parts == {"prompt": set(), "base": {"adapter"}}.get(kind, {"backbone"})
    assert not any(n.endswith((".bin", ".pt", ".pkl")) for n in folder.files())


def test_a_fitted_temperature_is_loaded(start, tmp_path: Path, tiny_lm: str) -> None:
    model, name = start("encoder")
    folder = Folder.at(tmp_path)
    model.save(folder, name, tiny_lm, "auto")
    assert Annotator.load(folder).temperature == 1.0
    card = (folder / "classifier").read_json("classifier.json")
    (folder / "classifier").write_json("classifier.json", card | {"temperature": 2.5})  # as the stage does after validation
    model.temperature = 2.5
    assert_close(Annotator.load(folder).annotate(TEXTS), model.annotate(TEXTS), rtol=0, atol=1e-6)


def test_save_and_load_of_a_regressor(start, tmp_path: Path, tiny_lm: str) -> None:
    model, name = start("base", outputs=1)
    model.shift.fill_(2.5)
    model.scale.fill_(1.5)
    folder = Folder.at(tmp_path)
    model.save(folder, name, tiny_lm, "auto")
    again = Annotator.load(folder)
    assert (again.shift.item(), again.scale.item()) == (2.5, 1.5)
    assert_close(again.annotate(TEXTS), model.annotate(TEXTS), rtol=0, atol=1e-6)


def test_untrained_adapters_change_no_answer(start, tiny_lm: str) -> None:
    model, _ = start("base")
    assert model.adapted and not start("encoder")[0].adapted and not start("prompt")[0].adapted
    answers = model.annotate(TEXTS)
    model.backbone = AutoModel.from_pretrained(tiny_lm)
    for one, other in zip(answers, model.annotate(TEXTS), strict=True):
        assert_close(one, other, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def tiny_gpt2(tiny_lm: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Its layers keep their weights the other way round, (in, out)."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    torch.manual_seed(2)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3))
    folder = tmp_path_factory.mktemp("tiny_gpt2")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_by_hand(start, family: str, tiny_lm: str, tiny_gpt2: str, tmp_path: Path) -> None:
    """Every linear layer has a pair of matrices, and loaded, its weight is W + B A; nothing else is written, and nothing else changes."""
    base = tiny_lm if family == "llama" else tiny_gpt2
    model, name = start("base", base=base)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(len(n)))
    model.save(Folder.at(tmp_path), name, base, "auto")
    files = {n for n in Folder.at(tmp_path).files() if "tokenizer" not in n}
    adapter = "classifier/adapter/"
    assert files == {
        f"{adapter}adapter_config.json",
        f"{adapter}adapter_model.safetensors",
        "classifier/classifier.json",
        "classifier/head.safetensors",
    }
    written = load_file(tmp_path / adapter / "adapter_model.safetensors")
    # rank 16 for each input and output of four matrices of 32 x 32 and three of 32 x 64; of GPT-2's 32 x 96, 32 x 32, and two of 32 x 128
    each = 16 * (4 * 64 + 3 * 96) if family == "llama" else 16 * (128 + 64 + 2 * 160)
    assert sum(t.numel() for t in written.values()) == 2 * each
    before, after = AutoModel.from_pretrained(base).state_dict(), Annotator.load(Folder.at(tmp_path)).backbone.state_dict()
    assert before.keys() == after.keys()
    changed = set()
    for key, weight in before.items():
        pair = [written.get(f"base_model.model.{key.removesuffix('weight')}lora_{side}.weight") for side in "AB"]
        if pair[0] is None:
            assert torch.equal(after[key], weight), key
        else:
            changed.add(key)
            update = pair[1] @ pair[0]
            assert_close(after[key], weight + (update if family == "llama" else update.T), rtol=0, atol=1e-6)
            assert update.abs().max() > 0.05
    assert len(changed) == (14 if family == "llama" else 8)
    assert_close(Annotator.load(Folder.at(tmp_path)).annotate(TEXTS), model.annotate(TEXTS), rtol=0, atol=2e-5)
    again = PeftModel.from_pretrained(AutoModel.from_pretrained(base), str(tmp_path / adapter)).eval()  # as anyone would load it
    ids, mask = model.encode(TEXTS)
    with torch.inference_mode():
        read = {"input_ids": ids, "attention_mask": mask}
        assert_close(again(**read).last_hidden_state, model.backbone(**read).last_hidden_state, rtol=0, atol=1e-5)


def test_a_base_with_adapters_stays_in_its_own_dtype(start) -> None:
    """What an optimizer updates is float32."""
    model, _ = start("base", dtype="bfloat16")
    found = {(p.requires_grad, p.dtype) for p in model.parameters()}
    assert found == {(False, torch.bfloat16), (True, torch.float32)}
    model.train()
    model(*model.encode(TEXTS))[0].sum().backward()
    reached = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    assert reached and all(p.grad.isfinite().all() for n, p in model.named_parameters() if n in reached)


def test_adapters_have_one_order_on_the_disk(start, tmp_path: Path, tiny_lm: str) -> None:
    """PEFT keeps the layers' names in a set: an artifact's digest must not depend on Python's hashes."""
    model, name = start("base")
    model.save(Folder.at(tmp_path), name, tiny_lm, "auto")
    names = Folder.at(tmp_path).read_json("classifier/adapter/adapter_config.json")["target_modules"]
    assert names == sorted(names) and len(names) == 14


def test_a_base_that_is_not_there_any_more_is_named(start, tmp_path: Path, tiny_lm: str) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(tiny_lm, moved)
    model, name = start("base", base=str(moved))
    model.save(Folder.at(tmp_path / "teacher"), name, str(moved), "auto")
    shutil.rmtree(moved)
    with pytest.raises(ConfigError, match=r"the annotator of .*/teacher stands on '.*/moved', which cannot be read here"):
        Annotator.load(Folder.at(tmp_path / "teacher"))

"""The base as a checkpoint: tokens, ends, chat."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from retrikt_ray.runtime.settings import ConfigError
from retrikt_ray.teacher.base import Base, PackedLinear, model_path, pack, pad_rows, pick_dtype

TURNS = (
    "{% for m in messages %}<bos>{{ m.role }}: {{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}<bos>assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def base(tiny_lm: str) -> Base:
    return Base.load(tiny_lm, "auto")


def changed(tiny_lm: str, folder: Path, template: str | None = None, **generation: object) -> str:
    """A copy with a chat template, and other settings of generation."""
    shutil.copytree(tiny_lm, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | generation))
    return str(folder)


def test_the_base_is_frozen_and_known(base: Base, tiny_lm: str) -> None:
    assert not any(p.requires_grad for p in base.model.parameters()) and not base.model.training
    assert (base.dim, base.eos, len(base.tokenizer)) == (32, 2, 300)
    # Two tables 300 x 32; per layer 4 of 32 x 32, 3 of 32 x 64, 2 norms; the last norm.
    assert model_path(tiny_lm) == tiny_lm and model_path("embedded").endswith("retrikt_ray/quickstart/model")


def test_pick_dtype() -> None:
    assert pick_dtype("auto", torch.device("cpu")) is torch.float32
    assert pick_dtype("auto", torch.device("cuda")) is torch.bfloat16
    assert pick_dtype("float16", torch.device("cpu")) is torch.float16


def test_encode_and_decode(base: Base) -> None:
    one = base.tokenizer("a fine film", add_special_tokens=False)["input_ids"]
    size = len(one)
    ids, mask = base.encode(["a fine film", ""], 10)
    assert ids.tolist() == [[*one, base.eos], [base.eos] * (size + 1)]
    assert mask.tolist() == [[1] * (size + 1), [1] + [0] * size]
    assert base.decode(ids, mask) == ["a fine film", ""]
    cut, cut_mask = base.encode(["a fine film"], 2)
    assert cut.tolist() == [one[:2]] and cut_mask.tolist() == [[1, 1]]  # no <eos> where the text was cut
    assert base.encode(["a fine film"], 10, end=False)[0].tolist() == [one]
    assert base.encode([""], 10, end=False)[0].tolist() == [[base.eos]]  # a model needs at least one token


@pytest.mark.parametrize("space", ["byte-level", "metaspace"])
def test_a_text_behind_a_template_has_the_tokens_that_it_has_there(space: str, base: Base) -> None:
    """The template's last space belongs to the text's first word: apart, it would be a token that no text was ever written after."""
    if space == "metaspace":  # as Llama's: every text begins with a space of the tokenizer's own
        vocabulary = {"<eos>": 0, "▁a": 1, "▁fine": 2, "▁good": 3, ":": 4, "▁": 5, "fine": 6, "<unk>": 7, "a": 8}
        plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        plain.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Split(":", "isolated")])
        plain.decoder = decoders.Metaspace()
        base = replace(base, tokenizer=PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>", unk_token="<unk>"))
    tokens = base.tokenizer
    for template in ("good: ", "good:"):
        ids, mask = base.encode(["fine a", "a"], 9, after=template)
        head = tokens(template.rstrip(), add_special_tokens=False)["input_ids"]
        for text, row, length in zip(("fine a", "a"), ids.tolist(), mask.sum(1).tolist(), strict=True):
            assert row[: length - 1] == tokens(template + text, add_special_tokens=False)["input_ids"][len(head) :]
            assert row[length - 1] == base.eos
            assert base.decode(torch.tensor([row[: length - 1]]), torch.ones(1, length - 1))[0].strip() == text


def test_pad_rows() -> None:
    ids, mask = pad_rows([[5], [6, 7, 8]], 9, torch.device("cpu"))
    assert ids.tolist() == [[5, 9, 9], [6, 7, 8]] and mask.tolist() == [[1, 0, 0], [1, 1, 1]]


def test_lines_in_front_do_not_end_a_text_and_a_pair_has_two(base: Base) -> None:
    tokens = base.tokenizer
    for text, lines, ends in (
        ("\n\n", 1, False),
        ("\na film\n", 1, True),
        ("a film\n", 2, False),
        ("a film\na play\n", 2, True),
        ("a film", 1, False),
    ):
        assert base.ends(tokens(text, add_special_tokens=False)["input_ids"], lines) is ends
    assert base.ends([base.eos], 2)


def test_every_end_of_the_checkpoint_ends_a_text(tiny_lm: str, tmp_path: Path) -> None:
    base = Base.load(changed(tiny_lm, tmp_path / "lm", eos_token_id=[7, 2]))
    assert base.stops == {2, 7} and base.eos == 2
    assert base.ends([5, 7], 1) and base.ends([5, 2], 1) and not base.ends([7, 5], 1)


def test_a_base_without_an_end_is_refused(tiny_lm: str, tmp_path: Path) -> None:
    folder = Path(changed(tiny_lm, tmp_path / "lm", eos_token_id=None))
    for name in ("config.json", "tokenizer_config.json"):
        card = json.loads((folder / name).read_text())
        card.pop("eos_token_id", None)
        card.pop("eos_token", None)
        (folder / name).write_text(json.dumps(card))
    with pytest.raises(ConfigError, match=r"lm: neither its tokenizer nor its generation_config.json names an end-of-text token"):
        Base.load(str(folder))


def test_an_instructed_model_is_talked_to_in_chat(tiny_lm: str, tmp_path: Path) -> None:
    """Its template ends a turn as the model ends a text; that of a base model with a borrowed template does not."""
    instructed = Base.load(changed(tiny_lm, tmp_path / "instructed", TURNS), chat="auto")
    borrowed = Base.load(changed(tiny_lm, tmp_path / "borrowed", TURNS.replace("<eos>", "<pad>")), chat="auto")
    assert instructed.chat and not borrowed.chat and not Base.load(tiny_lm, chat="auto").chat
    assert instructed.tokenizer.decode(instructed.head("positive: ")) == "<bos>user: positive:<eos><bos>assistant: "
    assert borrowed.tokenizer.decode(borrowed.head("positive: ")) == "<bos>positive:"
    # The answer begins anew: its tokens are those of the text alone.
    assert torch.equal(instructed.encode(["fine"], 9, after="positive: ")[0], instructed.encode(["fine"], 9)[0])
    assert instructed.head("") == borrowed.head("") == [1]  # nothing said: the bare model
    assert not Base.load(str(tmp_path / "instructed"), chat=False).chat
    with pytest.raises(ConfigError, match=r"teach\.chat is true, but its tokenizer has no chat template"):
        Base.load(tiny_lm, chat=True)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_hollow_base_has_vectors_and_tokens_alone(sharded: bool, base: Base, tmp_path: Path) -> None:
    base.model.save_pretrained(tmp_path, max_shard_size="20KB" if sharded else "1GB")
    base.tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists() is sharded
    hollow = Base.hollow(str(tmp_path))
    assert torch.equal(hollow.embed.weight, base.embed.weight) and hollow.stops == base.stops
    assert hollow.head("a: ") == base.head("a: ")
    held = [parameter for parameter in hollow.model.parameters() if parameter.device.type != "meta"]
    assert sum(parameter.numel() for parameter in held) == base.embed.weight.numel()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN, as on some Macs, has no packed layers")
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("outputs", "inputs"), [(256, 672), (672, 256), (8192, 256), (64, 33)])
def test_packed_layers_give_a_row_the_same_bits_in_any_batch(outputs: int, inputs: int, exact: bool) -> None:
    """What texts that do not depend on their batch hang on: a matrix product is free to sum otherwise for another number of rows."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(inputs, outputs)).requires_grad_(False)
    x, usual = torch.randn(64, inputs), torch.backends.mkldnn.matmul.fp32_precision
    plain = model(x)
    pack(model, exact)
    assert isinstance(model[0], PackedLinear)
    packed, threads = model(x), torch.get_num_threads()
    rounded = model[0].products == "bf16"
    assert rounded is (not exact and bool(torch.cpu.get_capabilities().get("amx_bf16")))
    torch.testing.assert_close(packed, plain, **({"rtol": 0.0, "atol": 0.01} if rounded else {}))
    assert not rounded or float((packed - plain).abs().max()) > 1e-5
    assert torch.backends.mkldnn.matmul.fp32_precision == usual
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert all(torch.equal(model(x[:rows]), packed[:rows]) for rows in (1, 2, 3, 8, 15, 16, 17, 33, 63))
    finally:
        torch.set_num_threads(threads)

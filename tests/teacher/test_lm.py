"""Prefixes with cached keys and values, scoring and sampling, against plain forward passes and hand-worked cases."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast

from retrikt_ray.teacher import lm
from retrikt_ray.teacher.lm import Base, InverseCDF

TEMPLATES = ["a: ", "the play is very dull: ", ""]  # prefixes of three lengths
TEXTS = ["a fine film", "never", "the cast was weak and the plot slow", "warm"]
ROWS = [2, 0, 1, 1]  # condition of each text


@pytest.fixture(scope="module")
def base(tiny_lm: str) -> Base:
    return Base.load(tiny_lm, "auto")


@pytest.fixture(scope="module")
def soft(base: Base) -> Tensor:
    return torch.randn(len(TEMPLATES), 5, base.dim, generator=torch.Generator().manual_seed(3))


def plain_forward(base: Base, soft: Tensor, condition: int, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Logits and states that predict each of `ids`: one unpadded pass over [soft, <bos>, template, text], without a cache."""
    head = [base.tokenizer.bos_token_id, *base.tokenizer(TEMPLATES[condition].rstrip(), add_special_tokens=False)["input_ids"]]
    embeds = torch.cat([soft[condition], base.embed(torch.tensor(head + ids))])[None]
    out = base.model(inputs_embeds=embeds, use_cache=False, output_hidden_states=True)
    first = soft.shape[1] + len(head) - 1
    return out.logits[0, first:-1], out.hidden_states[-1][0, first:-1]


def test_the_base_is_frozen_and_known(base: Base, tiny_lm: str) -> None:
    assert not any(p.requires_grad for p in base.model.parameters()) and not base.model.training
    assert (base.dim, base.eos, len(base.tokenizer)) == (32, 2, 300)
    # Two tables 300 x 32; per layer 4 of 32 x 32, 3 of 32 x 64, 2 norms; the last norm.
    assert lm.model_path(tiny_lm) == tiny_lm and lm.model_path("embedded").endswith("retrikt_ray/quickstart/model")


def test_pick_dtype() -> None:
    assert lm.pick_dtype("auto", torch.device("cpu")) is torch.float32
    assert lm.pick_dtype("auto", torch.device("cuda")) is torch.bfloat16
    assert lm.pick_dtype("float16", torch.device("cpu")) is torch.float16


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


def test_a_prefix_ends_before_its_space(base: Base, soft: Tensor) -> None:
    with_space, without = (lm.prefix_embeddings(base, soft[:1], [t])[0] for t in ("positive: ", "positive:"))
    assert torch.equal(with_space, without)
    assert len(with_space) == 5 + 1 + len(base.tokenizer("positive:", add_special_tokens=False)["input_ids"])


def test_pad_rows() -> None:
    ids, mask = lm.pad_rows([[5], [6, 7, 8]], 9, torch.device("cpu"))
    assert ids.tolist() == [[5, 9, 9], [6, 7, 8]] and mask.tolist() == [[1, 0, 0], [1, 1, 1]]


def test_prefix_and_score_equal_a_plain_forward(base: Base, soft: Tensor) -> None:
    ids, mask = base.encode(TEXTS, 20)
    with torch.no_grad():
        prefix = lm.run_prefix(base, soft, TEMPLATES)
        logits, hidden = lm.score(base, prefix, torch.tensor(ROWS), ids, mask)
        assert logits.shape == (4, ids.shape[1], 300) and hidden.shape == (4, ids.shape[1], 32)
        for i, condition in enumerate(ROWS):
            real = int(mask[i].sum())
            want_logits, want_hidden = plain_forward(base, soft, condition, ids[i, :real].tolist())
            assert_close(logits[i, :real], want_logits, rtol=0, atol=2e-5)
            assert_close(hidden[i, :real], want_hidden, rtol=0, atol=2e-5)
    lengths = [5 + 1 + len(base.tokenizer(t.rstrip(), add_special_tokens=False)["input_ids"]) for t in TEMPLATES]
    assert prefix.mask.sum(1).tolist() == lengths and len(set(lengths)) == 3


def test_gradients_reach_the_soft_prompt(base: Base, soft: Tensor) -> None:
    """The gradient through cached keys and values is that of the plain forward."""
    ids, mask = base.encode(TEXTS, 20)
    cached, plain = soft.clone().requires_grad_(), soft.clone().requires_grad_()
    logits, _ = lm.score(base, lm.run_prefix(base, cached, TEMPLATES), torch.tensor(ROWS), ids, mask)
    (lm.log_probs_of(logits, ids) * mask).sum().backward()
    for i, condition in enumerate(ROWS):
        row = ids[i, : int(mask[i].sum())]
        lm.log_probs_of(plain_forward(base, plain, condition, row.tolist())[0][None], row[None]).sum().backward()
    assert (plain.grad.abs().amax((1, 2)) > 0.1).all()  # every condition is used by some text
    assert_close(cached.grad, plain.grad, rtol=1e-4, atol=1e-4)


def test_gradients_do_not_depend_on_the_threads() -> None:
    """Sixteen texts share four prefixes: their gradients must be summed in one order. The packaged LM is large enough for PyTorch to cut the work."""
    base = Base.load("embedded", "float32")
    start = torch.randn(4, 16, base.dim, generator=torch.Generator().manual_seed(0)) * 0.1
    ids, mask = base.encode([f"{text} and {other}" for text in TEXTS for other in TEXTS], 24)
    rows = torch.arange(16) % 4
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2, 4):
            torch.set_num_threads(count)
            soft = start.clone().requires_grad_()
            prefix, (own,) = lm.run_prefix_of(base, soft, ["one: ", "two: ", "three: ", "four: "], rows)
            logits, hidden = lm.score(base, prefix, own, ids, mask)
            (lm.log_probs_of(logits, ids) * mask).sum().add(hidden.sum()).backward()
            found.append(soft.grad)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_log_probs_of() -> None:
    logits = torch.log(torch.tensor([[[0.25, 0.75], [0.5, 0.5]]])) + 3
    assert_close(lm.log_probs_of(logits, torch.tensor([[1, 0]])), torch.log(torch.tensor([[0.75, 0.5]])), rtol=0, atol=1e-6)


def test_inverse_cdf_picks_the_token_where_the_sum_passes_u() -> None:
    inf = math.inf
    scores = torch.tensor(
        [
            [0.2, 0.5, 0.3, 0.0],  # sums 0.2, 0.7, 1: u = 0.1 -> 0
            [0.2, 0.5, 0.3, 0.0],  # 0.45 -> 1
            [0.2, 0.5, 0.3, 0.0],  # 0.75 -> 2
            [0.0, 0.5, 0.0, 0.5],  # u = 0 must not pick a token without probability -> 1
            [0.5, 0.0, 0.0, 0.5],  # nor u at a step of the sum -> 3
            [0.5, 0.5, 0.0, 0.0],  # nor the largest u -> 1
        ]
    ).log()
    u = torch.tensor([0.1, 0.45, 0.75, 0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    got = InverseCDF(torch.stack([torch.full_like(u, 0.99), u], 1), start=7)(torch.zeros(6, 8, dtype=torch.long), scores)  # step 8 - 7 = 1
    assert got.argmax(-1).tolist() == [0, 1, 2, 1, 3, 1]
    assert (got.sort(-1).values == torch.tensor([-inf, -inf, -inf, 0.0])).all()


def test_inverse_cdf_never_passes_the_last_likely_token() -> None:
    """Sums of many rounded numbers end a little under or over 1; the largest u must still hit a token that has probability."""
    scores = torch.randn(40, 1000, generator=torch.Generator().manual_seed(0))
    scores[:, -5:] = -math.inf
    u = torch.full((40, 1), 1 - 2**-53, dtype=torch.float64)
    assert (InverseCDF(u, 0)(torch.zeros(40, 0, dtype=torch.long), scores).argmax(-1) <= 994).all()


def test_uniforms_depend_on_the_seed_alone() -> None:
    u = lm.uniforms([5, 2**63 + 7, 5], 4)
    assert u.shape == (3, 4) and u.dtype == torch.float64 and (u >= 0).all() and (u < 1).all()
    assert torch.equal(u[0], u[2]) and not torch.equal(u[0], u[1])
    assert torch.equal(lm.uniforms([2**63 + 7], 2)[0], u[1, :2])
    assert not torch.equal(lm.uniforms([5 + 2**32], 4)[0], u[0])  # all 64 bits count


def test_a_text_does_not_depend_on_its_batch(base: Base, soft: Tensor) -> None:
    with torch.no_grad():
        prefix = lm.run_prefix(base, soft, TEMPLATES)
    conditions, seeds = [0, 1, 2, 1, 0, 2, 1], [11, 12, 13, 14, 15, 16, 12]

    def texts(rows: list[int]) -> list[list[int]]:
        ids, mask = lm.sample(
            base, prefix, torch.tensor([conditions[r] for r in rows]), [seeds[r] for r in rows], 24, temperature=0.9, top_p=0.95
        )
        return [row[m.bool()].tolist() for row, m in zip(ids, mask, strict=True)]

    together = texts(list(range(7)))
    assert [texts([r])[0] for r in range(7)] == together
    assert texts([6, 4, 2, 0]) == [together[r] for r in (6, 4, 2, 0)]
    assert together[1] == together[6] and len({tuple(t) for t in together}) == 6  # equal seed and condition, equal text


def test_mask_ends_with_the_first_eos(base: Base, soft: Tensor) -> None:
    with torch.no_grad():
        prefix = lm.run_prefix(base, soft, TEMPLATES)
    ids, mask = lm.sample(base, prefix, torch.arange(900) % 3, list(range(900)), 12)
    assert ids.shape == mask.shape == (900, 12)
    ended = 0
    for row, m in zip(ids.tolist(), mask.tolist(), strict=True):
        size = row.index(base.eos) + 1 if base.eos in row else 12
        ended += base.eos in row
        assert m == [1] * size + [0] * (12 - size)
    assert 5 <= ended < 900
    # A row that ends at once is fed on with its batch; the mask hides it.
    prefix.last_logits[:, base.eos] += 5
    ids, mask = lm.sample(base, prefix, torch.arange(90) % 3, list(range(90)), 12)
    at_once = ids[:, 0] == base.eos
    assert ids[at_once].ne(base.eos).any() and mask[at_once].tolist() == [[1] + [0] * 11] * int(at_once.sum())


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.5)])
def test_frequencies_match_the_probabilities(base: Base, soft: Tensor, temperature: float, top_k: int, top_p: float) -> None:
    """First tokens, and second tokens after the commonest first one, of 6,000 texts: each within 4.5 standard errors."""
    count = 6000
    with torch.no_grad():
        prefix = lm.run_prefix(base, soft, TEMPLATES)
        ids, _ = lm.sample(base, prefix, torch.zeros(count, dtype=torch.long), list(range(count)), 2, temperature, top_k, top_p)
        first = int(ids[:, 0].mode().values)
        after = ids[ids[:, 0] == first, 1]
        logits = plain_forward(base, soft, 0, [first, 0])[0]  # what predicts the first and the second token
    for tokens, row in ((ids[:, 0], logits[0]), (after, logits[1])):
        p = expected(row, temperature, top_k, top_p)
        assert len(tokens) > 200 and not p[tokens].eq(0).any()
        share = torch.bincount(tokens, minlength=300) / len(tokens)
        error = torch.sqrt(p * (1 - p) / len(tokens)) + 1 / len(tokens)
        assert ((share - p).abs() < 4.5 * error).all()


def expected(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Probabilities after temperature, cut to the top_k likeliest tokens, or to the fewest that hold top_p of the mass."""
    p = torch.softmax(logits.double() / temperature, -1)
    cut, total = torch.zeros_like(p), 0.0
    for count, token in enumerate(p.argsort(descending=True).tolist()):
        if (top_k and count == top_k) or total >= top_p:
            break
        cut[token] = p[token]
        total += float(p[token])
    return cut / cut.sum()


def test_sampling_heeds_no_settings_of_the_checkpoint(base: Base, soft: Tensor, tiny_lm: str, tmp_path: Path) -> None:
    """Many checkpoints ship a repetition penalty or the like; texts must come from the distribution that `score` gives."""
    shutil.copytree(tiny_lm, tmp_path / "lm")
    path = tmp_path / "lm" / "generation_config.json"
    settings = {"do_sample": True, "repetition_penalty": 5.0, "min_new_tokens": 11, "no_repeat_ngram_size": 1, "top_k": 2}
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    def texts(base: Base) -> Tensor:
        with torch.no_grad():
            prefix = lm.run_prefix(base, soft, TEMPLATES)
        return lm.sample(base, prefix, torch.zeros(20, dtype=torch.long), list(range(20)), 12)[0]

    assert torch.equal(texts(Base.load(str(tmp_path / "lm"))), texts(base))


def test_prefixes_of_a_batch_alone_give_the_same_scores(tiny_lm: str) -> None:
    base = Base.load(tiny_lm, "float32")
    soft = torch.randn(3, 2, base.dim, generator=torch.Generator().manual_seed(1), requires_grad=True)
    templates = ["a: ", "a longer one: ", "b: "]
    ids, mask = base.encode(["a fine film", "dull"], 8)
    conditions = torch.tensor([2, 0])
    whole = lm.score(base, lm.run_prefix(base, soft, templates), conditions, ids, mask)[0]
    prefix, (rows,) = lm.run_prefix_of(base, soft, templates, conditions)
    assert rows.tolist() == [1, 0] and len(prefix.mask) == 2
    part = lm.score(base, prefix, rows, ids, mask)[0]
    torch.testing.assert_close(part, whole, rtol=0, atol=1e-5)
    part.sum().backward()
    assert soft.grad is not None and soft.grad[1].abs().sum() == 0 and soft.grad[[0, 2]].abs().sum() > 0

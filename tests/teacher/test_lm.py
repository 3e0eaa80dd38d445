"""Prefixes with cached keys and values, scoring and sampling, against plain forward passes and hand-worked cases."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from retrikt_ray.teacher import lm
from retrikt_ray.teacher.base import Base, pad_rows
from retrikt_ray.teacher.prefix import prefix_embeddings, run_prefix, run_prefix_of
from retrikt_ray.teacher.sampling import Sampling

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


def test_a_prefix_ends_before_its_space(base: Base, soft: Tensor) -> None:
    with_space, without = (prefix_embeddings(base, soft[:1], [t])[0] for t in ("positive: ", "positive:"))
    assert torch.equal(with_space, without)
    assert len(with_space) == 5 + 1 + len(base.tokenizer("positive:", add_special_tokens=False)["input_ids"])


def test_prefix_and_score_equal_a_plain_forward(base: Base, soft: Tensor) -> None:
    ids, mask = base.encode(TEXTS, 20)
    with torch.no_grad():
        prefix = run_prefix(base, soft, TEMPLATES)
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
    logits, _ = lm.score(base, run_prefix(base, cached, TEMPLATES), torch.tensor(ROWS), ids, mask)
    (lm.log_probs_of(logits, ids) * mask).sum().backward()
    for i, condition in enumerate(ROWS):
        row = ids[i, : int(mask[i].sum())]
        lm.log_probs_of(plain_forward(base, plain, condition, row.tolist())[0][None], row[None]).sum().backward()
    assert (plain.grad.abs().amax((1, 2)) > 0.1).all()  # every condition is used by some text
    assert_close(cached.grad, plain.grad, rtol=1e-4, atol=1e-4)


def test_gradients_are_the_same_each_time_on_any_number_of_threads() -> None:
    """Sixteen texts share four prefixes: their gradients must be summed in one order. The packaged LM is large enough for PyTorch to cut the work.

    Products are cut by the number of threads on some CPUs, which moves last digits; one number gives one result.
    """
    base = Base.load("embedded", "float32")
    start = torch.randn(4, 16, base.dim, generator=torch.Generator().manual_seed(0)) * 0.1
    ids, mask = base.encode([f"{text} and {other}" for text in TEXTS for other in TEXTS], 24)
    rows = torch.arange(16) % 4
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2, 2, 4, 4):
            torch.set_num_threads(count)
            soft = start.clone().requires_grad_()
            prefix, (own,) = run_prefix_of(base, soft, ["one: ", "two: ", "three: ", "four: "], rows)
            logits, hidden = lm.score(base, prefix, own, ids, mask)
            (lm.log_probs_of(logits, ids) * mask).sum().add(hidden.sum()).backward()
            found.append(soft.grad)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[i], found[j]) for i, j in ((1, 2), (1, 3), (4, 5)))
    assert all(torch.allclose(found[0], other, atol=1e-5 * float(found[0].abs().max())) for other in found)


def test_log_probs_of() -> None:
    logits = torch.log(torch.tensor([[[0.25, 0.75], [0.5, 0.5]]])) + 3
    assert_close(lm.log_probs_of(logits, torch.tensor([[1, 0]])), torch.log(torch.tensor([[0.75, 0.5]])), rtol=0, atol=1e-6)


def test_a_text_does_not_depend_on_its_batch(base: Base, soft: Tensor) -> None:
    with torch.no_grad():
        prefix = run_prefix(base, soft, TEMPLATES)
    conditions, seeds = [0, 1, 2, 1, 0, 2, 1], [11, 12, 13, 14, 15, 16, 12]

    def texts(rows: list[int]) -> list[list[int]]:
        asked = torch.tensor([conditions[r] for r in rows])
        return lm.sample(base, prefix, asked, [seeds[r] for r in rows], 24, Sampling(0.9, 0, 0.95), 1)

    together = texts(list(range(7)))
    assert [texts([r])[0] for r in range(7)] == together
    assert texts([6, 4, 2, 0]) == [together[r] for r in (6, 4, 2, 0)]
    assert together[1] == together[6] and len({tuple(t) for t in together}) == 6  # equal seed and condition, equal text


def test_a_text_ends_with_its_first_eos_or_line_end(base: Base, soft: Tensor) -> None:
    with torch.no_grad():
        prefix = run_prefix(base, soft, TEMPLATES)
    written = lm.sample(base, prefix, torch.arange(900) % 3, list(range(900)), 12, Sampling(), 1)
    assert len(written) == 900
    for ids in written:
        text = base.tokenizer.decode(ids[:-1], skip_special_tokens=True).lstrip()
        assert 1 <= len(ids) <= 12 and base.eos not in ids[:-1] and "\n" not in text
        assert base.ends(ids, 1) or len(ids) == 12
    how = [ids[-1] == base.eos for ids in written if base.ends(ids, 1)]
    assert 5 <= sum(how) < len(how) < 900  # some by <eos>, some by their line, some not at all
    prefix.last_logits[:, base.eos] += 5
    short = lm.sample(base, prefix, torch.arange(90) % 3, list(range(90)), 12, Sampling(), 1)
    assert 5 <= sum(ids == [base.eos] for ids in short) < 90


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.5)])
def test_frequencies_match_the_probabilities(base: Base, soft: Tensor, temperature: float, top_k: int, top_p: float) -> None:
    """First tokens, and second tokens after the commonest first one, of 6,000 texts: each within 4.5 standard errors."""
    count = 6000
    with torch.no_grad():
        prefix = run_prefix(base, soft, TEMPLATES)
        rows = torch.zeros(count, dtype=torch.long)
        written = lm.sample(base, prefix, rows, list(range(count)), 2, Sampling(temperature, top_k, top_p), 9)
        ids, _ = pad_rows(written, -1, base.device)
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

    def texts(base: Base) -> list[list[int]]:
        with torch.no_grad():
            prefix = run_prefix(base, soft, TEMPLATES)
        return lm.sample(base, prefix, torch.zeros(20, dtype=torch.long), list(range(20)), 12, Sampling(), 1)

    other = Base.load(str(tmp_path / "lm"))
    assert texts(other) == texts(base)
    other.shares = False  # written by `generate`
    assert texts(other) == texts(base)


def test_prefixes_of_a_batch_alone_give_the_same_scores(tiny_lm: str) -> None:
    base = Base.load(tiny_lm, "float32")
    soft = torch.randn(3, 2, base.dim, generator=torch.Generator().manual_seed(1), requires_grad=True)
    templates = ["a: ", "a longer one: ", "b: "]
    ids, mask = base.encode(["a fine film", "dull"], 8)
    conditions = torch.tensor([2, 0])
    whole = lm.score(base, run_prefix(base, soft, templates), conditions, ids, mask)[0]
    prefix, (rows,) = run_prefix_of(base, soft, templates, conditions)
    assert rows.tolist() == [1, 0] and len(prefix.mask) == 2
    part = lm.score(base, prefix, rows, ids, mask)[0]
    torch.testing.assert_close(part, whole, rtol=0, atol=1e-5)
    part.sum().backward()
    assert soft.grad is not None and soft.grad[1].abs().sum() == 0 and soft.grad[[0, 2]].abs().sum() > 0

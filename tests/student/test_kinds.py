"""The convolution student: what it sees, that its table of filters gives the same, and how large it is."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from making.tiny_run import WORDS, make_student
from tokenizers.processors import TemplateProcessing
from torch.testing import assert_close

from retrikt_ray.student import kinds
from retrikt_ray.student.inherit import count_tokens, new_student, reduce, token_vectors
from retrikt_ray.student.kinds import KINDS, Convolution, Static, StudentConfig, tokenized
from retrikt_ray.student.model import Student, StudentModel
from retrikt_ray.task.texts import Text
from retrikt_ray.teacher.annotator import Annotator

FILTERS = Convolution.FILTERS


def hand_model(pair: bool = False) -> StudentModel:
    """Rows 1 and 2 of the table are (4, 0) and (0, -4); filter 0 takes x of the token before and -y of the token after, filter 1 is its bias."""
    model = StudentModel(StudentConfig(kind="convolution", vocabulary=3, full_vocabulary=3, dim=2, outputs=2, pair=pair))
    with torch.no_grad():
        model.token_map.copy_(torch.arange(3))
        model.embedding.weight.copy_(torch.tensor([[8.0, 8.0], [4.0, 0.0], [0.0, -4.0]]))
        model.importance.weight.zero_()
        model.filters.weight.zero_()
        model.filters.bias.zero_()
        model.filters.weight[0] = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, -1.0])
        model.filters.bias[1] = 0.5
        model.filters.bias[2] = -1.0
    return model.eval()


def vector_of(model: StudentModel, *tokens: int) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens]), torch.ones(1, len(tokens)))[1][0]


@pytest.mark.parametrize("training", [False, True])
def test_the_order_of_words_counts(training: bool) -> None:
    model = hand_model().train(training)
    # 1 1 2: in the middle 4 before and 4 after; 2 1 1: at the end 4 before. The mean is the same, (8, -4) / 3.
    for tokens, most in (((1, 1, 2), 8.0), ((2, 1, 1), 4.0), ((2, 2, 1), 4.0)):
        vector = vector_of(model, *tokens)
        assert vector[2:5].tolist() == [most, 0.5, 0.0]  # a filter that is below 0 says 0
        assert vector.shape == (2 + FILTERS,)
    assert_close(vector_of(model, 1, 1, 2)[:2], torch.tensor([8 / 3, -4 / 3]))
    assert vector_of(model, 1)[2] == 0  # beyond a text there is nothing
    assert vector_of(model, 2, 1)[2] == 0 and vector_of(model, 1, 2)[2] == 4


@pytest.mark.parametrize("training", [False, True])
def test_what_is_masked_is_not_there(training: bool) -> None:
    """A padded token, or one that training hides: neither in the mean nor in a window."""
    model = hand_model().train(training)
    with torch.no_grad():
        _, vectors = model(torch.tensor([[1, 1, 2], [1, 1, 2], [1, 1, 2]]), torch.tensor([[1, 1, 0], [1, 0, 1], [0, 0, 0]]))
    assert vectors[:, 2].tolist() == [4, 0, 0] and vectors[:, 3].tolist() == [0.5, 0.5, 0]
    assert vectors[0, :2].tolist() == [4, 0] and vectors[1, :2].tolist() == [2, -2] and vectors[2].eq(0).all()


def test_features_of_a_pair() -> None:
    model, one = hand_model(pair=True), torch.ones(1, 2)
    with torch.no_grad():
        logits, vector = model(torch.tensor([[1, 2]]), one, torch.tensor([[2, 1]]), one)
    a, b = (vector_of(hand_model(), *tokens) for tokens in ((1, 2), (2, 1)))
    each = torch.cat([a, b, (a - b).abs(), a * b])
    assert_close(vector[0, : len(each)], each, rtol=0, atol=1e-6)
    # Both texts have the same tokens: nothing is missed, all is matched by itself.
    assert vector[0, len(each) :].tolist() == [0, 0, 8, 8, 0, 0] * 2
    assert (a[2], b[2]) == (4, 0) and logits.shape == (1, 2)


@pytest.mark.parametrize("training", [False, True])
def test_what_a_text_of_a_pair_lacks(training: bool) -> None:
    """Token 1 is (4, 0), token 2 (0, -4), token 3 (3, -4): cosines 0 to each other, 0.6 and 0.8 with the third. Token 2 counts three times."""
    model = StudentModel(StudentConfig(kind="static", vocabulary=4, full_vocabulary=4, dim=2, outputs=2, pair=True)).train(training)
    with torch.no_grad():
        model.token_map.copy_(torch.arange(4))
        model.embedding.weight.copy_(torch.tensor([[8.0, 8.0], [4.0, 0.0], [0.0, -4.0], [3.0, -4.0]]))
        model.importance.weight.copy_(torch.tensor([[5.0], [0.0], [math.log(3)], [0.0]]))
        # 1 2 beside 3 1 and a token that is not there.
        _, vector = model(torch.tensor([[1, 2]]), torch.ones(1, 2), torch.tensor([[3, 1, 2]]), torch.tensor([[1, 1, 0]]))
    # Of the first: 1 is there itself; 2 is matched at 0.8, so 3 x 0.2 of weight 4 is missed: (0, -4) x 0.15.
    first = [0, -0.6, 8 * (1 + 3 * 0.8) / 4, 8 / 4, 8 * 0.2, 8 * 0.6]
    # Of the second: 3 is matched by 2 at 0.8: 0.2 of weight 2, (3, -4) x 0.1.
    second = [0.3, -0.4, 8 * 1.8 / 2, 8 / 2, 8 * 0.2, 8 * 0.2]
    assert_close(vector[0, 8:], torch.tensor(first + second), rtol=0, atol=5e-3)  # to the grid of `units`


def random_student(seed: int, pair: bool = False) -> Student:
    tokenizer = make_student(pair, 2, 0).tokenizer
    torch.manual_seed(seed)
    size = len(tokenizer)
    model = StudentModel(
        StudentConfig(kind="convolution", vocabulary=size, full_vocabulary=size, dim=8, outputs=2, pair=pair, max_tokens=32)
    )
    with torch.no_grad():
        model.token_map.copy_(torch.arange(size))
        for p in model.parameters():
            p.normal_()
    return Student(model.eval(), tokenizer)


def random_texts(count: int, pair: bool = False) -> list[Text]:
    rng = np.random.default_rng(count)
    return [(" ".join(rng.choice(WORDS, rng.integers(1, 31))), " ".join(rng.choice(WORDS, 3)) if pair else None) for _ in range(count)]


def both_ways(model: StudentModel, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The filters by product and by table, of the tokens that count."""
    with torch.no_grad():
        product, table = model.kind.over_windows(model, ids, mask), model.kind.over_table(model, ids, mask) + model.filters.bias
        return product * mask[..., None], table * mask[..., None]


def test_the_table_gives_what_the_product_gives() -> None:
    """Also with tokens hidden within a text."""
    student = random_student(0)
    ids = torch.randint(0, student.model.config.vocabulary, (20, 15), generator=torch.Generator().manual_seed(1))
    mask = (torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.7).long()
    product, table = both_ways(student.model, ids, mask)
    assert product.max() > 5
    assert_close(table, product, rtol=0, atol=1e-5 * product.max().item())


def test_the_table_is_made_once_and_anew_after_weights_change() -> None:
    student, texts = random_student(0), random_texts(3)
    model = student.model
    student.encode(texts)
    before = model.kind.table(model)
    student.encode(texts[:1])
    assert model.kind.table(model) is before
    ids, mask = student.tensors(texts)["ids"], student.tensors(texts)["mask"]
    other = {k: v.clone() for k, v in random_student(5).model.state_dict().items()}

    def step() -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        model.train()(**student.tensors(texts))[0].sum().backward()
        optimizer.step()
        model.eval()

    def add(name: str) -> None:
        with torch.no_grad():
            model.get_parameter(name).add_(0.5)

    for change in (
        step,
        lambda: add("filters.weight"),
        lambda: add("embedding.weight"),
        lambda: add("filters.bias"),
        lambda: model.load_state_dict(other),
    ):
        was = student.encode(texts)[1]
        change()
        assert_close(*both_ways(model, ids, mask), rtol=1e-4, atol=1e-4)
        assert (student.encode(texts)[1] - was).abs().max() > 1e-4
    assert torch.equal(student.encode(texts)[1], random_student(5).encode(texts)[1])


@pytest.mark.parametrize("pair", [False, True])
def test_a_vector_is_the_same_to_the_last_bit_in_any_batch(pair: bool) -> None:
    student, texts = random_student(0, pair), random_texts(40, pair)
    together = student.encode(texts)[1]
    for batch in (1, 3, 7):
        assert torch.equal(student.encode(texts, batch=batch)[1], together)
    assert torch.equal(student.encode(texts[::-1])[1].flip(0), together)


@pytest.mark.parametrize("kind", ["static", "convolution"])
@pytest.mark.parametrize("pair", [False, True])
def test_a_text_without_a_token_is_answered(kind: str, pair: bool, tiny_encoder: str) -> None:
    """A tokenizer may leave nothing of a text that is not empty, as of a zero-width space; a generated pair's second text may be empty."""
    torch.manual_seed(0)
    teacher = Annotator.start(tiny_encoder, "", "auto", 2, 0, 16).eval()
    student = new_student(kind, teacher, count_tokens(teacher.tokenizer, [[("a fine film", None)]]), 5000, 1, pair)
    blank = ("\u200b", "" if pair else None)
    answers, vectors = student.encode([blank])
    assert_close(answers, torch.softmax(student.model.head.bias.detach(), 0)[None])
    assert vectors.eq(0).all()
    beside = student.encode([("a fine film", "dull" if pair else None), blank])
    assert_close((beside[0][1:], beside[1][1:]), (answers, vectors))


# how large


def size_of(dim: int, vocabulary: int, outputs: int, pair: bool) -> int:
    config = StudentConfig(kind="convolution", vocabulary=vocabulary, full_vocabulary=2, dim=dim, outputs=outputs, pair=pair)
    return StudentModel(config).parameter_count


def test_size_by_hand() -> None:
    # dim 32 as of a static student. Filters 64 * (3 * 32 + 1) = 6208, head 2 * (32 + 64 + 1) = 194; (131072 - 6402) // 33 = 3777 tokens.
    assert Convolution.size(131072, 100_000, 2, False) == (32, 3777)
    # A pair's head: 2 * (4 * 96 + 2 * (32 + 4) + 1) = 914; (131072 - 6208 - 914) // 33 = 3756.
    assert Convolution.size(131072, 100_000, 2, True) == (32, 3756)
    # Few tokens: 1000 (d + 1) + 64 (3 d + 1) + 2 (d + 65) <= 131072: d = (131072 - 1194) / 1194 = 108.8.
    assert Convolution.size(131072, 1000, 2, False) == (108, 1000)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(20_000, 2_000_000), st.integers(2000, 60_000), st.integers(1, 20), st.booleans())
def test_the_budget_is_met(budget: int, tokens: int, outputs: int, pair: bool) -> None:
    """From one-percent students of the smallest teachers to those of large ones; less only where there are not the tokens to spend it on."""
    dim, vocabulary = Convolution.size(budget, tokens, outputs, pair)
    size = size_of(dim, vocabulary, outputs, pair)
    assert size <= budget
    assert size >= 0.97 * budget or (dim, vocabulary) == (256, tokens)


def test_it_starts_from_its_teacher(tiny_encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tokens as the static student's; filters of outputs about as large as a token."""
    monkeypatch.setattr(kinds, "MIN_TOKENS", 4)
    torch.manual_seed(0)
    teacher, chunks = Annotator.start(tiny_encoder, "", "auto", 3, 0, 16).eval(), [[("a a film film", None)], [("a play", None)]]
    student = new_student("convolution", teacher, count_tokens(teacher.tokenizer, chunks), 4000, 1, False)
    model = student.model
    kept = model.token_map.nonzero()[:, 0].tolist()
    assert model.config.vocabulary == 6 and model.parameter_count <= 4000  # [CLS], [SEP], a, film, play and the unknown token
    assert_close(model.embedding.weight[1:].detach(), reduce(token_vectors(teacher, kept), model.config.dim), rtol=0, atol=1e-6)
    assert model.embedding.weight[0].eq(0).all()
    assert model.filters.weight.std().item() == pytest.approx((3 * model.config.dim) ** -0.5, rel=0.1)
    assert KINDS["convolution"] is Convolution and Convolution.rate < Static.rate and Convolution.token_dropout


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("second", [None, ["so weak", "", "the plot was very cold and slow"]])
def test_tokens_are_those_of_the_tokenizer_in_transformers(special: bool, second: list[str] | None) -> None:
    tokenizer = make_student(False, 2, 0).tokenizer
    tokenizer.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(t, tokenizer.convert_tokens_to_ids(t)) for t in ("[CLS]", "[SEP]")],
    )
    first = ["a fine film and a warm play", "", "unheard of"]
    want = tokenizer(first, second, padding=True, truncation=True, max_length=6, add_special_tokens=special, return_tensors="pt")
    ids, mask = tokenized(tokenizer, first, second, 6, special)
    assert ids.tolist() == want["input_ids"].tolist() and mask.tolist() == want["attention_mask"].tolist()
    assert [t.shape for t in tokenized(tokenizer, [""], None, 6, False)] == [(1, 1)] * 2

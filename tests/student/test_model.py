"""The student and how it starts: averages and PCA by hand, its folder, its size."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import AutoModel

from retrikt_ray.student import kinds
from retrikt_ray.student.inherit import count_tokens, new_student, pretrained_student, reduce, token_vectors
from retrikt_ray.student.kinds import Static, StudentConfig
from retrikt_ray.student.model import Student, StudentModel
from retrikt_ray.task.texts import Text
from retrikt_ray.teacher.annotator import Annotator

TEXTS: list[Text] = [
    ("a fine film", None),
    ("the cast was very weak and the plot so slow that nobody needs a film", None),
    ("dull", None),
    ("never a brave play", None),
]
PAIRS: list[Text] = [("a fine film", "a warm play"), ("dull", "the cast was very fine and the plot brave"), ("never slow", "cold")]
LOG3 = math.log(3.0)


def hand_model(pair: bool = False, outputs: int = 2) -> StudentModel:
    """Rows 0 (unknown), 1, 2 of 2 dimensions; of five tokens, 3 is row 1 and 4 is row 2. Row 2 weighs three times row 1."""
    model = StudentModel(StudentConfig(kind="static", vocabulary=3, full_vocabulary=5, dim=2, outputs=outputs, pair=pair))
    with torch.no_grad():
        model.token_map[3], model.token_map[4] = 1, 2
        model.embedding.weight.copy_(torch.tensor([[8.0, 8.0], [4.0, 0.0], [0.0, -4.0]]))
        model.importance.weight.copy_(torch.tensor([[0.0], [0.0], [LOG3]]))
    return model.eval()


def test_average_is_weighted_by_importance_and_mask() -> None:
    model = hand_model()
    got = model.kind.average(model, torch.tensor([[1, 2, 0], [2, 2, 0]]), torch.tensor([[1, 1, 0], [1, 0, 0]]))
    # (1 (4, 0) + 3 (0, -4)) / 4, and row 2 alone
    assert_close(got, torch.tensor([[1.0, -3.0], [0.0, -4.0]]), rtol=0, atol=1e-6)


def test_average_of_nothing_is_zero() -> None:
    model = hand_model()
    assert model.kind.average(model, torch.tensor([[1, 2]]), torch.tensor([[0, 0]])).tolist() == [[0.0, 0.0]]


def test_tokens_are_mapped_and_the_head_reads_the_vector() -> None:
    model = hand_model()
    with torch.no_grad():
        model.head.weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        model.head.bias.copy_(torch.tensor([0.5, 0.0]))
        logits, vector = model(torch.tensor([[3, 4], [1, 3]]), torch.ones(2, 2))
    # Token 1 is not in the table: row 0, of weight 1: ((8, 8) + (4, 0)) / 2.
    assert_close(vector, torch.tensor([[1.0, -3.0], [6.0, 4.0]]), rtol=0, atol=1e-6)
    assert_close(logits, torch.tensor([[1.5, -2.0], [6.5, 10.0]]), rtol=0, atol=1e-6)


def test_pair_features() -> None:
    model = hand_model(pair=True)
    one = torch.ones(1, 1)
    _, vector = model(torch.tensor([[4, 4]]), torch.ones(1, 2), torch.tensor([[3]]), one)
    # a = (0, -4), b = (4, 0): a, b, |a - b|, a b; then of each what the other lacks: all of it. Token 4 weighs 3, shares and misses times 8.
    assert vector.tolist() == [[0, -4, 4, 0, 4, 4, 0, 0, *(0, -4, 0, 0, 8, 24), *(4, 0, 0, 0, 8, 8)]]
    _, vector = model(torch.tensor([[4, 3]]), torch.ones(1, 2), torch.tensor([[4]]), one)
    assert_close(vector[0, 6:8], torch.tensor([0.0, 12.0]), rtol=0, atol=1e-5)  # (1, -3) times (0, -4)
    assert model.head.weight.shape == (2, 20)


def teacher_of(folder: str, lm: str = "", outputs: int = 3) -> Annotator:
    """An annotator with random weights: an encoder from `folder`, or with `lm` the LM itself, fine-tuned."""
    torch.manual_seed(2)
    return Annotator.start("base" if lm else folder, lm, "auto", outputs, 0, 16).eval()


@pytest.fixture
def encoder(tiny_encoder: str) -> Annotator:
    return teacher_of(tiny_encoder)


@pytest.fixture
def lm(tiny_lm: str) -> Annotator:
    return teacher_of("", tiny_lm)


def randomised(student: Student) -> Student:
    with torch.no_grad():
        for p in student.model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return student


@pytest.mark.parametrize("kind", ["static", "convolution", "transformer", "pretrained"])
@pytest.mark.parametrize("teacher", ["encoder", "lm"])
@pytest.mark.parametrize("pair", [False, True])
def test_answers_depend_on_no_batch_and_survive_the_folder(
    kind: str, teacher: str, pair: bool, request: pytest.FixtureRequest, tiny_encoder: str, tmp_path: Path
) -> None:
    texts = PAIRS if pair else TEXTS
    labels = request.getfixturevalue(teacher)
    made = (
        pretrained_student(tiny_encoder, labels, pair)
        if kind == "pretrained"
        else new_student(kind, labels, count_tokens(labels.tokenizer, [texts]), 5000, 1, pair)
    )
    student = randomised(made)
    student.model.train()  # no dropout in answers, whatever went before
    answers, vectors = student.encode(texts)
    assert answers.shape == (len(texts), 3) and len(vectors) == len(texts)
    assert_close(answers.sum(1), torch.ones(len(texts)), rtol=0, atol=1e-5)
    assert_close(vectors.norm(dim=1), torch.ones(len(texts)), rtol=0, atol=1e-5)
    assert (torch.cdist(vectors, vectors) + torch.eye(len(texts))).min() > 1e-2  # the texts do differ
    again, again_vectors = student.encode(texts[::-1], batch=2)
    assert_close((again.flip(0), again_vectors.flip(0)), (answers, vectors), rtol=0, atol=2e-5)
    if pair:
        assert (vectors - student.encode([(a, "weak") for a, _ in texts])[1]).norm(dim=1).min() > 1e-2  # the second text counts

    student.save(str(tmp_path))
    assert_close(Student.load(str(tmp_path)).encode(texts), (answers, vectors), rtol=0, atol=1e-6)
    model = AutoModel.from_pretrained(str(tmp_path)).eval()
    assert isinstance(model, StudentModel) and model.parameter_count == student.model.parameter_count
    with torch.no_grad():
        logits, _ = model(**student.tensors(texts))
    assert_close(torch.softmax(logits, -1), answers, rtol=0, atol=1e-6)
    assert not list(tmp_path.glob("*.bin"))


def test_texts_are_cut_per_text(encoder: Annotator) -> None:
    student = new_student("static", encoder, count_tokens(encoder.tokenizer, [PAIRS]), 5000, 1, True)
    student.model.config.max_tokens = 4
    tensors = student.tensors([("a fine film " * 9, "dull"), ("warm", "cold " * 9)])
    assert {n: x.tolist() for n, x in tensors.items() if "mask" in n} == {
        "mask": [[1, 1, 1, 1], [1, 0, 0, 0]],
        "pair_mask": [[1, 0, 0, 0], [1, 1, 1, 1]],
    }
    assert student.tokenizer.decode(tensors["ids"][0]) == "a fine film a"  # no special tokens in an average


def test_values_are_scaled_back(tiny_encoder: str) -> None:
    teacher = teacher_of(tiny_encoder, outputs=1)
    teacher.shift.fill_(10.0)
    teacher.scale.fill_(0.5)
    student = new_student("static", teacher, count_tokens(teacher.tokenizer, [TEXTS]), 5000, 1, False)
    with torch.no_grad():
        student.model.head.weight.zero_()
        student.model.head.bias.fill_(2.0)
    assert student.encode(TEXTS)[0].tolist() == [[11.0]] * 4  # 2 * 0.5 + 10


def test_a_pretrained_student_of_a_regressor_is_standardised_too(tiny_encoder: str) -> None:
    teacher = teacher_of(tiny_encoder, outputs=1)
    teacher.shift.fill_(10.0)
    teacher.scale.fill_(0.5)
    student = pretrained_student(tiny_encoder, teacher, False)
    assert (student.model.shift.item(), student.model.scale.item()) == (10.0, 0.5)


def test_a_pretrained_student_has_the_encoders_weights(encoder: Annotator, tiny_encoder: str) -> None:
    student = pretrained_student(tiny_encoder, encoder, False)
    batch = student.tensors(TEXTS)
    with torch.no_grad():
        states = AutoModel.from_pretrained(tiny_encoder)(input_ids=batch["ids"], attention_mask=batch["mask"]).last_hidden_state
        vector = student.model.eval()(**batch)[1]
    size = int(batch["mask"][0].sum())
    assert_close(vector[0], states[0, :size].mean(0), rtol=0, atol=1e-5)


# -- how large ---------------------------------------------------------------------------------------------------------


def static_size(dim: int, vocabulary: int, outputs: int, pair: bool) -> int:
    config = StudentConfig(kind="static", vocabulary=vocabulary, full_vocabulary=2, dim=dim, outputs=outputs, pair=pair)
    return StudentModel(config).parameter_count


def test_size_for_by_hand() -> None:
    # sqrt(131072 / 128) = 32: dim 32; head 2 * 33 = 66; (131072 - 66) // 33 = 3969 tokens.
    assert Static.size(131072, 100_000, 2, False) == (32, 3969)
    # With 1000 tokens the rest goes into dimension: (131072 - 1000 - 2) / (1000 + 2) = 129.8.
    assert Static.size(131072, 1000, 2, False) == (129, 1000)
    # A pair's head is six times as wide, and eight shares: 2 * (6 * 32 + 8 + 1) = 402; (131072 - 402) // 33 = 3959.
    assert Static.size(131072, 100_000, 2, True) == (32, 3959)
    assert Static.size(10, 100_000, 2, False) == (8, 256)  # the floor
    assert Static.size(10**9, 1000, 2, False) == (256, 1000)  # the ceiling


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(2646, 10**7), st.integers(2, 60_000), st.integers(1, 6), st.booleans())
def test_size_for_stays_within_budget(budget: int, tokens: int, outputs: int, pair: bool) -> None:
    """From 2,646 parameters on, 256 tokens of 8 dimensions and the widest head here fit: 256 * 9 + 6 * (6 * 8 + 8 + 1)."""
    dim, vocabulary = Static.size(budget, tokens, outputs, pair)
    size = vocabulary * (dim + 1) + outputs * ((6 * dim + 8 if pair else dim) + 1)
    assert size <= budget
    assert 8 <= dim <= 256 and 1 <= vocabulary <= tokens
    if dim < 256 and vocabulary < tokens and vocabulary > kinds.MIN_TOKENS:
        assert size + dim + 1 > budget  # not one more token would fit


def test_size_for_counts_as_the_model_does() -> None:
    for outputs, pair in ((2, False), (1, True)):
        dim, vocabulary = Static.size(50_000, 10_000, outputs, pair)
        assert 50_000 - (dim + 1) < static_size(dim, vocabulary, outputs, pair) <= 50_000


# -- inherited vectors -------------------------------------------------------------------------------------------------


def test_reduce_by_hand() -> None:
    # Around their mean (5, 7): (+-2, 0) and (0, +-1). Scatter diag(8, 2): the axes are x, then y. Norms 2, 2, 1, 1: mean 1.5.
    points = torch.tensor([[7.0, 7.0], [3.0, 7.0], [5.0, 8.0], [5.0, 6.0]])
    third = 1 / 3
    assert_close(reduce(points, 2), torch.tensor([[4 * third, 0], [-4 * third, 0], [0, 2 * third], [0, -2 * third]]), rtol=0, atol=1e-6)
    # One column: 2, -2, 0, 0 of mean norm 1.
    assert_close(reduce(points, 1), torch.tensor([[2.0], [-2.0], [0.0], [0.0]]), rtol=0, atol=1e-6)
    wide = reduce(points, 4)
    assert wide.shape == (4, 4) and wide[:, 2:].eq(0).all() and torch.equal(wide[:, :2], reduce(points, 2))


@pytest.mark.parametrize("axis", [(0.8, 0.6), (0.8, -0.6), (0.6, 0.8), (-0.6, 0.8)])
@pytest.mark.parametrize("flip", [1, -1])
def test_reduce_fixes_the_sign_of_an_axis(axis: tuple[float, float], flip: int) -> None:
    """The component that is largest in size is positive; so the point at +axis has coordinate +1, whatever LAPACK returns."""
    direction = flip * torch.tensor(axis)
    assert_close(reduce(torch.stack([direction, -direction]), 1), torch.tensor([[1.0], [-1.0]]) * flip, rtol=0, atol=1e-6)


def test_count_tokens(encoder: Annotator) -> None:
    counts = count_tokens(encoder.tokenizer, [[("a film", "a play")], [("a", None)]])
    name = encoder.tokenizer.convert_ids_to_tokens
    assert {name(t): n for t, n in counts.items()} == {"[CLS]": 3, "[SEP]": 3, "a": 3, "film": 1, "play": 1}


@pytest.mark.parametrize("teacher", ["encoder", "lm"])
def test_a_token_vector_is_the_teachers_of_that_token_alone(teacher: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(teacher)
    words = ["film", "f", "d"]
    tokens = [model.tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in words]
    spelled = [(w, None) for w in words if len(model.tokenizer(w, add_special_tokens=False)["input_ids"]) == 1]
    got = token_vectors(model, tokens, batch=2)
    keep = [i for i, w in enumerate(words) if (w, None) in spelled]
    assert len(keep) >= 2
    assert_close(got[keep], model.annotate(spelled)[1], rtol=0, atol=1e-5)


def test_a_static_student_starts_from_its_teacher(encoder: Annotator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "MIN_TOKENS", 4)
    texts: list[Text] = [("a a a film film play", None), ("a film film [UNK]", None)]
    # Tokens: a 4, film 4, [CLS] 2, [SEP] 2, play 1, [UNK] 1. The budget asks for 4 rows: unknown and the 3 commonest,
    # ties by id: [CLS] (2) comes before [SEP] (3).
    student = new_student("static", encoder, count_tokens(encoder.tokenizer, [texts]), 8 * 4 + 4 + 3 * 9, 1, False)
    model, ids = student.model, encoder.tokenizer.convert_tokens_to_ids
    assert (model.config.dim, model.config.vocabulary) == (8, 4)
    kept = sorted([ids("a"), ids("film"), ids("[CLS]")])
    assert model.token_map.nonzero()[:, 0].tolist() == kept
    assert model.token_map[torch.tensor(kept)].tolist() == [1, 2, 3]
    assert model.embedding.weight[0].eq(0).all()
    assert_close(model.embedding.weight[1:].detach(), reduce(token_vectors(encoder, kept), 8), rtol=0, atol=1e-6)
    # log(a / (a + p)) with a = 1e-3 and p = 2/14 of [CLS], 4/14 of a and film; log 0.1 for the unknown token.
    want = [math.log(0.1)] + [math.log(1e-3 / (1e-3 + n / 14)) for n in (2, 4, 4)]
    assert_close(model.importance.weight[:, 0].detach(), torch.tensor(want), rtol=0, atol=1e-5)


def test_a_transformer_student_starts_from_its_teacher(lm: Annotator) -> None:
    student = new_student("transformer", lm, count_tokens(lm.tokenizer, [TEXTS]), 40_000, 2, False)
    config, counts = student.model.config, count_tokens(lm.tokenizer, [TEXTS])
    # dim = 32 int(sqrt(40000 / 3 / 24) / 32) = 32 * 0, floored at 32.
    assert (config.kind, config.dim, config.layers, config.vocabulary) == ("transformer", 32, 2, len(counts) + 1)
    assert len(student.model.backbone.encoder.layer) == 2 and config.max_tokens == 16
    table = student.model.backbone.embeddings.word_embeddings.weight
    assert table[0].eq(0).all()
    assert_close(table[1:].detach(), 0.5 * reduce(token_vectors(lm, sorted(counts)), 32), rtol=0, atol=1e-5)


def test_a_transformer_student_grows_with_its_budget(lm: Annotator) -> None:
    # sqrt(400000 / 3 / 24) / 32 = 2.3 heads of 32: dim 64.
    student = new_student("transformer", lm, count_tokens(lm.tokenizer, [TEXTS]), 400_000, 2, False)
    assert student.model.config.dim == 64 and student.model.backbone.config.num_attention_heads == 2
    assert student.model.parameter_count <= 400_000


def test_a_static_student_of_a_pair_task(lm: Annotator) -> None:
    student = new_student("static", lm, count_tokens(lm.tokenizer, [PAIRS]), 3000, 1, True)
    rows, config = len(count_tokens(lm.tokenizer, [PAIRS])) + 1, student.model.config
    assert config.pair and config.vocabulary == rows
    assert config.dim == int((3000 - rows - 3 * 9) / (rows + 18))  # what the tokens leave over, 3 outputs, six-fold head and eight shares
    assert student.encode(PAIRS)[1].shape == (3, 6 * config.dim + 8)
    assert student.model.parameter_count <= 3000


@pytest.mark.parametrize("pair", [False, True])
def test_a_vector_does_not_depend_on_the_texts_beside_it(pair: bool) -> None:
    """To the last bit: added rows are encoded alone, the same rows in a fresh index beside others."""
    from making.tiny_run import WORDS, make_student

    student, rng = make_student(pair, 2, 0), np.random.default_rng(0)
    texts = [(" ".join(rng.choice(WORDS, n)), " ".join(rng.choice(WORDS, 3)) if pair else None) for n in (1, 4, 9, 17, 30)]
    together = student.encode(texts)[1]
    for i, text in enumerate(texts):
        assert torch.equal(student.encode([text])[1][0], together[i])

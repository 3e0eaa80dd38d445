"""Nearness to the labelled rows: by hand, by averaged token vectors, and by the encoder as it was before it was tuned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from retrikt_ray.runtime.folders import Folder
from retrikt_ray.store.nearness import RARE, Averaged, Encoded, encoder_of, nearness, unit, weights_of
from retrikt_ray.teacher.annotator import Annotator


def test_nearness_is_the_mean_of_the_five_nearest() -> None:
    reference = np.array([[1.0, 0], [0.8, 0.6], [0.6, 0.8], [0, 1], [-1, 0], [0, -1]])
    assert nearness(np.array([[1.0, 0], [0, -1]]), reference) == pytest.approx([(1 + 0.8 + 0.6 + 0 + 0) / 5, (1 + 0 + 0 - 0.6 - 0.8) / 5])
    assert nearness(np.array([[1.0, 0]]), reference[:2]) == pytest.approx([0.9])  # fewer than five


def test_unit() -> None:
    assert unit(np.array([[3.0, 4.0], [0.0, 0.0]])).tolist() == [[0.6, 0.8], [0.0, 0.0]]


@pytest.fixture
def encoder(tiny_encoder: str) -> Annotator:
    return Annotator.start(tiny_encoder, "", "float32", 2, 0, 12).eval().requires_grad_(False)


def test_averages_by_hand(encoder: Annotator) -> None:
    """Of two words of which one is as frequent as RARE says, the other not seen at all: weights 1/2 and 1."""
    table = torch.zeros_like(encoder.backbone.get_input_embeddings().weight)
    ids = {word: encoder.tokenizer.convert_tokens_to_ids(word) for word in ("film", "plot", "cast", "warm")}
    table[ids["film"], 0], table[ids["plot"], 1], table[ids["cast"], 2], table[ids["warm"], 3] = 1, 1, 1, 1
    encoder.backbone.get_input_embeddings().weight.copy_(table)
    general = ["cast " * 11] * 90 + ["film"]  # 991 tokens; texts add nothing to film's count
    made = Averaged(encoder, ["warm"] * 9, general)  # 1,000 tokens: film one of them
    assert RARE == 1e-3
    assert made.table[ids["film"], 0] == pytest.approx(0.5) and made.table[ids["plot"], 1] == 1.0
    made.middle = np.zeros(32, np.float32)
    assert made.vectors(["film plot"])[0, :2] == pytest.approx(np.array([0.5, 1]) / np.sqrt(1.25))
    assert made.vectors(["film"])[0] == pytest.approx(np.eye(32)[0])
    assert not made.vectors([""]).any()  # no token


def test_the_middle_of_the_corpus_is_taken_away(encoder: Annotator) -> None:
    general = ["a fine film with a warm heart", "the play is dull", "never was a plot so brave"]
    made = Averaged(encoder, ["the cast is weak"], general)
    found = made.vectors(general)
    made.middle = np.zeros(32, np.float32)
    plain = made.vectors(general)
    assert found == pytest.approx(unit(plain - plain.mean(0)), abs=1e-5) and abs(found - plain).max() > 0.1


def test_the_weights_are_those_of_a_ridge_regression(encoder: Annotator) -> None:
    """Scores that are a sum of features: found again where the penalty is small beside the texts; and little of them where there is one text."""
    rng = np.random.default_rng(0)
    words = ["film", "plot", "cast", "warm", "fine", "dull", "slow", "sharp", "brave", "weak", "never", "play"]
    texts = [" ".join(rng.choice(words, 6)) for _ in range(3000)]
    made = Averaged(encoder, texts[:9], texts)
    assert made(texts[:50]) == pytest.approx(nearness(made.vectors(texts[:50]), made.reference))  # before they are fitted
    scores = made.features(texts) @ np.append(rng.normal(size=32), [0.5, 3.0])
    made.fit(texts, scores)
    assert np.corrcoef(made(texts), scores)[0, 1] > 0.98 and made(texts).mean() == pytest.approx(scores.mean())
    made.fit(texts[:1], scores[:1])
    assert made(texts).std() < 0.3 * scores.std()


def test_fitted_averages_tell_what_the_encoder_finds(encoder: Annotator, tiny_encoder: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    words = ["film", "plot", "cast", "warm", "fine", "dull", "slow", "sharp", "brave", "weak", "never", "play"]
    general = [" ".join(rng.choice(words, rng.integers(2, 8))) for _ in range(600)]
    task, teacher = Folder.at(tmp_path / "task"), Folder.at(tmp_path / "teacher")
    texts = ["a fine film with a warm heart", "the play is dull", "the cast is weak"]
    task.write_table("train.parquet", pa.table({"text": texts, "text_pair": pa.nulls(3, pa.string())}))
    encoder.save(teacher, tiny_encoder, "", "float32")
    teacher.write_json("teacher.json", {"annotator": tiny_encoder, "base": "", "dtype": "float32", "max_tokens": 12})
    quick = Averaged(encoder, texts, general)
    true = Encoded(encoder, [(text, None) for text in texts])([(text, None) for text in general], 64)
    plain = np.corrcoef(quick(general), true)[0, 1]
    quick.weights = weights_of(teacher, task, general, 64)
    assert np.corrcoef(quick(general), true)[0, 1] > max(0.5, plain)


def test_the_texts_themselves_are_the_nearest(encoder: Annotator) -> None:
    texts = ["a fine film with a warm heart", "the play is dull"]
    others = ["never was a plot so brave and so sharp", "positive negative needs"]
    averaged = Averaged(encoder, texts, others + texts)
    assert averaged(texts).min() > averaged(others).max()
    encoded = Encoded(encoder, [(text, None) for text in texts[:1]])
    assert encoded([(texts[0], None)], 64) == pytest.approx([1.0])
    assert encoded([(text, None) for text in others], 64).max() < 0.999


@pytest.mark.parametrize("kind", ["prompt", "base", "encoder"])
def test_an_encoder_of_its_own_is_taken_as_it_was_before(kind: str, tiny_lm: str, tiny_encoder: str, tmp_path: Path) -> None:
    """An LM has no vectors of its own worth comparing: there it is the annotator."""
    name = tiny_encoder if kind == "encoder" else kind
    teacher = Folder.at(tmp_path)
    tuned = Annotator.start(name, tiny_lm, "float32", 2, 2, 12)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.01
    tuned.save(teacher, name, tiny_lm, "float32")
    teacher.write_json("teacher.json", {"annotator": name, "base": tiny_lm, "dtype": "float32", "max_tokens": 12})
    texts = [("a fine film", None), ("the play is dull", None)]
    before, after = Annotator.start(name, tiny_lm, "float32", 2, 2, 12).eval(), Annotator.load(teacher)
    found = encoder_of(teacher).annotate(texts)[1]
    assert torch.equal(found, (before if kind == "encoder" else after).annotate(texts)[1])
    assert not torch.allclose(before.annotate(texts)[1], after.annotate(texts)[1])

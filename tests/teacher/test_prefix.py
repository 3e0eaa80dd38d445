"""How texts begin behind a prefix. Keys, values and gradients: `test_lm.py`."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from retrikt_ray.teacher import lm
from retrikt_ray.teacher.base import Base, start_of
from retrikt_ray.teacher.prefix import begin_like, plain_layers, run_prefix
from retrikt_ray.teacher.sampling import Sampling


def test_start_of() -> None:
    assert [start_of(text) for text in ("A", " a film", "7 days", "“so", "中文", "\n ", "")] == ["Lu", "Ll", "Nd", "Pi", "Lo", "", ""]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_texts_begin_as_often_with_a_letter_or_number_as_the_rows(temperature: float, tiny_lm: str) -> None:
    base = Base.load(tiny_lm, "float32")
    with torch.no_grad():
        prefix = run_prefix(base, torch.randn(2, 4, base.dim, generator=torch.Generator().manual_seed(0)), ["a: ", "b: "])
    # 19 rows, and one shared out by the model's own habits
    like = begin_like(base, prefix, {"Ll": 12, "Nd": 7}, temperature)
    probs, own = (torch.softmax(p.last_logits.double() / temperature, -1) for p in (like, prefix))
    for kind, count in (("Ll", 12), ("Nd", 7), ("Po", 0), ("", 0)):
        of_kind = torch.tensor([start_of(piece) == kind for piece in base.pieces])
        assert torch.allclose(probs[:, of_kind].sum(1), (count + own[:, of_kind].sum(1)) / 20, atol=1e-6)
        inside = [p[:, of_kind] / p[:, of_kind].sum(1, keepdim=True) for p in (probs, own)]
        assert torch.allclose(*inside, atol=1e-6)  # within a kind the model chooses
    assert like.layers is prefix.layers
    rows = torch.arange(800) % 2
    written = lm.sample(base, like, rows, list(range(800)), 3, Sampling(temperature), 1)
    starts = Counter(start_of(base.pieces[ids[0]]) for ids in written)
    assert abs(starts["Ll"] / 800 - 0.62) < 0.08 and abs(starts["Nd"] / 800 - 0.35) < 0.08
    assert len({ids[0] for ids in written}) > 10


def test_a_kind_that_the_model_never_begins_with_stays_out(tiny_lm: str) -> None:
    """Its probability is nought, which no count can make more of; an end of text is no start of any kind."""
    base = Base.load(tiny_lm, "float32")
    assert base.pieces[base.eos] == ""
    with torch.no_grad():
        prefix = run_prefix(base, torch.zeros(1, 4, base.dim), ["a: "])
    digits = torch.tensor([start_of(piece) == "Nd" for piece in base.pieces])
    prefix.last_logits[:, digits] = -torch.inf
    probs = torch.softmax(begin_like(base, prefix, {"Nd": 5, "Ll": 5}, 1.0).last_logits, -1)
    assert not probs.isnan().any() and probs[:, digits].sum() == 0


def test_plain_layers_are_not_made_of_other_memories() -> None:
    assert plain_layers(object(), 3) is None

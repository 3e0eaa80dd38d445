"""The reward model: what it reads of the annotator, the base LM, the task rows and earlier texts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from making.policy_run import FixedAnnotator, make_rows, make_task
from torch.testing import assert_close

from retrikt_ray.policy import reward_model, rewards
from retrikt_ray.policy.reward_model import RewardModel
from retrikt_ray.policy.rewards import RewardWeights
from retrikt_ray.teacher import lm

ANSWERS = {"fine": [0.25, 0.75], "dull": [0.9, 0.1]}
EMBEDDINGS = {"fine": [1.0, 0.0], "dull": [0.0, 2.0]}
WEIGHTS = RewardWeights(fidelity=2.0, diversity=0.5, novelty=0.25, domain=3.0, coverage=0.75, disagreement=4.0, fluency=0.125, length=1.5)


def model(base: lm.Base, *, custom: dict[str, float] | None = None, rows: list[str] | None = None, **task: bool) -> tuple[Any, Any]:
    """A reward model over a fixed annotator, and that annotator."""
    annotator = FixedAnnotator({"fine": [2.0], "dull": [3.0]} if task.get("regression") else ANSWERS, EMBEDDINGS)
    card = make_task(**task)
    return RewardModel(base, annotator, card, make_rows(card, rows or ["fine a film", "dull plot"]), WEIGHTS, custom or {}), annotator


def judge(model: Any, texts: list[str], conditions: list[int]) -> Any:
    return model.judge(model.read(texts, torch.tensor(conditions), *model.base.encode(texts, 12)))


def test_the_reward_is_the_weighted_sum_of_the_scaled_terms(base: lm.Base) -> None:
    made, _ = model(base)
    texts, conditions = ["fine film", "dull plot", "fine"], [1, 1, 0]
    total, terms = judge(made, texts, conditions)
    assert list(terms) == list(rewards.TERMS)
    assert terms["fidelity"] == pytest.approx([math.log(0.75), math.log(0.1), math.log(0.25)])
    assert terms["domain"] == pytest.approx([0.5, 0.5, 0.5])  # the two task rows are (1, 0) and (0, 2)
    assert terms["coverage"] == pytest.approx([0.0, 0.0, 0.0])
    assert terms["novelty"].tolist() == [1.0, 0.0, 0.0]  # "dull plot" is a task row
    asked = np.array(conditions)
    assert made.scale == rewards.Scale.of(terms, asked, 2)  # the first texts that are judged say where a term stands
    weights = WEIGHTS.model_dump()
    assert total == pytest.approx(sum(weights[name] * made.scale(name, term, asked) for name, term in terms.items()))
    scale = made.scale
    judge(made, ["dull", "dull"], [0, 1])
    assert made.scale is scale


def test_the_proxy_is_a_student_of_rows_and_earlier_texts(base: lm.Base) -> None:
    made, _ = model(base)
    first = made.seen.proxy(["fine film", "dull plot", "never heard"])  # type: ignore[misc]
    assert first.shape == (3, 2) and first.sum(1) == pytest.approx([1, 1, 1])
    assert first[0, 0] > first[2, 0] > first[1, 0]  # "fine a film" is of condition 0, "dull plot" of condition 1
    made.remember(["fine plot"] * 5)  # which the annotator calls 1
    assert made.seen.proxy(["fine film"])[0, 0] < first[0, 0]  # type: ignore[misc]
    assert made.first.proxy(["fine film"])[0, 0] == first[0, 0]  # type: ignore[misc]


def test_held_out_texts_are_compared_with_the_task_rows_alone(base: lm.Base) -> None:
    made, _ = model(base)
    read = made.read(["never a play", "fine film"], torch.tensor([0, 1]), *base.encode(["never a play", "fine film"], 12))
    before = made.judge(read, held_out=True)
    made.remember(["never a play"])
    after = made.judge(read, held_out=True)
    assert all((before.terms[name] == after.terms[name]).all() for name in before.terms)
    assert made.judge(read).terms["novelty"].tolist() == [0.0, 1.0] and before.terms["novelty"].tolist() == [1.0, 1.0]


def test_likelihood_is_the_mean_of_a_tokens_log_after_bos(base: lm.Base) -> None:
    made, _ = model(base)
    texts = ["a fine film", "dull"]
    found = made.likelihood(*base.encode(texts, 12)).tolist()
    for text, got in zip(texts, found, strict=True):
        ids = torch.tensor([base.tokenizer.bos_token_id, *base.tokenizer(text, add_special_tokens=False)["input_ids"], base.eos])
        with torch.no_grad():
            log_probs = torch.log_softmax(base.model(input_ids=ids[None]).logits[0, :-1], -1)
        assert got == pytest.approx(log_probs[torch.arange(len(ids) - 1), ids[1:]].mean().item(), abs=1e-4)
    low, high = made.rows.likelihood
    assert low <= high and judge(made, ["fine a film"], [0]).terms["fluency"][0] == pytest.approx(0.0, abs=0.05 * abs(low))


def test_without_a_bos_token_a_text_begins_after_eos(tiny_lm: str) -> None:
    base = lm.Base.load(tiny_lm)
    with_bos = reward_model.bare_prefix(base)
    base.tokenizer.bos_token = None
    without = reward_model.bare_prefix(base)
    assert with_bos.mask.shape == without.mask.shape == (1, 1)
    with torch.no_grad():
        assert_close(without.last_logits, base.model(input_ids=torch.tensor([[base.eos]])).logits[:, -1], rtol=0, atol=1e-4)
    assert not torch.allclose(with_bos.last_logits, without.last_logits)


def test_length_counts_the_end_of_a_text(base: lm.Base) -> None:
    texts = ["a fine film", "dull"]
    rows = model(base, rows=texts)[0].rows
    counts = [len(base.tokenizer(t)["input_ids"]) + 1 for t in texts]
    assert [rows.low, rows.high] == np.percentile(counts, [5, 95]).tolist()
    made, _ = model(base, rows=["a fine film"] * 3)
    ids, mask = base.encode(["a fine film"] * 2, 12)
    ids[1, -1] = ids[1, 0]  # the same length, but cut before its end
    assert made.judge(made.read(["a fine film"] * 2, torch.tensor([0, 0]), ids, mask)).terms["length"].tolist() == [1.0, 0.0]


def test_novelty_is_measured_against_earlier_texts_too(base: lm.Base, monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = model(base)

    def novelty() -> list[float]:
        return judge(made, ["never a play", "dull plot"], [0, 0]).terms["novelty"].tolist()

    assert novelty() == [1.0, 0.0] == novelty()  # to judge is not to remember
    made.remember(["a play"])
    assert novelty() == [0.5, 0.0]
    monkeypatch.setattr(reward_model, "RESERVOIR_TEXTS", 3)
    made.remember(["one", "two", "three"])
    assert made.reservoir == ["one", "two", "three"] and novelty() == [1.0, 0.0]  # the oldest are forgotten


def test_a_pair_is_two_lines(base: lm.Base) -> None:
    made, annotator = model(base, pair=True)
    assert annotator.asked == [("fine a film", "dull plot"), ("dull plot", "fine a film")]
    terms = judge(made, ["fine  film \n the plot", "dull"], [1, 0]).terms
    assert annotator.asked == [("fine film", "the plot"), ("dull", "")]
    assert terms["fidelity"] == pytest.approx([math.log(0.75), math.log(0.8)])  # the margin
    assert judge(made, ["film\ndull", "dull plot"], [0, 0]).terms["novelty"].tolist() == [0.0, 0.0]  # both rows hold the two in this order


def test_a_text_that_is_no_pair_is_its_first_line(base: lm.Base) -> None:
    made, annotator = model(base)
    judge(made, [" fine  film \nand more", "dull"], [1, 0])
    assert annotator.asked == [("fine film", None), ("dull", None)]


def test_regression_asks_for_the_mean_value_of_a_condition(base: lm.Base) -> None:
    made, _ = model(base, rows=["fine a film", "dull plot", "fine play", "dull play"], regression=True)
    # Values 1, 2, 3, 4 of conditions 0, 1, 0, 1; none of condition 2, which asks for the mean of all. Answers: fine 2, dull 3.
    assert made.rows.values.tolist() == [2.0, 3.0, 2.5] and made.rows.spread == pytest.approx(math.sqrt(1.25))
    fidelity = judge(made, ["fine", "fine play", "dull film"], [0, 1, 2]).terms["fidelity"]
    assert fidelity == pytest.approx([0.0, -1 / math.sqrt(1.25), -0.5 / math.sqrt(1.25)])


def starts(texts: list[str], labels: list[str]) -> list[int]:
    """A term: 1 where the text starts as its label does."""
    return [int(text[0] == label[0]) for text, label in zip(texts, labels, strict=True)]


def one_number(texts: list[str], labels: list[str]) -> float:
    return 0.5


def test_a_custom_term_counts_by_its_weight(base: lm.Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("json.starts", starts, raising=False)
    plain, _ = model(base)
    made, _ = model(base, custom={"json:starts": 10.0})
    texts, conditions = ["good film", "good film", "bad plot"], [0, 1, 0]
    total, terms = judge(made, texts, conditions)
    assert terms["json:starts"].tolist() == [0.0, 1.0, 1.0]
    assert made.scale is not None and total - judge(plain, texts, conditions).total == pytest.approx(
        10 * made.scale("json:starts", terms["json:starts"], np.array(conditions))
    )


def test_a_custom_term_of_another_shape_is_refused(base: lm.Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("json.one_number", one_number, raising=False)
    made, _ = model(base, custom={"json:one_number": 1.0})
    with pytest.raises(ValueError, match=r"^json:one_number returned shape \(\) for 2 texts; expected \(2,\)$"):
        judge(made, ["fine", "dull"], [0, 1])

"""Drawing tokens, against hand-worked cases."""

from __future__ import annotations

import math

import torch

from retrikt_ray.teacher.sampling import Draw, Sampling, draw, likeliest, uniforms


def test_the_token_is_where_the_sum_passes_u() -> None:
    inf = math.inf
    logits = torch.tensor(
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
    assert draw(logits, u, Sampling()).tolist() == [0, 1, 2, 1, 3, 1]
    # Of the two likeliest, 0.5 and 0.3, sums 0.625 and 1, in order of ids: u = 0.7 -> 2; by temperature 1/2 they are 0.735 and 0.265.
    assert draw(logits[:1], torch.tensor([0.7]), Sampling(1, 2)).tolist() == [2]
    assert draw(logits[:1], torch.tensor([0.7]), Sampling(0.5, 2)).tolist() == [1]
    # The fewest with 0.75 of the mass are 1 and 2; with 0.5 it is 1 alone; within the likeliest two (0.625, 0.375) 0.6 needs one, 0.7 both.
    assert draw(logits[:1], torch.tensor([0.0]), Sampling(1, 0, 0.75)).tolist() == [1]
    assert draw(logits[:1], torch.tensor([0.99]), Sampling(1, 0, 0.75)).tolist() == [2]
    assert draw(logits[:1], torch.tensor([0.99]), Sampling(1, 0, 0.5)).tolist() == [1]
    assert draw(logits[:1], torch.tensor([0.99]), Sampling(1, 2, 0.6)).tolist() == [1]
    assert draw(logits[:1], torch.tensor([0.99]), Sampling(1, 2, 0.7)).tolist() == [2]
    # As a processor of `generate`: that token alone is left, and the second call takes the second uniform.
    processor = Draw(torch.stack([u, u.flip(0)], 1), Sampling())
    first, second = (processor(torch.zeros(6, 9, dtype=torch.long), logits) for _ in range(2))
    assert first.argmax(-1).tolist() == [0, 1, 2, 1, 3, 1] and second.argmax(-1).tolist() != first.argmax(-1).tolist()
    assert (first.sort(-1).values == torch.tensor([-inf, -inf, -inf, 0.0])).all()


def test_the_last_likely_token_is_never_passed() -> None:
    """Sums of many rounded numbers end a little under or over 1; the largest u must still hit a token that has probability."""
    logits = torch.randn(40, 1000, generator=torch.Generator().manual_seed(0))
    logits[:, -5:] = -math.inf
    u = torch.full((40,), 1 - 2**-53, dtype=torch.float64)
    assert (draw(logits, u, Sampling()) <= 994).all()
    assert torch.isin(draw(logits, u, Sampling(1, 7)), logits.topk(7).indices).all()


def test_likeliest() -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    wanted = logits.topk(20).indices.sort(-1).values
    assert torch.equal(likeliest(logits, 20), wanted) and torch.equal(likeliest(logits.double(), 20), wanted)


def test_uniforms_depend_on_the_seed_alone() -> None:
    u = uniforms([5, 2**63 + 7, 5], 4)
    assert u.shape == (3, 4) and u.dtype == torch.float64 and (u >= 0).all() and (u < 1).all()
    assert torch.equal(u[0], u[2]) and not torch.equal(u[0], u[1])
    assert torch.equal(uniforms([2**63 + 7], 2)[0], u[1, :2])
    assert not torch.equal(uniforms([5 + 2**32], 4)[0], u[0])  # all 64 bits count

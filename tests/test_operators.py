"""Operators on spectrograms against a dense one and the sum over taps; their bases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stable_audio_lite.restoration.operators import Convolution, Operator, frames_beside_gaps

BINS, FRAMES = 4, 9


def filters(taps: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BINS, taps, dtype=torch.complex128, generator=generator)


def differences() -> Tensor:
    """x[t] - x[t - 1]: loses each frequency's mean."""
    return torch.tensor([[1.0, -1.0]], dtype=torch.complex128).expand(BINS, 2)


OPERATORS: dict[str, Operator] = {
    "gap": Operator(frames_beside_gaps(FRAMES, [(3 * 8, 5 * 8)], hop=8, window=16).float()[None]),
    "band": Operator(torch.tensor([[0.0], [1.0], [1.0], [0.0]])),
    "noise": Operator(torch.ones(1, 1)),
    "room": Convolution(filters(5), FRAMES),
    "room as long as the sound": Convolution(filters(FRAMES), FRAMES),
    "room that looks ahead": Convolution(filters(6), FRAMES, lookahead=2),
    "room that loses something": Convolution(differences(), FRAMES),
    "silence": Convolution(0 * filters(2), FRAMES),
}


def draw(seed: int) -> Tensor:
    return torch.randn(2, 2, BINS, FRAMES, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def lost_part(operator: Operator, x: Tensor) -> Tensor:
    """The projection of x onto the coordinates where S is 0."""
    return operator.v(torch.where(operator.singular > 0, 0, operator.vt(x)))


def dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((1, 2, 3))


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_both_bases_are_orthonormal_on_real_coordinates(operator: Operator) -> None:
    x, y = draw(0), draw(1)
    for there, back in ((operator.vt, operator.v), (operator.ut, operator.u)):
        torch.testing.assert_close(back(there(x)), x)
        torch.testing.assert_close(there(back(x)), x)
        torch.testing.assert_close(dot(there(x), there(y)), dot(x, y))


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_singular_values_are_those_of_the_dense_matrix(operator: Operator) -> None:
    size = 2 * BINS * FRAMES
    basis = torch.eye(size, dtype=torch.float64).reshape(size, 2, BINS, FRAMES)
    dense = operator.forward(basis).reshape(size, size)
    ours = operator.singular.double().expand(1, 2, BINS, FRAMES).flatten().sort(descending=True).values
    torch.testing.assert_close(ours, torch.linalg.svdvals(dense), atol=1e-6, rtol=0)


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_what_is_lost_is_lost_and_the_rest_is_not(operator: Operator) -> None:
    x = draw(0)
    lost = lost_part(operator, x)
    assert operator.forward(lost).abs().max() < 1e-6
    torch.testing.assert_close(lost_part(operator, lost), lost)
    torch.testing.assert_close(dot(lost, x - lost), torch.zeros(2, dtype=torch.float64))


def test_what_each_operator_loses() -> None:
    x = draw(0)
    for name in ("noise", "room", "room that looks ahead"):
        assert not lost_part(OPERATORS[name], x).any()
    torch.testing.assert_close(lost_part(OPERATORS["silence"], x), x)
    constant = torch.ones(1, 2, BINS, FRAMES, dtype=torch.float64)
    torch.testing.assert_close(lost_part(OPERATORS["room that loses something"], constant), constant)


def test_frames_that_overlap_a_gap_are_unknown() -> None:
    # Frame k is centred on 8 k + 4 and sees 16 samples: frame 1 ends at 20, frame 6 starts at 44.
    known = frames_beside_gaps(FRAMES, [(20, 44)], hop=8, window=16).tolist()
    assert known == [1, 1, 0, 0, 0, 0, 1, 1, 1]
    known = frames_beside_gaps(FRAMES, [(19, 20), (44, 45)], hop=8, window=16).tolist()
    assert known == [1, 0, 0, 1, 1, 0, 0, 1, 1]


def test_a_convolution_is_the_sum_over_taps() -> None:
    taps, x = filters(3), draw(0)
    z = torch.complex(x[:, 0], x[:, 1])
    expected = sum(taps[:, i, None] * z.roll(i - 1, 2) for i in range(3))
    y = Convolution(taps, FRAMES, lookahead=1).forward(x)
    torch.testing.assert_close(torch.complex(y[:, 0], y[:, 1]), expected)


def test_bad_operators_are_refused() -> None:
    with pytest.raises(ValueError, match="complex"):
        Convolution(filters(3).real, FRAMES)
    with pytest.raises(ValueError, match="L <= 4"):
        Convolution(filters(5), 4)
    with pytest.raises(ValueError, match="lookahead"):
        Convolution(filters(3), FRAMES, lookahead=3)


def test_a_mask_may_differ_from_item_to_item() -> None:
    known = torch.rand(2, 1, BINS, FRAMES, generator=torch.Generator().manual_seed(3)) > 0.5
    x = draw(0)
    torch.testing.assert_close(Operator(known.double()).forward(x), x * known)

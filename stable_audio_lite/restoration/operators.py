"""Linear operators that degrade a complex spectrogram, with the singular value decompositions that DDRM needs.

A spectrogram x (B, 2, F, T) holds real and imaginary parts as real coordinates. An operator is A = U S V^T between
such spaces; its spectral coordinates have the same shape, S is diagonal on them, and U and V are orthonormal as maps
of real vectors, so that white noise stays white. A complex factor of modulus 1 is a rotation of (real, imaginary).

There is no operator for declipping: known samples of the waveform are orthogonal coordinates only in a tight frame,
and a spectrogram without its DC row is not one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_RANK_TOLERANCE = 1e-6
"""Singular values below this share of the largest count as 0: their coordinates can't be told from rounding."""


class Operator:
    """A = U S V^T on (B, 2, F, T); this one scales each coordinate, U = V = 1: a mask that loses cells where S is 0.

    Args:
        singular: S >= 0, broadcastable to (B, 2, F, T).
    """

    def __init__(self, singular: Tensor) -> None:
        self.singular = singular

    def forward(self, x: Tensor) -> Tensor:
        """A x."""
        return self.u(self.singular * self.vt(x))

    def u(self, coordinates: Tensor) -> Tensor:
        """U c: from spectral coordinates to an observation."""
        return coordinates

    def ut(self, y: Tensor) -> Tensor:
        """U^T y: from an observation to spectral coordinates."""
        return y

    def v(self, coordinates: Tensor) -> Tensor:
        """V c: from spectral coordinates to a spectrogram."""
        return coordinates

    def vt(self, x: Tensor) -> Tensor:
        """V^T x: from a spectrogram to spectral coordinates."""
        return x


def frames_beside_gaps(frames: int, gaps: list[tuple[int, int]], hop: int, window: int) -> Tensor:
    """Find the frames (frames,) that overlap no gap; frame k covers `window` samples around (k + 1/2) * hop.

    Gaps are (start, stop) in samples, stop excluded.
    """
    centres = torch.arange(frames) * hop + hop / 2
    known = torch.ones(frames, dtype=torch.bool)
    for start, stop in gaps:
        known &= (centres + window / 2 <= start) | (centres - window / 2 >= stop)
    return known


class Convolution(Operator):
    """Reverberation: circular convolution of each frequency's frames with a filter of its own (Saito et al. 2022).

    y[f, t] = sum_l filters[f, l] x[f, t - l + lookahead], indices modulo T: a circulant matrix for each frequency,
    which the Fourier transform over the frames makes diagonal. With h its complex eigenvalues, V^T is that (unitary)
    transform, S = |h|, and U carries the phase of h.

    Args:
        filters: complex (F, L).
        frames: T >= L of the spectrograms; pad with L - 1 frames of silence to keep the end out of the start.
        lookahead: how many of the L taps act on later frames, since windows overlap.

    Raises:
        ValueError: the filters are not complex (F, L), are longer than the frames, or `lookahead` is not in 0..L - 1.
    """

    def __init__(self, filters: Tensor, frames: int, lookahead: int = 0) -> None:
        if filters.ndim != 2 or not filters.is_complex() or filters.shape[1] > frames:
            raise ValueError(
                f"filters must be complex (F, L) with L <= {frames} frames, got {filters.dtype} {tuple(filters.shape)}"
            )
        if not 0 <= lookahead < filters.shape[1]:
            raise ValueError(f"lookahead must lie in 0..{filters.shape[1] - 1}, got {lookahead}")
        response = torch.fft.fft(F.pad(filters, (0, frames - filters.shape[1])).roll(-lookahead, 1))  # F, T
        magnitude = response.abs()
        lost = magnitude <= _RANK_TOLERANCE * magnitude.max()
        super().__init__(torch.where(lost, 0, magnitude))
        self.phase = torch.where(lost, 1, response / magnitude.clamp_min(torch.finfo(magnitude.dtype).tiny))

    def u(self, coordinates: Tensor) -> Tensor:
        return _to_real(torch.fft.ifft(_to_complex(coordinates) * self.phase, norm="ortho"))

    def ut(self, y: Tensor) -> Tensor:
        return _to_real(torch.fft.fft(_to_complex(y), norm="ortho") * self.phase.conj())

    def v(self, coordinates: Tensor) -> Tensor:
        return _to_real(torch.fft.ifft(_to_complex(coordinates), norm="ortho"))

    def vt(self, x: Tensor) -> Tensor:
        return _to_real(torch.fft.fft(_to_complex(x), norm="ortho"))


def _to_complex(x: Tensor) -> Tensor:
    return torch.complex(x[:, 0], x[:, 1])


def _to_real(z: Tensor) -> Tensor:
    return torch.stack((z.real, z.imag), 1)

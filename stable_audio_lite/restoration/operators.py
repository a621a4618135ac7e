"""Linear operators that degrade a complex spectrogram, with the singular value decompositions that DDRM needs.

A spectrogram x (B, 2, F, T) holds real and imaginary parts as real coordinates. An operator is A = U S V^T between
such spaces; its spectral coordinates have the same shape, S is diagonal on them, and U and V are orthonormal as maps
of real vectors, so that white noise stays white. A complex factor of modulus 1 is a rotation of (real, imaginary).

There is no operator for declipping: known samples of the waveform are orthogonal coordinates only in a tight frame,
and a spectrogram without its DC row is not one.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

_RANK_TOLERANCE = 1e-6
"""Singular values below this share of the largest count as 0: their coordinates can't be told from rounding."""


class Operator(Protocol):
    """A = U S V^T on (B, 2, F, T).

    Attributes:
        singular: S >= 0, broadcastable to (B, 2, F, T).
    """

    singular: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """A x, computed directly."""
        ...

    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y, computed directly."""
        ...

    def u(self, coordinates: Tensor) -> Tensor:
        """U c: from spectral coordinates to an observation."""
        ...

    def ut(self, y: Tensor) -> Tensor:
        """U^T y: from an observation to spectral coordinates."""
        ...

    def v(self, coordinates: Tensor) -> Tensor:
        """V c: from spectral coordinates to a spectrogram."""
        ...

    def vt(self, x: Tensor) -> Tensor:
        """V^T x: from a spectrogram to spectral coordinates."""
        ...


class Mask:
    """A mask that keeps known cells and sets the others to 0: U = V = 1, and S is 1 where known.

    Args:
        known: boolean, broadcastable to (F, T) or to (B, 1, F, T).
    """

    def __init__(self, known: Tensor) -> None:
        self.singular = known.float()

    def forward(self, x: Tensor) -> Tensor:
        """A x."""
        return torch.where(self.singular > 0, x, 0)

    adjoint = forward

    def to(self, device: torch.device) -> Mask:
        """Return the same mask on another device."""
        return Mask(self.singular.to(device) > 0)

    def u(self, coordinates: Tensor) -> Tensor:
        """The coordinates themselves; likewise `ut`, `v` and `vt`."""
        return coordinates

    ut = v = vt = u


def identity() -> Mask:
    """The identity, for observations that only have noise."""
    return Mask(torch.ones(1, 1, dtype=torch.bool))


def band_mask(bins: int, low: int, high: int) -> Mask:
    """A mask of `bins` frequency bins, of which low <= k < high are known.

    Raises:
        ValueError: not 0 <= low < high <= bins.
    """
    if not 0 <= low < high <= bins:
        raise ValueError(f"expected 0 <= low < high <= {bins} bins, got {low} and {high}")
    bin_numbers = torch.arange(bins)[:, None]
    return Mask((bin_numbers >= low) & (bin_numbers < high))


def gap_mask(frames: int, gaps: list[tuple[int, int]], hop: int, window: int) -> Mask:
    """A mask without the frames that overlap a gap; frame k covers `window` samples around (k + 1/2) * hop.

    Args:
        frames: number of frames.
        gaps: (start, stop) in samples, stop excluded.
        hop: samples from frame to frame.
        window: samples that a frame covers.

    Raises:
        ValueError: a gap is empty or starts before the spectrogram.
    """
    centres = torch.arange(frames) * hop + hop / 2
    known = torch.ones(frames, dtype=torch.bool)
    for start, stop in gaps:
        if not 0 <= start < stop:
            raise ValueError(f"a gap must have 0 <= start < stop, got {start} and {stop}")
        known &= (centres + window / 2 <= start) | (centres - window / 2 >= stop)
    return Mask(known[None])


class Convolution:
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
        self.filters, self.frames, self.lookahead = filters, frames, lookahead
        response = torch.fft.fft(F.pad(filters, (0, frames - filters.shape[1])).roll(-lookahead, 1))  # F, T
        magnitude = response.abs()
        lost = magnitude <= _RANK_TOLERANCE * magnitude.max()
        self.singular = torch.where(lost, 0, magnitude)
        self.phase = torch.where(lost, 1, response / magnitude.clamp_min(torch.finfo(magnitude.dtype).tiny))

    def forward(self, x: Tensor) -> Tensor:
        """A x, tap by tap."""
        return self._correlate(x, self.filters.flip(1), self.filters.shape[1] - 1 - self.lookahead)

    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y: correlation with the filters."""
        return self._correlate(y, self.filters.conj(), self.lookahead)

    def u(self, coordinates: Tensor) -> Tensor:
        """U c: the phase of each eigenvalue, then the inverse transform."""
        return _to_real(torch.fft.ifft(_to_complex(coordinates) * self.phase, norm="ortho"))

    def ut(self, y: Tensor) -> Tensor:
        """U^T y."""
        return _to_real(torch.fft.fft(_to_complex(y), norm="ortho") * self.phase.conj())

    def v(self, coordinates: Tensor) -> Tensor:
        """V c: the inverse Fourier transform over the frames."""
        return _to_real(torch.fft.ifft(_to_complex(coordinates), norm="ortho"))

    def vt(self, x: Tensor) -> Tensor:
        """V^T x."""
        return _to_real(torch.fft.fft(_to_complex(x), norm="ortho"))

    def _correlate(self, x: Tensor, kernel: Tensor, before: int) -> Tensor:
        """out[t] = sum_l kernel[l] x[t + l - before], circularly, as a grouped convolution of real numbers."""
        bins, length = kernel.shape
        after = length - 1 - before
        around = torch.cat((x[..., x.shape[-1] - before :], x, x[..., :after]), -1)
        real, imaginary = kernel.real, kernel.imag
        weight = torch.stack((torch.stack((real, -imaginary), 1), torch.stack((imaginary, real), 1)), 1)
        rows = around.transpose(1, 2).flatten(1, 2)  # B, F * 2, T + L - 1
        out = F.conv1d(rows, weight.flatten(0, 1).to(x), groups=bins)
        return out.unflatten(1, (bins, 2)).transpose(1, 2)


def _to_complex(x: Tensor) -> Tensor:
    return torch.complex(x[:, 0], x[:, 1])


def _to_real(z: Tensor) -> Tensor:
    return torch.stack((z.real, z.imag), 1)

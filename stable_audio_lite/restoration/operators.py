"""Linear operators that spoil a complex spectrogram, each with its singular value decomposition, for DDRM.

A spectrogram x (B, 2, F, T) holds real and imaginary parts as real coordinates. An operator is A = U S V^T between
such spaces; its spectral coordinates have the same shape, S is diagonal on them, and U and V are orthonormal as maps
of real vectors, so that white noise stays white. A complex factor of unit size is a rotation of (real, imaginary).

Declipping is left out: known samples of the waveform are orthogonal coordinates only of a tight frame, and the
spectrogram without its DC row is none.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

_NOTHING = 1e-6
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
        """U c: spectral coordinates to an observation."""
        ...

    def ut(self, y: Tensor) -> Tensor:
        """U^T y: an observation to spectral coordinates."""
        ...

    def v(self, coordinates: Tensor) -> Tensor:
        """V c: spectral coordinates to a spectrogram."""
        ...

    def vt(self, x: Tensor) -> Tensor:
        """V^T x: a spectrogram to spectral coordinates."""
        ...


class Mask:
    """Keeps the cells that are known and sets the others to 0: U = V = 1, S is 1 where known.

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
        """The same on another device."""
        return Mask(self.singular.to(device) > 0)

    def u(self, coordinates: Tensor) -> Tensor:
        """The coordinates themselves, as are those of `ut`, `v` and `vt`."""
        return coordinates

    ut = v = vt = u


def identity() -> Mask:
    """Nothing is lost: what is left to restore from is the noise."""
    return Mask(torch.ones(1, 1, dtype=torch.bool))


def band_mask(bins: int, low: int, high: int) -> Mask:
    """Frequency bins low <= k < high are known, of `bins`.

    Raises:
        ValueError: not 0 <= low < high <= bins.
    """
    if not 0 <= low < high <= bins:
        raise ValueError(f"expected 0 <= low < high <= {bins} bins, got {low} and {high}")
    bin_numbers = torch.arange(bins)[:, None]
    return Mask((bin_numbers >= low) & (bin_numbers < high))


def gap_mask(frames: int, gaps: list[tuple[int, int]], hop: int, window: int) -> Mask:
    """Frames that overlap a gap are unknown; frame k spans `window` samples around sample k * hop + hop / 2.

    Args:
        frames: of the spectrogram.
        gaps: (start, stop) in samples, stop excluded.
        hop: samples from frame to frame.
        window: samples that a frame sees.

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
    """Each frequency's frames convolved with a filter of its own, circularly: reverberation (Saito et al. 2022).

    y[f, t] = sum_l filters[f, l] x[f, t - l + lead], indices modulo T: a circulant matrix for each frequency, which
    the Fourier transform over the frames makes diagonal. With h its complex eigenvalues, V^T is that (unitary)
    transform, S = |h|, and U carries the phase of h.

    Args:
        filters: complex (F, L).
        frames: T >= L of the spectrograms; pad with L - 1 frames of silence where the end must not meet the start.
        lead: how many of the L taps look ahead, as a window that overlaps the next one does.

    Raises:
        ValueError: the filters are not complex (F, L), are longer than the frames, or `lead` is not in 0..L - 1.
    """

    def __init__(self, filters: Tensor, frames: int, lead: int = 0) -> None:
        if filters.ndim != 2 or not filters.is_complex() or filters.shape[1] > frames:
            raise ValueError(
                f"filters must be complex (F, L) with L <= {frames} frames, got {filters.dtype} {tuple(filters.shape)}"
            )
        if not 0 <= lead < filters.shape[1]:
            raise ValueError(f"lead must lie in 0..{filters.shape[1] - 1}, got {lead}")
        self.filters, self.frames, self.lead = filters, frames, lead
        response = torch.fft.fft(F.pad(filters, (0, frames - filters.shape[1])).roll(-lead, 1))  # F, T
        size = response.abs()
        lost = size <= _NOTHING * size.max()
        self.singular = torch.where(lost, 0, size)
        self.phase = torch.where(lost, 1, response / size.clamp_min(torch.finfo(size.dtype).tiny))

    def forward(self, x: Tensor) -> Tensor:
        """A x, tap by tap."""
        return self._taps(x, self.filters.flip(1), self.filters.shape[1] - 1 - self.lead)

    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y: correlation with the filters."""
        return self._taps(y, self.filters.conj(), self.lead)

    def u(self, coordinates: Tensor) -> Tensor:
        """U c: the phase of each eigenvalue, then the inverse transform."""
        return _parts(torch.fft.ifft(_complex(coordinates) * self.phase, norm="ortho"))

    def ut(self, y: Tensor) -> Tensor:
        """U^T y."""
        return _parts(torch.fft.fft(_complex(y), norm="ortho") * self.phase.conj())

    def v(self, coordinates: Tensor) -> Tensor:
        """V c: the inverse Fourier transform over the frames."""
        return _parts(torch.fft.ifft(_complex(coordinates), norm="ortho"))

    def vt(self, x: Tensor) -> Tensor:
        """V^T x."""
        return _parts(torch.fft.fft(_complex(x), norm="ortho"))

    def _taps(self, x: Tensor, kernel: Tensor, before: int) -> Tensor:
        """out[t] = sum_l kernel[l] x[t + l - before], circularly, as a grouped convolution of real numbers."""
        bins, length = kernel.shape
        after = length - 1 - before
        around = torch.cat((x[..., x.shape[-1] - before :], x, x[..., :after]), -1)
        real, imaginary = kernel.real, kernel.imag
        weight = torch.stack((torch.stack((real, -imaginary), 1), torch.stack((imaginary, real), 1)), 1)
        rows = around.transpose(1, 2).flatten(1, 2)  # B, F * 2, T + L - 1
        out = F.conv1d(rows, weight.flatten(0, 1).to(x), groups=bins)
        return out.unflatten(1, (bins, 2)).transpose(1, 2)


def project_null(operator: Operator, x: Tensor) -> Tensor:
    """The part of x that the operator loses: its projection onto the coordinates where S is 0."""
    return operator.v(torch.where(operator.singular > 0, 0, operator.vt(x)))


def _complex(x: Tensor) -> Tensor:
    return torch.complex(x[:, 0], x[:, 1])


def _parts(z: Tensor) -> Tensor:
    return torch.stack((z.real, z.imag), 1)

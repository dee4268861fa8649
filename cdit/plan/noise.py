"""Coloured noise: candidates that keep a direction for several steps reach farther than those of white noise."""

import torch
from torch import Tensor


def coloured_noise(shape: tuple[int, ...], beta: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise of variance 1 with a power spectrum proportional to 1 / f^beta along the last dimension.

    Timmer and König 1995, "On generating power law noise"; the mean has the power of the lowest frequency above zero,
    as in iCEM (Pinneri et al. 2020, arXiv 2008.06389).

    Args:
        shape: of the noise, (…, T).
        beta: 0 for white noise, 2 for a random walk.
        generator: random generator; the noise is on its device.
    """
    *many, length = shape
    if beta == 0 or length == 1:
        return torch.randn(shape, generator=generator, device=generator.device)
    frequency = torch.fft.rfftfreq(length, device=generator.device)
    frequency[0] = 1 / length
    amplitude = frequency ** (-beta / 2)
    real, imaginary = torch.randn(2, *many, len(frequency), generator=generator, device=generator.device) * amplitude
    # The mean, and the highest frequency of an even length, have no imaginary part and occur once in the sum.
    single = [0, -1] if length % 2 == 0 else [0]
    real[..., single] *= 2**0.5
    imaginary[..., single] = 0
    power = 4 * amplitude.square()
    power[single] /= 2
    return torch.fft.irfft(torch.complex(real, imaginary), n=length) * length / power.sum().sqrt()

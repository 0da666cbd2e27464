"""Normal distributions."""

from torch import Tensor


def normal_kl(mean: Tensor, sigma: Tensor, other_mean: Tensor, other_sigma: Tensor) -> Tensor:
    """Return KL(N(mean, sigma^2) || N(other_mean, other_sigma^2)), element-wise, 0 if equal."""
    ratio, shift = sigma / other_sigma, (mean - other_mean) / other_sigma
    return (ratio.square() + shift.square() - 1) / 2 - ratio.log()

"""Confidence intervals of a share and of a mean."""

import math

Z95 = 1.959963984540054  # of a normal distribution, 95% lie within this many standard deviations


def wilson(successes: float, images: float, z: float = Z95) -> tuple[float, float]:
    """Return the interval of a share: Wilson's, which is no point at 0 or 1 (Wilson 1927, J. Am. Stat. Assoc. 22).

    The share p of the population is in it where |p - found| <= z sqrt(p (1 - p) / n).
    """
    if images <= 0:
        return 0.0, 1.0
    found, square = successes / images, z * z / images
    middle = (found + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(found * (1 - found) / images + square / (4 * images))
    return max(0.0, middle - half), min(1.0, middle + half)


def of_mean(mean: float, deviation: float, images: float, z: float = Z95) -> tuple[float, float]:
    """Return the interval of a mean by the normal approximation; all there is to one image is its own value."""
    if images < 2:
        return -math.inf, math.inf
    half = z * deviation / math.sqrt(images)
    return mean - half, mean + half

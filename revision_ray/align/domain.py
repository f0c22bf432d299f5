"""Whether rows come from the domain of a fit: the distance between centroids, beside what chance makes of it.

Let mu, T be the centroid and trace of a fit's N rows, and m the centroid of n other rows. Were all drawn
from one distribution, E||m - mu_true||^2 = T / n and E||mu - mu_true||^2 = T / N with independent errors,
so the root mean square of ||m - mu|| is the *sampling floor* sqrt(T (1/n + 1/N)).
"""

import math

# With fewer, a shift of two fifths of the spread sqrt(T) could be chance.
MIN_ROWS = 50
# The error of a mean of that many rows is nearly Gaussian, so its squared length over the squared floor is a
# weighted sum of chi-squares with mean 1. Of all weights a single one has the heaviest tail (Szekely and
# Bakirov, 2003): independent rows pass three floors by chance in less than 0.3 % of cases, on any spectrum.
FLOORS = 3.0


def sampling_floor(trace: float, num_fitted: int, num_sampled: int) -> float:
    """Root mean square distance between the centroid of `num_sampled` rows of the fit's own distribution and
    the fit's centroid, whose `num_fitted` rows have this trace."""
    return math.sqrt(unbiased_trace(trace, num_fitted) * (1 / num_sampled + 1 / num_fitted))


def gap_floor(text_trace: float, num_texts: int, image_trace: float, num_images: int) -> float:
    """Root mean square distance that sampling alone leaves between the centroids of texts and images."""
    return math.sqrt(text_trace / max(num_texts - 1, 1) + image_trace / max(num_images - 1, 1))


def unbiased_trace(trace: float, num_rows: int) -> float:
    """The trace of a sample is N / (N - 1) too small on average."""
    return max(trace, 0.0) * num_rows / max(num_rows - 1, 1)

"""How near pictures are to others: PSNR, and SSIM with a Gaussian window (Wang et al., IEEE TIP 13(4), 2004).

Shapes: F frames, H W pixels, uint8 [..., H, W, 3].
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import correlate1d

WINDOW = 11
SIGMA = 1.5
PEAK = 255.0
MOST_DECIBELS = 100.0  # of equal pictures, whose PSNR has no bound


def psnr(found: np.ndarray, expected: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB over all pixels; equal pictures have MOST_DECIBELS."""
    error = np.mean(np.square(found.astype(np.float64) - expected.astype(np.float64)))
    return MOST_DECIBELS if error == 0 else min(float(10 * np.log10(PEAK**2 / error)), MOST_DECIBELS)


def ssim(found: np.ndarray, expected: np.ndarray) -> float:
    """Structural similarity: mean over frames, channels and all places where a window of 11 x 11 fits (the largest odd
    one, in smaller pictures)."""
    x, y = (np.moveaxis(image.astype(np.float64), -1, 0) for image in (found, expected))
    mean_x, mean_y = _blurred(x), _blurred(y)
    variance_x = _blurred(x * x) - mean_x**2
    variance_y = _blurred(y * y) - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return float(np.mean(luminance * structure))


def _blurred(image: np.ndarray) -> np.ndarray:
    """Gaussian means over every window that fits into the last two axes."""
    side = min(WINDOW, *((size - 1) // 2 * 2 + 1 for size in image.shape[-2:]))
    offsets = np.arange(side) - side // 2
    weights = np.exp(-(offsets**2) / (2 * SIGMA**2))
    weights /= weights.sum()
    for axis in (-2, -1):
        inside = [slice(None)] * image.ndim
        inside[axis] = slice(side // 2, image.shape[axis] - side // 2)
        image = correlate1d(image, weights, axis=axis)[tuple(inside)]
    return image

"""PSNR and SSIM against their definitions, written out window by window."""

import numpy as np
import pytest
from scipy.ndimage import correlate1d

from infer.similarity import psnr, ssim


def pictures(*shape):
    rng = np.random.default_rng(0)
    first = rng.integers(0, 256, shape, np.uint8)
    return first, np.clip(first + rng.normal(0, 30, shape), 0, 255).astype(np.uint8)


def slow_ssim(x, y, side=11):
    """Of one channel: every window that fits, its statistics weighted by the Gaussian."""
    axis = np.arange(side) - side // 2
    window = np.exp(-(axis[:, None] ** 2 + axis[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for row in range(x.shape[0] - side + 1):
        for column in range(x.shape[1] - side + 1):
            a, b = (of[row : row + side, column : column + side].astype(float) for of in (x, y))
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            cov = (window * (a - mean_a) * (b - mean_b)).sum()
            values.append(
                (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
            )
    return np.mean(values)


def test_ssim_is_its_definition():
    x, y = pictures(2, 17, 14, 3)
    expected = np.mean([slow_ssim(x[f, ..., c], y[f, ..., c]) for f in range(2) for c in range(3)])
    assert ssim(x, y) == pytest.approx(expected, abs=1e-9)
    assert ssim(x, x) == pytest.approx(1) and ssim(x, y) == pytest.approx(ssim(y, x))


def test_ssim_falls_with_blur_and_takes_small_pictures():
    x, _ = pictures(32, 32, 3)
    weak, strong = (correlate1d(x.astype(float), np.ones(n) / n, axis=0).astype(np.uint8) for n in (2, 5))
    assert 1 > ssim(x, weak) > ssim(x, strong)
    small = x[:8, :8]
    assert ssim(small, small) == pytest.approx(1)


def test_psnr():
    x = np.zeros((4, 4, 3), np.uint8)
    assert psnr(x, x) == 100
    assert psnr(x + 5, x) == pytest.approx(20 * np.log10(255 / 5))
    y = x.copy()
    y[0, 0, 0] = 240
    assert psnr(y, x) == pytest.approx(10 * np.log10(255**2 / (240**2 / 48)))

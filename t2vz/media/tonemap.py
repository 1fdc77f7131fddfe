"""High dynamic range to SDR: BT.2020 in PQ or HLG to BT.709, as FFmpeg's zscale and tonemap=mobius have it."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

# cd/m²: what becomes SDR's white (BT.2408), and the brightest that HDR is graded for mostly; brighter is clipped.
WHITE_CD_M2, PEAK_CD_M2 = 203.0, 1000.0

_PEAK = PEAK_CD_M2 / WHITE_CD_M2
_KNEE = 0.3  # of white: what is darker stays as it is (tonemap's default)
_BT2020_TO_BT709 = np.array(
    [[1.660491, -0.587641, -0.072850], [-0.124550, 1.132900, -0.008349], [-0.018151, -0.100579, 1.118730]], np.float32
)
_BT2020_LUMA = np.array([0.2627, 0.6780, 0.0593], np.float32)
_GAMMA = 2.4  # of SDR displays (BT.1886)


def to_sdr(picture: NDArray[np.uint16], transfer: str) -> NDArray[np.uint8]:
    """R'G'B' of BT.2020, uint16 (h, w, 3), full range → uint8 RGB of BT.709. transfer: PQ or HLG."""
    light = _light(transfer)[picture]  # in units of white
    if transfer == "HLG":  # from the scene's light to a display's
        light *= (_PEAK * np.power(light @ _BT2020_LUMA, 0.2))[..., None]
    light = np.maximum(light @ _BT2020_TO_BT709.T, 0)
    brightest = light.max(axis=-1)
    light *= (_mobius(brightest) / np.maximum(brightest, 1e-6))[..., None]
    return np.rint(255 * np.power(np.minimum(light, 1), 1 / _GAMMA)).astype(np.uint8)


@cache
def _light(transfer: str) -> NDArray[np.float32]:
    """Of each code value: PQ's light in units of white, HLG's of the scene from 0 to 1 (BT.2100)."""
    code = np.arange(65536) / 65535
    if transfer == "HLG":
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        return np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12).astype(np.float32)
    root = code ** (1 / 78.84375)
    linear = (np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (1 / 0.1593017578125)
    return (linear * 10_000 / WHITE_CD_M2).astype(np.float32)


def _mobius(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """The identity up to the knee, from there smoothly to 1 at the peak."""
    j, peak = _KNEE, _PEAK
    a = -j * j * (peak - 1) / (j * j - 2 * j + peak)
    b = (j * j - 2 * j * peak + peak) / (peak - 1)
    return np.where(x <= j, x, (b * b + 2 * b * j + j * j) / (b - a) * (x + a) / (x + b)).astype(np.float32)

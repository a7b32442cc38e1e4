"""Colour jitter of images, as torchvision's ColorJitter and RandomGrayscale compute it on values in [0, 1]."""

import numpy as np

STRENGTH = (0.5, 0.5, 0.5, 0.1)  # brightness, contrast, saturation, hue
APPLIED, GREY = 0.9, 0.05  # probabilities of jitter and of a grey image (VGGT's training)
ROWS = 32  # that are changed at once: their temporary arrays stay in the processor's cache
LUMA = np.array([0.2989, 0.587, 0.114], np.float32)
# Columns of the parameters of an image.
ORDER = slice(0, 4)  # the four changes are made in the order of these numbers
FACTORS = slice(4, 8)  # of brightness, contrast and saturation, and the shift of hue in turns
IS_GREY, JITTER_WIDTH = 8, 9
CONTRAST, SATURATION, HUE = 1, 2, 3
NOTHING = np.array([0, 0, 0, 0, 1, 1, 1, 0, 0], float)  # parameters that change nothing


def draw_jitter(rng: np.random.Generator, count: int, applied: float = APPLIED, grey: float = GREY) -> np.ndarray:
    """Parameters for `jitter`, (count, JITTER_WIDTH) float64; `applied` and `grey` are probabilities."""
    drawn = rng.random((count, JITTER_WIDTH + 1))
    drawn[:, FACTORS] = 1 + np.array(STRENGTH) * (2 * drawn[:, FACTORS] - 1)
    drawn[:, FACTORS.start + HUE] -= 1
    changed, is_grey = drawn[:, JITTER_WIDTH] < applied, drawn[:, IS_GREY] < grey
    drawn = np.where(changed[:, None], drawn[:, :JITTER_WIDTH], NOTHING)
    drawn[:, IS_GREY] = is_grey
    return drawn


def jitter(image: np.ndarray, parameters: np.ndarray) -> np.ndarray:
    """Change the colours of an image (H, W, 3) uint8 by parameters (JITTER_WIDTH,); returns uint8."""
    factors, grey = parameters[FACTORS].tolist(), parameters[IS_GREY] > 0
    if not grey and np.array_equal(parameters[FACTORS], NOTHING[FACTORS]):
        return image
    planes = np.ascontiguousarray(image.transpose(2, 0, 1)).astype(np.float32) / 255
    blocks = [planes[:, top : top + ROWS] for top in range(0, planes.shape[1], ROWS)]
    for change in np.argsort(parameters[ORDER]).tolist():
        factor = factors[change]
        mean = float(LUMA @ planes.mean((1, 2))) if change == CONTRAST else 0.0
        for block in blocks if factor != NOTHING[FACTORS][change] else ():
            if change == HUE:
                _turn_hue(block, factor)
            else:
                other = _grey(block) if change == SATURATION else mean
                np.clip(block * np.float32(factor) + np.float32(1 - factor) * other, 0, 1, out=block)
    if grey:
        planes[:] = _grey(planes)
    return np.ascontiguousarray(np.rint(planes * 255).astype(np.uint8).transpose(1, 2, 0))


def _grey(planes: np.ndarray) -> np.ndarray:
    """Brightness (H, W) of planes (3, H, W)."""
    return np.tensordot(LUMA, planes, 1)


def _turn_hue(planes: np.ndarray, turns: float) -> None:
    """Add to the hue of HSV, in place.

    A channel is V - V S max(0, min(k, 4 - k, 1)) with k = (n + hue in sixths of a turn) mod 6, n = 5, 3, 1 for R, G, B.
    """
    r, g, b = planes
    high, low = np.maximum(np.maximum(r, g), b), np.minimum(np.minimum(r, g), b)
    chroma = high - low
    scale = 1 / np.where(chroma > 0, chroma, np.float32(1))
    hue = np.where(high == r, (g - b) * scale, np.where(high == g, 2 + (b - r) * scale, 4 + (r - g) * scale))
    hue += np.float32(6 * turns)
    for channel, n in enumerate((5, 3, 1)):
        k = hue + n  # in -2 ... 10
        k -= 6 * np.floor(k * np.float32(1 / 6))
        np.minimum(k, 4 - k, out=k)
        np.clip(k, 0, 1, out=k)
        np.subtract(high, k * chroma, out=planes[channel])

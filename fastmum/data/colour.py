"""Colour jitter of images, as torchvision's ColorJitter and RandomGrayscale compute it on values in [0, 1]."""

import numpy as np

STRENGTH = (0.5, 0.5, 0.5, 0.1)  # brightness, contrast, saturation, hue
APPLIED, GREY = 0.9, 0.05  # probabilities of jitter and of a grey image (VGGT's training)
LUMA = np.array([0.2989, 0.587, 0.114], np.float32)
# Columns of the parameters of an image.
ORDER = slice(0, 4)  # the four changes are made in the order of these numbers
FACTORS = slice(4, 8)  # of brightness, contrast and saturation, and the shift of hue in turns
IS_GREY, JITTER_WIDTH = 8, 9
HUE, NOTHING = 3, (0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0)


def draw_jitter(rng: np.random.Generator, count: int) -> np.ndarray:
    """Parameters for `jitter`, (count, JITTER_WIDTH) float64."""
    drawn = rng.random((count, JITTER_WIDTH + 1))
    drawn[:, FACTORS] = 1 + np.array(STRENGTH) * (2 * drawn[:, FACTORS] - 1)
    drawn[:, FACTORS.start + HUE] -= 1
    applied, grey = drawn[:, JITTER_WIDTH] < APPLIED, drawn[:, IS_GREY] < GREY
    drawn = np.where(applied[:, None], drawn[:, :JITTER_WIDTH], NOTHING)
    drawn[:, IS_GREY] = grey
    return drawn


def jitter(image: np.ndarray, parameters: np.ndarray) -> np.ndarray:
    """Change the colours of an image (H, W, 3) uint8 by parameters (JITTER_WIDTH,); returns uint8."""
    factors, grey = parameters[FACTORS].tolist(), parameters[IS_GREY] > 0
    if not grey and tuple(factors) == NOTHING[FACTORS]:
        return image
    pixels = image.astype(np.float32) / 255
    for change in np.argsort(parameters[ORDER]).tolist():
        factor = factors[change]
        if change == HUE:
            pixels = _turn_hue(pixels, factor) if factor else pixels
        elif factor != 1:
            other: float | np.ndarray = 0.0
            if change == 1:
                other = float((pixels @ LUMA).mean())
            elif change == 2:
                other = (pixels @ LUMA)[..., None]
            pixels = np.clip(factor * pixels + (1 - factor) * other, 0, 1)
    if grey:
        pixels = np.repeat((pixels @ LUMA)[..., None], 3, -1)
    return np.rint(pixels * 255).astype(np.uint8)


def _turn_hue(pixels: np.ndarray, turns: float) -> np.ndarray:
    """Add to the hue of HSV; a channel is V - V S max(0, min(k, 4 - k, 1)) for k = (n + hue in sixths) mod 6."""
    high, low = pixels.max(-1), pixels.min(-1)
    chroma = high - low
    r, g, b = np.moveaxis(pixels, -1, 0)
    safe = np.where(chroma > 0, chroma, 1)
    hue = np.where(high == r, (g - b) / safe, np.where(high == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    hue += np.float32(6 * turns)
    out = np.empty_like(pixels)
    for channel, n in enumerate((5, 3, 1)):
        k = np.mod(hue + n, 6)
        out[..., channel] = high - chroma * np.clip(np.minimum(k, 4 - k), 0, 1)
    return out

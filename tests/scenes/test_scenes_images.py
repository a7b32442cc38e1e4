"""The images are lit, varied, and smooth enough to be predicted from their surroundings."""

from __future__ import annotations

import numpy as np

from fastmum.scenes.textures import MATERIALS, Face


def test_brightness_contrast_and_smoothness(scenes):
    f = np.hypot(*np.meshgrid(np.fft.fftfreq(96), np.fft.fftfreq(96)))
    for frame in (frame for _, frames in scenes for frame in frames):
        image, grey = frame.image, frame.image.mean(-1)
        assert 55 < image.mean() < 200
        assert grey.std() > 18
        assert ((image <= 4) | (image >= 253)).any(-1).mean() < 0.02
        blocks = grey.reshape(12, 8, 12, 8).std(axis=(1, 3))
        assert (blocks < 0.5).mean() < 0.05, "large flat areas"
        assert 0.75 < np.corrcoef(grey[:, 1:].ravel(), grey[:, :-1].ravel())[0, 1] < 0.999
        power = np.abs(np.fft.fft2((grey - grey.mean()) * np.outer(np.hanning(96), np.hanning(96)))) ** 2
        bands = [power[(f > low) & (f <= 2 * low)].mean() for low in (0.03, 0.06, 0.12, 0.24)]
        slope = np.polyfit(np.log([1, 2, 4, 8]), np.log(bands), 1)[0]
        assert -4.5 < slope < -1.0, "natural images fall off as about frequency squared"
    means = np.array([np.mean([frame.image.mean((0, 1)) for frame in frames], 0) for _, frames in scenes])
    apart = np.abs(means[:, None] - means[None]).sum(-1)
    assert apart[np.triu_indices(len(means), 1)].min() > 2


def test_every_material_is_in_range_and_never_repeats():
    more = {"tiles": {"size": (0.3, 0.1), "bond": 0.5}, "ground": {"name": "grass.png"}}
    colours = (0.6, 0.5, 0.4), (0.4, 0.5, 0.6)
    for name, material in MATERIALS.items():
        for shape in ((256, 320), (3, 40), (40, 3), (1, 1)):
            out = material(np.random.default_rng(1), Face(*shape, 0.01), *colours, **more.get(name, {}))
            assert (out.shape, out.dtype) == ((3, *shape), np.float32), name
            assert np.isfinite(out).all(), name
            assert out.min() > -0.3, name
            assert out.max() < 2, name
        if name != "glow":
            big = material(np.random.default_rng(2), Face(512, 512, 0.004), *colours, **more.get(name, {})).mean(0)
            assert abs(np.corrcoef(big[:256, :256].ravel(), big[256:, 256:].ravel())[0, 1]) < 0.9, f"{name} repeats"

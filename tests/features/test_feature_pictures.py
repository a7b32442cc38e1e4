"""Colours of tokens, and files of pictures."""

import numpy as np
import torch

from fastmum.features.images import Placement
from fastmum.features.pictures import _file_names, content, fit_basis
from fastmum.features.store import Tokens


def test_the_main_directions_are_found_largest_first():
    torch.manual_seed(0)
    frame, _ = torch.linalg.qr(torch.randn(16, 16))
    strength = torch.tensor([9.0, 5.0, 3.0] + [0.01] * 13)
    tokens = (torch.randn(500, 16) * strength) @ frame.T + 7
    basis = fit_basis([tokens[:100], tokens[100:]])
    overlap = (basis.directions.T @ frame[:, :3]).abs()
    torch.testing.assert_close(overlap, torch.eye(3), atol=0.1, rtol=0)
    colours = basis.colours(tokens)
    assert colours.dtype == np.uint8
    assert (colours.min(0) == 0).all()
    assert (colours.max(0) == 255).all()
    mirrored = fit_basis([tokens.flip(0)])  # independent of the signs of the solver's vectors
    np.testing.assert_allclose(mirrored.colours(tokens).astype(int), colours, atol=2)
    assert fit_basis([torch.ones(4, 8)]).colours(torch.ones(2, 3, 8)).shape == (2, 3, 3)  # no direction at all


def test_padding_is_omitted():
    tokens = Tokens(torch.zeros(2), torch.arange(12.0)[:, None].expand(12, 2), Placement(48, 64, 20, 50))
    assert content(tokens, 16)[..., 0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    layers = tokens._replace(patch=torch.stack([tokens.patch, tokens.patch + 100]))
    assert content(layers, 16)[0, 0, 0] == 100


def test_file_names_are_unique():
    names = {"s/a.jpg": "s/a.jpg.png", "s/b.jpg": "s/b.png", "s/a.png": "s/a.png.png"}
    assert _file_names(names) == names

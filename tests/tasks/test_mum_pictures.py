import numpy as np
import torch

from benchmarks.kernel_reference import gather_patches, normalise_patches
from fastmum.model.inputs import IMAGENET_MEAN, IMAGENET_STD
from fastmum.tasks.mum import GAP, GREY, draw_reconstruction


def test_a_perfect_prediction_shows_the_original():
    frames = torch.randint(0, 256, (3, 32, 48, 3), dtype=torch.uint8)
    ids = torch.tensor([[0, 4], [1, 2], [3, 5]])
    pred = normalise_patches(gather_patches(frames, ids, IMAGENET_MEAN, IMAGENET_STD, 16, torch.float32))
    picture = np.asarray(draw_reconstruction(frames, (2, 1), ids, pred)).astype(int)
    below = 32 + GAP
    original, masked, predicted = (picture[i * below : i * below + 32, :48] for i in range(3))
    assert np.array_equal(original, frames[0].numpy())
    assert np.abs(predicted - original).max() <= 1
    assert (masked[:16, :16] == GREY).all(), "patch 0 is masked"
    assert (masked[16:, 16:32] == GREY).all(), "patch 4 is masked"
    assert np.array_equal(masked[:16, 16:], original[:16, 16:])
    assert picture.shape[1] == 2 * 48 + GAP
    assert (picture[3 * below + 12 :, 48:] == 255).all(), "the second sequence has one view"

import numpy as np
import torch

from benchmarks.kernel_reference import gather_patches, normalise_patches
from fastmum.model.inputs import IMAGENET_MEAN, IMAGENET_STD
from fastmum.tasks.mum import GAP, GREY, TEXT, ZOOM, draw_reconstruction

LINE, MARGIN = 20, 6 * TEXT  # height of a line of text, width of the names of rows


def test_a_perfect_prediction_shows_the_original():
    frames = torch.randint(0, 256, (3, 32, 48, 3), dtype=torch.uint8)
    ids = torch.tensor([[0, 4], [1, 2], [3, 5]])
    pred = normalise_patches(gather_patches(frames, ids, IMAGENET_MEAN, IMAGENET_STD, 16, torch.float32))
    latin = "b" * 400 + b"\xe4".decode(errors="surrogateescape")  # too long, and not UTF-8
    drawn = draw_reconstruction(frames, (2, 1), ids, pred, 12_000, ["a", latin], ["1", "2", latin], [0.5, 0.7, 0.9])
    picture = np.asarray(drawn).astype(int)
    below, top, right = ZOOM * 32 + GAP, 3 * LINE, ZOOM * 48 + GAP
    original, masked, predicted = (
        picture[top + i * below :, MARGIN:][: ZOOM * 32 : ZOOM, : ZOOM * 48 : ZOOM] for i in range(3)
    )
    assert np.array_equal(original, frames[0].numpy())
    assert np.abs(predicted - original).max() <= 1
    assert (masked[:16, :16] == GREY).all(), "patch 0 is masked"
    assert (masked[16:, 16:32] == GREY).all(), "patch 4 is masked"
    assert np.array_equal(masked[:16, 16:], original[:16, 16:])
    assert picture.shape[1] == MARGIN + 2 * right
    second = picture[top + 3 * below + GAP :]
    assert (second[2 * LINE :, MARGIN + right :] == 255).all(), "the second sequence has one view"
    lines = picture[:LINE], picture[LINE : 2 * LINE, MARGIN:], second[:LINE, MARGIN:], picture[top:, :MARGIN]
    for text in (*lines, picture[2 * LINE : top, MARGIN:], second[LINE : 2 * LINE, MARGIN : MARGIN + right]):
        assert text.min() < 100, "it has a label"

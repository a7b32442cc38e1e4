"""What the decoder's global blocks attend to: pictures (Fig. 6), and matching from it without training (supplement, C).

The decoder is fed whole pictures, nothing masked, as ZeroCo feeds CroCo's: a mask token has no content of its own to be
matched by. Every patch counts as visible to the decoder, and the last block, which in training is asked for masked
patches alone, is asked for all.

Legend: n pairs, P patches of a frame, h heads, d width of a head, G global blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastmum.attention import ragged_attention
from fastmum.data.errors import DataError
from fastmum.evaluate.features import check_finite, check_size, load_image, patch_size, true_warps
from fastmum.evaluate.matcher import decode
from fastmum.evaluate.metrics import pixel_errors, scores
from fastmum.evaluate.pairs import PairSet
from fastmum.evaluate.result import Result, measured
from fastmum.model.mum import GlobalAttention, MuM

BATCH = 2  # pairs decoded at a time
LEAST = 1e-12  # attention below it counts as this much


class Recorder:
    """Attention across the two frames of every pair, as the model computes it, that keeps who looks at whom.

    Args:
        pairs: n.
        patches: P.
    """

    def __init__(self, pairs: int, patches: int) -> None:
        self._pairs, self._patches = pairs, patches
        self.maps: list[Tensor] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (T_q, h, d), k and v (T, h, d), T = n * 2 * (1 + P) -> (T_q, h, d); T_q may leave CLS out."""
        self.maps.append(self._map(q, k))
        queries, keys = (len(x) // self._pairs for x in (q, k))
        ends_q, ends_k = (torch.arange(self._pairs + 1, dtype=torch.int32) * tokens for tokens in (queries, keys))
        return ragged_attention(q, k, v, ends_k, keys, cu_seqlens_q=ends_q, max_seqlen_q=queries)

    def _map(self, q: Tensor, k: Tensor) -> Tensor:
        """Attention of patches of A to patches of B, mean over heads, (n, P, P) float32 on the CPU."""
        # CLS, where there is one, comes first in its frame.
        asking = q.unflatten(0, (self._pairs, 2, -1))[:, 0, -self._patches :].float()
        seen = k.unflatten(0, (self._pairs, -1)).float()
        logits = torch.einsum("nqhd,nkhd->nhqk", asking, seen) * q.shape[-1] ** -0.5
        return logits.softmax(-1)[..., -self._patches :].mean(1).cpu()


@torch.no_grad()
def attention_maps(model: MuM, images: Tensor) -> Tensor:
    """Attention from the first to the second frame of every pair in every global block.

    Args:
        model: with its decoder.
        images: (2 n, H, W, 3) uint8, the frames of a pair one behind the other.

    Returns:
        (G, n, P, P) float32 on the CPU: of a patch of A (row) to each patch of B, mean over heads. A row sums to less
        than 1, since patches look at their own frame and at CLS, too.
    """
    device, size = next(model.parameters()).device, patch_size(model)
    grid = images.shape[1] // size, images.shape[2] // size
    features = model.forward_features(images.to(device))
    encoded = torch.cat([features["x_norm_clstoken"][:, None], features["x_norm_patchtokens"]], 1)
    ids = torch.arange(grid[0] * grid[1], device=device).repeat(len(images), 1)
    recorder = Recorder(len(images) // 2, ids.shape[1])
    model.decode(encoded, ids, ids, GlobalAttention(recorder, recorder), grid)
    return torch.stack(recorder.maps)


def evaluate_attention(model: nn.Module, pairs: PairSet, size: int | None = None, progress: bool = True) -> Result:
    """Match by attention alone, in every global block and in their mean.

    Args:
        model: a `MuM`, on the device that everything is computed on.
        pairs: to test on.
        size: side of the pictures in pixels; None: the set's own.
        progress: whether to show bars.

    Returns:
        "scores" and "per_pair_epe" of the best, "best" which it is, "blocks" the scores of "mean" and of 0, 1, ...

    Raises:
        DataError: an encoder without decoder, or a set that cannot be read or does not fit it.
    """
    if not isinstance(model, MuM):
        raise DataError("attention across views is the decoder's, but these weights are an encoder's alone")
    size = size or pairs.size
    side = check_size(model, size) // patch_size(model)
    truth = true_warps(pairs, side, progress)
    warps = _warps(model, pairs, size, truth.grid, progress)
    errors = pixel_errors(warps, truth.target)
    names = ["mean", *map(str, range(len(warps) - 1))]
    found = scores(errors, truth.visible)
    best = min(range(len(names)), key=lambda i: found[i].epe)
    blocks = {name: each.as_dict() for name, each in zip(names, found, strict=True)}
    numbers = {"best": names[best], "blocks": blocks, "settings": {"size": size}} | measured(warps[best], truth)
    return Result(numbers, warps[best], size)


def _warps(model: MuM, pairs: PairSet, size: int, grid: tuple[int, int], progress: bool) -> Tensor:
    """Warps by the mean over blocks and by each block, (1 + G, N, P, 2)."""
    warps = []
    with tqdm(total=len(pairs.pairs), desc="attention", unit="pair", disable=not progress, leave=False) as bar:
        for start in range(0, len(pairs.pairs), BATCH):
            some = pairs.pairs[start : start + BATCH]
            images = torch.stack([load_image(frame, size) for pair in some for frame in (pair.a, pair.b)])
            maps = attention_maps(model, images)
            check_finite(maps, pairs)
            both = torch.cat([maps.mean(0, keepdim=True), maps])
            warps.append(decode(both.clamp(min=LEAST).log(), grid))
            bar.update(len(some))
    return torch.cat(warps, dim=1)

"""Attention across views in the decoder's global blocks: pictures (Fig. 6), matching without training (section C).

The decoder gets whole pictures without masks, as in ZeroCo: mask tokens have no content to match. Every patch counts as
visible, and the last block, which in training outputs masked patches only, outputs all.

Legend: n pairs, P patches of a frame, h heads, d width of a head, G global blocks.
"""

import torch
from torch import Tensor, nn

from fastmum.attention import ragged_attention
from fastmum.data.errors import DataError
from fastmum.evaluate.features import check_finite, check_size, load_image, patch_size, true_warps
from fastmum.evaluate.matching import Result, decode
from fastmum.evaluate.pairs import PairSet
from fastmum.evaluate.scoring import measured
from fastmum.geometry.metrics import match_errors, match_scores
from fastmum.model.mum import GlobalAttention, MuM
from fastmum.progress import progress_bar

BATCH = 2  # pairs decoded at once
LEAST = 1e-12  # attention is clamped to this before the logarithm


class Recorder:
    """Global attention over `pairs` sequences of two frames with `patches` patches; it also stores its weights."""

    def __init__(self, pairs: int, patches: int) -> None:
        self._pairs, self._patches = pairs, patches
        self.maps: list[Tensor] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (T_q, h, d), k and v (T, h, d), T = n * 2 * (1 + P) -> (T_q, h, d); q may lack the CLS tokens."""
        queries_A = q.unflatten(0, (self._pairs, 2, -1))[:, 0, -self._patches :].float()  # CLS, if present, is first
        logits = torch.einsum("nqhd,nkhd->nhqk", queries_A, k.unflatten(0, (self._pairs, -1)).float())
        maps = (logits * q.shape[-1] ** -0.5).softmax(-1)[..., -self._patches :].mean(1)
        self.maps.append(maps.cpu())  # (n, P, P) float32, from patches of A to patches of B
        queries, keys = (len(x) // self._pairs for x in (q, k))
        ends_q, ends_k = (torch.arange(self._pairs + 1, dtype=torch.int32) * tokens for tokens in (queries, keys))
        return ragged_attention(q, k, v, ends_k, keys, cu_seqlens_q=ends_q, max_seqlen_q=queries)


@torch.no_grad()
def attention_maps(model: MuM, images: Tensor) -> Tensor:
    """Attention from the first to the second frame of every pair in every global block.

    `images` (2 n, H, W, 3) uint8 are the two frames of a pair in succession. The result (G, n, P, P), float32 on the
    CPU, holds weights from patches of A (rows) to patches of B, mean over heads. Rows sum to less than 1, because
    patches also attend to their own frame and to CLS.
    """
    device, size = next(model.parameters()).device, patch_size(model)
    grid = images.shape[1] // size, images.shape[2] // size
    features = model.forward_features(images.to(device))
    encoded = torch.cat([features["x_norm_clstoken"][:, None], features["x_norm_patchtokens"]], 1)
    ids = torch.arange(grid[0] * grid[1], device=device).repeat(len(images), 1)
    recorder = Recorder(len(images) // 2, ids.shape[1])
    model.decode(encoded, ids, ids, GlobalAttention(recorder, recorder), grid)
    return torch.stack(recorder.maps)


def evaluate_attention(model: nn.Module, pairs: PairSet, size: int | None = None) -> Result:
    """Match by the attention weights of every global block of a `MuM` and of their mean.

    The result has "scores" and "per_pair_epe" of the best, "best" which one that is, and "blocks" the scores of "mean",
    "0", "1", ... DataError: the model has no decoder, or the set cannot be read or does not fit the model.
    """
    if not isinstance(model, MuM):
        raise DataError("attention across views needs the decoder, but these weights have only an encoder")
    size = size or pairs.size
    truth = true_warps(pairs, check_size(model, size) // patch_size(model))
    batches = []
    for start in progress_bar(range(0, len(pairs.pairs), BATCH), desc="attention", leave=False):
        some = pairs.pairs[start : start + BATCH]
        maps = attention_maps(model, torch.stack([load_image(f, size) for pair in some for f in (pair.a, pair.b)]))
        check_finite(maps, pairs)
        both = torch.cat([maps.mean(0, keepdim=True), maps])
        batches.append(decode(both.clamp(min=LEAST).log(), truth.grid))
    warps = torch.cat(batches, dim=1)  # (1 + G, N, P, 2)
    names = ["mean", *map(str, range(len(warps) - 1))]
    found = match_scores(match_errors(warps, truth.target), truth.visible)
    best = min(range(len(names)), key=lambda i: found[i].epe)
    blocks = {name: each.as_dict() for name, each in zip(names, found, strict=True)}
    numbers = {"best": names[best], "blocks": blocks, "settings": {"size": size}} | measured(warps[best], truth)
    return Result(numbers, warps[best], size)

"""Recall of correspondences on objects, after Probe3D (El Banani et al., 2024): Table 13, column NAVI.

Features are upsampled to a quarter of the image's side; each object point of A takes its nearest of B by cosine
distance; the 1,000 matches with the best ratio to their second nearest are kept. A match is right if its two points are
within 1, 2 or 5 cm of each other in space.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmum.evaluate.features import NORMS, Norm, check_size, load_image, patch_features, patch_size
from fastmum.evaluate.pairs import Frame, Pair, PairSet
from fastmum.evaluate.pairs.pair import depth_and_K
from fastmum.geometry.warp import grid_points
from fastmum.progress import progress_bar

# `navi_correspondence.yaml` and `evaluate_navi_correspondence.py` of Probe3D.
SCALE = 4
MATCHES = 1000
WITHIN = (0.01, 0.02, 0.05)  # metres
CHUNK = 4096  # points of A compared at a time


def object_recall(encoder: nn.Module, pairs: PairSet, size: int | None = None) -> dict[Norm, dict[str, float]]:
    """Percentage of right ones among the kept matches, mean over pairs, by features after and before the last norm.

    The keys are "recall_1cm", "recall_2cm", "recall_5cm", their mean "recall", and the number of "pairs".
    """
    size = check_size(encoder, size or pairs.size)
    bar = progress_bar(pairs.pairs, desc=f"recall on {pairs.name}", unit="pair", leave=False)
    recalls = torch.stack([_pair_recalls(encoder, pair, size) for pair in bar]).mean(0)
    names = [f"recall_{round(100 * bound)}cm" for bound in WITHIN]
    return {
        norm: {"recall": row.mean().item(), **dict(zip(names, row.tolist(), strict=True)), "pairs": len(pairs.pairs)}
        for norm, row in zip(NORMS, recalls, strict=True)
    }


@torch.no_grad()
def _pair_recalls(encoder: nn.Module, pair: Pair, size: int) -> Tensor:
    """Percentages for each norm within each distance, (2, 3) float64."""
    fine = size // SCALE
    features = patch_features(encoder, torch.stack([load_image(frame, size) for frame in (pair.a, pair.b)]))
    points_a, points_b = (_surface(frame, fine) for frame in (pair.a, pair.b))
    T = torch.from_numpy(pair.T_b_a)
    moved = points_a @ T[:3, :3].T + T[:3, 3]
    seen_a, seen_b = points_a[:, 2] > 0, points_b[:, 2] > 0
    recalls = []
    for norm in NORMS:
        maps = features[norm].mT.unflatten(2, (size // patch_size(encoder),) * 2)
        fine_maps = F.interpolate(maps, (fine, fine), mode="bicubic", align_corners=False).flatten(2).mT
        a, b = fine_maps[0][seen_a.to(fine_maps.device)], fine_maps[1][seen_b.to(fine_maps.device)]
        first, second = best_matches(a, b, MATCHES)
        distance = (moved[seen_a][first.cpu()] - points_b[seen_b][second.cpu()]).norm(dim=1)
        recalls.append(torch.stack([100 * (distance < bound).double().mean() for bound in WITHIN]))
    return torch.stack(recalls)


def best_matches(a: Tensor, b: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Indices of at most `count` matches of features (N, D) and (M, D), width D, with the best ratio test.

    They are sorted by the weight 1 - d1 / d2, d the cosine distances of the two nearest.
    """
    a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    nearest = [(1 - chunk @ b.T).topk(min(2, len(b)), largest=False) for chunk in a.split(CHUNK)]
    distances = torch.cat([each.values for each in nearest]).clamp(min=1e-9)
    weights = 1 - distances[:, 0] / distances[:, -1]
    kept = weights.topk(min(count, len(weights))).indices
    return kept, torch.cat([each.indices for each in nearest])[kept, 0]


def _surface(frame: Frame, side: int) -> Tensor:
    """Points in camera axes at the cells of a grid, (side * side, 3) float64; z is 0 off the object."""
    depth, K = (each.double() for each in depth_and_K(frame))
    pixels = grid_points(side, side) * torch.tensor(depth.shape[::-1])
    columns, rows = pixels.long().T
    rays = torch.cat([pixels, torch.ones_like(pixels[:, :1])], 1) @ torch.linalg.inv(K).T
    return rays * depth[rows, columns][:, None]

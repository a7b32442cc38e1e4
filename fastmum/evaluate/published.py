"""The paper's numbers, to stand beside ours. They were measured on MegaDepth-1500, ScanNet-1500 and NAVI alone."""

from __future__ import annotations

# Dense matching by linear probe, end-point error in pixels of 448 x 448 (main paper, Table 4).
LINEAR_PROBE: dict[str, dict[str, float]] = {
    "MuM": {"megadepth": 10.2, "scannet": 27.9},
    "DINOv3": {"megadepth": 19.0, "scannet": 28.7},
    "CroCo v2": {"megadepth": 27.3},
    "MAE": {"megadepth": 29.7, "scannet": 35.0},
}

# Cosine matching: the same error, and recall on NAVI in percent (supplement, Table 13).
COSINE: dict[str, dict[str, float]] = {
    "MuM": {"navi": 46.9, "megadepth": 50.8, "scannet": 55.7},
    "DINOv3": {"navi": 62.8, "megadepth": 36.5, "scannet": 56.4},
    "CroCo v2": {"navi": 41.0, "megadepth": 60.3, "scannet": 62.1},
    "MAE": {"navi": 43.7, "megadepth": 88.8, "scannet": 83.4},
}

# By evaluation; nothing was published on those that are empty.
PUBLISHED: dict[str, dict[str, dict[str, float]]] = {
    "matching": LINEAR_PROBE,
    "cosine": COSINE,
    "attention": {},
    "views": {},
}

"""The reference's image loading: Pillow and torchvision's transforms in DataLoader workers.

`RandomResizedCrop(256, scale=(0.2, 1), interpolation=bicubic)`, `RandomHorizontalFlip`, `ToTensor` and `Normalize` of
torchvision, written out as the calls to Pillow and torch that they make, so that torchvision need not be installed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.reference.step import IMAGENET_MEAN, IMAGENET_STD


class ImageFiles(Dataset):
    """Random crops of image files, (3, size, size) float32, normalised."""

    def __init__(self, files: Sequence[Path], size: int) -> None:
        self.files = files
        self.size = size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        image = Image.open(self.files[index]).convert("RGB")
        return transform(image, random_box(*image.size), random.random() < 0.5, self.size)


def loader(files: Sequence[Path], size: int, batch_size: int, workers: int) -> DataLoader:
    """Batches (batch_size, 3, size, size) float32 from worker processes."""
    return DataLoader(ImageFiles(files, size), batch_size, shuffle=True, num_workers=workers, persistent_workers=True)


def random_box(width: int, height: int) -> tuple[int, int, int, int]:
    """`RandomResizedCrop.get_params`: left, top, right, bottom."""
    for _ in range(10):
        area = width * height * random.uniform(0.2, 1.0)
        aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width / (3 / 4)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def transform(image: Image.Image, box: tuple[int, int, int, int], flip: bool, size: int) -> Tensor:
    """Crop, resize, flip, `to_tensor`, `normalize`."""
    image = image.crop(box).resize((size, size), Image.Resampling.BICUBIC)
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(image, copy=True)).permute(2, 0, 1).contiguous()
    pixels = pixels.to(torch.float32).div(255)
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return pixels.clone().sub_(mean[:, None, None]).div_(std[:, None, None])

"""The device that weights are used on."""

from __future__ import annotations

import re

import torch

from fastmum.pretrained.errors import WeightsError


def pick_device(name: str, what: str = "--device") -> torch.device:
    """The device of a name; auto is a GPU where there is one.

    Args:
        name: auto, cpu, cuda or cuda:N.
        what: names it in messages.

    Raises:
        WeightsError: there is no such device.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise WeightsError(f"{what} is '{name}', but must be auto, cpu, cuda or cuda:N")
    there = torch.cuda.device_count()
    device = torch.device(("cuda" if there else "cpu") if name == "auto" else name)
    if device.type == "cuda" and (device.index or 0) >= there:
        raise WeightsError(f"{what} is '{name}', but torch sees {there} CUDA devices")
    return device

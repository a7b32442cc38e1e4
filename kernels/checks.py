"""Checks of the arguments of operations."""

import torch
from torch import Tensor

INTEGERS = (torch.int64, torch.int32)


def check_tensors(**tensors: Tensor) -> None:
    """Raise TypeError unless all are tensors, ValueError unless they are on one device."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}, but must be a tensor")
    devices = {name: x.device for name, x in tensors.items()}
    if len(set(devices.values())) > 1:
        places = ", ".join(f"{name} is on {device}" for name, device in devices.items())
        raise ValueError(f"all tensors must be on one device, but {places}")


def check_floating(name: str, x: Tensor, ndim: int, shape: str) -> None:
    """Raise TypeError unless `x` is floating point, ValueError unless it has `ndim` axes."""
    if not x.is_floating_point():
        raise TypeError(f"{name} has dtype {x.dtype}, but must be floating point")
    if x.ndim != ndim:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, but must be {shape}")


def check_ids(name: str, ids: Tensor, num_frames: int) -> None:
    """Raise TypeError unless `ids` are int64 or int32, ValueError unless they are (num_frames, n)."""
    if ids.dtype not in INTEGERS:
        raise TypeError(f"{name} has dtype {ids.dtype}, but must be int64 or int32")
    if ids.ndim != 2 or ids.shape[0] != num_frames:
        raise ValueError(f"{name} has shape {tuple(ids.shape)}, but must be ({num_frames}, n): a row for every frame")


def check_range(name: str, ids: Tensor, low: int, high: int) -> None:
    """Raise IndexError unless low <= ids < high, on the CPU only: on a GPU this would synchronise."""
    if ids.device.type == "cpu" and ids.numel():
        least, most = (int(x) for x in ids.aminmax())
        if least < low or most >= high:
            raise IndexError(f"{name} holds {least if least < low else most}, but must lie in {low}..{high - 1}")

"""The nearest rotation of a matrix, without waiting for the device.

torch.linalg.svd on CUDA waits for its status, and its gradient is infinite where singular values are equal.
"""

import torch
from torch import Tensor

from fastmum.tasks.reconstruction.camera import rotation_matrix

SQUARINGS = 24  # of K: eigenvalues that differ by 1e-6 are separated by e**16
LEAST = 1e-8  # added to sums of two singular values: where one is 0, the rotation is not unique


def nearest_rotation(m: Tensor) -> Tensor:
    """The rotations (..., 3, 3) of least squared distance to matrices (..., 3, 3), in their dtype; float64 inside.

    It is U diag(1, 1, det(U V')) V' of the singular vectors (`svd_orthogonalize` of Reloc3r). Where it is not unique,
    any rotation. Gradients are those of first order.
    """
    wide = m.double()
    R = _horn(wide.detach())
    # A change dm turns R by R [w], (tr(H) I - H) w = vee(R' dm - dm' R), where H = R' m. The value of w is not used.
    H = R.mT @ wide
    sums = (H.detach().diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None] + LEAST) * torch.eye(3, device=m.device)
    w = torch.linalg.inv_ex(sums - H.detach()).inverse @ _vee(H)[..., None]
    return (R + torch.linalg.cross(R, (w - w.detach()).mT)).to(m.dtype)  # R [w]


def _vee(m: Tensor) -> Tensor:
    """The vector (..., 3) of the antisymmetric matrix m - m'."""
    return torch.stack([m[..., i, j] - m[..., j, i] for i, j in ((2, 1), (0, 2), (1, 0))], -1)


def _horn(m: Tensor) -> Tensor:
    """Horn's method: the quaternion of the rotation is the eigenvector of the largest eigenvalue of K."""
    trace, odd = m.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None], _vee(m)
    upper = m + m.mT - trace[..., None] * torch.eye(3, dtype=m.dtype, device=m.device)
    K = torch.cat([torch.cat([upper, odd[..., None]], -1), torch.cat([odd, trace], -1)[..., None, :]], -2)
    size = K.square().sum((-2, -1), keepdim=True).sqrt() + torch.finfo(torch.float32).tiny
    power = K / size + torch.eye(4, dtype=K.dtype, device=m.device)  # eigenvalues of 0 to 2
    for _ in range(SQUARINGS):
        power = power / power.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        power = power @ power
    largest = power.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None]
    return rotation_matrix(power.gather(-2, largest.expand(*largest.shape[:-1], 4))[..., 0, :])

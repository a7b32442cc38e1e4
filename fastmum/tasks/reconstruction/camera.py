"""Cameras: the head that predicts them in four refinements, in float32, and their encoding as nine numbers.

Legend: F frames, C width of the aggregator.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmum.tasks.reconstruction.aggregator import Sequences
from fastmum.tasks.reconstruction.block import Block, Mlp

NUMBERS = 9  # translation (3), quaternion x y z w (4), vertical and horizontal field of view in radians (2)


class CameraHead(nn.Module):
    """Refines the encoding of every camera from the camera tokens; all refinements share their weights.

    Each adds to the detached estimate before it, so the loss of a refinement reaches the weights through its own update
    only.

    Args:
        dim: width of the tokens, 2C.
        num_heads, blocks, iterations: VGGT's are 16, 4 and 4.
    """

    def __init__(self, dim: int, num_heads: int, blocks: int, iterations: int) -> None:
        super().__init__()
        self.iterations = iterations
        self.token_norm = nn.LayerNorm(dim)
        self.trunk = nn.Sequential(*(Block(dim, num_heads, qk_norm=False) for _ in range(blocks)))
        self.trunk_norm = nn.LayerNorm(dim)
        self.empty_pose_tokens = nn.Parameter(torch.zeros(1, 1, NUMBERS))
        self.embed_pose = nn.Linear(NUMBERS, dim)
        self.poseLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 3 * dim))
        self.adaln_norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.pose_branch = Mlp(dim, dim // 2, NUMBERS)

    def forward(self, tokens: Tensor, sequences: Sequences) -> list[Tensor]:
        """Camera tokens (F, 2C) -> encodings (F, 9) after each refinement."""
        with torch.autocast(tokens.device.type, enabled=False):
            tokens = self.token_norm(tokens.to(self.token_norm.weight.dtype))
            attend = sequences.attention(1, tokens, "sdpa")
            estimate, outputs = self.empty_pose_tokens[0].expand(len(tokens), -1), []
            for i in range(self.iterations):
                # The first estimate is a parameter and keeps its gradient.
                previous = estimate.detach()
                embedded = self.embed_pose(previous if i else estimate)
                shift, scale, gate = self.poseLN_modulation(embedded).chunk(3, dim=-1)
                x = tokens + gate * (self.adaln_norm(tokens) * (1 + scale) + shift)
                for block in self.trunk:
                    x = block(x, attend)
                delta = self.pose_branch(self.trunk_norm(x))
                estimate = previous + delta if i else delta
                outputs.append(torch.cat([estimate[:, :7], F.relu(estimate[:, 7:])], dim=-1))
            return outputs


def encode_cameras(camera_from_world: Tensor, K: Tensor, size: tuple[int, int]) -> Tensor:
    """Encode poses (..., 3 or 4, 4) and intrinsics (..., 3, 3) of images of `size` (height, width): (..., 9)."""
    height, width = size
    fov_h, fov_w = 2 * torch.atan(height / 2 / K[..., 1, 1]), 2 * torch.atan(width / 2 / K[..., 0, 0])
    angles = torch.stack([fov_h, fov_w], -1)
    return torch.cat([camera_from_world[..., :3, 3], quaternion(camera_from_world[..., :3, :3]), angles], dim=-1)


def decode_cameras(encoding: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """camera_from_world (..., 4, 4) and K (..., 3, 3) of encodings; the principal point is the image's centre."""
    height, width = size
    T = torch.zeros(*encoding.shape[:-1], 4, 4, dtype=encoding.dtype, device=encoding.device)
    T[..., :3, :3], T[..., :3, 3], T[..., 3, 3] = rotation_matrix(encoding[..., 3:7]), encoding[..., :3], 1
    fy, fx = height / 2 / torch.tan(encoding[..., 7] / 2), width / 2 / torch.tan(encoding[..., 8] / 2)
    K = torch.zeros_like(T[..., :3, :3])
    K[..., 0, 0], K[..., 1, 1], K[..., 0, 2], K[..., 1, 2], K[..., 2, 2] = fx, fy, width / 2, height / 2, 1
    return T, K


def quaternion(R: Tensor) -> Tensor:
    """Quaternions x y z w (..., 4), w >= 0, of rotations (..., 3, 3); as `fastmum.geometry.camera.quaternion`."""
    trace = R.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None]
    odd = torch.stack([R[..., i, j] - R[..., j, i] for i, j in ((2, 1), (0, 2), (1, 0))], -1)
    upper = R + R.mT + (1 - trace[..., None]) * torch.eye(3, dtype=R.dtype, device=R.device)
    products = torch.cat([torch.cat([upper, odd[..., None]], -1), torch.cat([odd, 1 + trace], -1)[..., None, :]], -2)
    largest = products.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None]  # of 4 q q^T
    row = products.gather(-2, largest[..., None].expand(*largest.shape, 4))[..., 0, :]
    q = row / (2 * row.gather(-1, largest).sqrt())
    return torch.where(q[..., 3:] < 0, -q, q)


def rotation_matrix(q: Tensor) -> Tensor:
    """Rotations (..., 3, 3) of quaternions x y z w (..., 4) of any length."""
    vector, w = q[..., :3], q[..., 3, None, None]
    x, y, z = vector.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))
    turn = w * cross + cross @ cross
    return torch.eye(3, dtype=q.dtype, device=q.device) + 2 / q.square().sum(-1)[..., None, None] * turn

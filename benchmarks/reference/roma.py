"""RoMa's decoder and losses in plain PyTorch, as its public training code computes them.

Local correlation gathers the (2 r + 1)^2 features around every warped position, image by image; pixels without a true
warp are removed by indexing. Names of weights are the public ones.

Legend: B pairs, (h, w) map of a stride, C channels, K positions of a window.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDES = (16, 8, 4, 2, 1)
LOCAL = {1: 4, 2: 4, 4: 8, 8: 8}


def coordinates(h: int, w: int) -> Tensor:
    """(1, 2, h, w)."""
    ys, xs = torch.meshgrid(
        torch.linspace(-1 + 1 / h, 1 - 1 / h, h), torch.linspace(-1 + 1 / w, 1 - 1 / w, w), indexing="ij"
    )
    return torch.stack([xs, ys])[None]


def gathered_correlation(x: Tensor, y: Tensor, radius: int, warp: Tensor) -> Tensor:
    """(B, K, h, w), from all sampled features of an image at once."""
    B, C, h, w = x.shape
    K = (2 * radius + 1) ** 2
    dy, dx = torch.meshgrid(
        torch.linspace(-2 * radius / h, 2 * radius / h, 2 * radius + 1),
        torch.linspace(-2 * radius / w, 2 * radius / w, 2 * radius + 1), indexing="ij",
    )  # fmt: skip
    window = torch.stack([dx, dy], -1).reshape(1, 1, K, 2)
    out = torch.empty(B, K, h, w)
    for i in range(B):
        with torch.no_grad():
            at = (warp[i].permute(1, 2, 0)[:, :, None] + window).reshape(1, h, w * K, 2)
            sampled = F.grid_sample(y[i : i + 1], at, align_corners=False).reshape(C, h, w, K)
        out[i] = (x[i][..., None] / C**0.5 * sampled).sum(0).permute(2, 0, 1)
    return out


class ConvRefiner(nn.Module):
    def __init__(
        self, channels: int, projected: int, displacement: int, radius: int, hidden: int | None, hidden_blocks: int
    ) -> None:
        super().__init__()
        inputs = 2 * projected + displacement + ((2 * radius + 1) ** 2 if radius else 0)
        width = hidden or inputs
        self.radius = radius
        self.block1 = self.block(inputs, width)
        self.hidden_blocks = nn.Sequential(*[self.block(width, width) for _ in range(hidden_blocks)])
        self.out_conv = nn.Conv2d(width, 3, 1)
        self.disp_emb = nn.Conv2d(2, displacement, 1)

    @staticmethod
    def block(inputs: int, width: int) -> nn.Sequential:
        depthwise = nn.Conv2d(inputs, width, 5, 1, 2, groups=inputs)
        return nn.Sequential(
            depthwise, nn.BatchNorm2d(width, momentum=0.01), nn.ReLU(inplace=True), nn.Conv2d(width, width, 1)
        )

    def forward(self, x: Tensor, y: Tensor, warp: Tensor, scale_factor: float = 1) -> tuple[Tensor, Tensor]:
        x_hat = F.grid_sample(y, warp.permute(0, 2, 3, 1), align_corners=False, mode="bilinear")
        shift = warp - coordinates(*x.shape[2:]).expand(len(x), -1, -1, -1)
        parts = [x, x_hat, self.disp_emb(40 / 32 * scale_factor * shift)]
        if self.radius:
            parts.append(gathered_correlation(x, y, self.radius, warp))
        d = self.hidden_blocks(self.block1(torch.cat([part.float() for part in parts], dim=1)))
        with torch.autocast(d.device.type, enabled=False):
            d = self.out_conv(d.float())
        return d[:, :-1], d[:, -1:]


class GP(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pos_conv = nn.Conv2d(2, dim, 1)

    @staticmethod
    def kernel(x: Tensor, y: Tensor) -> Tensor:
        product = torch.einsum("bnd,bmd->bnm", x, y)
        cosine = product / (x.norm(dim=-1)[..., None] * y.norm(dim=-1)[:, None] + 1e-6)
        return ((cosine - 1.0) / 0.2).exp()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        B, _, h, w = x.shape
        f = torch.cos(8 * math.pi * self.pos_conv(coordinates(h, w).expand(B, -1, -1, -1)))
        x, y, f = (each.flatten(2).transpose(1, 2) for each in (x, y, f))
        K_yy, K_xy = self.kernel(y, y), self.kernel(x, y)
        noise = 0.1 * torch.eye(h * w)[None]
        if self.training:
            mean = K_xy.matmul(torch.linalg.inv(K_yy + noise).matmul(f))
        else:
            mean = K_xy @ torch.cholesky_solve(f, torch.linalg.cholesky(K_yy + noise))
        return mean.transpose(1, 2).reshape(B, -1, h, w)


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, dim * 3, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads)
        q, k, v = (each.transpose(1, 2) for each in torch.unbind(qkv, 2))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C))


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, num_heads)
        self.norm2, self.mlp = nn.LayerNorm(dim), Mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TransformerDecoder(nn.Module):
    def __init__(self, dim: int, num_heads: int, blocks: int, outputs: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[Block(dim, num_heads) for _ in range(blocks)])
        self.to_out = nn.Linear(dim, outputs)

    def forward(self, posterior: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        B, _, h, w = posterior.shape
        tokens = torch.cat([posterior, features], dim=1).flatten(2).permute(0, 2, 1)
        out = self.to_out(self.blocks(tokens)).permute(0, 2, 1).reshape(B, -1, h, w)
        return out[:, :-1], out[:, -1:]


@torch.no_grad()
def refined_classes(logits: Tensor) -> Tensor:
    """Warp (B, h, w, 2) of logits (B, side^2, h, w)."""
    C = logits.shape[1]
    side = round(math.sqrt(C))
    anchors = coordinates(side, side)[0].permute(1, 2, 0).reshape(C, 2)
    probabilities = logits.softmax(dim=1)
    mode = probabilities.max(dim=1).indices
    index = torch.stack([mode - 1, mode, mode + 1, mode - side, mode + side], dim=1).clamp(0, C - 1)
    near = torch.gather(probabilities, 1, index)[..., None]
    flow = sum(near[:, i] * anchors[index[:, i]] for i in range(5))
    return flow / near.sum(dim=1)


class ReferenceRoMa(nn.Module):
    """The decoder. `scales`: stride -> channels, projected channels, displacement, radius, hidden width or None."""

    def __init__(
        self, scales: Mapping[int, Sequence[int | None]], gp_dim: int, num_heads: int, blocks: int, anchors: int,
        hidden_blocks: int,
    ) -> None:  # fmt: skip
        super().__init__()
        width = gp_dim + (scales[16][1] or 0)
        self.embedding_decoder = TransformerDecoder(width, num_heads, blocks, anchors**2 + 1)
        self.gps = nn.ModuleDict({"16": GP(gp_dim)})
        self.proj = nn.ModuleDict()
        self.conv_refiner = nn.ModuleDict()
        for stride, (channels, projected, displacement, radius, hidden) in scales.items():
            assert channels is not None
            assert projected is not None
            assert displacement is not None
            assert radius is not None
            self.proj[str(stride)] = nn.Sequential(nn.Conv2d(channels, projected, 1), nn.BatchNorm2d(projected))
            self.conv_refiner[str(stride)] = ConvRefiner(
                channels, projected, displacement, radius, hidden, hidden_blocks
            )

    def forward(
        self, f1: Mapping[int, Tensor], f2: Mapping[int, Tensor], start: Tensor | None = None
    ) -> dict[int, dict[str, Tensor]]:
        """Flow, certainty and delta_flow by stride; of the first gm_cls and gm_certainty, unless it is `start`."""
        h, w = f1[1].shape[2:]
        corresps: dict[int, dict[str, Tensor]] = {}
        flow = certainty = torch.zeros(0)
        for stride in STRIDES:
            # The public code's projections and Gaussian process are in float32 whatever the precision.
            with torch.autocast(f1[1].device.type, enabled=False):
                x, y = (self.proj[str(stride)](f[stride].float()) for f in (f1, f2))
            corresps[stride] = {}
            if stride == 16 and start is not None:
                flow, certainty = start, start[:, :1] * 0
            elif stride == 16:
                with torch.autocast(x.device.type, enabled=False):
                    posterior = self.gps["16"](x, y)
                classes, certainty = (each.float() for each in self.embedding_decoder(posterior, x))
                flow = refined_classes(classes).permute(0, 3, 1, 2)
                corresps[stride] |= {"gm_cls": classes, "gm_certainty": certainty}
            delta_flow, delta_certainty = self.conv_refiner[str(stride)](x, y, flow)
            flow = flow + stride * torch.stack([delta_flow[:, 0] / (4 * w), delta_flow[:, 1] / (4 * h)], dim=1)
            certainty = certainty + delta_certainty
            corresps[stride] |= {"flow": flow, "certainty": certainty, "delta_flow": delta_flow}
            if stride > 1:
                size = f1[stride // 2].shape[2:]
                flow = F.interpolate(flow, size=size, mode="bilinear").detach()
                certainty = F.interpolate(certainty, size=size, mode="bilinear").detach()
        return corresps


@torch.no_grad()
def true_warp(batch: Mapping[str, Tensor], h: int, w: int) -> tuple[Tensor, Tensor]:
    """Points (B, h, w, 2) and 1 where they are visible (B, h, w); the batch has the fixture's names."""
    depth1, depth2, T, K1, K2 = (batch[name].double() for name in ("im_A_depth", "im_B_depth", "T_1to2", "K1", "K2"))
    B, H, W = depth1.shape
    x1 = coordinates(h, w)[0].permute(1, 2, 0).reshape(1, h * w, 2).expand(B, -1, -1).double()
    z1 = F.grid_sample(depth1[:, None], x1[:, :, None], align_corners=False)[:, 0, :, 0]
    pixels = torch.stack([W * (x1[..., 0] + 1) / 2, H * (x1[..., 1] + 1) / 2, torch.ones_like(z1)], -1)
    in1 = K1.inverse() @ (pixels * z1[..., None]).transpose(2, 1)
    in2 = T[:, :3, :3] @ in1 + T[:, :3, [3]]
    projected = (K2 @ in2).transpose(2, 1)
    x2 = projected[..., :2] / (projected[..., [2]] + 1e-4)
    H, W = depth2.shape[1:]
    inside = (x2[..., 0] > 0) & (x2[..., 0] < W - 1) & (x2[..., 1] > 0) & (x2[..., 1] < H - 1)
    x2 = torch.stack([2 * x2[..., 0] / W - 1, 2 * x2[..., 1] / H - 1], -1)
    z2 = F.grid_sample(depth2[:, None], x2[:, :, None], align_corners=False)[:, 0, :, 0]
    same = ((z2 - in2[:, 2]) / z2).abs() < 0.05
    return x2.reshape(B, h, w, 2).float(), ((z1 != 0) & inside & same).float().reshape(B, h, w)


def losses_of(corresps: Mapping[int, Mapping[str, Tensor]], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Terms by the fixture's names, and `total`."""
    losses: dict[str, Tensor] = {}
    total, before = torch.zeros(()), torch.zeros(0)
    for stride, out in corresps.items():
        x2, prob = true_warp(batch, *out["flow"].shape[2:])
        if stride <= 8:
            near = F.interpolate(before[:, None], size=prob.shape[1:], mode="nearest-exact")[:, 0]
            prob = prob * (near < 2 / 512 * LOCAL[stride] * stride)
        seen = prob > 0.99
        if "gm_cls" in out:
            C = out["gm_cls"].shape[1]
            side = round(math.sqrt(C))
            with torch.no_grad():
                anchors = coordinates(side, side)[0].flatten(1).t()
                nearest = (anchors[None, :, None, None] - x2[:, None]).norm(dim=-1).min(dim=1).indices
            classes = F.cross_entropy(out["gm_cls"], nearest, reduction="none")[seen]
            certain = F.binary_cross_entropy_with_logits(out["gm_certainty"][:, 0], prob)
            if not torch.any(classes):
                classes = certain * 0.0
            losses |= {f"gm_cls_loss_{stride}": classes.mean(), f"gm_certainty_loss_{stride}": certain}
            total = total + 0.01 * certain + classes.mean()
        error = (out["flow"].permute(0, 2, 3, 1) - x2).norm(dim=-1)
        if stride == 1:
            losses["train_pck_05"] = (error[seen] < 0.5 * (2 / 512)).float().mean()
        certain = F.binary_cross_entropy_with_logits(out["certainty"][:, 0], prob)
        scale = 1e-4 * stride
        robust = scale**0.5 * ((error[seen] / scale) ** 2 + 1) ** 0.25
        if not torch.any(robust):
            robust = certain * 0.0
        losses |= {f"delta_regression_loss_{stride}": robust.mean(), f"delta_certainty_loss_{stride}": certain}
        total = total + 0.01 * certain + robust.mean()
        before = error.detach()
    return losses | {"total": total}

"""MuM: masked image modelling over the views of a scene.

The encoder sees the visible quarter of every frame by itself. The decoder puts mask tokens into the holes and
alternates attention within a frame and across all frames of a sequence; a linear head predicts the masked patches'
normalised pixels (paper, section 3; supplement, "Architecture").

Legend: F frames, H W pixels, p patch side, P patches of a frame, K visible, M masked, D encoder width, E decoder width,
n sequences packed one behind another, T = F * (1 + P) packed tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastmum.attention import Spans, choose_backend, dense_attention
from fastmum.kernels import patch_loss, scatter_tokens
from fastmum.model.block import Asking, Block, Context, compute_dtype, computed, packed
from fastmum.model.config import ModelConfig
from fastmum.model.encoder import Encoder
from fastmum.model.inputs import Pixels, check_frames, check_lengths, check_max_views, check_noise
from fastmum.model.masking import num_visible, split_by_noise
from fastmum.model.rope import AxialRope


class MuMOutput(NamedTuple):
    """What a forward pass returns.

    Args:
        loss: float32, a scalar, or (F,) where it was asked for frame by frame.
        pred: (F, M, 3*p*p), the patch-normalised pixels predicted for the masked patches, order (row, column, channel).
        visible_ids: (F, K) int64, ascending.
        masked_ids: (F, M) int64, ascending.
    """

    loss: Tensor
    pred: Tensor
    visible_ids: Tensor
    masked_ids: Tensor


class Views(NamedTuple):
    """Attention across the frames of each sequence: q, k, v -> output, by the backend and its plan for the batch.

    Args:
        all: every token asks.
        masked: the masked patches ask, as in the last block.
    """

    all: Callable[[Tensor, Tensor, Tensor], Tensor]
    masked: Callable[[Tensor, Tensor, Tensor], Tensor]


class MuM(Encoder):
    """Encoder and multi-view decoder; its `state_dict` has the released checkpoint's keys and shapes.

    `attention` is the name of the backend of attention across frames, see `fastmum.attention.BACKENDS`.
    """

    attention = "auto"
    norm_pix = True  # whether the loss normalises each target patch
    compiled_autoencode: Callable[..., MuMOutput] | None = None  # `_autoencode`, where all of it is compiled

    def _build(self, config: ModelConfig) -> None:
        super()._build(config)
        width, heads, eps = config.decoder_embed_dim, config.decoder_num_heads, config.norm_eps
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.rope_embed_decoder = AxialRope(width // heads)
        self.decoder_embed = nn.Linear(config.embed_dim, width)
        self.decoder_frame_blocks = nn.ModuleList(Block(width, heads, eps) for _ in range(config.decoder_depth // 2))
        self.decoder_global_blocks = nn.ModuleList(Block(width, heads, eps) for _ in range(config.decoder_depth // 2))
        self.decoder_norm = nn.LayerNorm(width, eps=eps)
        self.decoder_pred = nn.Linear(width, config.in_chans * config.patch_size**2)

    def set_recompute(self, what: str) -> None:
        super().set_recompute(what)
        for block in (*self.decoder_frame_blocks, *self.decoder_global_blocks):
            block.mlp.keep = "input" if what == "mlp" else "all"

    def forward(
        self,
        frames: Tensor,
        lengths: Tensor | Sequence[int],
        mask_ratio: float = 0.75,
        noise: Tensor | None = None,
        max_views: int | None = None,
        reduction: Literal["mean", "none"] = "mean",
    ) -> MuMOutput:
        """Mask, encode, decode and compare.

        Args:
            frames: (F, 3, H, W) floating point, ImageNet-normalised, or (F, H, W, 3) uint8, normalised inside.
            lengths: frames of each sequence, (n,) integers that sum to F; sequences lie one behind another. A list or
                a tensor on the CPU, so that reading it does not wait for the device. A tensor may be padded with zeros;
                where this function itself is compiled, its values are not checked.
            mask_ratio: share of masked patches; int(P * (1 - mask_ratio)) of every frame stay visible.
            noise: (F, P) uniform; the smallest of a row are visible, ties by index. None draws it.
            max_views: no sequence of any batch is longer; None: F. It bounds what attention kernels launch.
            reduction: "mean": one loss; "none": that of every frame, which all have as many masked patches.

        Raises:
            TypeError, ValueError: an argument that does not fit, named with what came and what is allowed.
        """
        pixels = check_frames(frames, self.config.patch_size, self.config.in_chans)
        num_frames, num_patches = len(frames), pixels.grid[0] * pixels.grid[1]
        lengths = check_lengths(lengths, num_frames)
        max_views = check_max_views(max_views, lengths, num_frames)
        visible = num_visible(num_patches, mask_ratio)
        if noise is None:
            noise = torch.rand(num_frames, num_patches, device=frames.device)
        noise = check_noise(noise, num_frames, num_patches)
        views = self._views(lengths, num_frames, num_patches, num_patches - visible, max_views, frames.device)
        if self.compiled_autoencode is not None:
            return self.compiled_autoencode(self, pixels, noise, visible, views, reduction)
        return self._autoencode(pixels, noise, visible, views, reduction)

    def _views(
        self, lengths: Tensor, num_frames: int, num_patches: int, masked: int, max_views: int, device: torch.device
    ) -> Views:
        """Everything that depends on the lengths: made here, on the host, so that what follows never changes shape."""
        backend = choose_backend(self.attention, device, compute_dtype(self.mask_token))
        tokens = 1 + num_patches
        plans = [
            backend.plan(Spans.of_frames(lengths, num_frames, queries, tokens, max_views), device)
            for queries in (tokens, masked)
        ]
        return Views(*(partial(backend.attend, plan=plan) for plan in plans))

    def _autoencode(
        self, pixels: Pixels, noise: Tensor, visible: int, views: Views, reduction: Literal["mean", "none"]
    ) -> MuMOutput:
        """The whole of the computation: static in shape, no Python that depends on data."""
        visible_ids, masked_ids = split_by_noise(noise, visible)
        _, encoded = self.encode(pixels, visible_ids)
        pred = computed(self.decoder_pred, self.decode(encoded, visible_ids, masked_ids, views, pixels.grid))
        target = pixels.frames, masked_ids, pixels.mean, pixels.std, pixels.patch_size
        loss = patch_loss(pred, *target, norm_pix=self.norm_pix, reduction=reduction)
        return MuMOutput(loss, pred, visible_ids, masked_ids)

    def decode(
        self, encoded: Tensor, visible_ids: Tensor, masked_ids: Tensor, views: Views, grid: tuple[int, int]
    ) -> Tensor:
        """Visible tokens (F, 1 + K, D), CLS first -> normed tokens of the masked patches (F, M, E)."""
        num_frames, num_patches = len(encoded), grid[0] * grid[1]
        # As in the encoder, the residual stream keeps the parameters' precision under autocast.
        embedded = computed(self.decoder_embed, encoded).to(self.mask_token.dtype)
        x_TE = packed(scatter_tokens(embedded, self.mask_token, visible_ids, num_patches))

        positions = torch.arange(-1, num_patches, device=x_TE.device).repeat(num_frames)
        sin, cos = self.rope_embed_decoder.tables(*grid)
        within_frame = partial(dense_attention, span=1 + num_patches)
        frame = Context(within_frame, positions, sin, cos, special="keep")
        # The released model zeroes q and k of CLS in global blocks; its weights expect that.
        scene = Context(views.all, positions, sin, cos, special="zero")
        # Nothing but masked patches is looked at behind the last block.
        asking = Asking(masked_ids, masked_ids.flatten())
        last = replace(scene, attend=views.masked, asking=asking)
        stack = []
        for frame_block, global_block in zip(self.decoder_frame_blocks, self.decoder_global_blocks, strict=True):
            stack += [(frame_block, frame), (global_block, scene)]
        stack[-1] = (stack[-1][0], last)
        _, normed_TE, _ = self._run(x_TE, stack, self.decoder_norm)
        return normed_TE.unflatten(0, (num_frames, -1))

"""MuM: masked image modelling over the views of a scene.

The encoder processes the visible quarter of each frame independently. The decoder inserts mask tokens for the other
patches and alternates attention within frames and across all frames of a sequence; a linear head predicts the
normalised pixels of the masked patches (paper, section 3; supplement, "Architecture").

Legend: F frames, H W pixels, p patch side, P patches of a frame, K visible, M masked, D encoder width, E decoder width,
n consecutive sequences, T = F * (1 + P) packed tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastmum.attention import Segments, choose_backend, dense_attention
from fastmum.kernels import patch_loss, scatter_tokens
from fastmum.model.block import AxialRope, Block, Context, apply_linear, compute_dtype, is_bare, pack
from fastmum.model.config import ModelConfig
from fastmum.model.encoder import Encoder
from fastmum.model.inputs import Pixels, check_frames, check_lengths, check_noise, num_visible, split_by_noise


class MuMOutput(NamedTuple):
    """Output of the forward pass."""

    loss: Tensor  # float32, a scalar, or (F,) with reduction "none"
    pred: Tensor  # (F, M, 3*p*p), predicted patch-normalised pixels of masked patches, order (row, column, channel)
    visible_ids: Tensor  # (F, K) int64, ascending
    masked_ids: Tensor  # (F, M) int64, ascending


class ReleasedOutput(NamedTuple):
    """Output of the released model's call."""

    loss: Tensor  # as in `MuMOutput`
    pred: Tensor  # (B*S, P, 3*p*p), predictions for all patches, visible ones included
    mask: Tensor  # (B*S, P) float32, 1 for masked patches


class GlobalAttention(NamedTuple):
    """Attention across the frames of each sequence, (q, k, v) -> output: a backend with its plan for the batch."""

    all: Callable[[Tensor, Tensor, Tensor], Tensor]  # queries are all tokens
    queries: Callable[[Tensor, Tensor, Tensor], Tensor]  # queries are those of the last block, the masked patches


class MuM(Encoder):
    """Encoder and multi-view decoder; its `state_dict` has the released checkpoint's keys and shapes.

    `attention` is the backend of attention across frames, "auto" or a key of `fastmum.attention.BACKENDS`.
    """

    attention = "auto"
    cuda_graphs = False  # whether CUDA graphs record attention across frames, so that its launches must not change
    norm_pix = True  # whether the loss normalises each target patch
    compiled_autoencode: Callable[..., MuMOutput | ReleasedOutput] | None = None  # compiled `_autoencode`

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
        for block in cast(Sequence[Block], (*self.decoder_frame_blocks, *self.decoder_global_blocks)):
            block.mlp.recompute = "mlp" if what == "mlp" else "none"

    def forward(  # type: ignore[override]
        self, frames: Tensor, lengths: Tensor | Sequence[int] | None = None, mask_ratio: float = 0.75,
        noise: Tensor | None = None, max_views: int | None = None, reduction: Literal["mean", "none"] = "mean",
    ) -> MuMOutput | ReleasedOutput:  # fmt: skip
        """Predict the masked patches, and the loss. TypeError or ValueError for an invalid argument, which it names.

        The released model's call is `loss, pred, mask = model(frames)` with B sequences of S frames, (B, S, 3, H, W),
        and no lengths; it returns a `ReleasedOutput`.

        Args:
            frames: (F, 3, H, W) floating point, ImageNet-normalised, or (F, H, W, 3) uint8, normalised inside. They may
                require a gradient.
            lengths: (n,) integers, frames of each sequence, which sum to F. A list or a tensor on the CPU, as reading
                a GPU tensor synchronises. A tensor may be padded with zeros; if this function itself is compiled,
                its values are not checked.
            mask_ratio: share of masked patches; int(P * (1 - mask_ratio)) of every frame stay visible.
            noise: (F, P) uniform; the smallest of a row are visible, ties by index. None draws it.
            max_views: upper bound of the lengths of any batch, F by default; attention kernels are launched for it.
            reduction: "mean": one loss; "none": one per frame, all of as many masked patches.
        """
        if isinstance(lengths, float):  # the released model's second argument
            lengths, mask_ratio = None, lengths
        released = lengths is None and isinstance(frames, Tensor) and frames.ndim == 5
        if released:
            frames, lengths = frames.flatten(0, 1), [frames.shape[1]] * frames.shape[0]
        if lengths is None:
            raise TypeError("lengths is missing: the frames of each sequence, unless frames are (B, S, 3, H, W)")
        pixels = check_frames(frames, self.config.patch_size, self.config.in_chans)
        rows, columns = pixels.grid
        num_frames, num_patches = len(frames), rows * columns
        lengths, max_views = check_lengths(lengths, max_views, num_frames)
        visible = num_visible(num_patches, mask_ratio)
        noise = torch.rand(num_frames, num_patches, device=frames.device) if noise is None else noise
        check_noise(noise, num_frames, num_patches)
        queries = num_patches if released else num_patches - visible
        attend = self._global_attention(lengths, num_frames, num_patches, queries, max_views, frames.device)
        fused = self.compiled_autoencode and not released and self._is_fused()
        autoencode = (self.compiled_autoencode if fused else None) or MuM._autoencode
        return autoencode(self, pixels, noise, visible, attend, reduction, released)

    def _global_attention(
        self, lengths: Tensor, num_frames: int, num_patches: int, queries: int, max_views: int, device: torch.device
    ) -> GlobalAttention:
        """The only part that depends on the lengths, once per batch on the host; the rest has static shapes."""
        backend = choose_backend(self.attention, device, compute_dtype(self.mask_token))
        tokens = 1 + num_patches
        segments = [Segments.of_frames(lengths, num_frames, n, tokens, max_views) for n in (tokens, queries)]
        if self.cuda_graphs:
            segments = [s._replace(sizes=None) for s in segments]
        return GlobalAttention(*(partial(backend.attend, plan=backend.plan(s, device)) for s in segments))

    def _is_fused(self) -> bool:
        layers = self.patch_embed.proj, self.norm, self.decoder_embed, self.decoder_norm, self.decoder_pred
        stacks = cast(Sequence[Sequence[Block]], (self.blocks, self.decoder_frame_blocks, self.decoder_global_blocks))
        return all(map(is_bare, layers)) and all(b.is_fused() and is_bare(b.norm1) for stack in stacks for b in stack)

    def _autoencode(
        self, pixels: Pixels, noise: Tensor, visible: int, attend: GlobalAttention, reduction: Literal["mean", "none"],
        released: bool = False,
    ) -> MuMOutput | ReleasedOutput:  # fmt: skip
        """The whole computation, with static shapes and no control flow that depends on data."""
        rows, columns = pixels.grid
        visible_ids, masked_ids = split_by_noise(noise, visible)
        _, encoded = self.encode(pixels, visible_ids)
        query_ids = torch.arange(rows * columns, device=noise.device).expand(len(noise), -1) if released else masked_ids
        decoded = self.decode(encoded, visible_ids, query_ids, attend, (rows, columns))
        everything = pred = apply_linear(self.decoder_pred, decoded)
        if released:
            pred = pred.gather(1, masked_ids[:, :, None].expand(-1, -1, pred.shape[2]))
        target = pixels.frames, masked_ids, pixels.mean, pixels.std, pixels.patch_size
        loss = patch_loss(pred, *target, norm_pix=self.norm_pix, reduction=reduction)
        if released:
            mask = torch.zeros(noise.shape, device=noise.device).scatter(1, masked_ids, 1.0)
            return ReleasedOutput(loss, everything, mask)
        return MuMOutput(loss, pred, visible_ids, masked_ids)

    def decode(
        self, encoded: Tensor, visible_ids: Tensor, query_ids: Tensor, attend: GlobalAttention, grid: tuple[int, int]
    ) -> Tensor:
        """Visible tokens (F, 1 + K, D), CLS first -> normed tokens of the patches `query_ids` (F, M), (F, M, E)."""
        num_frames, (rows, columns) = len(encoded), grid
        # As in the encoder, the residual stream keeps the parameters' precision under autocast.
        embedded = apply_linear(self.decoder_embed, encoded).to(self.mask_token.dtype)
        x_TE = pack(scatter_tokens(embedded, self.mask_token, visible_ids, rows * columns))

        positions = torch.arange(-1, rows * columns, device=x_TE.device).repeat(num_frames)
        sin, cos = self.rope_embed_decoder.tables(rows, columns)
        frame_attention = partial(dense_attention, seqlen=1 + rows * columns)
        within_frames = Context(frame_attention, positions, sin, cos, special="keep")
        # The released model zeroes q and k of CLS in global blocks; its weights expect that.
        across_frames = Context(attend.all, positions, sin, cos, special="zero")
        stack = []
        for frame_block, global_block in zip(self.decoder_frame_blocks, self.decoder_global_blocks, strict=True):
            stack += [(frame_block, within_frames), (global_block, across_frames)]
        # The last block computes no patches that are not asked for: only masked ones reach the loss.
        stack[-1] = stack[-1][0], replace(across_frames, attend=attend.queries, query_ids=query_ids)
        _, normed_TE, _ = self._run(x_TE, cast(list[tuple[Block, Context]], stack), self.decoder_norm)
        return normed_TE.unflatten(0, (num_frames, -1))

"""The aggregator: attention within frames and across the frames of a sequence, in turns, over packed sequences.

Legend: F frames, n sequences, P patches of a frame, R registers, L = 1 + R + P tokens of a frame, E width of the
encoder, C width, T = F * L packed tokens.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastmum.attention import Segments, choose_backend, dense_attention
from fastmum.engine.device import to_device
from fastmum.model.block import apply_linear, compute_dtype
from fastmum.tasks.reconstruction.block import Attend, Block, Rotation

TOKEN_STD = 1e-6  # VGGT's initial camera and register tokens


class Sequences(NamedTuple):
    """Packed sequences of frames."""

    lengths: tuple[int, ...]  # frames of each
    firsts: Tensor  # (n,) int64, number of the first frame of each sequence
    of_frame: Tensor  # (F,) int64, sequence of each frame

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> "Sequences":
        """ValueError if there is no sequence, or an empty one."""
        if not lengths or min(lengths) < 1:
            raise ValueError(f"lengths is {list(lengths)}, but every sequence must have at least one frame")
        counts = torch.tensor(lengths)
        firsts, numbers = counts.cumsum(0) - counts, torch.arange(len(counts)).repeat_interleave(counts)
        return to_device(cls(tuple(lengths), firsts, numbers), torch.device(device))

    def attention(self, tokens: int, like: Tensor, backend_name: str, longest: int | None = None) -> Attend:
        """Attention within each sequence, of `tokens` for each frame; `longest` as in `Segments.of_frames`."""
        backend = choose_backend(backend_name, like.device, compute_dtype(like))
        frames, longest = sum(self.lengths), longest or max(self.lengths)
        segments = Segments.of_frames(self.lengths, frames, tokens, tokens, longest)
        return partial(backend.attend, plan=backend.plan(segments, like.device))


class Tap(NamedTuple):
    """Output of a pair of blocks, (F, L, C) each. The heads read both, concatenated along the channels."""

    within: Tensor  # of the frame block
    across: Tensor  # of the global block

    def select(self, frames: slice = slice(None), tokens: slice = slice(None)) -> Tensor:
        """Some tokens of some frames, (F', L', 2C)."""
        return torch.cat([self.within[frames, tokens], self.across[frames, tokens]], dim=-1)


class Aggregator(nn.Module):
    """Pairs of a frame block and a global block. `attention` is the backend of the global ones."""

    attention = "auto"
    recompute = False  # whether the backward pass recomputes every block, as VGGT does

    def __init__(self, encoder_dim: int, dim: int, pairs: int, num_heads: int, registers: int) -> None:
        super().__init__()
        self.head_dim, self.special = dim // num_heads, 1 + registers
        self.proj = nn.Linear(encoder_dim, dim) if encoder_dim != dim else nn.Identity()
        # The first row is for the first frame of a sequence, the second for the others.
        self.camera_token = nn.Parameter(TOKEN_STD * torch.randn(1, 2, 1, dim))
        tokens = nn.Parameter(TOKEN_STD * torch.randn(1, 2, registers, dim)) if registers else None
        self.register_token: nn.Parameter | None
        self.register_parameter("register_token", tokens)
        self.frame_blocks = nn.ModuleList(Block(dim, num_heads, qk_norm=True) for _ in range(pairs))
        self.global_blocks = nn.ModuleList(Block(dim, num_heads, qk_norm=True) for _ in range(pairs))

    def forward(
        self, patches_FPE: Tensor, grid: tuple[int, int], sequences: Sequences, taps: Sequence[int],
        longest: int | None = None,
    ) -> list[Tap]:  # fmt: skip
        """Patch tokens (F, P, E) of the encoder -> the outputs of the pairs `taps`, counted from 0."""
        patches = apply_linear(self.proj, patches_FPE) if isinstance(self.proj, nn.Linear) else patches_FPE
        x_FLC = self._add_tokens(patches.to(self.camera_token.dtype), sequences)
        F, L, _ = x_FLC.shape
        rotation = Rotation.of_grid(*grid, self.special, self.head_dim, x_FLC.device)
        within, across = partial(dense_attention, seqlen=L), sequences.attention(L, x_FLC, self.attention, longest)
        x_TC, outputs = x_FLC.flatten(0, 1), {}
        pairs = zip(cast(Sequence[Block], self.frame_blocks), cast(Sequence[Block], self.global_blocks), strict=True)
        for i, (frame_block, global_block) in enumerate(pairs):
            inner_TC = self._run(frame_block, x_TC, within, rotation)
            x_TC = self._run(global_block, inner_TC, across, rotation)
            if i in taps:
                outputs[i] = Tap(inner_TC.unflatten(0, (F, L)), x_TC.unflatten(0, (F, L)))
        return [outputs[i] for i in taps]

    def _add_tokens(self, patches: Tensor, sequences: Sequences) -> Tensor:
        tokens: list[Tensor] = [self.camera_token]
        if self.register_token is not None:
            tokens.append(self.register_token)
        first, rest = torch.cat(tokens, dim=2)[0]
        is_first = torch.zeros(len(patches), 1, 1, dtype=torch.bool, device=patches.device)
        is_first = is_first.index_fill(0, sequences.firsts, True)
        return torch.cat([torch.where(is_first, first, rest), patches], dim=1)

    def _run(self, block: Block, x_TC: Tensor, attend: Attend, rotation: Rotation) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(block, x_TC, attend, rotation, use_reentrant=False, preserve_rng_state=False)
        return block(x_TC, attend, rotation)

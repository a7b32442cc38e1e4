"""The encoder: a vision transformer over the visible patches of each frame.

Legend: F frames, H W pixels, P patches of a frame, K visible ones, D width, T = F * (1 + K) packed tokens.
"""

from collections.abc import Container, Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastmum.attention import dense_attention
from fastmum.kernels import gather_patches, linear
from fastmum.model.block import AxialRope, Block, Context, compute_dtype, is_bare, pack
from fastmum.model.config import ModelConfig
from fastmum.model.inputs import Pixels, check_frames

RECOMPUTE = ("none", "mlp", "blocks")


class PatchEmbed(nn.Module):
    """The convolution of the released model, computed as a matrix product on selected patches.

    The weight (D, C, p, p) is channels-last, so that it is a matrix for patches in the order (row, column, channel)
    without a copy. `state_dict` holds a contiguous copy.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_chans, config.embed_dim, config.patch_size, config.patch_size)
        self.proj.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.proj.register_state_dict_post_hook(_contiguous_weight)
        self.patch_size = config.patch_size, config.patch_size

    def forward(self, pixels: Pixels, ids: Tensor) -> Tensor:
        """Patches `ids` (F, K) -> (F, K, D). A convolution that is not bare is applied to the whole images."""
        normalisation = pixels.mean, pixels.std, pixels.patch_size
        if not is_bare(self.proj):
            (rows, columns), dtype = pixels.grid, compute_dtype(next(self.proj.parameters()))
            every = torch.arange(rows * columns, device=ids.device).expand(len(ids), -1)
            patches = gather_patches(pixels.frames, every, *normalisation, dtype)
            patches = patches.unflatten(2, (*self.patch_size, -1)).unflatten(1, (rows, columns))
            images = patches.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
            tokens = self.proj(images).flatten(2).mT
            return tokens.gather(1, ids[:, :, None].expand(-1, -1, tokens.shape[2]))
        weight, bias = self.proj.weight, cast(Tensor, self.proj.bias)
        dtype = compute_dtype(weight)
        patches = gather_patches(pixels.frames, ids, *normalisation, dtype)
        return linear(patches, weight.permute(0, 2, 3, 1).flatten(1).to(dtype), bias.to(dtype))


def _contiguous_weight(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict) -> None:
    if (name := f"{prefix}weight") in state:  # a parametrization has other names
        state[name] = state[name].contiguous()  # as safetensors requires


class Encoder(nn.Module):
    """ViT encoder with the interface of DINOv2, DINOv3 and the released model; `MuM` adds the decoder.

    Hooks, parametrizations and replacements of linear layers, norms and the patch embedding's convolution take effect:
    blocks that have any call their layers instead of the fused kernels. They see packed tokens (T, D).
    """

    recompute = "none"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_dim = self.num_features = config.embed_dim
        self.n_blocks, self.num_heads, self.patch_size = config.depth, config.num_heads, config.patch_size
        self._build(config)
        self.init_weights()

    def _build(self, config: ModelConfig) -> None:
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.embed_dim))
        self.patch_embed = PatchEmbed(config)
        self.rope_embed = AxialRope(config.embed_dim // config.num_heads)
        sizes = config.embed_dim, config.num_heads, config.norm_eps
        self.blocks = nn.ModuleList(Block(*sizes) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)

    def set_recompute(self, what: str) -> None:
        """Set what the backward pass recomputes instead of saving it, in place; results do not change.

        "none"; "mlp": outputs of the GELUs and, in the decoder with its many tokens, their inputs, at 5 % more
        operations; "blocks": everything inside blocks. A ValueError for another value.
        """
        if what not in RECOMPUTE:
            raise ValueError(f"recompute is '{what}', but must be one of {', '.join(RECOMPUTE)}")
        self.recompute = what
        for block in cast(Sequence[Block], self.blocks):
            block.mlp.recompute = "act" if what == "mlp" else "none"

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise every parameter and buffer as the released code does, also after `to_empty`.

        Linear layers: truncated normal of std 0.02, zero biases; CLS and mask token: normal of std 0.02; patch
        embedding: the convolution's default; norms: 1 and 0.
        """
        for token in self.parameters(recurse=False):
            nn.init.normal_(token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, AxialRope):
                module.init_weights()
            elif isinstance(module, (nn.LayerNorm, nn.Conv2d)):
                module.reset_parameters()

    def encode(self, pixels: Pixels, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Patches `ids` (F, K) of each frame -> tokens before and after the last norm, (F, 1 + K, D), CLS first."""
        x_TD, normed_TD, _ = self._run(*self._embed(pixels, ids), self.norm)
        return x_TD.unflatten(0, (len(ids), -1)), normed_TD.unflatten(0, (len(ids), -1))

    def _run(
        self, x_TD: Tensor, stack: Sequence[tuple[Block, Context]], last: nn.LayerNorm, keep: Container[int] = ()
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Apply blocks; each computes the norm of the next, the last one `last`.

        Returns the stream after the blocks and its norm, (T, D) each, and the stream after each block number in `keep`.
        """
        norms = [*(block.norm1 for block, _ in stack), last]
        normed_TD, kept = norms[0](x_TD).to(compute_dtype(x_TD)), []
        for i, ((block, context), norm) in enumerate(zip(stack, norms[1:], strict=True)):
            fuses = is_bare(norm) and norm.eps == getattr(block.norm2, "eps", None)
            args = x_TD, normed_TD, context, *((norm.weight, norm.bias) if fuses else (None, None))
            if self.recompute == "blocks" and torch.is_grad_enabled():
                x_TD, normed_TD = checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
            else:
                x_TD, normed_TD = block(*args)
            if normed_TD is None:
                normed_TD = norm(x_TD).to(compute_dtype(x_TD))
            if i in keep:
                kept.append(x_TD)
        return x_TD, normed_TD, kept

    def _embed(self, pixels: Pixels, ids: Tensor) -> tuple[Tensor, list[tuple[Block, Context]]]:
        patches = self.patch_embed(pixels, ids)
        # The residual stream keeps the parameters' precision under autocast.
        cls = self.cls_token.expand(len(ids), -1, -1)
        x_TD = pack(torch.cat([cls, patches.to(cls.dtype)], dim=1))
        positions = F.pad(ids, (1, 0), value=-1).flatten()
        rows, columns = pixels.grid  # torch 2.10 cannot trace `*pixels.grid`
        sin, cos = self.rope_embed.tables(rows, columns)
        attend = partial(dense_attention, seqlen=1 + ids.shape[1])
        context = Context(attend, positions, sin, cos, special="keep")
        return x_TD, [(block, context) for block in cast(Sequence[Block], self.blocks)]

    def _all_patches(self, images: Tensor, name: str) -> tuple[Pixels, Tensor]:
        pixels = check_frames(images, self.config.patch_size, self.config.in_chans, name)
        rows, columns = pixels.grid
        ids = torch.arange(rows * columns, device=pixels.frames.device).expand(len(pixels.frames), -1)
        return pixels, ids

    def forward_features(self, images: Tensor) -> dict[str, Tensor]:
        """Features of whole images, nothing masked.

        `images` are (F, 3, H, W) floating point, ImageNet-normalised, or (F, H, W, 3) uint8; H and W any multiples of
        the patch size. Floating-point images may require gradients. Returns "x_norm_clstoken" (F, D), which the
        released model calls "x_norm_cls_token", and "x_norm_patchtokens" (F, P, D), normed, and "x_prenorm"
        (F, 1 + P, D).
        """
        x, normed = self.encode(*self._all_patches(images, "images"))
        cls, patches = normed[:, 0], normed[:, 1:]
        return {"x_norm_clstoken": cls, "x_norm_cls_token": cls, "x_norm_patchtokens": patches, "x_prenorm": x}

    def forward(self, images: Tensor, is_training: bool = False) -> Tensor | dict[str, Tensor]:
        """The normed CLS tokens (F, D) of images; `is_training`: everything that `forward_features` returns."""
        features = self.forward_features(images)
        return features if is_training else features["x_norm_clstoken"]

    def get_intermediate_layers(
        self, x: Tensor, n: int | Sequence[int] = 1, reshape: bool = False, return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Tensor, ...] | tuple[tuple[Tensor, Tensor], ...]:  # fmt: skip
        """Patch tokens after some of the blocks.

        Args:
            x: images as in `forward_features`.
            n: the last n blocks, or block numbers from 0; a ValueError if one does not exist.
            reshape: return maps (F, D, H / p, W / p) instead of tokens (F, P, D).
            return_class_token: return pairs (patch tokens, CLS token (F, D)).
            norm: apply the encoder's last norm to each.
        """
        depth = len(self.blocks)
        if isinstance(n, int):
            wanted, allowed = list(range(depth - n, depth)), f"1 to {depth}"
        else:
            wanted, allowed = sorted(n), f"numbers of 0 to {depth - 1}"
        if not wanted or wanted[0] < 0 or wanted[-1] >= depth:
            raise ValueError(f"n is {n}, but the encoder has {depth} blocks: {allowed} is allowed")
        pixels, ids = self._all_patches(x, "x")
        _, _, kept = self._run(*self._embed(pixels, ids), self.norm, keep=wanted)
        outputs = [x_TD.unflatten(0, (len(ids), -1)) for x_TD in kept]
        outputs = [self.norm(out) for out in outputs] if norm else outputs
        patches = [out[:, 1:] for out in outputs]
        if reshape:
            patches = [out.transpose(1, 2).unflatten(2, pixels.grid).contiguous() for out in patches]
        if return_class_token:
            return tuple(zip(patches, (out[:, 0] for out in outputs), strict=True))
        return tuple(patches)

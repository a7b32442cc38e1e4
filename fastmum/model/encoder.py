"""The encoder: a vision transformer over the visible patches of each frame.

Legend: F frames, H W pixels, P patches of a frame, K visible ones, R registers, D width, L tokens of a
frame (MuM: 1 + K), T = F * L packed tokens.
"""

from collections.abc import Container, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastmum.attention import dense_attention
from fastmum.kernels import gather_patches, linear
from fastmum.model.block import AxialRope, Block, Context, compute_dtype, is_bare, pack
from fastmum.model.config import ModelConfig
from fastmum.model.inputs import Pixels, check_frames
from fastmum.model.options import DEFAULT, EncoderOptions, position_table

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


class LayerTokens(NamedTuple):
    """Tokens of images after a block."""

    patch: Tensor  # (F, P, D), row by row
    cls: Tensor | None  # (F, D)
    registers: Tensor | None  # (F, R, D)
    grid: tuple[int, int]  # rows and columns of patches

    def of(self, k: int) -> Self:
        """Those of one image, F = 1."""
        cls, registers = (None if x is None else x[k : k + 1] for x in (self.cls, self.registers))
        return self._replace(patch=self.patch[k : k + 1], cls=cls, registers=registers)

    def maps(self) -> Tensor:
        """Patch tokens as contiguous maps (F, D, rows, columns)."""
        return self.patch.mT.unflatten(2, self.grid).contiguous()


class Encoder(nn.Module):
    """ViT encoder with the interface of DINOv2, DINOv3 and the released model; `MuM` adds the decoder.

    By its `options` it is MuM's, or that of MAE, CroCo v2 or DINOv3 with the same blocks.

    Hooks, parametrizations and replacements of linear layers, norms and the patch embedding's convolution take effect:
    blocks that have any call their layers instead of the fused kernels. They see packed tokens (T, D).
    """

    recompute = "none"
    about: Mapping[str, Any] = MappingProxyType({})  # name, spec, normalisation, ... of loaded weights, for records

    def __init__(self, config: ModelConfig, options: EncoderOptions = DEFAULT) -> None:
        super().__init__()
        self.config, self.options = config, options
        self.embed_dim = self.num_features = config.embed_dim
        self.n_blocks, self.num_heads, self.patch_size = config.depth, config.num_heads, config.patch_size
        self._build(config)
        self.init_weights()

    def _build(self, config: ModelConfig) -> None:
        options, width = self.options, config.embed_dim
        if options.cls:
            self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        if options.registers:
            self.register_tokens = nn.Parameter(torch.empty(1, options.registers, width))
        if options.table:
            self.pos_embed = nn.Parameter(torch.empty(1, 1 + options.table[0] * options.table[1], width))
        self.patch_embed = PatchEmbed(config)
        self.rope_embed = AxialRope(width // config.num_heads, options.coordinates)
        sizes = width, config.num_heads, config.norm_eps
        self.blocks = nn.ModuleList(Block(*sizes, options) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)

    @property
    def mean(self) -> tuple[float, ...]:
        """What is subtracted from pixel values in 0..1, RGB; then they are divided by `std`."""
        return self.options.mean

    @property
    def std(self) -> tuple[float, ...]:
        return self.options.std

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
        """Patches `ids` (F, K) of each frame -> tokens before and after the last norm, (F, L, D): prefix, patches."""
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
        options = self.options
        rows, columns = pixels.grid
        prefix: list[Tensor] = [self.cls_token] if options.cls else []
        # The residual stream keeps the parameters' precision under autocast.
        patches = self.patch_embed(pixels, ids).to((prefix[0] if prefix else self.norm.weight).dtype)
        if options.table:
            table = position_table(self.pos_embed, options.table, (rows, columns), options.resize)
            prefix, patches = [self.cls_token + table[:, :1]], patches + table[0, 1:][ids]
        if options.registers:
            prefix.append(self.register_tokens)
        x_TD = pack(torch.cat([*(token.expand(len(ids), -1, -1) for token in prefix), patches], dim=1))
        positions = F.pad(ids, (options.prefix, 0), value=-1).flatten()
        attend = partial(dense_attention, seqlen=options.prefix + ids.shape[1])
        blocks = cast(Sequence[Block], self.blocks)
        if self.training and options.rope_rescale:
            factors = [options.rope_rescale ** (2 * share - 1) for share in torch.rand(len(blocks)).tolist()]
            tables = [self.rope_embed.tables(rows, columns, factor) for factor in factors]
        else:
            tables = [self.rope_embed.tables(rows, columns)] * len(blocks)
        contexts = (Context(attend, positions, sin, cos, special="keep") for sin, cos in tables)
        return x_TD, list(zip(blocks, contexts, strict=True))

    def _all_patches(self, images: Tensor, name: str) -> tuple[Pixels, Tensor]:
        options = self.options
        pixels = check_frames(images, self.config.patch_size, self.config.in_chans, name, options.mean, options.std)
        rows, columns = pixels.grid
        ids = torch.arange(rows * columns, device=pixels.frames.device).expand(len(pixels.frames), -1)
        return pixels, ids

    def split(self, x_FLD: Tensor, grid: tuple[int, int]) -> LayerTokens:
        """Split the tokens of images by kind."""
        cls, prefix = self.options.cls, self.options.prefix
        registers = x_FLD[:, cls:prefix] if self.options.registers else None
        return LayerTokens(x_FLD[:, prefix:], x_FLD[:, 0] if cls else None, registers, grid)

    def tokens(self, images: Tensor, blocks: Sequence[int] = (-1,), *, norm: bool) -> tuple[LayerTokens, ...]:
        """Tokens after each of some blocks, in the given order; later blocks are not computed.

        Args:
            images: (F, H, W, 3) uint8, normalised inside, or (F, 3, H, W) floating point, normalised by `mean` and
                `std`; H and W any multiples of the patch size. Floating-point images may require gradients.
            blocks: numbers from 0, or negative ones from the end; ValueError if one does not exist.
            norm: apply the encoder's last norm to each.
        """
        depth = len(self.blocks)
        if not blocks or any(not -depth <= number < depth for number in blocks):
            raise ValueError(f"blocks are {list(blocks)}, but must be numbers of -{depth} to {depth - 1}")
        wanted = [number % depth for number in blocks]
        pixels, ids = self._all_patches(images, "images")
        x_TD, stack = self._embed(pixels, ids)
        last = max(wanted)
        _, normed_TD, kept = self._run(x_TD, stack[: last + 1], self.norm, keep=wanted)
        found = dict(zip(sorted(set(wanted)), kept, strict=True))
        if norm:
            found = {i: normed_TD if i == last else self.norm(x_TD) for i, x_TD in found.items()}
        split = {i: self.split(x_TD.unflatten(0, (len(ids), -1)), pixels.grid) for i, x_TD in found.items()}
        return tuple(split[i] for i in wanted)

    def tokens_of(
        self, images: Sequence[Tensor], blocks: Sequence[int] = (-1,), *, norm: bool
    ) -> list[tuple[LayerTokens, ...]]:
        """`tokens` of images of any sizes, (H, W, 3) uint8 or (3, H, W) each; equal sizes are computed together."""
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, image in enumerate(images):
            groups.setdefault((*image.shape, image.dtype), []).append(i)
        found: list[tuple[LayerTokens, ...]] = [()] * len(images)
        for group in groups.values():
            layers = self.tokens(torch.stack([images[i] for i in group]), blocks, norm=norm)
            for k, i in enumerate(group):
                found[i] = tuple(each.of(k) for each in layers)
        return found

    def forward_features(self, images: Tensor) -> dict[str, Any]:
        """Features of whole images, nothing masked; images as in `tokens`.

        Returns "x_norm_clstoken" (F, D), which the released model calls "x_norm_cls_token", None without CLS;
        "x_norm_patchtokens" (F, P, D), normed; "x_prenorm" (F, L, D), all tokens; and "x_norm_regtokens" (F, R, D)
        if there are registers.
        """
        pixels, ids = self._all_patches(images, "images")
        x, normed = self.encode(pixels, ids)
        patches, cls, registers, _ = self.split(normed, pixels.grid)
        found = {"x_norm_clstoken": cls, "x_norm_cls_token": cls, "x_norm_patchtokens": patches, "x_prenorm": x}
        return found if registers is None else found | {"x_norm_regtokens": registers}

    def forward(self, images: Tensor, is_training: bool = False) -> Any:
        """The normed CLS tokens (F, D) of images; `is_training`: everything that `forward_features` returns."""
        features = self.forward_features(images)
        return features if is_training else features["x_norm_clstoken"]

    def get_intermediate_layers(
        self, x: Tensor, n: int | Sequence[int] = 1, reshape: bool = False, return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Tensor, ...] | tuple[tuple[Tensor, Tensor | None], ...]:  # fmt: skip
        """Patch tokens after some of the blocks, in ascending order; the interface of DINOv2 to `tokens`.

        Args:
            x: images as in `tokens`.
            n: the last n blocks, or block numbers from 0; a ValueError if one does not exist.
            reshape: return maps (F, D, H / p, W / p) instead of tokens (F, P, D).
            return_class_token: return pairs (patch tokens, CLS token (F, D), or None if there is none).
            norm: apply the encoder's last norm to each.
        """
        depth = len(self.blocks)
        if isinstance(n, int):
            wanted, allowed = list(range(depth - n, depth)), f"1 to {depth}"
        else:
            wanted, allowed = sorted(n), f"numbers of 0 to {depth - 1}"
        if not wanted or wanted[0] < 0 or wanted[-1] >= depth:
            raise ValueError(f"n is {n}, but the encoder has {depth} blocks: {allowed} is allowed")
        found = self.tokens(x, wanted, norm=norm)
        patches = tuple(each.maps() if reshape else each.patch for each in found)
        return tuple(zip(patches, (each.cls for each in found), strict=True)) if return_class_token else patches

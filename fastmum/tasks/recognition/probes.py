"""Probes of image classification as CAPI trains them (facebookresearch/capi, eval_classification.py), jointly.

A head is a classifier on one source of features with its own learning rate and weight decay. Linear heads read a
vector of the image; attentive heads pool its patch tokens by a learnt query. All heads of a source are stacked in one
tensor for each parameter, so that a step reads the features once for all.

The query attends to keys W_k x + b_k, so that its score of a token is (W_k^T q) x up to a constant, which the softmax
ignores; and the mean of the values W_v x + b_v is W_v times the mean of the tokens, plus b_v. Keys and values are
therefore never computed: two products with vectors replace two products with matrices for each token.

Legend: Q heads of a source, B images, N patches, D width, h attention heads, E = 64 width of one, C classes.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmum.errors import FastmumError

HEAD_WIDTH = 64  # E
STD = 0.02  # of initial weights
BETAS = (0.9, 0.95)  # of AdamW
LR_BATCH = 256  # learning rates are for this batch
ATTENTIVE = "patch"  # the source of attentive heads
SOURCES = (ATTENTIVE, "cls", "avg_patch", "cls_avg_patch")

Weights = dict[str, Tensor]  # parameters of the heads of a source, (Q, ...), by the names of CAPI's modules
Features = Mapping[str, Tensor]  # by source: (B, N, D) for `ATTENTIVE`, else (B, D)


class Head(NamedTuple):
    """A classifier to train."""

    source: str
    learning_rate: float  # at a batch of 256
    weight_decay: float  # of weights and query; that of biases is 0


@dataclass(frozen=True)
class ClassifierSettings:
    """Training of the heads: CAPI's values. A value out of range is a ValueError that starts with the field."""

    steps: int = 12_500  # the first tenth is the warm-up
    batch: int = 128  # images
    learning_rates: tuple[float, ...] = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
    weight_decays: tuple[float, ...] = (5e-4, 1e-3, 5e-2)
    seed: int = 42  # of the order of images, their crops and the initial weights

    def __post_init__(self) -> None:
        for name, least in {"steps": 2, "batch": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least {least}")
        if not self.learning_rates or not all(0 < rate < np.inf for rate in self.learning_rates):
            raise ValueError(f"learning_rates are {list(self.learning_rates)}, but must be positive")
        if not self.weight_decays or not all(0 <= decay < np.inf for decay in self.weight_decays):
            raise ValueError(f"weight_decays are {list(self.weight_decays)}, but must be at least 0")

    def heads(self, sources: Sequence[str]) -> list[Head]:
        """One for each source, learning rate and weight decay."""
        return [Head(*each) for each in itertools.product(sources, self.learning_rates, self.weight_decays)]


def sources_of(cls: Tensor | None, patch: Tensor) -> dict[str, Tensor]:
    """Features by source, from CLS (B, D), None without it, and patch tokens (B, N, D)."""
    mean = patch.mean(1)
    found = {ATTENTIVE: patch, "avg_patch": mean}
    return found if cls is None else found | {"cls": cls, "cls_avg_patch": torch.cat([cls, mean], dim=-1)}


def attentive_logits(weights: Weights, x_BND: Tensor) -> Tensor:
    """Logits (B, C, Q) of attentive heads: scaled dot-product attention of the query, then a linear layer."""
    width, heads = x_BND.shape[-1], x_BND.shape[-1] // HEAD_WIDTH
    query_QhE = weights["query_token"].unflatten(1, (heads, HEAD_WIDTH))
    key_QhED, value_QhED = weights["kv.weight"].unflatten(1, (2, heads, HEAD_WIDTH)).unbind(1)
    directions_QhD = torch.einsum("qhe,qhed->qhd", query_QhE / HEAD_WIDTH**0.5, key_QhED)
    share_BNK = (x_BND @ directions_QhD.flatten(0, 1).T).softmax(1)  # K = Q * h
    pooled_BQhD = (share_BNK.mT @ x_BND).unflatten(1, (-1, heads))
    values_BQhE = torch.einsum("bqhd,qhed->bqhe", pooled_BQhD, value_QhED)
    return linear_logits(weights, values_BQhE.flatten(2) + weights["kv.bias"][:, width:])


def linear_logits(weights: Weights, x: Tensor) -> Tensor:
    """Logits (B, C, Q) of linear heads, of common features (B, D) or of each head's own (B, Q, D)."""
    weight_QCD, bias_QC = weights["linear.weight"], weights["linear.bias"]
    if x.ndim == 2:
        logits_BQC = (x @ weight_QCD.flatten(0, 1).T).unflatten(1, (len(weight_QCD), -1))
    else:
        logits_BQC = torch.einsum("bqd,qcd->bqc", x, weight_QCD)
    return (logits_BQC + bias_QC).mT


def logits_of(weights: Mapping[str, Weights], features: Features) -> dict[str, Tensor]:
    """Logits (B, C, Q) of all heads by source."""
    return {
        source: (attentive_logits if source == ATTENTIVE else linear_logits)(each, features[source])
        for source, each in weights.items()
    }


def schedule(steps: int, warmup: int) -> np.ndarray:
    """Factors of the learning rate, (steps,) float64: linear from 0 to 1, then a cosine to 0, both ends included."""
    return np.concatenate([np.linspace(0, 1, warmup), (1 + np.cos(np.linspace(0, np.pi, steps - warmup))) / 2])


def any_match(logits_BCQ: Tensor, labels_BA: Tensor) -> Tensor:
    """Whether the class of the largest logit is among an image's labels, padded with -1: (B', Q) bool.

    Images without a label are left out.
    """
    right_BQ = (logits_BCQ.argmax(1)[..., None] == labels_BA[:, None]).any(-1)
    return right_BQ[(labels_BA >= 0).any(1)]


class Probes:
    """Heads of any sources with one AdamW.

    Args:
        heads: those of a source have the order of this list.
        widths: D of the features of each source.
        classes: C.
        weights: initial values by source; None: truncated normal of std 0.02, zero biases.

    FastmumError: the width of attentive heads is no multiple of 64.
    """

    def __init__(
        self, heads: Sequence[Head], widths: Mapping[str, int], classes: int, batch: int, seed: int = 0,
        device: torch.device | str = "cpu", weights: Mapping[str, Weights] | None = None,
    ) -> None:  # fmt: skip
        self.heads = {source: [h for h in heads if h.source == source] for source in SOURCES}
        self.heads = {source: found for source, found in self.heads.items() if found}
        generator = torch.Generator(device).manual_seed(seed)
        self.weights = dict(weights) if weights is not None else {
            source: _initial(source, len(found), widths[source], classes, generator)
            for source, found in self.heads.items()
        }  # fmt: skip
        groups: dict[tuple[float, float], list[Tensor]] = {}
        self._views: list[tuple[Tensor, list[Tensor]]] = []  # each parameter, and that of each head in it
        for source, stacks in self.weights.items():
            for name, stack in stacks.items():
                views = list(stack.detach().unbind())  # the optimizer updates the stack
                self._views.append((stack.requires_grad_(), views))
                for head, view in zip(self.heads[source], views, strict=True):
                    decay = 0.0 if "bias" in name else head.weight_decay
                    groups.setdefault((head.learning_rate * batch / LR_BATCH, decay), []).append(view)
        self._rates = [rate for rate, _ in groups]
        self._optimizer = torch.optim.AdamW(
            [{"params": params, "weight_decay": decay} for (_, decay), params in groups.items()],
            lr=0.0, betas=BETAS, fused=True,
        )  # fmt: skip

    def step(self, features: Features, labels_B: Tensor, factor: float) -> Tensor:
        """Train all heads on a batch, at `factor` times their learning rates; returns their losses, in their order.

        The loss is the mean of the cross-entropy over images and heads.
        """
        losses = []
        for logits_BCQ in logits_of(self.weights, features).values():
            target_BQ = labels_B[:, None].expand(-1, logits_BCQ.shape[-1])
            losses.append(F.cross_entropy(logits_BCQ, target_BQ, reduction="none").mean(0))
        every = torch.cat(losses)
        gradients = torch.autograd.grad(every.mean(), [stack for stack, _ in self._views])
        for (_, views), gradient in zip(self._views, gradients, strict=True):
            for view, own in zip(views, gradient.contiguous().unbind(), strict=True):  # fused AdamW ignores strides
                view.grad = own
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = factor * rate
        self._optimizer.step()
        return every.detach()

    def keep(self, chosen: Mapping[str, int]) -> dict[str, Weights]:
        """The weights of one head of each source, Q = 1."""
        return {
            source: {name: stack.detach()[i : i + 1] for name, stack in self.weights[source].items()}
            for source, i in chosen.items()
        }


def _initial(source: str, heads: int, width: int, classes: int, generator: torch.Generator) -> Weights:
    shapes = {"linear.weight": (classes, width), "linear.bias": (classes,)}
    if source == ATTENTIVE:
        if width % HEAD_WIDTH:
            raise FastmumError(f"the encoder's width is {width}, but attentive probes need a multiple of {HEAD_WIDTH}")
        shapes = {"query_token": (width,), "kv.weight": (2 * width, width), "kv.bias": (2 * width,), **shapes}
    weights = {name: torch.zeros(heads, *shape, device=generator.device) for name, shape in shapes.items()}
    for name, stack in weights.items():
        if "bias" not in name:
            nn.init.trunc_normal_(stack, std=STD, generator=generator)
    return weights


def visits(count: int, seed: int) -> Iterator[tuple[int, int]]:
    """Endless (image, how many times it came before), in the order of CAPI's sampler on one device."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randperm(count, dtype=torch.int32, generator=generator)
    for epoch in itertools.count():
        generator.manual_seed(seed + (epoch << 24))
        for image in first[torch.randperm(count, dtype=torch.int32, generator=generator)].tolist():
            yield image, epoch

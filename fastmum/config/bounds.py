"""Bounds of the configuration's values that a type cannot express."""

from __future__ import annotations

from fastmum.attention import BACKENDS
from fastmum.config.schema import (
    COMPILE_MODES,
    OPTIMIZERS,
    PRECISIONS,
    RECOMPUTE_MODES,
    REDUCE_DTYPES,
    STRATEGIES,
    Config,
    ConfigError,
)
from fastmum.model.masking import num_visible


def check_values(config: Config) -> None:
    """Check what a run could not work with.

    Raises:
        ConfigError: the first value out of bounds.
    """
    data, optim, train, model, parallel = config.data, config.optim, config.train, config.model, config.parallel
    sizes = config.model_config
    low_high = {"data.views": data.views, "data.crop_scale": data.crop_scale, "data.crop_aspect": data.crop_aspect}
    for key, pair in low_high.items():
        if len(pair) != 2 or not 0 < pair[0] <= pair[1]:
            raise ConfigError(f"{key} is {pair}, but must be [fewest, most] with 0 < fewest <= most")
    choices = [
        ("model.compile", model.compile, COMPILE_MODES),
        ("model.recompute", model.recompute, RECOMPUTE_MODES),
        ("model.attention", model.attention, ("auto", *BACKENDS)),
        ("optim.optimizer", optim.optimizer, OPTIMIZERS),
        ("train.precision", train.precision, PRECISIONS),
        ("parallel.strategy", parallel.strategy, STRATEGIES),
        ("parallel.reduce", parallel.reduce, REDUCE_DTYPES),
    ]
    own_data = data.root is not None or data.manifests  # the embedded scenes are then not rendered
    rules = [
        ("data.views", data.views, data.views[1] <= data.frames_per_batch, "at most data.frames_per_batch"),
        ("data.crop_scale", data.crop_scale, data.crop_scale[1] <= 1, "at most 1"),
        ("data.image_size", data.image_size, _is_multiple(data.image_size, sizes.patch_size),
         f"a positive multiple of the patch size {sizes.patch_size}"),
        ("data.flip", data.flip, 0 <= data.flip <= 1, "between 0 and 1"),
        ("data.held_out", data.held_out, 0 <= data.held_out < 1, "at least 0 and below 1"),
        ("data.imagenet_share", data.imagenet_share, 0 <= data.imagenet_share <= 1, "between 0 and 1"),
        *((f"data.weights.{name}", weight, weight >= 0, "at least 0") for name, weight in data.weights.items()),
        ("data.workers", data.workers, data.workers >= 1, "at least 1"),
        ("data.cache_gb", data.cache_gb, data.cache_gb >= 0, "at least 0"),
        ("data.scenes.count", data.scenes.count, own_data or data.scenes.count >= 2, "at least 2, as one is held out"),
        ("data.scenes.views", data.scenes.views, own_data or data.scenes.views >= data.views[0],
         "at least the fewest data.views"),
        ("model.mask_ratio", model.mask_ratio, 0 < model.mask_ratio < 1, "between 0 and 1"),
        ("optim.base_lr", optim.base_lr, optim.base_lr > 0, "positive"),
        ("optim.betas", optim.betas, len(optim.betas) == 2 and all(0 <= b < 1 for b in optim.betas),
         "two numbers in [0, 1)"),
        ("optim.warmup_steps", optim.warmup_steps, optim.warmup_steps >= 0, "at least 0"),
        ("optim.eps", optim.eps, optim.eps > 0, "positive"),
        ("optim.weight_decay", optim.weight_decay, optim.weight_decay >= 0, "at least 0"),
        ("run.seed", config.run.seed, config.run.seed >= 0, "at least 0"),
        ("train.threads", train.threads, train.threads >= 0, "at least 0"),
        ("train.steps", train.steps, train.steps >= 1, "at least 1"),
        *((key, value, value in allowed, f"one of {', '.join(allowed)}") for key, value, allowed in choices),
        ("data.frames_per_step", data.frames_per_step,
         data.frames_per_step is None or _is_multiple(data.frames_per_step, data.frames_per_batch),
         f"a positive multiple of data.frames_per_batch ({data.frames_per_batch})"),
        ("train.keep_every", train.keep_every, train.keep_every >= 0, "at least 0"),
        ("parallel.shard", parallel.shard, parallel.shard >= 0, "at least 0"),
        ("parallel.dead_after_s", parallel.dead_after_s, parallel.dead_after_s >= 1, "at least 1"),
        *((f"train.{name}", getattr(train, name), getattr(train, name) >= 1, "at least 1")
          for name in ("log_every", "checkpoint_every", "keep_checkpoints", "eval_every", "eval_batches",
                       "picture_every", "max_bad_steps", "collect_every")),
    ]  # fmt: skip
    for key, value, fits, allowed in rules:
        if not fits:
            raise ConfigError(f"{key} is {value}, but must be {allowed}")
    _ = config.profile.window
    try:
        num_visible((data.image_size // sizes.patch_size) ** 2, model.mask_ratio)
    except ValueError as error:
        raise ConfigError(f"model.{error}") from None


def _is_multiple(number: int, of: int) -> bool:
    return number > 0 and number % of == 0

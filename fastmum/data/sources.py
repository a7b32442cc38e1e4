"""What a run trains and is evaluated on, from its configuration."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import NamedTuple

from fastmum.config import Config
from fastmum.data.plan import StepPlanner
from fastmum.data.sequences import DataError, Sequences, find_sequences, find_single_images, split_held_out

log = logging.getLogger(__name__)

HELD_OUT_SEED = 0  # not the run's: runs of different seeds are evaluated on the same batches


class Sources(NamedTuple):
    """Planners of the two splits, and sequences to draw pictures from.

    `held_out` is None where nothing is held out; pictures then show training sequences.
    """

    training: StepPlanner
    held_out: StepPlanner | None
    shown: Sequences


def open_sources(config: Config) -> Sources:
    """Find the sequences, rendering the embedded scenes if there is no `data.root`, and split them.

    Held-out sequences are sampled like those of training, so that the two losses can be compared.

    Raises:
        DataError: a folder that is missing or holds no sequences, or scenes that cannot be rendered.
    """
    data = config.data
    training, held_out = split_held_out(_sequences(config), data.held_out)
    if not held_out:
        log.warning("no sequence is held out, so there is no evaluation: data.held_out is %g", data.held_out)
    log.info(
        "training on %d sequences (%d frames), held out: %d (%d frames)",
        len(training), training.num_frames, len(held_out), held_out.num_frames,
    )  # fmt: skip
    images = find_single_images(data.image_root) if data.image_root else None
    planner = StepPlanner(
        training,
        config.run.seed,
        data.frames_per_batch,
        views=(data.views[0], data.views[1]),
        images=images,
        image_share=data.image_share,
        crop_scale=(data.crop_scale[0], data.crop_scale[1]),
        crop_aspect=(data.crop_aspect[0], data.crop_aspect[1]),
        flip=data.flip,
    )
    if not held_out:
        return Sources(planner, None, shown=training)
    return Sources(planner, replace(planner, sequences=held_out, images=None, seed=HELD_OUT_SEED), shown=held_out)


def _sequences(config: Config) -> Sequences:
    data, scenes = config.data, config.data.scenes
    if data.root is not None:
        return find_sequences(data.root, min_views=data.views[0])
    # Rendering needs packages that own data does not.
    from fastmum.data.scenes import ensure_scenes

    try:
        root = ensure_scenes(count=scenes.count, views=scenes.views, size=scenes.size, seed=scenes.seed)
    except (ValueError, OSError, RuntimeError) as error:
        raise DataError(f"the embedded scenes cannot be rendered: {error}") from error
    found = find_sequences(root, min_views=data.views[0])
    return found.select(list(range(scenes.count)))  # the cache may hold more, rendered for another run

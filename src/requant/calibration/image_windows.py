"""The images of a calibration or comparison: prompts that mlx-vlm's processor prepares."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from requant.checkpoints.folder_files import CONFIG
from requant.core.types import Source
from requant.errors import CheckpointError, Problem
from requant.layouts.left_dense import is_of_a_tower
from requant.libraries.loading import Module
from requant.libraries.modalities import modalities
from requant.mlx_lm.evaluation import Prompt
from requant.mlx_vlm.image_prompts import ImagePrompt, prepare
from requant.mlx_vlm.loading import load_processor
from requant.planning.plan import Plan
from requant.planning.planner import Planned


@dataclass(frozen=True, slots=True)
class ImageWindows:
    """Prompts about images; each is prepared when its turn comes, so that one is in memory.

    Attributes:
        processor: As ``mlx_vlm.load`` gives it.
        class_config: The config of the model's class.
        plan: The plan of the model.
        prompts: The prompts, in their order.
    """

    processor: Any
    class_config: Any
    plan: Plan
    prompts: tuple[ImagePrompt, ...]

    @staticmethod
    def of(
        source: Source, planned: Planned, model: Module, prompts: Sequence[ImagePrompt]
    ) -> ImageWindows:
        """Load the processor of a model that takes images.

        Args:
            source: The model, as errors name it.
            planned: Its plan, in the layout of mlx-vlm.
            model: The model of mlx-vlm, with or without its weights.
            prompts: At least one.

        Raises:
            CheckpointError: The model takes no images, or its processor cannot be loaded.
        """
        plan = planned.plan
        names = (tensor.name for shard in plan.shards for tensor in shard.tensors)
        if not modalities(plan.config).images and not any(map(is_of_a_tower, names)):
            why = "describes no part for images (vision_config): leave out --image"
            raise CheckpointError(str(source), [Problem(CONFIG, why)])
        processor = load_processor(source, planned, getattr(model.config, "eos_token_id", None))
        return ImageWindows(processor, model.config, plan, tuple(prompts))

    def __iter__(self) -> Iterator[Prompt]:
        """The prepared prompts."""
        for prompt in self.prompts:
            yield prepare(self.processor, self.class_config, self.plan.config, prompt)

    def __len__(self) -> int:
        """How many prompts there are."""
        return len(self.prompts)

    def within(self, tokens: int, seed: int) -> DrawnImages:
        """As many prompts, drawn by a seed, as begin within a number of tokens; in their order."""
        order = np.random.default_rng(seed).permutation(len(self.prompts))
        count, digests = 0, {}
        for number in map(int, order):
            if count >= tokens:
                break
            prompt = self.prompts[number]
            prepared = prepare(self.processor, self.class_config, self.plan.config, prompt)
            count += len(prepared.ids)
            digests[number] = prepared.digest
        taken = sorted(digests)
        chosen = tuple(self.prompts[number] for number in taken)
        sha = hashlib.sha256(b"".join(digests[number] for number in taken))
        return DrawnImages(replace(self, prompts=chosen), count, sha.hexdigest())


@dataclass(frozen=True, slots=True)
class DrawnImages:
    """Prompts about images that a calibration reads.

    Attributes:
        windows: The prompts.
        tokens: How many tokens they have, places of images included.
        digest: Hash of all that the model is given.
    """

    windows: ImageWindows
    tokens: int
    digest: str

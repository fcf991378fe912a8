"""The preprocessing with which a model is evaluated."""

from dataclasses import replace

from dvit_infer.config import Config
from dvit_infer.images.preprocess import Preprocess
from dvit_infer.models.registry import family_of


def preprocess_for(config: Config, crop_pct: float | None = None) -> Preprocess:
    """Return the preprocessing in the config, else that with which the model's family was evaluated.

    Args:
        config: of the model.
        crop_pct: the share that the crop keeps, instead of theirs.
    """
    if crop_pct is not None:
        config = replace(config, crop_pct=crop_pct)
    crop_pct = family_of(config).crop_pct(config) if config.crop_pct is None else config.crop_pct
    if crop_pct is None or (config.crop_pct is None and config.crop_mode == "squash"):
        return Preprocess(config.image_size, 1.0, "squash", config.interpolation)
    return Preprocess(config.image_size, crop_pct, config.crop_mode, config.interpolation)

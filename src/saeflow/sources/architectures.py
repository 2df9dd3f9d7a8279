"""The class of transformers that a model's configuration is built as, and the image tower inside it."""

from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel


def architecture(config: Any) -> Any:
    """The automatic class that a configuration's model is built and loaded by.

    A causal language model where the family has one, then a model of images and text that predicts tokens, then the
    encoder of an encoder-decoder, then the family's bare model.
    """
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForTextEncoding,
    )

    for kind in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForTextEncoding):
        if type(config) in kind._model_mapping:
            return kind
    return AutoModel


def part_of(config: Any) -> dict[str, str]:
    """A note for the record where not all of a configuration's model is run."""
    from transformers import AutoModelForCausalLM

    if config.is_encoder_decoder and architecture(config) is AutoModelForCausalLM:
        return {"model": "its decoder alone is run, without an encoder's output"}
    return {}


def image_part(config: Any) -> Any:
    """The configuration of the image tower; of a model of images its own."""
    return getattr(config, "vision_config", None) or config


def tower_of(model: nn.Module) -> nn.Module:
    """The image tower of a model of images and text; a model of images is its own."""
    config = cast(Any, model).config
    part = image_part(config)
    if part is config:
        return cast(nn.Module, cast(Any, model).base_model)
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and type(module.config) is type(part):
            return cast(nn.Module, module)
    return model

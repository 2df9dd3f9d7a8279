"""The class of transformers that a model's configuration is built as, and the image tower inside it."""

from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel


class _Encoder:
    """The encoder of an encoder-decoder whose family has no class for it (BART, Marian, Pegasus), as an automatic class."""

    @staticmethod
    def from_config(config: Any, **settings: Any) -> Any:
        """The encoder with random weights."""
        from transformers import AutoModel

        return AutoModel.from_config(config, **settings).get_encoder()

    @staticmethod
    def from_pretrained(folder: Any, **settings: Any) -> tuple[Any, dict[str, Any]]:
        """The encoder of a saved model, and what the library says of loading the whole (`output_loading_info`)."""
        from transformers import AutoModel

        model, info = AutoModel.from_pretrained(folder, **settings)
        return model.get_encoder(), info


def architecture(config: Any) -> Any:
    """The automatic class that a configuration's model is built and loaded by.

    The encoder of an encoder-decoder of texts, whose decoder's activations depend on a second text; else a model of images
    and text that predicts tokens, with its image tower, then a causal language model where the family has one, then another
    model of images and text, then an encoder, then the family's bare model.
    """
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForTextEncoding,
    )

    known = type(config)
    if config.is_encoder_decoder and known not in AutoModelForImageTextToText._model_mapping:
        if known in AutoModelForTextEncoding._model_mapping:
            return AutoModelForTextEncoding
        if known in AutoModel._model_mapping:
            whole = AutoModel._model_mapping[known]
            if whole.main_input_name == "input_ids":
                return _Encoder
    if hasattr(config, "vision_config") and known in AutoModelForImageTextToText._model_mapping:
        return AutoModelForImageTextToText
    for kind in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForTextEncoding):
        if known in kind._model_mapping:
            return kind
    return AutoModel


def is_known(config: Any) -> bool:
    """Tell whether the library has a model of a configuration by itself; some image towers are only parts of one."""
    from transformers import AutoModel

    return type(config) in AutoModel._model_mapping


def predicts_tokens(config: Any) -> bool:
    """Tell whether a configuration is of a model made to predict next tokens; a loaded one is tried (`no_predictions`)."""
    from transformers import AutoModelForMaskedLM

    fills_gaps = type(config) in AutoModelForMaskedLM._model_mapping
    return architecture(config).__name__ in (
        "AutoModelForCausalLM", "AutoModelForImageTextToText",
    ) and not (fills_gaps and not getattr(config, "is_decoder", False))  # fmt: skip


def part_of(config: Any) -> dict[str, str]:
    """A note for the record where not all of a configuration's model is run."""
    if not config.is_encoder_decoder:
        return {}
    name = architecture(config).__name__
    if name in ("_Encoder", "AutoModelForTextEncoding"):
        return {"model": "its encoder alone is run"}
    if name == "AutoModelForCausalLM":
        return {"model": "its decoder alone is run, without an encoder's output"}
    return {}


DEPTHS = ("num_hidden_layers", "depth")
"""Names that the number of blocks has in the configuration of a language part or of a tower."""


def depth_of(config: Any) -> int | None:
    """The number of blocks that a part's configuration states, if it does."""
    return next((getattr(config, name) for name in DEPTHS if hasattr(config, name)), None)


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

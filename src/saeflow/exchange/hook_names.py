"""Names of hook points in other libraries."""

import re
from collections.abc import Mapping
from typing import Any

from saeflow.errors import UserError

_KINDS = "resid_pre|resid_mid|resid_post|mlp_out|attn_out"
_CLASS = "AutoModelForCausalLM"
"""SAELens's model_class_name of models whose hook_name is a module's path, read at the first value that it gives."""
_INPUTS = "mlp|attn"
"""Modules whose TransformerLens hook_in is their input after the norm before it."""


def theirs(hook_point: str) -> dict[str, Any]:
    """Return the other libraries' names of a language model's hook point; empty for other hook points.

    Returns:
        hook_name (TransformerLens, SAELens) and layer; submodule_name (dictionary_learning) where it has one. What a
        module gives has the module's path as hook_name, in SAELens with the class of transformers as model_class_name.
    """
    if found := re.fullmatch(r"module\.(.+)\.output(\.0)?", hook_point):
        return {"hook_name": found[1], "model_class_name": _CLASS}
    if found := re.fullmatch(rf"blocks\.(\d+)\.({_INPUTS})_in", hook_point):
        return {"hook_name": f"blocks.{found[1]}.{found[2]}.hook_in", "layer": int(found[1])}
    found = re.fullmatch(rf"blocks\.(\d+)\.({_KINDS})", hook_point)
    if not found:
        return {}
    layer, kind = found.groups()
    return {
        "hook_name": f"blocks.{layer}.hook_{kind}", "layer": int(layer),
        "submodule_name": f"{kind}_layer_{layer}",
    }  # fmt: skip


def ours(facts: Mapping[str, Any]) -> str | None:
    """The hook point that another library's config names; None where it names none, or not in its own names.

    Raises:
        UserError: a place of TransformerLens where saeflow reads no activations.
    """
    name = facts.get("hook_name")
    if isinstance(name, str) and facts.get("model_class_name") == _CLASS:
        return f"module.{name}.output"
    if isinstance(name, str) and (found := re.fullmatch(rf"blocks\.(\d+)\.hook_({_KINDS})", name)):
        return f"blocks.{found[1]}.{found[2]}"
    if isinstance(name, str) and (
        found := re.fullmatch(rf"blocks\.(\d+)\.({_INPUTS})\.hook_in", name)
    ):
        return f"blocks.{found[1]}.{found[2]}_in"
    if isinstance(name, str) and re.match(r"(blocks\.\d+\.|hook_|ln_final)", name):
        raise UserError(
            f"hook_name: expected one of blocks.N.hook_({_KINDS}) or blocks.N.({_INPUTS}).hook_in, found {name}, where "
            "saeflow reads no activations."
        )
    name = facts.get("submodule_name")
    if isinstance(name, str) and (found := re.fullmatch(rf"({_KINDS})_layer_(\d+)", name)):
        return f"blocks.{found[2]}.{found[1]}"
    return None

"""SAEs of other libraries with other configs and damaged weights."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .reading import REFUSED, demand, read, rotten, write_json_or_rot

D_IN, D_SAE = 6, 16
SAELENS: dict[str, Any] = {
    "architecture": "standard", "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu",
    "activation_fn_str": "relu", "activation_fn_kwargs": {}, "apply_b_dec_to_input": True,
    "normalize_activations": "none", "finetuning_scaling_factor": False, "hook_name": "blocks.1.hook_resid_post",
    "hook_layer": 1, "hook_head_index": None, "prepend_bos": True, "context_size": 16, "model_name": "gpt2",
}  # fmt: skip


def _weights(names: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in names.items()}


AFFINE = _weights({"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)})  # fmt: skip
ROWS = torch.randn(9, D_IN, generator=torch.Generator().manual_seed(1)) * 2


def saelens(rng: random.Random, folder: Path) -> None:
    """A config with other values, or weights with other headers: what is read does what SAELens would do."""
    from saeflow.exchange import saelens as library
    from saeflow.exchange.plain import sae_of

    base = SAELENS | rng.choice(
        [{}, {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}}, {"architecture": "topk", "k": 3, "activation_fn_str": "topk"}]
    )  # fmt: skip
    save_file(AFFINE, folder / library.WEIGHTS)
    config: dict[str, Any] | None = base
    if rng.random() < 0.3:
        weights = folder / library.WEIGHTS
        weights.write_bytes(rotten(rng, weights.read_bytes(), first=320))
        (folder / library.CONFIG).write_text(json.dumps(base))
        config = None
    else:
        config = write_json_or_rot(rng, folder / library.CONFIG, base)
    plain = read(lambda: library.read(folder), folder)
    if plain is REFUSED or config is None:
        return
    expected = _saelens_latents(config)
    demand(expected is not None, f"read a config that SAELens does not take so: {config}")
    with torch.no_grad():
        found = sae_of(plain)[2].encode(ROWS)
    demand(torch.allclose(found, expected, atol=1e-4), f"other latents than SAELens's: {config}")


def _saelens_latents(config: Any) -> torch.Tensor | None:
    """Latents as sae_lens 5 makes them (sae.py), None for what it refuses or does beyond an affine encoder."""
    config = {{"activation_fn": "activation_fn_str"}.get(k, k): v for k, v in config.items()}
    config = {
        "architecture": "standard",
        "activation_fn_kwargs": {},
        "apply_b_dec_to_input": True,
    } | config
    if config["architecture"] not in ("standard", "topk"):
        return None
    dtype = {
        "float32": torch.float32,
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
        "float64": torch.float64,
    }
    if str(config.get("dtype", "float32")).removeprefix("torch.") not in dtype:
        return None
    w = {
        name: part.to(dtype[str(config.get("dtype", "float32")).removeprefix("torch.")]).float()
        for name, part in AFFINE.items()
    }
    pre = (ROWS - w["b_dec"] * config["apply_b_dec_to_input"]) @ w["W_enc"] + w["b_enc"]
    default = "topk" if config["architecture"] == "topk" else "relu"
    activation = config.get("activation_fn_str") or default
    if activation == "relu" and config["architecture"] == "standard":
        return pre.relu()
    if activation != "topk":
        return None
    kwargs = config["activation_fn_kwargs"] or {}
    k = kwargs.get("k", config.get("k")) if isinstance(kwargs, dict) else None
    if type(k) is not int or not 1 <= k <= D_SAE:
        return None
    best = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, best.indices, best.values.relu())


def dictionary_learning(rng: random.Random, folder: Path) -> None:
    """The same of dictionary_learning's folders; its weights are a pickle that is never run."""
    from saeflow.exchange import dictionary_learning as library
    from saeflow.exchange.plain import Plain, sae_of

    kind = rng.choice(["relu", "topk", "jumprelu", "gated"])
    extra: dict[str, Any] = {
        "relu": {}, "topk": {"k": 4}, "jumprelu": {"threshold": torch.full((D_SAE,), 0.3)},
        "gated": {"r_mag": torch.zeros(D_SAE), "b_mag": torch.zeros(D_SAE)},
    }[kind]  # fmt: skip
    plain = Plain(kind, **AFFINE, **extra)  # type: ignore[arg-type]
    library.write(plain, folder, {"lm_name": "gpt2"})
    config, weights = folder / library.CONFIG, folder / library.WEIGHTS
    changed: Any = True
    if rng.random() < 0.5:
        weights.write_bytes(rotten(rng, weights.read_bytes(), first=rng.choice([400, None])))
    else:
        changed = write_json_or_rot(rng, config, json.loads(config.read_text()))
    found = read(lambda: library.read(folder), folder)
    if found is REFUSED or not isinstance(changed, dict):
        return
    with torch.no_grad():  # the config alone was changed, and of it only dict_class decides
        ours, whole = (sae_of(one)[2](ROWS) for one in (found, plain))
    same = changed["trainer"].get("dict_class") == {"relu": "AutoEncoder", "topk": "AutoEncoderTopK", "jumprelu": "JumpReluAutoEncoder", "gated": "GatedAutoEncoder"}[kind]  # fmt: skip
    demand(not same or torch.allclose(ours, whole, atol=1e-4), f"another function: {changed}")

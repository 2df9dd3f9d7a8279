"""Every field of a SAELens config that changes what an SAE does is honoured or refused (sae_lens 3 to 6).

The reference is written out from sae_lens 5.11.0, sae.py: encode_standard, encode_jumprelu, encode_gated, decode.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from saeflow.errors import UserError
from saeflow.exchange import import_sae, saelens
from saeflow.exchange.hook_names import ours, theirs
from saeflow.exchange.plain import sae_of

D_IN, D_SAE = 8, 24
OLD: dict[str, Any] = {
    "architecture": "standard", "d_in": D_IN, "d_sae": D_SAE, "dtype": "torch.float32", "device": "cpu",
    "activation_fn_str": "relu", "activation_fn_kwargs": {}, "apply_b_dec_to_input": True,
    "normalize_activations": "none", "finetuning_scaling_factor": False, "hook_name": "blocks.1.hook_resid_post",
    "hook_layer": 1, "hook_head_index": None, "prepend_bos": True, "context_size": 16, "model_name": "gpt2",
    "sae_lens_training_version": "3.22.2",
}  # fmt: skip
ABOUT = {"name": "s/h/e/r", "entry": "e", "source": "s", "hook_point": "blocks.1.resid_post"}


def weights(*extra: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    shapes |= dict.fromkeys(extra, (D_SAE,))
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: part.abs() if name in extra else part for name, part in found.items()}


def folder_of(path: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    save_file({name: part.contiguous() for name, part in tensors.items()}, path / saelens.WEIGHTS)
    given = {key: value for key, value in (OLD | config).items() if value is not ...}
    (path / saelens.CONFIG).write_text(json.dumps(given))
    return path


def reference(tensors: dict[str, Tensor], **config: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, and SAELens's latents and reconstructions of them."""
    set_to = OLD | config
    dtype = getattr(torch, str(set_to["dtype"]).removeprefix("torch."))
    t = {name: part.to(dtype).float() for name, part in tensors.items()}
    x = torch.randn(50, D_IN, generator=torch.Generator().manual_seed(1)) * 2
    pre = (x - t["b_dec"] * set_to["apply_b_dec_to_input"]) @ t["W_enc"] + t["b_enc"]
    z = pre.relu()
    if set_to["activation_fn_str"] == "topk":
        best = pre.topk(set_to["activation_fn_kwargs"]["k"], dim=-1)
        z = torch.zeros_like(pre).scatter(-1, best.indices, best.values.relu())
    if set_to["architecture"] == "jumprelu":
        z = z * (pre > t["threshold"])
    scale = t.get("finetuning_scaling_factor", torch.ones(D_SAE))
    return x, z, (z * scale) @ t["W_dec"] + t["b_dec"]


@pytest.mark.parametrize(
    ("extra", "config"),
    [
        ((), {}),
        ((), {"apply_b_dec_to_input": False}),
        ((), {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}}),
        (
            (),
            {"architecture": "topk", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}},
        ),
        (("threshold",), {"architecture": "jumprelu"}),
        (("finetuning_scaling_factor",), {"finetuning_scaling_factor": True}),
        ((), {"dtype": "torch.bfloat16"}),
        ((), {"dtype": "float16"}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_it_does_what_saelens_does(
    extra: tuple[str, ...], config: dict[str, Any], tmp_path: Path
) -> None:
    tensors = weights(*extra)
    x, latents, x_hat = reference(tensors, **config)
    sae = sae_of(saelens.read(folder_of(tmp_path / "sae", tensors, **config)))[2]
    with torch.no_grad():
        torch.testing.assert_close(sae.encode(x), latents, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sae(x), x_hat, atol=1e-5, rtol=1e-5)


def test_names_of_older_and_newer_versions_mean_the_same(tmp_path: Path) -> None:
    tensors = weights()
    topk = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}}
    ways = {
        "3": topk,
        "2": {"activation_fn": "topk", "activation_fn_str": ..., "activation_fn_kwargs": {"k": 4}, "architecture": ...},
        "6": {"architecture": "topk", "k": 4, "activation_fn_str": ..., "activation_fn_kwargs": ...},
    }  # fmt: skip
    for name, config in ways.items():
        plain = saelens.read(folder_of(tmp_path / name, tensors, **config))
        assert (plain.kind, plain.k) == ("topk", 4)
    jump = weights("threshold")
    as_log = {k: v for k, v in jump.items() if k != "threshold"}
    as_log["log_threshold"] = jump["threshold"].log()
    read = [
        saelens.read(folder_of(tmp_path / f"j{i}", parts, architecture="jumprelu"))
        for i, parts in enumerate((jump, as_log))
    ]
    torch.testing.assert_close(read[0].threshold, read[1].threshold)
    ones = tensors | {"scaling_factor": torch.ones(D_SAE)}  # written for a while though never used
    assert torch.equal(saelens.read(folder_of(tmp_path / "1", ones)).W_dec, tensors["W_dec"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"activation_fn_str": "tanh-relu"}, "activation_fn_str: expected relu or topk"),
        ({"activation_fn_str": 3}, "activation_fn_str: expected relu or topk"),
        ({"activation_fn_str": "topk"}, "k: expected one whole number, found none"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4.0}}, "found 4.0"),
        (
            {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 99}},
            "k: expected a whole number",
        ),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}, "k": 5}, "found 5 and 4"),
        (
            {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4, "postact_fn": "tanh"}},
            "activation_fn_kwargs: expected k alone",
        ),
        ({"activation_fn": "topk"}, "expected one value of activation_fn and activation_fn_str"),
        ({"architecture": "topk"}, "activation_fn_str: expected topk with the architecture topk"),
        (
            {"architecture": "gated", "activation_fn_str": "topk"},
            "expected relu with the architecture",
        ),
        ({"architecture": "transcoder"}, "architecture: expected one of"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations: expected 'none'"),
        ({"normalize_activations": "constant_norm_rescale"}, "normalize_activations"),
        ({"normalize_activations": True}, "normalize_activations: expected 'none', found True"),
        ({"reshape_activations": "hook_z"}, "reshape_activations: expected 'none'"),
        ({"hook_head_index": 3}, "hook_head_index: expected None, found 3"),
        ({"apply_b_dec_to_input": 0.5}, "apply_b_dec_to_input: expected true or false"),
        ({"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm: expected it with"),
        ({"dtype": "int8"}, "dtype: expected one of"),
        (
            {"model_from_pretrained_kwargs": {"center_writing_weights": True}},
            "model_from_pretrained_kwargs: expected none that changes activations",
        ),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_what_it_cannot_do_is_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "sae", weights(), **config)
    with pytest.raises(UserError) as caught:
        saelens.read(folder)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)


def test_factors_that_the_config_denies_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "sae", weights("scaling_factor"))
    with pytest.raises(UserError, match="finetuning_scaling_factor: expected true"):
        saelens.read(folder)


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    tensors = weights()
    tensors["W_enc"] = (tensors["W_enc"] * 40).to(torch.int8)
    with pytest.raises(
        UserError, match=r"expected floating-point numbers, found torch\.int8 in W_"
    ):
        saelens.read(folder_of(tmp_path / "sae", tensors))


@pytest.mark.parametrize(
    "name", ["blocks.1.attn.hook_z", "blocks.1.hook_mlp_in", "blocks.1.ln2.hook_normalized"]
)
def test_an_sae_of_another_place_is_refused(name: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "sae", weights(), hook_name=name)
    with pytest.raises(UserError, match="where saeflow reads no activations"):
        import_sae(folder, "saelens", ABOUT, tmp_path)


@pytest.mark.parametrize(
    ("name", "hook_name"),
    [
        ("blocks.3.resid_mid", "blocks.3.hook_resid_mid"),
        ("blocks.3.mlp_out", "blocks.3.hook_mlp_out"),
        ("blocks.12.mlp_in", "blocks.12.mlp.hook_in"),
        ("blocks.12.attn_in", "blocks.12.attn.hook_in"),
    ],
)
def test_names_of_hook_points_are_translated_both_ways(name: str, hook_name: str) -> None:
    """By TransformerLens's names; its mlp.hook_in is what the MLP takes, its hook_mlp_in the stream before the norm."""
    assert theirs(name)["hook_name"] == hook_name
    assert ours({"hook_name": hook_name}) == name


def test_a_module_is_named_by_its_path_both_ways() -> None:
    """As SAELens does of models that transformers runs: hook_name is a module, read at the first value that it gives."""
    names = theirs("module.model.layers.7.mlp.output")
    assert names == {"hook_name": "model.layers.7.mlp", "model_class_name": "AutoModelForCausalLM"}
    assert ours(names) == "module.model.layers.7.mlp.output"
    assert (
        ours({"hook_name": "model.layers.7.mlp"}) is None
    )  # TransformerLens's names have no such one
    assert theirs("module.model.layers.7.mlp.input") == theirs("module.model.norm.output.1") == {}


def test_a_place_of_another_library_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of(tmp_path / "sae", weights(), hook_name="model.layers.1")
    out = tmp_path / "out"
    out.mkdir()
    import_sae(folder, "saelens", ABOUT, out)
    assert "it is of model.layers.1, a name that saeflow cannot compare" in caplog.text


PURSUIT = {"architecture": "matching_pursuit", "residual_threshold": 1.5, "max_iterations": 3}


def pursuit_weights() -> dict[str, Tensor]:
    return {name: part for name, part in weights().items() if name in ("W_dec", "b_dec")}


@pytest.mark.parametrize("is_centred", [True, False])
def test_a_matching_pursuit_is_read_with_its_rules(is_centred: bool, tmp_path: Path) -> None:
    """SAELens leaves b_dec out of both sides where it is not taken from the inputs."""
    config = PURSUIT | {"activation_fn_str": ..., "apply_b_dec_to_input": is_centred}
    folder_of(tmp_path / "theirs", pursuit_weights(), **config, stop_on_duplicate_support=False)
    plain = saelens.read(tmp_path / "theirs")
    sae = sae_of(plain)[2]
    tensors = pursuit_weights()
    centre = tensors["b_dec"] * is_centred
    x = torch.randn(20, D_IN, generator=torch.Generator().manual_seed(1)) * 2
    for row, latents in zip(x - centre, sae.encode(x), strict=True):
        residual, z = row.clone(), torch.zeros(D_SAE)
        for _ in range(3):
            products = tensors["W_dec"] @ residual
            best = int(products.argmax())
            z[best] += products[best].relu()
            residual = residual - products[best].relu() * tensors["W_dec"][best]
            if residual.norm() < 1.5:
                break
        torch.testing.assert_close(latents, z, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sae(x), sae.encode(x) @ tensors["W_dec"] + centre)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual_threshold": -1.0}, "residual_threshold: expected a number from 0"),
        ({"max_iterations": 0}, "max_iterations: expected a whole number from 1 or null"),
        ({"stop_on_duplicate_support": 1}, "stop_on_duplicate_support: expected true or false"),
        ({"d_sae": 23}, "d_sae 24 as in"),
    ],
)
def test_a_matching_pursuit_that_cannot_be_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = PURSUIT | {"activation_fn_str": ...} | change
    with pytest.raises(UserError, match=message):
        saelens.read(folder_of(tmp_path, pursuit_weights(), **config))


def test_factors_of_a_pursuit_are_refused(tmp_path: Path) -> None:
    tensors = pursuit_weights() | {"scaling_factor": torch.ones(D_SAE)}
    folder_of(tmp_path, tensors, **PURSUIT, activation_fn_str=...)
    with pytest.raises(UserError, match="expected no factors of latents with matching_pursuit"):
        saelens.read(tmp_path)


def test_tensors_that_steered_training_are_passed_over(tmp_path: Path) -> None:
    """Some of SynthSAEBench's published ReLU and JumpReLU SAEs hold those of its tuner of penalties."""
    steered = weights("threshold") | {"coefficient_autotuner.multiplier": torch.tensor(3)}
    plain = saelens.read(folder_of(tmp_path / "a", steered, architecture="jumprelu"))
    clean = saelens.read(folder_of(tmp_path / "b", weights("threshold"), architecture="jumprelu"))
    x = torch.randn(9, D_IN)
    torch.testing.assert_close(sae_of(plain)[2](x), sae_of(clean)[2](x), atol=0, rtol=0)

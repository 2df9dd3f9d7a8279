"""Hook points of every layout, against the model's own hidden states and edited weights."""

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from torch import Tensor, nn

from saeflow.errors import UserError
from saeflow.saes.edits import ablate, add, clamp, scale
from saeflow.sources.heads import logits
from saeflow.sources.hook_points import (
    HookPoint,
    capture,
    check_model,
    decoder_of,
    hook,
    run_from,
    splice,
)

from .conftest import CONFIGS, FINAL_NORM, tiny_model

TOKEN_IDS = torch.randint(0, 320, (3, 12), generator=torch.Generator().manual_seed(1))
N_BLOCKS = 4
PLACES = ("resid_pre", "attn_out", "mlp_out", "resid_post")
LAYOUTS = pytest.mark.parametrize("name", CONFIGS)
EVERY_PLACE = pytest.mark.parametrize("place", PLACES)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Independent of the package: the modules whose class is the library's block."""
    names = ("GPT2Block", "GPTNeoXLayer")
    return [
        module
        for module in model.modules()
        if type(module).__name__ in names or type(module).__name__.endswith("DecoderLayer")
    ]


def count_calls(model: Any) -> Counter[str]:
    """Count the runs of each block and of the lm head (through a part inside each block)."""
    calls: Counter[str] = Counter()
    watched = {f"block {i}": block.mlp for i, block in enumerate(blocks_of(model))}
    watched |= {f"norm {i}": next(block.children()) for i, block in enumerate(blocks_of(model))}
    watched["head"] = model.get_output_embeddings()
    for name, module in watched.items():
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    return calls


def reference_residuals(model: Any, name: str) -> list[Tensor]:
    """The residual stream before each block and after the last one, by the library's own means."""
    final: list[Tensor] = []
    norm = getattr(decoder_of(model), FINAL_NORM.get(name.split("-")[0], "norm"))
    handle = norm.register_forward_pre_hook(lambda _, args: final.append(args[0]))
    hidden = model(TOKEN_IDS, output_hidden_states=True).hidden_states
    handle.remove()
    return [*hidden[:-1], final[0]]


@LAYOUTS
def test_residual_stream_is_the_librarys(name: str) -> None:
    model = tiny_model(name)
    expected = reference_residuals(model, name)
    names = [
        f"blocks.{i}.{place}" for i in range(N_BLOCKS) for place in ("resid_pre", "resid_post")
    ]
    found = capture(model, names, TOKEN_IDS)
    assert list(found) == names
    for i in range(N_BLOCKS):
        assert torch.equal(found[f"blocks.{i}.resid_pre"], expected[i])
        assert torch.equal(found[f"blocks.{i}.resid_post"], expected[i + 1])


@LAYOUTS
def test_a_block_adds_attention_and_mlp_to_the_residual_stream(name: str) -> None:
    model = tiny_model(name)
    for i in range(N_BLOCKS):
        pre, attention, mlp, post = capture(
            model, [f"blocks.{i}.{place}" for place in PLACES], TOKEN_IDS
        ).values()
        torch.testing.assert_close(pre + attention + mlp, post, rtol=1e-5, atol=1e-5)
        assert min(attention.std(), mlp.std()) > 1e-3


@LAYOUTS
@EVERY_PLACE
def test_nothing_after_the_last_hook_point_runs(name: str, place: str) -> None:
    model = tiny_model(name)
    calls = count_calls(model)
    capture(model, ["blocks.0.resid_post", f"blocks.2.{place}", "blocks.1.mlp_out"], TOKEN_IDS)
    assert calls["block 0"] == calls["block 1"] == 1
    assert calls["block 2"] == (place in ("mlp_out", "resid_post"))
    assert calls["block 3"] == calls["norm 3"] == calls["head"] == 0


@LAYOUTS
@EVERY_PLACE
@pytest.mark.parametrize("block", [0, 2, 3])
def test_the_clean_activation_spliced_in_gives_the_models_own_logits(
    name: str, place: str, block: int
) -> None:
    model = tiny_model(name)
    expected = model(TOKEN_IDS).logits
    point = HookPoint.parse(f"blocks.{block}.{place}")
    found = capture(model, [str(point.block_input), str(point)], TOKEN_IDS)
    seen: list[Tensor] = []

    def replace(x: Tensor) -> Tensor:
        seen.append(x)
        return found[str(point)].clone()

    calls = count_calls(model)
    hidden = run_from(model, str(point), found[str(point.block_input)], TOKEN_IDS, replace)
    assert torch.equal(logits(model, hidden), expected)
    assert torch.equal(seen[0], found[str(point)])
    assert calls["head"] == 1
    for i in range(N_BLOCKS):
        assert calls[f"block {i}"] == calls[f"norm {i}"] == (i >= block)
    # ... and the model is as it was.
    assert torch.equal(model(TOKEN_IDS).logits, expected)
    assert calls["block 0"] == 1 + (block == 0)


def without(model: Any, place: str, block: int) -> Any:
    """A copy of the model whose weights make `place` of a block zero."""
    edited = copy.deepcopy(model)
    inside = blocks_of(edited)[block]
    parts = {
        "attn_out": ("attn.c_proj", "attention.dense", "self_attn.o_proj"),
        "mlp_out": ("mlp.c_proj", "mlp.dense_4h_to_h", "mlp.down_proj"),
    }
    for path, module in inside.named_modules():
        if path in parts[place]:
            for parameter in module.parameters():
                parameter.zero_()
    return edited


@LAYOUTS
@pytest.mark.parametrize("place", ["attn_out", "mlp_out"])
def test_zero_spliced_in_is_a_model_with_zero_weights_there(name: str, place: str) -> None:
    model = tiny_model(name)
    point = HookPoint.parse(f"blocks.1.{place}")
    expected = without(model, place, 1)(TOKEN_IDS).logits
    assert not torch.allclose(expected, model(TOKEN_IDS).logits, atol=1e-3)
    block_input = capture(model, [str(point.block_input)], TOKEN_IDS)[str(point.block_input)]
    hidden = run_from(model, str(point), block_input, TOKEN_IDS, torch.zeros_like)
    torch.testing.assert_close(logits(model, hidden), expected, rtol=1e-5, atol=1e-5)
    with splice(model, str(point), torch.zeros_like):
        torch.testing.assert_close(model(TOKEN_IDS).logits, expected, rtol=1e-5, atol=1e-5)


def test_soft_capped_logits_stay_below_the_cap() -> None:
    model = tiny_model("gemma2")
    hidden = 100 * torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    raw = hidden @ model.get_output_embeddings().weight.T
    torch.testing.assert_close(logits(model, hidden), 0.5 * torch.tanh(raw / 0.5))


class Scaled(nn.Module):
    """Stands for an SAE: gives back its input times a learned number."""

    def __init__(self, factor: float, d_in: int = 16) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor, dtype=torch.float64))
        self.d_in = d_in

    def forward(self, x: Tensor) -> Tensor:
        assert x.ndim == 2
        assert x.dtype == torch.float64
        return self.factor * x


def test_hook_runs_the_model_on_reconstructions_and_takes_itself_away() -> None:
    model = tiny_model("llama")
    clean = model(TOKEN_IDS).logits
    with hook(model, "blocks.2.resid_post", Scaled(1.0)):
        torch.testing.assert_close(model(TOKEN_IDS).logits, clean)
    with hook(model, "blocks.1.mlp_out", Scaled(0.0)):
        expected = without(model, "mlp_out", 1)(TOKEN_IDS).logits
        torch.testing.assert_close(model(TOKEN_IDS).logits, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(KeyError), hook(model, "blocks.1.mlp_out", Scaled(0.0)):
        raise KeyError
    assert torch.equal(model(TOKEN_IDS).logits, clean)


def test_hook_lets_gradients_through_and_works_while_generating() -> None:
    model, sae = tiny_model("gpt2"), Scaled(0.5)
    with hook(model, "blocks.2.resid_post", sae):
        model(TOKEN_IDS).logits.logsumexp(-1).sum().backward()
    assert sae.factor.grad is not None
    assert abs(float(sae.factor.grad)) > 1e-6
    clean = model.generate(TOKEN_IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=1)
    with hook(model, "blocks.2.resid_post", Scaled(1.0)):
        spliced = model.generate(TOKEN_IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=1)
    assert torch.equal(clean, spliced)


@pytest.mark.parametrize(
    ("positions", "seen"),
    [
        (slice(1, None), lambda n: range(1, n)),
        (slice(0, 1), lambda n: range(1)),
        (slice(2, 4), lambda n: range(2, 4)),
    ],
)
def test_positions_that_training_left_out_keep_their_activations(
    positions: slice, seen: Callable[[int], range]
) -> None:
    """Against the reconstruction of chosen positions by hand; and one token at a time, with a cache."""
    model, sae = tiny_model("llama"), Scaled(0.3)
    given = TOKEN_IDS[:2]
    chosen = list(seen(given.shape[1]))

    def by_hand(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, chosen] = (0.3 * x[:, chosen].double()).to(x.dtype)
        return x

    with torch.no_grad():
        with splice(model, "blocks.2.resid_post", by_hand):
            expected = model(given).logits
        with hook(model, "blocks.2.resid_post", sae, positions=positions):
            torch.testing.assert_close(model(given).logits, expected)
            begun = model(given[:, :3], use_cache=True)
            found = [begun.logits]
            for n in range(3, given.shape[1]):
                step = model(given[:, n : n + 1], past_key_values=begun.past_key_values)
                found.append(step.logits)
        torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-4)
        sae.positions = positions  # an SAE's own, of its config, are the default
        with hook(model, "blocks.2.resid_post", sae):
            torch.testing.assert_close(model(given).logits, expected)
        with hook(model, "blocks.2.resid_post", sae, positions=slice(None)):
            assert (model(given).logits - expected).abs().max() > 1e-3


def test_hook_refuses_an_sae_of_another_width() -> None:
    model = tiny_model("llama")
    with (
        pytest.raises(UserError, match="width 16, but the SAE expects 12"),
        hook(model, "blocks.2.resid_post", Scaled(1.0, 12)),
    ):
        model(TOKEN_IDS)
    assert model(TOKEN_IDS).logits.isfinite().all()


def test_a_failure_inside_leaves_the_model_as_it_was() -> None:
    model = tiny_model("gemma2")
    clean = model(TOKEN_IDS).logits
    block_input = capture(model, ["blocks.2.resid_pre"], TOKEN_IDS)["blocks.2.resid_pre"]

    def fail(x: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_from(model, "blocks.2.mlp_out", block_input, TOKEN_IDS, fail)
    assert torch.equal(model(TOKEN_IDS).logits, clean)


def test_a_missing_block_is_named() -> None:
    with pytest.raises(UserError, match=r"has 4 blocks \(0\.\.3\), found hook point blocks\.40"):
        capture(tiny_model("gpt2"), ["blocks.40.resid_post"], TOKEN_IDS)


def test_a_language_model_has_no_image_tower() -> None:
    with pytest.raises(UserError, match="GPT2LMHeadModel: expected a model with an image tower"):
        capture(tiny_model("gpt2"), ["vision.blocks.0.resid_post"], TOKEN_IDS)


def test_a_model_of_another_library_is_refused() -> None:
    with pytest.raises(UserError, match="Linear: expected a model of transformers"):
        check_model(nn.Linear(2, 2), ["blocks.0.resid_post"])


def test_a_model_without_a_head_gives_activations_and_no_logits() -> None:
    model = tiny_model("llama")
    expected = capture(model, ["blocks.1.mlp_out"], TOKEN_IDS)["blocks.1.mlp_out"]
    found = capture(model.model, ["blocks.1.mlp_out"], TOKEN_IDS)["blocks.1.mlp_out"]
    assert torch.equal(found, expected)
    with pytest.raises(UserError, match="LlamaModel: expected a causal language model"):
        logits(model.model, found)


class Coder(nn.Module):
    """Stands for an SAE: latents are the activations themselves on 12 directions, of 16."""

    d_in = 16

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.W = nn.Parameter(torch.linalg.qr(torch.randn(16, 12, dtype=torch.float64))[0])

    def encode(self, x: Tensor) -> Tensor:
        return x @ self.W

    def decode(self, z: Tensor) -> Tensor:
        return z @ self.W.T

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


@pytest.mark.parametrize(
    ("edit", "changes"),
    [
        (ablate(5), lambda z: -z),
        (ablate([5]), lambda z: -z),
        (clamp(5, 2.5), lambda z: 2.5 - z),
        (scale(5, 3.0), lambda z: 2 * z),
        (add(5, -1.5), lambda z: torch.full_like(z, -1.5)),
    ],
)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_an_edit_moves_the_activation_along_one_decoder_row(
    name: str, edit: Callable[[Tensor], Tensor], changes: Callable[[Tensor], Tensor]
) -> None:
    """Against a hook on the library's own module that adds (change of z) x (decoder row)."""
    model, sae = tiny_model(name), Coder()
    row = sae.W[:, 5].detach().float()
    blocks = model.model.layers if name == "llama" else model.transformer.h

    def by_hand(module: nn.Module, args: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        moved = x + changes(x @ row)[..., None] * row
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    with torch.no_grad():
        handle = blocks[1].register_forward_hook(by_hand)
        expected = model(TOKEN_IDS).logits
        handle.remove()
        with hook(model, "blocks.1.resid_post", sae, edit=edit, keep_error=True):
            torch.testing.assert_close(model(TOKEN_IDS).logits, expected, rtol=1e-4, atol=1e-5)
        with hook(model, "blocks.1.resid_post", sae, edit=edit):
            without_error = model(TOKEN_IDS).logits
        assert (without_error - expected).abs().max() > 1e-3  # 4 directions are lost there


def test_the_error_kept_leaves_the_model_as_it_is() -> None:
    model = tiny_model("gpt2")
    with torch.no_grad(), hook(model, "blocks.1.resid_post", Coder(), keep_error=True):
        spliced = model(TOKEN_IDS).logits
    torch.testing.assert_close(spliced, model(TOKEN_IDS).logits, rtol=1e-5, atol=1e-5)


def test_an_edit_of_a_latent_that_is_not_there_is_refused() -> None:
    model = tiny_model("gpt2")
    with (
        pytest.raises(UserError, match=r"latents in 0\.\.11, found 12"),
        hook(model, "blocks.1.resid_post", Coder(), edit=ablate([3, 12])),
    ):
        model(TOKEN_IDS)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_a_model_spread_over_devices_gives_the_same_activations(name: str, tmp_path: Path) -> None:
    """One block lies on the disk, as accelerate puts what no device has room for."""
    ids = torch.arange(12).reshape(2, 6)
    hooks = ["blocks.1.mlp_out", "blocks.2.resid_pre", "blocks.3.resid_post"]
    whole = tiny_model(name)
    expected = capture(whole, hooks, ids)
    blocks = "transformer.h" if name == "gpt2" else "model.layers"
    spread = tiny_model(name)
    body, block = blocks.split(".")
    parts = [
        f"{body}.{part}" for part, _ in spread.get_submodule(body).named_children() if part != block
    ]
    where = dict.fromkeys([*parts, "lm_head", *(f"{blocks}.{i}" for i in range(N_BLOCKS))], "cpu")
    where[f"{blocks}.2"] = "disk"
    dispatch_model(spread, where, "cpu", offload_dir=str(tmp_path))
    assert all(p.is_meta for p in spread.get_submodule(f"{blocks}.2").parameters())
    for hook_point, x in capture(spread, hooks, ids).items():
        assert torch.equal(x, expected[hook_point])
    given = expected["blocks.2.resid_pre"]
    runs = [
        run_from(model, "blocks.2.resid_pre", given, ids, lambda x: 2 * x)
        for model in (whole, spread)
    ]
    assert torch.equal(*runs)
    assert torch.equal(logits(spread, runs[1]), logits(whole, runs[0]))

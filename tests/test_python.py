"""saeflow from Python, as a user at a prompt meets it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import saeflow
from saeflow.batch import Batch
from saeflow.errors import UserError
from saeflow.saes import build
from saeflow.saes.files import save

from .sources.conftest import tiny_model

D_IN, D_SAE = 12, 40
CONFIG = {
    "variant": "topk", "options": {"k": 3}, "d_in": D_IN, "d_sae": D_SAE, "seed": 5, "source": "gpt2",
    "hook_point": "blocks.1.resid_post", "training": {"tokens": 120_000},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    sae = build("topk", D_IN, D_SAE, {"k": 3})
    sae.initialise(Batch.of(torch.randn(64, D_IN)), torch.Generator().manual_seed(0))
    (tmp_path / "entry/label").mkdir(parents=True)
    save(sae.state_dict(), tmp_path / "entry/label", CONFIG)
    return tmp_path / "entry/label"


def test_the_public_names_are_listed_before_any_is_used() -> None:
    code = "import saeflow, sys; print(*dir(saeflow)); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == sorted(saeflow.__all__)


def test_an_sae_says_what_it_is(folder: Path) -> None:
    said = repr(saeflow.load(folder))
    assert "\n" not in said
    assert said == (
        "TopK(12 -> 40 latents, at blocks.1.resid_post of gpt2, trained on 120,000 activations, seed 5)"
    )
    assert repr(build("relu", 4, 8, {"l1": 0.1})).endswith("(4 -> 8 latents)")


def test_a_loaded_sae_needs_no_gradient(folder: Path) -> None:
    sae = saeflow.load(str(folder))
    assert not sae(torch.randn(2, D_IN)).requires_grad
    x = torch.randn(2, D_IN, requires_grad=True)
    sae(x).sum().backward()  # that of activations flows through all the same
    assert x.grad is not None
    assert bool(x.grad.any())


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda sae: sae.encode(torch.zeros(3, 24)), r"activations \(\.\.\., 12\), found the shape \[3, 24\]"),
        (lambda sae: sae(torch.zeros(())), r"activations \(\.\.\., 12\), found the shape \[\]"),
        (lambda sae: sae.decode(torch.zeros(2, 3, 12)), r"latents \(\.\.\., 40\), found the shape \[2, 3, 12\]"),
    ],
)  # fmt: skip
def test_another_width_is_a_sentence(folder: Path, call: object, said: str) -> None:
    """(3, 24) was read as six rows of 12 before."""
    assert callable(call)
    with pytest.raises(UserError, match=said):
        call(saeflow.load(folder))


def test_a_wrong_path_is_a_sentence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected the folder of an SAE.*found no such folder"):
        saeflow.load(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=rf"no config\.json in it\. .*Below it: {folder}\."):
        saeflow.load(tmp_path / "entry")
    with pytest.raises(UserError, match=r"expected the folder of a model.*found no such folder"):
        saeflow.load_model(str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match=r"found neither model\.json nor config\.json"):
        saeflow.load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no such store"):
        saeflow.open_store(tmp_path / "elsewhere")


def test_a_model_is_loaded_from_a_path_as_text(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path)
    loaded = saeflow.load_model(str(tmp_path))
    ids = torch.arange(6)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_edits_of_a_list_are_applied_in_turn() -> None:
    """Against one function that does both, in either order, which differs."""
    model = tiny_model("gpt2")
    width = model.config.hidden_size
    sae = build("topk", width, D_SAE, {"k": 3}).requires_grad_(False)
    sae.initialise(Batch.of(torch.randn(64, width)), torch.Generator().manual_seed(0))
    ids = torch.arange(8)[None]

    def by_hand(z: Tensor) -> Tensor:
        z = z.clone()
        z[:, 7] = (z[:, 7] + 2) * 3
        return z

    def logits(edit: object) -> Tensor:
        with torch.no_grad(), saeflow.hook(model, "blocks.1.resid_post", sae, edit=edit):  # type: ignore[arg-type]
            return torch.as_tensor(model(ids).logits)

    add, scale = saeflow.add(7, 2.0), saeflow.scale(7, 3.0)
    torch.testing.assert_close(logits([add, scale]), logits(by_hand))
    assert not torch.allclose(logits([scale, add]), logits(by_hand))
    torch.testing.assert_close(logits([]), logits(None))

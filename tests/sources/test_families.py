"""Hook points of families of language models that have no line of code, and of a family of this test's own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from docs.families import BLOCKS, FAMILIES, tiny_family
from docs.models import PAGE, lines_of
from torch import Tensor, nn

from saeflow.errors import UserError
from saeflow.evaluation.in_model.token_losses import linear_head
from saeflow.sources.heads import logits, no_predictions
from saeflow.sources.hook_points import capture, hook, run_from, splice
from saeflow.sources.layouts import PLACES
from saeflow.sources.models import fetch_model, load_model
from saeflow.sources.proof import prove, prove_with_context

from .toy import toy

IDS = torch.randint(320, (2, 9), generator=torch.Generator().manual_seed(1))
EVERY = list(PLACES)
NO_MIDDLE = [place for place in PLACES if place != "resid_mid"]
SOME = {
    "bert": ("sequential", EVERY),
    "bloom": ("sequential", EVERY),
    "cohere": ("parallel", NO_MIDDLE),
    "dbrx": ("sequential", EVERY),
    "deepseek_v3": ("sequential", EVERY),
    "doge": ("sequential", EVERY),
    "falcon": ("parallel", NO_MIDDLE),
    "falcon_h1": ("attn + mlp + mixer", NO_MIDDLE),
    "gemma2": ("sequential", EVERY),
    "gemma4_text": ("attn + mlp + other", EVERY),
    "gptj": ("parallel", NO_MIDDLE),
    "granite": ("sequential", EVERY),
    "mamba": ("mixer", ["resid_pre", "resid_post"]),
    "mixtral": ("sequential", EVERY),
    "olmo2": ("sequential", EVERY),
    "opt": ("sequential", EVERY),
    "phi": ("parallel", NO_MIDDLE),
    "phi3": ("sequential", EVERY),
    "xlstm": ("mlp + mixer", ["resid_pre", "resid_mid", "mlp_in", "mlp_out", "resid_post"]),
}
"""By the models' papers: one after the other (BERT with norms of the sums, Gemma 2 with norms before and after, DeepSeek with
groups of experts, Doge with weights of the residual stream), side by side, Falcon-H1 with a state space beside attention,
Gemma 4 with a gate of each block's own embeddings after the MLP, xLSTM with a recurrence in place of attention, or neither
attention nor MLP."""


@pytest.mark.parametrize("name", SOME)
def test_a_familys_hook_points_are_proved(name: str) -> None:
    model = tiny_family(name)
    kind, places = SOME[name]
    proof = prove(model)
    assert proof.kinds == {kind: BLOCKS}
    assert proof.places == places
    assert (proof.linked, proof.sums, proof.hidden_states) == (BLOCKS - 1, BLOCKS, BLOCKS)
    assert proof.identities == BLOCKS * len(places)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named_for_what_they_are(broken: float) -> None:
    model = tiny_family("olmo2")
    next(iter(model.model.layers[1].mlp.parameters())).data[0, 0] = broken
    with pytest.raises(
        UserError, match=r"finite activations, found NaN or infinity in resid_post of .*layers\.1"
    ):
        prove(model)


def test_a_weighted_residual_stream_is_the_models_own() -> None:
    """Doge multiplies the stream by a vector before each sum, Gemma 4 its block's output by a number: as they are written."""
    for name in ("doge", "gemma4_text"):
        model = tiny_family(name)
        for i, block in enumerate(model.model.layers):
            for weight in ("input_residual", "post_attention_residual", "layer_scalar"):
                if hasattr(block, weight):
                    getattr(block, weight).uniform_(0.5, 2)
            points = [f"blocks.{i}.{place}" for place in PLACES]
            pre, _, attention, middle, _, mlp, post = capture(model, points, IDS).values()
            if name == "doge":
                expected = block.input_residual * pre + attention
                whole = block.post_attention_residual * expected + mlp
                torch.testing.assert_close(post, whole, rtol=1e-5, atol=1e-5)
            else:
                expected = pre + attention
                with splice(model, f"blocks.{i}.mlp_out", torch.zeros_like):
                    without = capture(model, points[-1:], IDS)[points[-1]]
                assert not torch.allclose(without, post, atol=1e-3)
            torch.testing.assert_close(middle, expected, rtol=1e-5, atol=1e-5)
        assert prove(model).sums == BLOCKS


def test_a_model_without_attention_says_what_it_has() -> None:
    with pytest.raises(
        UserError,
        match=r"layers\.1 has no attn_out: the block has no attention; it adds what mixer",
    ):
        capture(tiny_family("mamba"), ["blocks.1.attn_out"], IDS)


def by_hand(model: Any) -> dict[str, Tensor]:
    """Activations that a toy computes, written out."""
    found = {}
    stream = model.trunk.words(IDS)
    for i, stage in enumerate(model.trunk.stages):
        taken = stage.before(stream)
        seen = 0.5 * stage.look(taken)[0]
        middle = stream + seen
        inside = stage.then(middle)
        more = stage.down(nn.functional.gelu(stage.up(inside)))
        values = (stream, taken, seen, middle, inside, more, more + middle)
        found |= {f"blocks.{i}.{place}": x for place, x in zip(PLACES, values, strict=True)}
        stream = values[-1]
    return found


def test_a_new_family_needs_no_line_of_code() -> None:
    model = toy()
    expected = by_hand(model)
    found = capture(model, list(expected), IDS)
    for name, x in expected.items():
        assert torch.equal(found[name], x), name
    proof = prove(model)
    assert (proof.linked, proof.sums, proof.identities) == (2, 3, 3 * len(PLACES))
    assert linear_head(model) is None  # it scales: the shortcut of a plain head would be wrong


def test_zeros_spliced_into_a_new_family_are_a_model_without_that_part() -> None:
    model = toy()
    start = capture(model, ["blocks.1.resid_pre"], IDS)["blocks.1.resid_pre"]
    for place, part in (("attn_out", "look.out"), ("mlp_out", "down")):
        without = toy()
        for parameter in without.trunk.stages[1].get_submodule(part).parameters():
            parameter.zero_()
        expected = without(IDS).logits
        hidden = run_from(model, f"blocks.1.{place}", start, IDS, torch.zeros_like)
        torch.testing.assert_close(logits(model, hidden), expected, rtol=1e-5, atol=1e-5)
        with splice(model, f"blocks.1.{place}", torch.zeros_like):
            torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-5)


def test_the_middle_of_a_block_is_replaced_as_a_whole() -> None:
    model, other = toy(), torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(2))
    stage = model.trunk.stages[2]
    with splice(model, "blocks.2.resid_mid", lambda _: other):
        found = model(IDS).logits
    after = other + stage.down(nn.functional.gelu(stage.up(stage.then(other))))
    expected = 3 * model.scores(model.trunk.last(after))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_modules_are_named_by_their_path() -> None:
    model = toy()
    look = model.trunk.stages[1].look
    seen: dict[str, Any] = {}
    look.register_forward_hook(lambda _, args, out: seen.update(given=args[0], out=out))
    model(IDS)
    path = "module.trunk.stages.1.look"
    names = [
        f"{path}.input",
        f"{path}.output",
        f"{path}.output.1",
        "module.trunk.stages.1.output.1",
    ]
    found = capture(model, names, IDS)
    assert torch.equal(found[names[0]], seen["given"])
    assert torch.equal(found[names[1]], seen["out"][0])
    assert torch.equal(found[names[2]][:, 0], seen["out"][1][:, 0])
    assert torch.equal(found[names[3]], by_hand(model)["blocks.1.resid_post"])
    assert prove(model, names[:2]).identities == 2


def test_what_has_no_axis_of_positions_is_read_by_context() -> None:
    """A mixture's router and shared expert take and give (batch x position, width)."""
    model = tiny_family("qwen2_moe")
    point = "module.model.layers.1.mlp.shared_expert.output"
    seen: list[Tensor] = []
    handle = model.model.layers[1].mlp.shared_expert.register_forward_hook(
        lambda _, args, out: seen.append(out)
    )
    model(IDS)
    handle.remove()
    assert seen[0].ndim == 2
    found = capture(model, [point], IDS)[point]
    assert torch.equal(found, seen[0].reshape(*IDS.shape, -1))
    assert prove(model, [point]).identities == 1
    with pytest.raises(UserError, match=r"gate\.output, found the same: nothing reads what it"):
        prove(model, ["module.model.layers.1.mlp.gate.output"])


def test_what_a_fused_kernel_does_not_run_is_named() -> None:
    model, point = tiny_family("gpt2"), "module.transformer.h.1.attn.attn_dropout.output"
    with pytest.raises(UserError, match=r"attn_dropout.output: the module does not run \(a fused"):
        capture(model, [point], IDS)


def test_what_is_no_activation_of_positions_is_not_stored() -> None:
    with pytest.raises(
        UserError, match=r"expected a tensor \(batch, position, width\), found \(1, 1"
    ):
        prove_with_context(toy(), ["module.trunk.stages.1.look.output.1"], 12)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("module.trunk.stage.1.output", r"trunk has words, stages, last, found 'stage'"),
        ("module.trunk.stages.1.look.output.2", r"gives 2 values \(0\.\.1\), found output\.2"),
        ("module.trunk.stages.1.output", r"expected a tensor, found str\. Name output\.1\."),
        ("blocks.3.mlp_out", r"has 3 blocks \(0\.\.2\)"),
    ],
)
def test_what_is_not_there_is_named(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        capture(toy(), [name], IDS)


def test_a_block_that_does_not_add_up_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of which the model's shapes say nothing: a forward that is patched after it was traced."""
    model = toy()
    prove(model, [])
    own = model.trunk.stages[1].forward
    model.trunk.stages[1].forward = lambda *, stream: ("a stage", 2 * own(stream=stream)[1])
    with pytest.raises(
        UserError, match=r"stages\.1 to be its input and what its parts add, found values"
    ):
        prove(model, [])


class Nothing(nn.Module):
    """An SAE that reconstructs zeros."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class Stages(nn.Module):
    """Blocks under names of their own."""

    def __init__(self, stages: Any) -> None:
        super().__init__()
        for number, stage in enumerate(stages):
            self.add_module(f"stage{number}", stage)

    def __iter__(self) -> Any:
        return iter(self.children())


def without_list() -> Any:
    model = toy()
    model.trunk.stages = Stages(model.trunk.stages)
    return model


def test_a_model_without_a_list_of_blocks_lists_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected a list of blocks .* Its lists of modules: none"):
        capture(without_list(), ["blocks.0.resid_post"], IDS)


def test_modules_of_a_model_without_a_list_of_blocks(tmp_path: Path) -> None:
    model, point = without_list(), "module.trunk.stages.stage1.down.output"
    expected = by_hand(toy())["blocks.1.mlp_out"]
    assert torch.equal(capture(model, [point], IDS)[point], expected)
    assert prove(model, [point]).identities == 1
    assert no_predictions(model) is None
    with hook(model, point, Nothing()):
        found = model(IDS).logits
    without = toy()
    for parameter in without.trunk.stages[1].down.parameters():
        parameter.zero_()
    torch.testing.assert_close(found, without(IDS).logits, rtol=1e-5, atol=1e-5)


def test_a_registered_family_is_fetched_loaded_and_proved(tmp_path: Path) -> None:
    local, out = tmp_path / "local", tmp_path / "out"
    model = toy()
    model.save_pretrained(local)
    out.mkdir()
    fetch_model({"folder": str(local)}, ["blocks.2.mlp_out"], out)
    loaded: Any = load_model(out, "cpu")
    assert prove(loaded).identities == 3 * len(PLACES)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    with pytest.raises(UserError, match=r"has 3 blocks \(0\.\.2\), found hook point blocks\.3"):
        fetch_model({"folder": str(local)}, ["blocks.3.mlp_out"], out)


def test_the_page_has_a_line_for_every_family_of_transformers() -> None:
    assert set(lines_of(PAGE.read_text())) == set(FAMILIES)

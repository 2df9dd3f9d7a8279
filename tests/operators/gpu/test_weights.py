"""Products of a step whose weights' gradients are summed in one walk, against dense products and autograd in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from saeflow.operators.gpu import pairs, sparse, weights
from saeflow.operators.gpu.lists import Lists

B, M, D, C = 7, 24, 20, 16  # D is no power of two
ENDS = torch.tensor([5, 6, 17])
ROOM = [(C, 0), (4, 20)]  # and spare lists
Inputs = dict[str, Tensor]


def inputs(path: str) -> tuple[Inputs, Inputs]:
    """x, rows of W_enc, b_enc, b_dec and W_dec as leaves: float32 on the path's device, float64 on a CPU."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (B, D), "W": (M, D), "b_enc": (M,), "b_dec": (D,), "W_dec": (M, D)}
    exact = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }
    exact["x"][3] = exact["x"][4]  # equal rows
    exact["x"][5] = 0
    single = {name: t.float().to(path).requires_grad_() for name, t in exact.items()}
    return single, {name: t.requires_grad_() for name, t in exact.items()}


def chosen(seed: int, path: str) -> tuple[Tensor, Lists]:
    """A mask of 0 to C entries a row, and the entries; a column of no row. With an odd seed, rows are spread over lists."""
    mask = torch.rand(B, M, generator=torch.Generator().manual_seed(seed)) < 0.4
    mask[1], mask[2, :C], mask[2, C:], mask[:, 9] = False, True, False, False
    mask[:, 9] = False
    capacity, spare = ROOM[seed % 2]
    lists = Lists.from_mask(torch.zeros(B, M, device=path), mask.to(path), capacity, spare)
    assert not lists.status.any()
    return mask, lists


def start(t: Inputs) -> weights.Walk:
    return weights.walk(t["W"].t(), t["b_enc"], t["b_dec"], t["W_dec"])


def compare(single: Inputs, loss: Tensor, exact: Inputs, reference: Tensor) -> None:
    """Values, and gradients of all inputs; a gradient of nothing may be none."""
    torch.testing.assert_close(loss.double().cpu(), reference, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(loss, list(single.values()), allow_unused=True)
    expected = torch.autograd.grad(reference, list(exact.values()), allow_unused=True)
    for name, ours, theirs in zip(single, found, expected, strict=True):
        if theirs is None:
            assert ours is None or not ours.any(), name
            continue
        assert ours is not None, name
        scale = float(theirs.abs().max())
        torch.testing.assert_close(
            ours.double().cpu(),
            theirs,
            rtol=0,
            atol=1e-5 * scale,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def activate(values: Tensor) -> Tensor:
    return values.relu() * (1 + 0.1 * values)


def dense_of(t: Inputs, mask: Tensor, activation: Callable[[Tensor], Tensor] = activate) -> Tensor:
    pre_acts = (t["x"] - t["b_dec"]) @ t["W"].t() + t["b_enc"]
    return activation(pre_acts) * mask


def lists_of(
    t: Inputs, lists: Lists, walk: weights.Walk, activation: Callable[[Tensor], Tensor] = activate
) -> Lists:
    values = weights.gather(t["x"], lists, walk, is_rounded=True)
    return lists.with_values(activation(values).where(lists.real, 0))


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("is_nested", [False, True])
def test_squared_errors_and_all_their_gradients(is_nested: bool, seed: int, path: str) -> None:
    single, exact = inputs(path)
    mask, lists = chosen(seed, path)
    of_rows = torch.arange(1.0, B + 1, dtype=torch.float64)
    boundaries = ENDS.to(path) if is_nested else None
    walk = start(single)
    latents = lists_of(single, lists, walk)
    of_decoder = single["W_dec"], single["b_dec"], single["x"], walk, boundaries
    squares, error = weights.squared_errors(latents, *of_decoder)
    z = dense_of(exact, mask)
    ends = [*ENDS.tolist(), M] if is_nested else [M]
    errors = [z[:, :e] @ exact["W_dec"][:e] + exact["b_dec"] - exact["x"] for e in ends]
    expected = torch.stack([e.square().sum(1) for e in errors]).sum(0)
    torch.testing.assert_close(error.double().cpu(), errors[-1].detach(), rtol=1e-5, atol=1e-5)
    loss = (squares * of_rows.float().to(path)).sum()
    compare(single, loss, exact, (expected * of_rows).sum())
    assert not walk.left.of_encoder
    assert not walk.left.of_decoder


def test_a_second_choice_shares_the_walk(path: str) -> None:
    """As AuxK does, with latents that the first choice left out, and a third that only decodes constants."""
    single, exact = inputs(path)
    walk = start(single)
    (first, one), (second, two) = chosen(1, path), chosen(2, path)
    latents = lists_of(single, one, walk)
    of_decoder = single["W_dec"], single["b_dec"], single["x"].detach(), walk
    squares, error = weights.squared_errors(latents, *of_decoder)
    residual = -error
    e_hat = weights.decode(lists_of(single, two, walk, torch.relu), single["W_dec"], walk)
    ones = two.with_values(two.real.float())
    constant = weights.decode(ones, single["W_dec"], walk)
    loss = squares.sum() + (residual - e_hat).square().sum() + constant.square().sum()
    x, W_dec = exact["x"].detach(), exact["W_dec"]
    error = dense_of(exact, first) @ W_dec + exact["b_dec"] - x
    rebuilt = dense_of(exact, second, torch.relu) @ W_dec
    reference = error.square().sum() + (-error.detach() - rebuilt).square().sum()
    reference = reference + (second.double() @ W_dec).square().sum()
    compare(single, loss, exact, reference)


def test_constant_latents_train_the_decoder_alone(path: str) -> None:
    single, exact = inputs(path)
    mask, lists = chosen(1, path)
    walk = start(single)
    latents = lists_of(single, lists, walk)
    latents = latents.with_values(latents.values.detach())
    of_decoder = single["W_dec"], single["b_dec"], single["x"].detach(), walk
    loss = weights.squared_errors(latents, *of_decoder)[0].sum()
    z, x = dense_of(exact, mask).detach(), exact["x"].detach()
    reference = (z @ exact["W_dec"] + exact["b_dec"] - x).square().sum()
    compare(single, loss, exact, reference)


@pytest.mark.parametrize("is_nested", [False, True])
def test_another_decoder_than_the_steps(is_nested: bool, path: str) -> None:
    """A constant one, as the gate's, and one that is trained by itself."""
    single, exact = inputs(path)
    mask, lists = chosen(1, path)
    for is_constant in (True, False):
        walk = start(single)
        latents = lists_of(single, lists, walk)
        own = single["W_dec"].detach() if is_constant else single["W_dec"] * 2
        boundaries = ENDS.to(path) if is_nested else None
        squares, _ = weights.squared_errors(
            latents, own, single["b_dec"].detach(), single["x"].detach(), walk, boundaries
        )
        z, x, b_dec = dense_of(exact, mask), exact["x"].detach(), exact["b_dec"].detach()
        theirs = exact["W_dec"].detach() if is_constant else exact["W_dec"] * 2
        ends = [*ENDS.tolist(), M] if is_nested else [M]
        reference = sum(
            ((z[:, :e] @ theirs[:e] + b_dec - x).square().sum() for e in ends), torch.zeros(())
        )
        compare(single, squares.sum(), exact, reference)


def test_a_frozen_decoder_and_a_frozen_encoder(path: str) -> None:
    for frozen in (["W_dec"], ["W", "b_enc", "b_dec", "x"]):
        single, exact = inputs(path)
        mask, lists = chosen(1, path)
        for name in frozen:
            single[name].requires_grad_(False)
            exact[name].requires_grad_(False)
        walk = start(single)
        latents = lists_of(single, lists, walk)
        of_decoder = single["W_dec"], single["b_dec"], single["x"], walk
        loss = weights.squared_errors(latents, *of_decoder)[0].sum()
        z = dense_of(exact, mask)
        reference = (z @ exact["W_dec"] + exact["b_dec"] - exact["x"]).square().sum()
        trained = [{n: t for n, t in of.items() if t.requires_grad} for of in (single, exact)]
        compare(trained[0], loss, trained[1], reference)


def test_a_backward_pass_that_stops_short_leaves_nothing_behind(path: str) -> None:
    """Gradients of latents alone, then a whole pass, then another on the same graph."""
    single, _ = inputs(path)
    _, lists = chosen(1, path)
    walk = start(single)
    latents = lists_of(single, lists, walk)
    of_decoder = single["W_dec"], single["b_dec"], single["x"], walk
    loss = weights.squared_errors(latents, *of_decoder)[0].sum()
    torch.autograd.grad(loss, latents.values, retain_graph=True)
    leaves = list(single.values())
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_one_walk_serves_both_weights(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    single, _ = inputs(path)
    _, lists = chosen(1, path)
    walks: list[str] = []
    for name in ("weight_gradients", "column_sums", "decode", "row_products", "decode_error"):
        plain = getattr(sparse, name)

        def counted(
            *arguments: object, of: Callable = plain, n: str = name, **named: object
        ) -> object:
            walks.append(n)
            return of(*arguments, **named)

        monkeypatch.setattr(sparse, name, counted)
    walk = start(single)
    latents = lists_of(single, lists, walk)
    of_decoder = single["W_dec"], single["b_dec"], single["x"].detach(), walk
    loss = weights.squared_errors(latents, *of_decoder)[0].sum()
    called = [name for name in walks if name in ("decode_error", "weight_gradients")]
    loss.backward()
    assert walks.count("weight_gradients") == 1
    assert called == ["decode_error"]


def test_each_block_of_rows_gets_the_gradient_of_its_bias(path: str) -> None:
    single, exact = inputs(path)
    rows, lists = chosen(0, path)
    rows, n_blocks = rows[:6], 3
    lists = Lists.from_mask(torch.zeros(6, M, device=path), rows.to(path), C)
    biases = {}
    for name, t in (("single", single), ("exact", exact)):
        generator = torch.Generator().manual_seed(8)
        bias = torch.randn(n_blocks, D, generator=generator, dtype=torch.float64)
        biases[name] = bias.to(t["x"]).requires_grad_()
    values = torch.rand(6, M, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    latents = lists.with_values(
        values.float().to(path).gather(1, lists.columns.long()).where(lists.real, 0)
    )
    squares, _ = weights.squared_errors(
        latents, single["W_dec"], biases["single"], single["x"][:6], None
    )
    x_hat = values.where(rows, 0) @ exact["W_dec"] + biases["exact"].repeat_interleave(2, 0)
    reference = (x_hat - exact["x"][:6]).square().sum(1)
    scale = torch.arange(1.0, 7.0, dtype=torch.float64)
    ours = {"bias": biases["single"], "W_dec": single["W_dec"], "x": single["x"]}
    theirs = {"bias": biases["exact"], "W_dec": exact["W_dec"], "x": exact["x"]}
    compare(ours, (squares * scale.to(squares)).sum(), theirs, (reference * scale).sum())


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_pair_of_reconstructions_of_which_one_takes_the_decoder_as_a_constant(
    seed: int, kind: torch.dtype, path: str
) -> None:
    """Values of both come from the same pre-activations; the decoder that is multiplied has 8 bits at most."""
    single, exact = inputs(path)
    with torch.no_grad():
        single["W_dec"].copy_(single["W_dec"].bfloat16())
        exact["W_dec"].copy_(single["W_dec"])
    mask, lists = chosen(seed, path)
    walk = start(single)
    values = weights.gather(single["x"], lists, walk, is_rounded=True)
    latents = lists.with_values(activate(values).where(lists.real, 0))
    others, target = values.relu().where(lists.real, 0), single["x"].detach()
    of_two = latents, others, single["W_dec"], single["b_dec"], target, walk
    at = torch.rand(2, B, generator=torch.Generator().manual_seed(2)) + 0.5
    with torch.autocast(path, torch.bfloat16, enabled=kind == torch.bfloat16):
        squares, error, beside = pairs.squared_errors_of_two(*of_two)
    loss = (squares * at[0].to(path)).sum() + (beside * at[1].to(path)).sum()
    goal, mask = exact["x"].detach(), mask.double()
    first = dense_of(exact, mask) @ exact["W_dec"] + exact["b_dec"] - goal
    constant = exact["W_dec"].detach(), exact["b_dec"].detach()
    second = dense_of(exact, mask, torch.relu) @ constant[0] + constant[1] - goal
    torch.testing.assert_close(error.double().cpu(), first.detach(), rtol=1e-5, atol=1e-5)
    reference = (first.square().sum(1) * at[0]).sum() + (second.square().sum(1) * at[1]).sum()
    if kind == torch.float32:
        compare(single, loss, exact, reference)
        return
    torch.testing.assert_close(loss.double().cpu(), reference, rtol=1e-5, atol=1e-5)
    (found,) = torch.autograd.grad(loss, [single["b_enc"]])
    (theirs,) = torch.autograd.grad(reference, [exact["b_enc"]])
    torch.testing.assert_close(found.double().cpu(), theirs, rtol=1e-5, atol=1e-4)

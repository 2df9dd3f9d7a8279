"""Differentiable products of lists with an SAE's weights, whose gradients are summed in one walk over each latent's entries.

The gradients of an encoder's and a decoder's row need the same entries, but autograd reaches the two at different
times. So every product leaves what it knows of them with `Left`, and a token, an input of all of them, makes autograd
sum them up when the last has.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saeflow.operators import gpu
from saeflow.operators.autograd import applied
from saeflow.operators.gpu import dead, sparse
from saeflow.operators.gpu.lists import Lists
from saeflow.operators.gpu.shadows import multiplies_in_bf16, shadow


class OfEncoder(NamedTuple):
    """A part of the encoder's gradient, of some entries."""

    lists: Lists
    centred: Tensor  # (B, d)
    value_grads: Tensor  # (B, C)


class OfDecoder(NamedTuple):
    """A part of the decoder's gradient, of some entries."""

    lists: Lists
    grad: Tensor  # (B, d) at x_hat, or (B, G, d) at what each group of latents adds
    boundaries: Tensor | None = None  # (G - 1,), of the groups
    scales: Tensor | None = None  # (B,), what rows of grad are to be multiplied with


class OfRows(NamedTuple):
    """A part of the gradients of some latents' rows, of any precision."""

    columns: Tensor  # (n,) int64, which latents, none twice
    W_enc: Tensor  # (n, d) by rows
    b_enc: Tensor  # (n,)
    W_dec: Tensor | None  # (n, d)


@dataclass(eq=False)
class Left:
    """Parts of the gradients of one step's weights, which products leave here.

    Attributes:
        W_dec: the decoder that this is about.
        W_enc: (M, d) by rows, without gradient.
        b_enc, b_dec: (M,) and (d,), without gradient.
        of_encoder, of_decoder, of_rows: by the number of the product, so that a second backward pass replaces the first's.
    """

    W_dec: Tensor
    W_enc: Tensor
    b_enc: Tensor
    b_dec: Tensor
    numbers: int = 0
    of_encoder: dict[int, OfEncoder] = field(default_factory=dict)
    of_decoder: dict[int, OfDecoder] = field(default_factory=dict)
    of_rows: dict[int, OfRows] = field(default_factory=dict)

    def number(self) -> int:
        """Number one more product."""
        self.numbers += 1
        return self.numbers

    def sums(
        self, *, has_encoder: bool, has_decoder: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Sum up the gradients of W_enc (M, d), b_enc (M,) and W_dec (M, d), None without a part; nothing is left.

        Args:
            has_encoder, has_decoder: whether their gradients are wanted.
        """
        encoders = list(self.of_encoder.values()) if has_encoder else []
        decoders = list(self.of_decoder.values()) if has_decoder else []
        parts = list(self.of_rows.values())
        for left in (self.of_encoder, self.of_decoder, self.of_rows):
            left.clear()
        W_enc, b_enc, W_dec = None, None, None
        for encoder in encoders:
            columns = encoder.lists.columns
            of_same = (i for i, d in enumerate(decoders) if d.lists.columns is columns)
            place = next(of_same, None)
            if place is None:
                W, b = sparse.column_sums(encoder.centred, encoder.lists, encoder.value_grads)
                W_enc, b_enc = _added(W_enc, W), _added(b_enc, b)
                continue
            decoder, into = decoders.pop(place), None
            if W_enc is not None and b_enc is not None and W_dec is not None:
                into = sparse.Gradients(W_enc, b_enc, W_dec)
            found = sparse.weight_gradients(
                encoder.centred, decoder.grad, decoder.lists, encoder.value_grads,
                into=into, boundaries=decoder.boundaries, scales=decoder.scales,
            )  # fmt: skip
            if into is None:
                W_enc, b_enc = _added(W_enc, found.W_enc), _added(b_enc, found.b_enc)
                W_dec = _added(W_dec, found.W_dec)
        for decoder in decoders:
            values = decoder.lists.values.detach()
            W, _ = sparse.column_sums(
                decoder.grad, decoder.lists, values, decoder.boundaries, decoder.scales
            )
            W_dec = _added(W_dec, W)
        for part in parts:
            if has_encoder:
                W_enc = _with_rows(W_enc, self.W_enc, part.columns, part.W_enc)
                b_enc = _with_rows(b_enc, self.b_enc, part.columns, part.b_enc)
            if has_decoder and part.W_dec is not None:
                W_dec = _with_rows(W_dec, self.W_dec, part.columns, part.W_dec)
        return W_enc, b_enc, W_dec


class Walk(NamedTuple):
    """The link between the products of one step."""

    token: Tensor
    left: Left


def walk(W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, W_dec: Tensor) -> Walk:
    """Start a step with these weights: (d, M), (M,), (d,) and (M, d)."""
    left = Left(W_dec, W_enc.detach().t(), b_enc.detach(), b_dec.detach())
    return Walk(applied(_Token, W_enc, b_enc, b_dec, W_dec, left), left)


def gather(x: Tensor, lists: Lists, of: Walk, *, is_rounded: bool) -> Tensor:
    """Return the pre-activations (B, C) of entries, with gradient; see `products.gather_pre_acts`."""
    return applied(_Gather, x, of.token, of.left, lists, is_rounded)


def decode(lists: Lists, W_dec: Tensor, of: Walk | None) -> Tensor:
    """Return the sum of values times rows of W_dec (B, d), with gradient."""
    token, left, W_dec = _inputs(W_dec, of)
    return applied(_Decode, lists.values, token, W_dec, lists, left)


def squared_errors(
    lists: Lists,
    W_dec: Tensor,
    b_dec: Tensor,
    x: Tensor,
    of: Walk | None,
    boundaries: Tensor | None = None,
    lower: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the squared errors of a reconstruction; one pass finds them and all that their gradients need.

    Args:
        lists: latents.
        W_dec: (M, d).
        b_dec: (d,), or (n, d) where rows are in n blocks of one size, each with its own.
        x: (B, d).
        of: the step whose decoder this is; None: another decoder, such as a constant one.
        boundaries: (G - 1,), where latents are in groups: errors are those of the reconstructions from the
            first group, from the first two, ..., added up.
        lower: a copy of W_dec in lower precision, which is multiplied in its place.

    Returns:
        (B,), differentiable in values, weights and x, and (B, d) x_hat - x of all latents, which is not.
    """
    if lower is None and of is not None and of.left.W_dec is W_dec and multiplies_in_bf16(W_dec):
        lower = shadow(W_dec)
    token, left, W_dec = _inputs(W_dec, of)
    result: tuple[Tensor, Tensor] = _SquaredErrors.apply(  # type: ignore[no-untyped-call]
        lists.values, token, W_dec, b_dec, x, lists, left, boundaries, lower
    )
    return result


def of_columns(vector: Tensor, lists: Lists) -> Tensor:
    """Return the number (B, C) that a vector (M,) has for each entry's column, with gradient."""
    return applied(_OfColumns, vector, lists)


def _inputs(W_dec: Tensor, of: Walk | None) -> tuple[Tensor | None, Left | None, Tensor]:
    """Return a token and who sums up, where the decoder is a step's; the decoder, with gradient where it is not."""
    if of is None or of.left.W_dec is not W_dec:
        return None, None, W_dec
    return of.token, of.left, W_dec.detach()


def _added(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def _with_rows(total: Tensor | None, like: Tensor, columns: Tensor, part: Tensor) -> Tensor:
    """Add a part (n, ...) of a gradient, laid out as a parameter (M, ...), to the rows that columns (n,) name."""
    total = like.new_zeros(like.shape) if total is None else total
    dead.add_rows(total, columns, part)
    return total


class _Token(torch.autograd.Function):
    """A scalar whose gradient is worked out after those of all products that take it."""

    @staticmethod
    def forward(
        ctx: Any, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, W_dec: Tensor, left: Left
    ) -> Tensor:
        ctx.save_for_backward(W_enc, W_dec)  # that they are still what they were is checked
        ctx.left = left
        ctx.set_materialize_grads(False)
        return W_dec.new_empty(())  # of no value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        W_enc, _ = ctx.saved_tensors
        *of_encoder, of_decoder = ctx.needs_input_grad[:4]
        of_W_enc, of_b_enc, of_W_dec = ctx.left.sums(
            has_encoder=any(of_encoder), has_decoder=of_decoder
        )
        of_b_dec = None
        if of_b_enc is not None and ctx.needs_input_grad[2]:
            of_b_dec = gpu.minus_product(W_enc, of_b_enc)
        of_W_enc = None if of_W_enc is None else of_W_enc.t()
        found = (of_W_enc, of_b_enc, of_b_dec, of_W_dec)
        wanted = zip(found, ctx.needs_input_grad, strict=False)
        return (*(g if is_wanted else None for g, is_wanted in wanted), None)


class _OfColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vector: Tensor, lists: Lists) -> Tensor:
        ctx.lists = lists
        return vector.index_select(0, lists.columns.view(-1)).view(lists.columns.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return sparse.column_totals(ctx.lists, grad), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, token: Tensor, left: Left, lists: Lists, is_rounded: bool
    ) -> Tensor:
        ctx.left, ctx.lists, ctx.number = left, lists, left.number()
        ctx.is_centred = is_rounded
        if any(ctx.needs_input_grad):
            lists.transposed  # noqa: B018  # worked out here, so that lists of other values share it
        if is_rounded:
            lower = torch.bfloat16 if multiplies_in_bf16(x) else left.W_enc.dtype
            scores, centred = sparse.rescore(x, left.W_enc, left.b_enc, left.b_dec, lists, lower)
            ctx.save_for_backward(centred)
            return scores
        ctx.save_for_backward(x)
        return lists.values.to(left.W_enc.dtype, copy=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,), left, lists = ctx.saved_tensors, ctx.left, ctx.lists
        grad = grad.contiguous()
        centred = x if ctx.is_centred else (x - left.b_dec).to(left.W_enc.dtype)
        left.of_encoder[ctx.number] = OfEncoder(lists, centred, grad)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = sparse.decode(lists.with_values(grad), left.W_enc)
        return grad_x, None, None, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        token: Tensor | None,
        W_dec: Tensor,
        lists: Lists,
        left: Left | None,
    ) -> Tensor:
        ctx.save_for_backward(W_dec)
        ctx.lists, ctx.left = lists, left
        ctx.number = 0 if left is None else left.number()
        return sparse.decode(lists, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (W_dec,), grad = ctx.saved_tensors, grad.contiguous()
        of_values = None
        if ctx.needs_input_grad[0]:
            of_values = sparse.row_products(grad, W_dec, ctx.lists)
        return of_values, None, leave(ctx, OfDecoder(ctx.lists, grad)), None, None


class _SquaredErrors(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        token: Tensor | None,
        W_dec: Tensor,
        b_dec: Tensor,
        x: Tensor,
        lists: Lists,
        left: Left | None,
        boundaries: Tensor | None,
        lower: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        rows, ctx.n_blocks = W_dec if lower is None else lower, b_dec.ndim == 2 and len(b_dec)
        if boundaries is None:
            found = sparse.decode_error(lists, rows, b_dec, x, rows.dtype)
        else:
            found = sparse.nested_errors(lists, rows, b_dec, x, boundaries, rows.dtype)
        ctx.save_for_backward(found.kept, found.products, found.of_all)
        ctx.lists, ctx.left, ctx.boundaries = lists, left, boundaries
        ctx.number = 0 if left is None else left.number()
        ctx.mark_non_differentiable(found.error)
        ctx.set_materialize_grads(False)
        return found.squares, found.error

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 9
        error, products, of_all = ctx.saved_tensors
        twice, of_values = sparse.twice_scaled(ctx.lists, products, grad)
        of_b_dec, of_x = None, None
        if ctx.needs_input_grad[3]:
            of_b_dec = _weighted_sum(twice, of_all, ctx.n_blocks)
        if ctx.needs_input_grad[4]:
            of_x = -twice[:, None] * of_all
        of_W_dec = leave(ctx, OfDecoder(ctx.lists, error, ctx.boundaries, twice))
        return of_values, None, of_W_dec, of_b_dec, of_x, None, None, None, None


def _weighted_sum(weights: Tensor, rows: Tensor, n_blocks: int) -> Tensor:
    """Return the sum (d,) of weights (B,) times rows (B, d), or of each of some blocks of rows (n, d)."""
    if not n_blocks:
        return torch.mv(rows.t(), weights)
    return torch.bmm(weights.view(n_blocks, 1, -1), rows.view(n_blocks, -1, rows.shape[1]))[:, 0]


def leave(ctx: Any, part: OfDecoder) -> Tensor | None:
    """Leave the decoder's part of a gradient, or return it where nobody sums up."""
    if ctx.left is not None:
        if ctx.needs_input_grad[1]:
            ctx.left.of_decoder[ctx.number] = part
        return None
    if not ctx.needs_input_grad[2]:
        return None
    values = ctx.lists.values.detach()
    return sparse.column_sums(part.grad, part.lists, values, part.boundaries, part.scales)[0]

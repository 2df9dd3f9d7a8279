"""Dense latents of a step on a GPU: activation, the sum that a penalty needs, and gradients, each in one pass.

Latents have the precision of the scores, in which they are multiplied anyway; sums are in float32. Each function has
a plain torch form, by blocks of rows, which is the reference of its Triton kernel.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saeflow.operators import gpu
from saeflow.operators.autograd import applied
from saeflow.operators.rows import blocks

WIDE = 2048  # entries of a row that are looked at together
ROWS, TALL, COLUMNS = 8, 256, 256  # rows together, rows and columns of a program that sums columns


def relu(scores: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Return relu of scores (B, M), and the sum () of its powers p, both with gradient.

    Args:
        scores: float32, or bfloat16.
        p: above 0.
    """
    result: tuple[Tensor, Tensor] = _ReLU.apply(scores, p)  # type: ignore[no-untyped-call]
    return result


def jumprelu(
    scores: Tensor, threshold: Tensor, bandwidth: float, *, of_latents: bool
) -> tuple[Tensor, Tensor]:
    """Return `operators.jumprelu` of scores (B, M), and the sum () of `operators.step`, both with gradient.

    Args:
        scores: float32, or bfloat16.
        threshold: (M,) float32.
        bandwidth: of the kernel of the threshold's gradient.
        of_latents: the step's kernel is that of the latents, not of the scores.
    """
    result: tuple[Tensor, Tensor] = _JumpReLU.apply(  # type: ignore[no-untyped-call]
        scores, threshold, bandwidth, of_latents
    )
    return result


def gated(
    scores: Tensor, b_enc: Tensor, r_mag: Tensor, b_mag: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return latents relu((a - b_enc) exp(r_mag) + b_mag) [a > 0] of scores a (B, M), relu(a), and its sum ().

    Args:
        scores: float32, or bfloat16.
        b_enc, r_mag, b_mag: (M,) float32.

    Returns:
        All with gradient, in all four.
    """
    result: tuple[Tensor, Tensor, Tensor] = _Gated.apply(  # type: ignore[no-untyped-call]
        scores, b_enc, r_mag, b_mag
    )
    return result


def soft(scores: Tensor, k: Tensor, temperature: Tensor, reach: float) -> tuple[Tensor, Tensor]:
    """Return v times the soft top-k mask of v = relu(scores) (B, M), and its sum (), with gradient in scores and k.

    It is there where Triton is; `operators.soft_topk` is its reference.

    Args:
        scores: float32, or bfloat16.
        k: (B,); a row whose k is not in 0..M is NaN, as one with NaN or inf is.
        temperature: () on the device.
        reach: temperatures from the threshold at which the mask counts as 0 or 1.

    Source: LapSum, Struski et al. 2025 (arXiv:2503.06242), section 3.
    """
    result: tuple[Tensor, Tensor] = _Soft.apply(scores, k, temperature, reach)  # type: ignore[no-untyped-call]
    return result


def count(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many latents of each row are not 0 (B,) int64, and which are not in some row (M,) bool."""
    latents = latents.detach()
    if not _runs_triton(latents):
        is_active = latents != 0
        return is_active.sum(1), is_active.any(0)
    n_rows, n = latents.shape
    both = torch.zeros(4 * n_rows + n, dtype=torch.uint8, device=latents.device)
    counts, fired = both[: 4 * n_rows].view(torch.int32), both[4 * n_rows :]
    _launch_tiles("count_dense", latents.contiguous(), counts, fired)
    return counts.long(), fired.view(torch.bool)


def perceptron(
    x: Tensor,
    matrix: Tensor,
    bias: Tensor,
    centre: Tensor,
    weights: Tensor,
    shift: Tensor,
    within: tuple[float, float, float],
    lower: Tensor | None,
) -> Tensor:
    """Return largest sigmoid(relu((x - centre) matrix + bias) . weights + shift) (B,) float32, with gradient in all but x.

    The hidden layer has the precision of `lower`; what is multiplied with `weights`, and summed, is in float32.

    Args:
        x: (B, d).
        matrix: (d, M), laid out by columns.
        bias: (M,).
        centre: (d,).
        weights, shift: (1, M) and (1,).
        within: `largest`, and the least and the most that the result may be.
        lower: a copy of the matrix in the precision of the product; None: the matrix itself.
    """
    return applied(_Perceptron, x, matrix, bias, centre, weights, shift, within, lower)


def centred(x: Tensor, centre: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x - centre, of (B, d) and (d,), in a precision, in one pass."""
    if dtype == x.dtype == centre.dtype or not _runs_triton(x):
        return torch.sub(x, centre, out=torch.empty_like(x, dtype=dtype))
    out = torch.empty_like(x, dtype=dtype)
    _launch("centred_dense", x.contiguous(), centre, out)
    return out


def _runs_triton(rows: Tensor) -> bool:
    return gpu.serves_scores(rows)


def _launch(kernel: str, rows: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run a kernel of one program for each row."""
    n = rows.shape[1]
    wide = min(WIDE, gpu.block_for(n))
    function = getattr(gpu.load("dense"), kernel)
    function[(len(rows),)](rows, *arguments, n, WIDE=wide, num_warps=8, **constants)


def _launch_tiles(kernel: str, rows: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run a kernel of one program for each block of rows and columns."""
    n_rows, n = rows.shape
    sizes = {"ROWS": ROWS, "TALL": TALL, "WIDE": COLUMNS}
    function = getattr(gpu.load("dense"), kernel)
    grid = (-(-n // COLUMNS), -(-n_rows // TALL))
    function[grid](rows, *arguments, n, n_rows, num_warps=8, **sizes, **constants)


def _partial(rows: Tensor) -> Tensor:
    """Make room for two sums of each block of rows and column, (2, blocks, M)."""
    return torch.empty(2, -(-len(rows) // TALL), rows.shape[1], device=rows.device)


class _ReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, p: float) -> tuple[Tensor, Tensor]:
        latents = torch.empty_like(scores)
        sums = torch.empty(len(scores), device=scores.device)
        if _runs_triton(scores):
            _launch("relu_dense", scores, latents, sums, p, IS_ONE=p == 1)
        else:
            for at in blocks(scores):
                latents[at] = scores[at].clamp(min=0)
                sums[at] = _powers(latents[at].float(), p).sum(1)
        ctx.save_for_backward(latents)
        ctx.p = p
        return latents, sums.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, of_sum: Tensor) -> tuple[Tensor, None]:
        (latents,), p, grad = ctx.saved_tensors, ctx.p, grad.contiguous()
        out = torch.empty_like(latents)
        if _runs_triton(latents):
            _launch("relu_gradient_dense", latents, grad, of_sum, out, p, IS_ONE=p == 1)
            return out, None
        for at in blocks(latents):
            z = latents[at].float()
            slope = _powers(z, p - 1).mul_(p)
            out[at] = (grad[at] + of_sum * slope).masked_fill_(~(z > 0), 0)
        return out, None


def _powers(values: Tensor, p: float) -> Tensor:
    """Return v^p of the positive values, 0 at the others."""
    return values.clamp(min=0).pow(p).masked_fill_(~(values > 0), 0)


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, threshold: Tensor, bandwidth: float, of_latents: bool
    ) -> tuple[Tensor, Tensor]:
        latents = torch.empty_like(scores)
        sums = torch.empty(len(scores), device=scores.device)
        if _runs_triton(scores):
            _launch("jump_dense", scores, threshold.contiguous(), latents, sums)
        else:
            for at in blocks(scores):
                latents[at] = scores[at].masked_fill(scores[at].float() <= threshold, 0)
                sums[at] = (scores[at].float() > threshold).sum(1).float()
        ctx.save_for_backward(scores, threshold)
        ctx.bandwidth, ctx.of_latents = bandwidth, of_latents
        return latents, sums.sum()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor, of_sum: Tensor
    ) -> tuple[Tensor, Tensor | None, None, None]:
        (scores, threshold), half, grad = ctx.saved_tensors, ctx.bandwidth / 2, grad.contiguous()
        out, parts = torch.empty_like(scores), _partial(scores)
        if _runs_triton(scores):
            tensors = (threshold.contiguous(), grad, out, *parts)
            _launch_tiles("jump_gradient_dense", scores, *tensors, half, OF_LATENTS=ctx.of_latents)
        else:
            parts.zero_()
            for at in blocks(scores):
                a, g = scores[at].float(), grad[at].float()
                out[at] = g.where(a > threshold, 0).to(out.dtype)
                parts[0, 0] += g.where((a - threshold).abs() < half, 0).sum(0)
                u = a.where(a > threshold, 0) if ctx.of_latents else a
                parts[1, 0] += ((u - threshold).abs() < half).sum(0)
        jumps, steps = parts.sum(1)
        return out, -(threshold * jumps + of_sum * steps) / ctx.bandwidth, None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, b_enc: Tensor, r_mag: Tensor, b_mag: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        latents, gates = torch.empty_like(scores), torch.empty_like(scores)
        sums, rate = torch.empty(len(scores), device=scores.device), r_mag.exp()
        if _runs_triton(scores):
            _launch("gated_dense", scores, b_enc, rate, b_mag, latents, gates, sums)
        else:
            for at in blocks(scores):
                a = scores[at].float()
                magnitude = (a - b_enc) * rate + b_mag
                latents[at] = magnitude.masked_fill((a <= 0) | (magnitude <= 0), 0)
                gates[at] = a.clamp(min=0)
                sums[at] = gates[at].float().sum(1)
        ctx.save_for_backward(scores, b_enc, rate, b_mag)
        return latents, gates, sums.sum()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor, of_gates: Tensor, of_sum: Tensor
    ) -> tuple[Tensor | None, ...]:
        scores, b_enc, rate, b_mag = ctx.saved_tensors
        grad, of_gates = grad.contiguous(), of_gates.contiguous()
        out, parts = torch.empty_like(scores), _partial(scores)
        if _runs_triton(scores):
            tensors = (b_enc, rate, b_mag, grad, of_gates, of_sum, out, *parts)
            _launch_tiles("gated_gradient_dense", scores, *tensors)
        else:
            parts.zero_()
            for at in blocks(scores):
                u = scores[at].float() - b_enc
                is_open = scores[at] > 0
                g = grad[at].float().where(is_open & (u * rate + b_mag > 0), 0)
                out[at] = (g * rate + (of_gates[at] + of_sum).where(is_open, 0)).to(out.dtype)
                parts[0, 0] += g.sum(0)
                parts[1, 0] += (g * u).sum(0)
        magnitudes, products = parts.sum(1)
        return out, -rate * magnitudes, rate * products, magnitudes


class _Perceptron(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        matrix: Tensor,
        bias: Tensor,
        centre: Tensor,
        weights: Tensor,
        shift: Tensor,
        within: tuple[float, float, float],
        lower: Tensor | None,
    ) -> Tensor:
        by = matrix if lower is None else lower
        inputs = centred(x, centre, by.dtype)
        scores = torch.addmm(bias.to(by.dtype), inputs, by)
        dots, out = torch.empty(2, len(x), device=x.device).unbind()
        if _runs_triton(scores):
            _launch("perceptron_dense", scores, weights.contiguous(), shift, dots, out, *within)
        else:
            for at in blocks(scores):
                dots[at] = scores[at].float().clamp(min=0) @ weights[0] + shift
            largest, *bounds = within
            out = (largest * dots.sigmoid()).clamp(*bounds)
        ctx.save_for_backward(inputs, scores, matrix, weights, dots)
        ctx.within = within
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, scores, matrix, weights, dots = ctx.saved_tensors
        of_scores, n, grad = torch.empty_like(scores), scores.shape[1], grad.contiguous()
        parts = torch.empty(-(-len(scores) // TALL), 2 * n + 1, device=scores.device)
        if _runs_triton(scores):
            tensors = (weights.contiguous(), dots, grad, of_scores, parts)
            _launch_tiles("perceptron_gradient_dense", scores, *tensors, *ctx.within)
        else:
            (largest, least, most), share = ctx.within, dots.sigmoid()
            free = largest * share
            of_dots = grad * (free * (1 - share)).where((free >= least) & (free <= most), 0)
            parts.zero_()
            parts[0, -1] = of_dots.sum()
            for at in blocks(scores):
                a, of_rows = scores[at].float(), of_dots[at][:, None]
                part = (of_rows * weights).where(a > 0, 0)
                of_scores[at] = part.to(of_scores.dtype)
                parts[0, :n] += (a.clamp(min=0) * of_rows).sum(0)
                parts[0, n:-1] += part.sum(0)
        of_weights, of_bias, of_shift = parts.sum(0).split((n, n, 1))
        of_matrix = (of_scores.t() @ inputs).to(matrix.dtype).t()
        of_centre = gpu.minus_product(matrix, of_bias)
        return None, of_matrix, of_bias, of_centre, of_weights[None], of_shift, None, None


class _Soft(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, k: Tensor, temperature: Tensor, reach: float
    ) -> tuple[Tensor, Tensor]:
        latents = torch.empty_like(scores)
        guess, shift, near, sums = torch.empty(4, len(scores), device=scores.device)
        problems = torch.empty(len(scores), dtype=torch.int32, device=scores.device)
        of_rows = k.detach().contiguous(), temperature.float()
        tensors = (*of_rows, reach, latents, guess, shift, near, problems, sums)
        gpu.launch_rows("soft_rows", scores, *tensors, OF_RELU=True)
        ctx.save_for_backward(scores, guess, shift, near, of_rows[1])
        ctx.reach, ctx.k_dtype = reach, k.dtype
        return latents, sums.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, of_sum: Tensor) -> tuple[Tensor, Tensor, None, None]:
        scores, *of_rows = ctx.saved_tensors
        out, of_k = torch.empty_like(scores), torch.empty_like(of_rows[0])
        tensors = grad.contiguous(), *of_rows, ctx.reach, out, of_k, of_sum
        gpu.launch_rows("soft_gradient_rows", scores, *tensors, OF_RELU=True)
        return out, of_k.to(ctx.k_dtype), None, None

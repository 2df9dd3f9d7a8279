"""Row operators on lists: sparsemax, entmax and latents of the soft top-k, of the entries that can count.

They take the values (B, C) and counts (B,) of `Lists`, and give what the operator of the same name gives
of the whole rows, if the entries left out would have got 0. Nothing is raised: what a row must hold is the
caller's to see to.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saeflow.operators import gpu
from saeflow.operators.autograd import applied
from saeflow.operators.gpu.lists import Lists
from saeflow.operators.gpu.sparse import column_totals

FAR = 30.0
"""Temperatures from the threshold at which a soft mask counts as 0 or 1: it is 5e-14 there."""
BISECTIONS = 80  # of an entmax threshold in [-1, 0], beyond what float64 resolves


def sparsemax(values: Tensor, counts: Tensor, sizes: Tensor | None = None) -> Tensor:
    """(B, C) probabilities max(values - tau, 0) that sum to 1 over the real entries of each row, times its size.

    Args:
        values: (B, C) float32 scores.
        counts: (B,) entries that are real; a row of none gives zeros.
        sizes: (B,) float32, at least 0; None: 1. Where a size is 0, it has no gradient.

    Returns:
        (B, C), 0 where not real, differentiable in the values and sizes.

    Source: Martins & Astudillo 2016 (arXiv:1602.02068), eq. 2.
    """
    return applied(_Sparsemax, values, counts, sizes)


def entmax(values: Tensor, counts: Tensor, alpha: Tensor | float) -> Tensor:
    """(B, C) probabilities max((alpha - 1) values - tau, 0)^(1 / (alpha - 1)), as `sparsemax`.

    Args:
        values, counts: as for `sparsemax`.
        alpha: () or (B,), above 1; a number where it is known when kernels are launched.

    Returns:
        (B, C), 0 where not real, differentiable in the values and in alpha.

    Source: Peters et al. 2019 (arXiv:1905.05702), Correia et al. 2019 (arXiv:1909.00015), prop. 1.
    """
    if not isinstance(alpha, Tensor) and alpha == 2:
        return sparsemax(values, counts)
    power = None if isinstance(alpha, Tensor) else 1 / (alpha - 1)
    alpha = gpu.on_device(alpha, torch.float32, values)
    return applied(_Simplex, values, counts, alpha, power)


def soft(
    values: Tensor,
    counts: Tensor,
    k: Tensor,
    temperature: Tensor | float,
    reach: float = FAR,
) -> Tensor:
    """Return v times the soft top-k mask (B, C) of v = relu(values): F((v - b) / temperature), whose sum is k.

    Args:
        values, counts: as for `sparsemax`.
        k: (B,) real, 0 up to the number of real entries; above it every mask is 1.
        temperature: above 0, a number or () on the device.
        reach: temperatures from the threshold at which a mask counts as 0 or 1.

    Returns:
        (B, C), 0 where not real, differentiable in the values and k.

    Source: LapSum, Struski et al. 2025 (arXiv:2503.06242), section 3.
    """
    temperature = gpu.on_device(temperature, torch.float32, values)
    return applied(_Soft, values, counts, k, temperature, reach)


def jumprelu(lists: Lists, log_threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
    """Return `operators.jumprelu` of the values (R, C), and the sum () of `operators.step`, both with gradient.

    Args:
        lists: pre-activations, of which those within half a bandwidth of their threshold, or above, are there.
        log_threshold: (d_sae,) float32.
        bandwidth: of the kernel of the threshold's gradient.
    """
    result: tuple[Tensor, Tensor] = _Jump.apply(lists.values, log_threshold, lists, bandwidth)  # type: ignore[no-untyped-call]
    return result


def gated(
    lists: Lists, b_enc: Tensor, r_mag: Tensor, b_mag: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return relu((a - b_enc) exp(r_mag) + b_mag) [a > 0] and the gate relu(a) of the values a (R, C), and the gate's sum ().

    Args:
        lists: pre-activations.
        b_enc, r_mag, b_mag: (d_sae,) float32.

    Returns:
        (R, C) twice, 0 where not real, and (); with gradient in all four.
    """
    result: tuple[Tensor, Tensor, Tensor] = _Gated.apply(lists.values, b_enc, r_mag, b_mag, lists)  # type: ignore[no-untyped-call]
    return result


def _real(values: Tensor, counts: Tensor) -> Tensor:
    return torch.arange(values.shape[1], device=values.device) < counts[:, None]


def _entmax_of_lists(values: Tensor, counts: Tensor, alpha: Tensor) -> Tensor:
    """The plain form: bisection in float64."""
    real = _real(values, counts)
    scale = (alpha.double() - 1).expand(len(values))[:, None]
    entries = values.double().masked_fill(~real, -torch.inf)
    top = entries.amax(1, keepdim=True).nan_to_num(neginf=0)
    entries = (entries - top) * scale
    low = torch.full_like(top, -1.0)
    high = torch.zeros_like(top)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        is_low = (entries - middle).clamp(min=0).pow(1 / scale).sum(1, keepdim=True) >= 1
        low, high = torch.where(is_low, middle, low), torch.where(is_low, high, middle)
    return (entries - low).clamp(min=0).pow(1 / scale).float()


def _solve(
    values: Tensor, counts: Tensor, scale: Tensor, power: float | None, sizes: Tensor | None
) -> Tensor:
    """Solve entmax of each list by a kernel, see `simplex_lists`."""
    p, values = torch.empty_like(values), values.detach().contiguous()
    of_rows = counts, scale, values if sizes is None else sizes.contiguous(), p
    kind = {"LINEAR": power == 1, "SQUARES": power == 2, "HAS_SIZES": sizes is not None}
    _launch_rows("simplex_lists", values, *of_rows, **kind)
    return p


class _Sparsemax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, counts: Tensor, sizes: Tensor | None) -> Tensor:
        if gpu.runs_triton(values) and values.numel():
            result = _solve(values, counts, values, 1.0, sizes)
        else:
            result = _entmax_of_lists(values.detach(), counts, values.new_full((), 2.0))
            result = result if sizes is None else result * sizes[:, None]
        ctx.save_for_backward(result, sizes)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        result, sizes = ctx.saved_tensors
        if gpu.runs_triton(result) and result.numel():
            out, of_sizes = torch.empty_like(result), result.new_empty(len(result))
            given = result if sizes is None else sizes.contiguous()
            of_rows = result, given, grad.contiguous(), out, of_sizes
            _launch_rows("sparsemax_gradient_lists", *of_rows, HAS_SIZES=sizes is not None)
            return out, None, None if sizes is None else of_sizes
        on = (result > 0).float()
        mean = (on * grad).sum(1, keepdim=True) / on.sum(1, keepdim=True).clamp(min=1)
        out = on * (grad - mean)
        if sizes is None:
            return out, None, None
        of_sizes = (grad * result).sum(1) / sizes.where(sizes > 0, 1)
        return out * sizes[:, None], None, of_sizes


class _Simplex(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, counts: Tensor, alpha: Tensor, power: float | None
    ) -> Tensor:
        if gpu.runs_triton(values) and values.numel():
            scale = (alpha - 1).double().expand(len(values)).contiguous()
            p = _solve(values, counts, scale, power, None)
        else:
            p = _entmax_of_lists(values.detach(), counts, alpha.detach())
        ctx.save_for_backward(p, alpha)
        return p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        p, alpha = ctx.saved_tensors
        p, grad = p.double(), grad.double()
        scale = (alpha.double() - 1).expand(len(p))[:, None]
        q = torch.where(p > 0, p.clamp(min=1e-300) ** (1 - scale), 0)
        r = q / q.sum(1, keepdim=True).clamp(min=1e-300)
        grad_values = q * (grad - (r * grad).sum(1, keepdim=True))
        grad_alpha = None
        if ctx.needs_input_grad[2]:
            h = -torch.special.xlogy(p, p)
            by_alpha = (p - r) / scale**2 + (h - r * h.sum(1, keepdim=True)) / scale
            grad_alpha = (grad * by_alpha).sum(1).sum_to_size(alpha.shape).to(alpha.dtype)
        return grad_values.float(), None, grad_alpha, None


def _distance_in_lists(values: Tensor, counts: Tensor, k: Tensor, temperature: Tensor) -> Tensor:
    """(B, C) (values - b) / temperature; the plain form, from sorted sums of exponentials.

    With j entries above b, the sum of the mask is j - A e^b / 2 + D e^-b / 2, where A sums e^-x over
    those above and D sums e^x over the others: a quadratic in e^b.
    """
    real = _real(values, counts)
    top = values.double().masked_fill(~real, -torch.inf).amax(1, keepdim=True).nan_to_num(neginf=0)
    x = ((values.double() - top) / temperature.double()).masked_fill(~real, -torch.inf)
    ordered = x.sort(dim=1, descending=True).values
    is_entry = ordered > -torch.inf
    above = torch.where(is_entry, -ordered, -torch.inf).logcumsumexp(1)
    from_here = ordered.flip(1).logcumsumexp(1).flip(1)  # of this entry and those below
    nothing = torch.full_like(top, -torch.inf)
    log_above = torch.cat((nothing, above), 1)  # by how many entries are above b
    log_below = torch.cat((from_here, nothing), 1)
    number = torch.arange(1, values.shape[1] + 1, device=values.device)
    at_entry = torch.where(is_entry, ordered, 0)
    reached = number - (above + at_entry).exp() / 2 + (log_below[:, 1:] - at_entry).exp() / 2
    k = k.double().view(-1, 1)
    j = (is_entry & (reached < k)).sum(1, keepdim=True)
    log_a, log_d = log_above.gather(1, j), log_below.gather(1, j)
    extra = j - k
    root = (extra.square() + (log_a + log_d).exp()).sqrt()
    b = torch.where(
        extra > 0,
        (root + extra).log() - log_a,
        torch.where(extra < 0, log_d - (root - extra).log(), (log_d - log_a) / 2),
    )
    least = x.masked_fill(~real, torch.inf).amin(1, keepdim=True).nan_to_num(posinf=0)
    b = b.maximum(least - 1000).minimum(torch.full_like(b, 1000.0))
    return torch.where(real, x - b, -torch.inf).float()


class _Soft(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, counts: Tensor, k: Tensor, temperature: Tensor, reach: float
    ) -> Tensor:
        ctx.is_triton = gpu.runs_triton(values) and values.numel() > 0
        ctx.reach, ctx.k_dtype = reach, k.dtype
        if ctx.is_triton:
            values, latents = values.detach().contiguous(), torch.empty_like(values)
            b = torch.empty(len(values), dtype=torch.float64, device=values.device)
            _launch_rows("soft_lists", values, counts, k.detach(), temperature, reach, latents, b)
            ctx.save_for_backward(values, counts, b, temperature)
            return latents
        v = values.detach().relu()
        distance = _distance_in_lists(v, counts, k.detach(), temperature)
        ctx.save_for_backward(v, distance, temperature)
        return v * _mask(distance, reach)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.is_triton:
            values, *of_rows = ctx.saved_tensors
            out, of_k = torch.empty_like(values), values.new_empty(len(values))
            of_lists = *of_rows, ctx.reach, grad.contiguous(), out, of_k
            _launch_rows("soft_gradient_lists", values, *of_lists)
            return out, None, of_k.to(ctx.k_dtype), None, None
        v, distance, temperature = ctx.saved_tensors
        # f / sum f, also where every f is below float range; a row of nothing has no share
        share = (-distance.abs()).softmax(1).nan_to_num(0.0)
        at_mask = grad * v
        mean = (share * at_mask).sum(1)
        mask, tail = _mask(distance, ctx.reach)
        out = tail / temperature * (at_mask - mean[:, None]) + grad * mask
        return out.where(v > 0, 0), None, mean.to(ctx.k_dtype), None, None


def _mask(distance: Tensor, reach: float) -> tuple[Tensor, Tensor]:
    """F of distances in temperatures, and F(-|t|), exactly 0 from far away on."""
    minus = -distance.abs()
    tail = torch.where(minus > -reach, minus.clamp(min=-reach).exp() / 2, 0.0)
    return torch.where(distance > 0, 1 - tail, tail), tail


def _launch_rows(kernel: str, values: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run a kernel of one program for each row of values (B, C)."""
    capacity, function = values.shape[1], getattr(gpu.load("lists"), kernel)
    sizes = {"CAPACITY": capacity, "num_warps": gpu.warps_for(capacity)}
    function[(len(values),)](values, *arguments, **sizes, **constants)


def _launch(kernel: str, lists: Lists, *arguments: Any, **constants: Any) -> None:
    """Run a kernel of one program for each list, with its entries' columns and their number."""
    values = lists.values.detach().contiguous()
    _launch_rows(kernel, values, lists.columns, lists.counts, *arguments, **constants)


def _launch_columns(kernel: str, lists: Lists, grad: Tensor, *arguments: Any) -> None:
    """Run a kernel of one program for each column, with the places of its entries."""
    function, values = getattr(gpu.load("lists"), kernel), lists.values.detach().contiguous()
    of_all = values, grad, *lists.transposed
    function[(lists.d_sae,)](*of_all, *arguments, BLOCK=64, num_warps=1)


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, log_threshold: Tensor, lists: Lists, bandwidth: float
    ) -> tuple[Tensor, Tensor]:
        ctx.lists, ctx.bandwidth = lists, bandwidth
        ctx.save_for_backward(log_threshold)
        if gpu.serves(values, log_threshold) and values.numel():
            latents, numbers = torch.empty_like(values), values.new_empty(len(values))
            _launch("jump_lists", lists, log_threshold.contiguous(), latents, numbers)
            return latents, numbers.sum()
        is_over = lists.real & (values > log_threshold.exp()[lists.columns.long()])
        return values.where(is_over, 0), is_over.sum().to(values.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, of_number: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (log_threshold,), lists, grad = ctx.saved_tensors, ctx.lists, grad.contiguous()
        values = lists.values.detach()
        if gpu.serves(values, log_threshold) and values.numel():
            out, of_threshold = torch.empty_like(grad), torch.empty_like(log_threshold)
            _launch("jump_gradient_lists", lists, log_threshold.contiguous(), grad, out)
            of_columns = log_threshold.contiguous(), of_number, of_threshold, ctx.bandwidth
            _launch_columns("jump_gradient_columns", lists, grad, *of_columns)
            return out, of_threshold, None, None
        threshold = log_threshold.exp()
        of_entries = threshold[lists.columns.long()]
        is_near = (values - of_entries).abs() < ctx.bandwidth / 2
        jumps = column_totals(lists, grad.where(is_near, 0))
        total = threshold * jumps + of_number * column_totals(lists, is_near.to(grad.dtype))
        out = grad.where(lists.real & (values > of_entries), 0)
        return out, -total / ctx.bandwidth * threshold, None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, b_enc: Tensor, r_mag: Tensor, b_mag: Tensor, lists: Lists
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.lists = lists
        ctx.save_for_backward(b_enc, r_mag, b_mag)
        if gpu.serves(values, b_enc) and values.numel():
            latents, gate = torch.empty_like(values), torch.empty_like(values)
            totals = values.new_empty(len(values))
            _launch("gated_lists", lists, b_enc, r_mag, b_mag, latents, gate, totals)
            return latents, gate, totals.sum()
        u, rate, shift = _of_entries(lists, b_enc, r_mag, b_mag)
        magnitude, gate = u * rate + shift, values.where(lists.real & (values > 0), 0)
        return magnitude.where((gate > 0) & (magnitude > 0), 0), gate, gate.sum()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor, of_gate: Tensor, of_total: Tensor
    ) -> tuple[Tensor | None, ...]:
        (b_enc, r_mag, b_mag), lists = ctx.saved_tensors, ctx.lists
        values, grad = lists.values.detach(), grad.contiguous()
        if gpu.serves(values, b_enc) and values.numel():
            out, of_three = torch.empty_like(grad), b_enc.new_empty(3, lists.d_sae)
            grads = grad, of_gate.contiguous(), of_total
            _launch("gated_gradient_lists", lists, b_enc, r_mag, b_mag, *grads, out)
            of_columns = b_enc, r_mag, b_mag, *of_three
            _launch_columns("gated_gradient_columns", lists, grad, *of_columns)
            return out, *of_three, None
        u, rate, shift = _of_entries(lists, b_enc, r_mag, b_mag)
        is_on = lists.real & (values > 0)
        grad = grad.where(is_on & (u * rate + shift > 0), 0)
        magnitudes, products = column_totals(lists, grad), column_totals(lists, grad * u)
        out = grad * rate + (of_gate + of_total).where(is_on, 0)
        return out, -r_mag.exp() * magnitudes, r_mag.exp() * products, magnitudes, None


def _of_entries(
    lists: Lists, b_enc: Tensor, r_mag: Tensor, b_mag: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return value - b_enc, exp(r_mag) and b_mag of each entry, (R, C) each."""
    columns = lists.columns.long()
    return lists.values.detach() - b_enc[columns], r_mag.exp()[columns], b_mag[columns]

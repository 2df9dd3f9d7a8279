"""Kernels of an update of all weights: a program has a row of one parameter, or a block of its numbers."""

import triton
import triton.language as tl


@triton.jit
def update_row(
    weights, gradient, exp_avg, exp_avg_sq, shadow, numbers, row, rise1, beta2, rise2, eps, width, count,
    HAS_SHADOW: tl.constexpr, IS_UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A step of Adam; numbers: what scales the gradient, the rate, and 1 / sqrt(1 - beta2^t)."""
    at = tl.arange(0, BLOCK)
    where = row.to(tl.int64) * width + at
    inside = (at < width) & (where < count)
    clip, rate, correction = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    g = tl.load(gradient + where, mask=inside, other=0.0) * clip
    first = tl.load(exp_avg + where, mask=inside, other=0.0)
    second = tl.load(exp_avg_sq + where, mask=inside, other=0.0)
    first += rise1 * (g - first)
    second = beta2 * second + rise2 * g * g
    new = tl.load(weights + where, mask=inside, other=0.0)
    new -= rate * first / (tl.sqrt(second) * correction + eps)
    if IS_UNIT:
        new = new / tl.sqrt(tl.sum(tl.where(inside, new * new, 0.0), 0))
    tl.store(weights + where, new, mask=inside)
    tl.store(exp_avg + where, first, mask=inside)
    tl.store(exp_avg_sq + where, second, mask=inside)
    if HAS_SHADOW:
        tl.store(shadow + where, new.to(shadow.dtype.element_ty), mask=inside)


@triton.jit
def update_parts(
    weights, gradients, exp_avgs, exp_avg_sqs, shadows, numbers, skip, rise1, beta2, rise2, eps, widths, counts,
    PARTS: tl.constexpr, HAVE_SHADOW: tl.constexpr, ARE_UNIT: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """`update_row` of every row of PARTS parameters, one parameter after the other.

    rise1, rise2: 1 - beta, which a float32 would take from its beta with an error of 5e-5.
    """
    if tl.load(skip) == 0:
        row = tl.program_id(0)
        for part in tl.static_range(PARTS):
            rows = tl.cdiv(counts[part], widths[part])
            if (row >= 0) & (row < rows):
                update_row(
                    weights[part], gradients[part], exp_avgs[part], exp_avg_sqs[part], shadows[part], numbers[part],
                    row, rise1, beta2, rise2, eps, widths[part], counts[part],
                    HAVE_SHADOW[part], ARE_UNIT[part], BLOCKS[part],
                )  # fmt: skip
            row -= rows


@triton.jit
def measure_row(
    gradient, unit_rows, out, row, width, count, IS_UNIT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out = the sum of squares of a row, without its part along a unit row, which is removed."""
    at = tl.arange(0, BLOCK)
    where = row.to(tl.int64) * width + at
    inside = (at < width) & (where < count)
    found = tl.load(gradient + where, mask=inside, other=0.0)
    if IS_UNIT:
        direction = tl.load(unit_rows + where, mask=inside, other=0.0)
        found -= direction * tl.sum(found * direction, 0)
        tl.store(gradient + where, found, mask=inside)
    tl.store(out, tl.sum(found * found, 0))


@triton.jit
def measure_parts(
    gradients, unit_rows, squares, widths, counts,
    PARTS: tl.constexpr, ARE_UNIT: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """squares: `measure_row` of every row of PARTS gradients, one gradient after the other."""
    row = tl.program_id(0)
    out = squares + row
    for part in tl.static_range(PARTS):
        rows = tl.cdiv(counts[part], widths[part])
        if (row >= 0) & (row < rows):
            measure_row(
                gradients[part], unit_rows[part], out, row, widths[part], counts[part], ARE_UNIT[part], BLOCKS[part]
            )  # fmt: skip
        row -= rows


@triton.jit
def numbers_of_parts(
    steps, norm, lr, skip, numbers, moving, LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr,
    LARGEST_NORM: tl.constexpr,
):  # fmt: skip
    """Count a step of those parts whose bit of `moving` is set; write what `update_row` reads of each."""
    part = tl.program_id(0)
    is_moving = (moving >> part) & 1
    taken = tl.load(steps + part) + tl.where(tl.load(skip) == 0, is_moving, 0)
    tl.store(steps + part, taken)
    t = tl.maximum(taken, 1.0).to(tl.float64)
    fall1 = tl.exp(t * tl.full((), LOG_BETA1, tl.float64))
    fall2 = tl.exp(t * tl.full((), LOG_BETA2, tl.float64))
    clip = tl.full((), LARGEST_NORM, tl.float64) / (tl.load(norm).to(tl.float64) + 1e-6)
    own = numbers + part * 4
    tl.store(own, tl.where(clip > 1.0, 1.0, clip).to(tl.float32))
    tl.store(own + 1, (tl.load(lr).to(tl.float64) / (1.0 - fall1)).to(tl.float32))
    tl.store(own + 2, (1.0 / tl.sqrt(1.0 - fall2)).to(tl.float32))

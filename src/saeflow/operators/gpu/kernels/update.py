"""Kernels of an update of weights, a row or a block of numbers a program."""

import triton
import triton.language as tl


@triton.jit
def update_rows(
    weights, gradient, exp_avg, exp_avg_sq, shadow, numbers, skip, rise1, beta2, rise2, eps, width, count,
    HAS_SHADOW: tl.constexpr, IS_UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A step of Adam; numbers: what scales the gradient, the rate, and 1 / sqrt(1 - beta2^t).

    rise1, rise2: 1 - beta, which a float32 would take from its beta with an error of 5e-5.
    """
    if tl.load(skip) == 0:
        at = tl.arange(0, BLOCK)
        where = tl.program_id(0).to(tl.int64) * width + at
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
def measure_rows(
    gradient, unit_rows, squares, width, count, IS_UNIT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Sum the squares of each row of `count` numbers, without its part along a unit row, which is removed."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        where = row * width + start + at
        inside = (start + at < width) & (where < count)
        found = tl.load(gradient + where, mask=inside, other=0.0)
        if IS_UNIT:
            direction = tl.load(unit_rows + where, mask=inside, other=0.0)
            found -= direction * tl.sum(found * direction, 0)
            tl.store(gradient + where, found, mask=inside)
        total += found * found
    tl.store(squares + row, tl.sum(total, 0))


@triton.jit
def numbers_of_parts(
    steps, norm, lr, skip, numbers, moving, LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr,
    LARGEST_NORM: tl.constexpr,
):  # fmt: skip
    """Count a step of those parts whose bit of `moving` is set; write what `update_rows` reads of each."""
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

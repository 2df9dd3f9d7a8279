"""Kernels of dense steps: each reads and writes the scores' matrix once. NaN stays NaN, so that the loss shows it."""

import triton
import triton.language as tl


@triton.jit
def power_of(values, p, IS_ONE: tl.constexpr):
    """values^p of positive values, else 0."""
    if IS_ONE:
        return tl.where(values > 0, values, 0.0)
    positive = tl.where(values > 0, values, 1.0)
    return tl.where(values > 0, tl.exp(p * tl.log(positive)), 0.0)


@triton.jit
def centred_dense(x, centre, out, n, WIDE: tl.constexpr):
    """out = x - centre."""
    row = tl.program_id(0).to(tl.int64)
    for start in range(0, n, WIDE):
        at = start + tl.arange(0, WIDE)
        inside = at < n
        of_row = tl.load(x + row * n + at, mask=inside, other=0.0).to(tl.float32)
        off = of_row - tl.load(centre + at, mask=inside, other=0.0)
        tl.store(out + row * n + at, off, mask=inside)


@triton.jit
def relu_dense(scores, latents, sums, p, n, IS_ONE: tl.constexpr, WIDE: tl.constexpr):
    """latents = relu(scores); sums[b]: of latents^p."""
    row = tl.program_id(0).to(tl.int64)
    wide = tl.arange(0, WIDE)
    total = tl.zeros((WIDE,), tl.float32)
    for start in range(0, n, WIDE):
        at = row * n + start + wide
        inside = start + wide < n
        a = tl.load(scores + at, mask=inside, other=0.0).to(tl.float32)
        z = tl.where(a <= 0, 0.0, a)
        tl.store(latents + at, z, mask=inside)
        total += power_of(z, p, IS_ONE)
    tl.store(sums + row, tl.sum(total, 0))


@triton.jit
def relu_gradient_dense(latents, grad, of_sum, out, p, n, IS_ONE: tl.constexpr, WIDE: tl.constexpr):
    """out = (grad + of_sum p latents^(p - 1)) [latents > 0]."""
    row = tl.program_id(0).to(tl.int64)
    wide = tl.arange(0, WIDE)
    weight = tl.load(of_sum)
    for start in range(0, n, WIDE):
        at = row * n + start + wide
        inside = start + wide < n
        z = tl.load(latents + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        if IS_ONE:
            g += weight
        else:
            g += weight * p * power_of(z, p - 1, False)
        tl.store(out + at, tl.where(z > 0, g, 0.0), mask=inside)


@triton.jit
def jump_dense(scores, thresholds, latents, sums, n, WIDE: tl.constexpr):
    """latents = scores [scores > threshold]; sums[b]: how many."""
    row = tl.program_id(0).to(tl.int64)
    wide = tl.arange(0, WIDE)
    total = tl.zeros((WIDE,), tl.float32)
    for start in range(0, n, WIDE):
        at = row * n + start + wide
        inside = start + wide < n
        a = tl.load(scores + at, mask=inside, other=0.0).to(tl.float32)
        theta = tl.load(thresholds + start + wide, mask=inside, other=float("inf"))
        is_over = a > theta
        tl.store(latents + at, tl.where(a <= theta, 0.0, a), mask=inside)
        total += is_over.to(tl.float32)
    tl.store(sums + row, tl.sum(total, 0))


@triton.jit(do_not_specialize=["n_rows"])
def jump_gradient_dense(
    scores, thresholds, grad, out, of_jump, of_step, half, n, n_rows,
    OF_LATENTS: tl.constexpr, ROWS: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out = grad [scores > threshold]; for each block of rows and column, the sum of grad, and the number, near it.

    OF_LATENTS: the number is of latents that are near it, not of scores.
    """
    column = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    block = tl.program_id(1).to(tl.int64)
    inside = column < n
    theta = tl.load(thresholds + column, mask=inside, other=float("inf"))[None, :]
    jumps = tl.zeros((ROWS, WIDE), tl.float32)
    steps = tl.zeros((ROWS, WIDE), tl.float32)
    for start in range(0, TALL, ROWS):
        row = block * TALL + start + tl.arange(0, ROWS)
        at = row[:, None] * n + column[None, :]
        mask = (row < n_rows)[:, None] & inside[None, :]
        a = tl.load(scores + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + at, tl.where(a > theta, g, 0.0), mask=mask)
        jumps += tl.where((tl.abs(a - theta) < half) & mask, g, 0.0)
        u = a
        if OF_LATENTS:
            u = tl.where(a > theta, a, 0.0)
        steps += ((tl.abs(u - theta) < half) & mask).to(tl.float32)
    tl.store(of_jump + block * n + column, tl.sum(jumps, 0), mask=inside)
    tl.store(of_step + block * n + column, tl.sum(steps, 0), mask=inside)


@triton.jit
def gated_dense(scores, biases, rates, shifts, latents, gates, sums, n, WIDE: tl.constexpr):
    """gates = relu(scores); latents = relu((scores - bias) rate + shift) [scores > 0]; sums[b]: of gates."""
    row = tl.program_id(0).to(tl.int64)
    wide = tl.arange(0, WIDE)
    total = tl.zeros((WIDE,), tl.float32)
    for start in range(0, n, WIDE):
        at = row * n + start + wide
        inside = start + wide < n
        a = tl.load(scores + at, mask=inside, other=0.0).to(tl.float32)
        bias = tl.load(biases + start + wide, mask=inside, other=0.0)
        rate = tl.load(rates + start + wide, mask=inside, other=0.0)
        shift = tl.load(shifts + start + wide, mask=inside, other=0.0)
        magnitude = (a - bias) * rate + shift
        gate = tl.where(a <= 0, 0.0, a)
        tl.store(gates + at, gate, mask=inside)
        tl.store(latents + at, tl.where((a <= 0) | (magnitude <= 0), 0.0, magnitude), mask=inside)
        total += gate
    tl.store(sums + row, tl.sum(total, 0))


@triton.jit(do_not_specialize=["n_rows"])
def gated_gradient_dense(
    scores, biases, rates, shifts, grad, of_gates, of_sum, out, of_magnitude, of_product, n, n_rows,
    ROWS: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out, and for each block of rows and column the sums of grad, and of grad (score - bias), of active latents."""
    column = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    block = tl.program_id(1).to(tl.int64)
    inside = column < n
    bias = tl.load(biases + column, mask=inside, other=0.0)[None, :]
    rate = tl.load(rates + column, mask=inside, other=0.0)[None, :]
    shift = tl.load(shifts + column, mask=inside, other=0.0)[None, :]
    weight = tl.load(of_sum)
    magnitudes = tl.zeros((ROWS, WIDE), tl.float32)
    products = tl.zeros((ROWS, WIDE), tl.float32)
    for start in range(0, TALL, ROWS):
        row = block * TALL + start + tl.arange(0, ROWS)
        at = row[:, None] * n + column[None, :]
        mask = (row < n_rows)[:, None] & inside[None, :]
        a = tl.load(scores + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(of_gates + at, mask=mask, other=0.0).to(tl.float32)
        u = a - bias
        g = tl.where((a > 0) & (u * rate + shift > 0), g, 0.0)
        tl.store(out + at, g * rate + tl.where(a > 0, gate + weight, 0.0), mask=mask)
        magnitudes += g
        products += g * u
    tl.store(of_magnitude + block * n + column, tl.sum(magnitudes, 0), mask=inside)
    tl.store(of_product + block * n + column, tl.sum(products, 0), mask=inside)


@triton.jit(do_not_specialize=["n_rows"])
def count_dense(
    latents, counts, fired, n, n_rows, ROWS: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr
):
    """Add to counts[b] the latents that are not 0; fired[m] is set to 1 where one is."""
    column = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    block = tl.program_id(1).to(tl.int64)
    inside = column < n
    is_any = tl.zeros((WIDE,), tl.int32)
    for start in range(0, TALL, ROWS):
        row = block * TALL + start + tl.arange(0, ROWS)
        at = row[:, None] * n + column[None, :]
        mask = (row < n_rows)[:, None] & inside[None, :]
        z = tl.load(latents + at, mask=mask, other=0.0).to(tl.float32)
        is_active = (z != 0).to(tl.int32)
        is_any = tl.maximum(is_any, tl.max(is_active, 0))
        tl.atomic_add(counts + row, tl.sum(is_active, 1), mask=row < n_rows, sem="relaxed")
    tl.store(fired + column, is_any.to(tl.uint8), mask=inside & (is_any > 0))


@triton.jit
def sigmoid_of(values):
    return 1.0 / (1.0 + tl.exp(-values))


@triton.jit
def perceptron_dense(
    scores, weights, shifts, dots, out, largest, least, most, n, WIDE: tl.constexpr
):  # fmt: skip
    """dots[b] = relu(scores[b]) . weights + shift; out[b] = largest sigmoid(dots[b]), within least..most."""
    row = tl.program_id(0).to(tl.int64)
    wide = tl.arange(0, WIDE)
    total = tl.zeros((WIDE,), tl.float32)
    for start in range(0, n, WIDE):
        inside = start + wide < n
        a = tl.load(scores + row * n + start + wide, mask=inside, other=0.0).to(tl.float32)
        total += tl.where(a <= 0, 0.0, a) * tl.load(weights + start + wide, mask=inside, other=0.0)
    dot = tl.sum(total, 0) + tl.load(shifts)
    tl.store(dots + row, dot)
    free = largest * sigmoid_of(dot)
    tl.store(out + row, tl.where(free < least, least, tl.where(free > most, most, free)))


@triton.jit(do_not_specialize=["n_rows"])
def perceptron_gradient_dense(
    scores, weights, dots, grad, out, sums, largest, least, most, n, n_rows,
    ROWS: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out = g weights [scores > 0], where g[b] is the gradient at dots[b], of grad[b].

    sums: (blocks of rows, 2 n + 1), sums of g relu(scores), of out, and of g.
    """
    column = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    block = tl.program_id(1).to(tl.int64)
    inside = column < n
    weight = tl.load(weights + column, mask=inside, other=0.0)[None, :]
    products = tl.zeros((ROWS, WIDE), tl.float32)
    totals = tl.zeros((ROWS, WIDE), tl.float32)
    of_dots = tl.zeros((ROWS,), tl.float32)
    for start in range(0, TALL, ROWS):
        row = block * TALL + start + tl.arange(0, ROWS)
        share = sigmoid_of(tl.load(dots + row, mask=row < n_rows, other=0.0))
        is_free = (largest * share >= least) & (largest * share <= most)
        slope = tl.where(is_free, largest * share * (1.0 - share), 0.0)
        of_dot = tl.load(grad + row, mask=row < n_rows, other=0.0) * slope
        at = row[:, None] * n + column[None, :]
        mask = (row < n_rows)[:, None] & inside[None, :]
        a = tl.load(scores + at, mask=mask, other=0.0).to(tl.float32)
        of_score = tl.where(a > 0, of_dot[:, None] * weight, 0.0)
        tl.store(out + at, of_score, mask=mask)
        products += tl.where(a <= 0, 0.0, a) * of_dot[:, None]
        totals += of_score
        of_dots += of_dot
    first = sums + block * (2 * n + 1)
    tl.store(first + column, tl.sum(products, 0), mask=inside)
    tl.store(first + n + column, tl.sum(totals, 0), mask=inside)
    tl.store(first + 2 * n, tl.sum(of_dots, 0), mask=tl.program_id(0) == 0)


@triton.jit
def error_dense(product, b_dec, target, error, squares, width, BLOCK: tl.constexpr):
    """error = product + b_dec - target; squares[b]: the sum of its squares."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    total = tl.load(product + row * width + at, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(b_dec + at, mask=inside, other=0.0)
    total -= tl.load(target + row * width + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(error + row * width + at, total, mask=inside)
    tl.store(squares + row, tl.sum(total * total, 0))


@triton.jit
def scaled_dense(rows, scales, out, width, BLOCK: tl.constexpr):
    """out = rows times a scale for each."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    found = tl.load(rows + row * width + at, mask=inside, other=0.0) * tl.load(scales + row)
    tl.store(out + row * width + at, found, mask=inside)

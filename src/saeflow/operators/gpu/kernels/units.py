"""Kernels that divide rows by their norm."""

import triton
import triton.language as tl

LEAST = tl.constexpr(1e-12)  # norm that a row is divided by


@triton.jit
def minus_centre(
    x, centre, n_rows, width, HAS_CENTRE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Return the rows of a program, their places in x, which are inside, and x - centre."""
    row, at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    mask = (row < n_rows)[:, None] & (at < width)[None, :]
    where = row[:, None] * width + at[None, :]
    off = tl.load(x + where, mask=mask, other=0.0)
    if HAS_CENTRE:
        off = tl.where(mask, off - tl.load(centre + at, mask=at < width, other=0.0)[None, :], 0.0)
    return row, where, mask, off


@triton.jit
def unit_rows(
    x, centre, scale, unit, norms, n_rows, width, HAS_CENTRE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """unit = scale (x - centre) / |x - centre| of each row, and its norm."""
    row, where, mask, off = minus_centre(x, centre, n_rows, width, HAS_CENTRE, ROWS, BLOCK)
    norm = tl.sqrt(tl.sum(off * off, 1))
    tl.store(norms + row, norm, mask=row < n_rows)
    tl.store(unit + where, off / tl.maximum(norm, LEAST)[:, None] * tl.load(scale), mask=mask)


@triton.jit
def unit_gradient_rows(
    x, centre, scale, norms, of_unit, of_norm, of_centre, of_scale, n_rows, width,
    HAS_CENTRE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program's part of the gradients at the centre and at the scale, given those at the units and norms."""
    row, where, mask, off = minus_centre(x, centre, n_rows, width, HAS_CENTRE, ROWS, BLOCK)
    norm = tl.load(norms + row, mask=row < n_rows, other=0.0)
    unit = off / tl.maximum(norm, LEAST)[:, None]
    g = tl.load(of_unit + where, mask=mask, other=0.0)
    along = tl.sum(g * unit, 1)
    tl.store(of_scale + tl.program_id(0), tl.sum(along, 0))
    if HAS_CENTRE:
        factor = tl.load(scale) / tl.maximum(norm, LEAST)
        through = tl.where(norm >= LEAST, -factor * along, 0.0)  # the norm that it is divided by
        g_norm = tl.load(of_norm + row, mask=row < n_rows, other=0.0)
        direction = off / tl.where(norm > 0, norm, 1.0)[:, None]
        of_off = factor[:, None] * g + through[:, None] * unit + g_norm[:, None] * direction
        at = tl.arange(0, BLOCK)
        out = of_centre + tl.program_id(0).to(tl.int64) * width + at
        tl.store(out, -tl.sum(of_off, 0), mask=at < width)

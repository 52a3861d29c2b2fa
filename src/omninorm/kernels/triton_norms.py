"""The norms in Triton. A program holds ROWS whole rows in a tile at a time; it reads wider rows step by step.

With x a row of d features in the compute type C, γ the gain, β the bias, o the gain offset:

    RMSNorm    x̂ = x · r           r = 1/√(mean(x²) + ε)            y = x̂ · (γ + o)
    LayerNorm  x̂ = (x − μ) · r     r = 1/√(mean((x − μ)²) + ε)      y = x̂ · γ + β

    with g = dy · (γ + o):   RMSNorm    dx = r · (g − x̂ mean(g · x̂))              dγ = Σ_rows dy · x̂
                             LayerNorm  dx = r · (g − mean(g) − x̂ mean(g · x̂))    dβ = Σ_rows dy

The arithmetic is the reference's. Each row is divided by its unit, a power of two, so that no square overflows or
underflows. r is stored as two factors, root and per_unit, because their product may be out of range. μ is subtracted in
two steps: first the rounded mean (`center`), then the rest that rounding left (`rest`). LayerNorm divides only those
rows by a unit that need it; the others are "plain". The backward pass uses r and μ of the forward pass where r is
plain, and computes the statistics of other rows again.

Sums over a row have one order, that of its tile, so no row depends on the rows around it. For the gradients of gains,
each program sums a block of rows, whose size depends only on the number of rows; `column_totals` sums the blocks in
float64.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import constexpr

from omninorm.kernels.gpu import INTERPRETED

_INTERPRETED = constexpr(INTERPRETED)

# Arithmetic ------------------------------------------------------------------------------------------------------


@triton.jit
def divide(a, b):
    """Return a / b, rounded once; in float32, Triton compiles the operator / to an approximation."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def widen(v, C: constexpr):
    """Return v in the compute type. The interpreter's own conversion from bfloat16 is wrong for subnormal numbers."""
    if _INTERPRETED and v.dtype == tl.bfloat16:
        bits = v.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True).to(C)
    else:
        return v.to(C)


@triton.jit
def narrow(v, to: constexpr):
    """Return v rounded to nearest, ties to even. The interpreter's own conversion to bfloat16 truncates."""
    if to == tl.bfloat16:
        v = v.to(tl.float32)
        if _INTERPRETED:
            bits = v.to(tl.uint32, bitcast=True)
            bits = tl.where(v == v, bits + 0x7FFF + ((bits >> 16) & 1), bits)
            return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        else:
            return v.to(tl.bfloat16)
    else:
        return v.to(to)


@triton.jit
def multiply_add(a, b, c):
    """Return a · b + c, rounded once."""
    if _INTERPRETED and a.dtype == tl.float32:
        return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    elif _INTERPRETED:
        return a * b + c
    else:
        return tl.fma(a, b, c)


@triton.jit
def reciprocal_root(a):
    """Return 1/√a; both the root and the quotient are rounded to nearest."""
    if a.dtype == tl.float64:
        return 1.0 / tl.sqrt(a)
    else:
        return tl.div_rn(tl.full(a.shape, 1.0, tl.float32), tl.sqrt_rn(a))


@triton.jit
def reciprocal_unit(largest, least: constexpr):
    """Return the power of two that scales the larger of `largest` and `least` into [½, 1).

    Rows beyond an eighth of the largest number count as an eighth, so that the power is not subnormal."""
    if largest.dtype == tl.float64:
        largest = tl.minimum(tl.maximum(largest, max(least, 2.2250738585072014e-308)), 2.247116418577895e307)
        exponent = (largest.to(tl.int64, bitcast=True) >> 52) & 2047
        return ((2045 - exponent) << 52).to(tl.float64, bitcast=True)
    else:
        largest = tl.minimum(tl.maximum(largest, max(least, 1.1754943508222875e-38)), 4.253529586511731e37)
        exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
        return ((253 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def headroom_of(largest):
    """Return ⅛ for rows so large that the difference of two elements could overflow, else 1."""
    limit: constexpr = 2.247116418577895e307 if largest.dtype == tl.float64 else 4.253529586511731e37
    return tl.where(largest > limit, 0.125, 1.0).to(largest.dtype)


@triton.jit
def is_plain(r):
    """Return whether a row with this r has squares that neither overflow nor underflow in the compute type."""
    if r.dtype == tl.float64:
        return (r >= 2.0**-400) & (r <= 2.0**400)
    else:
        return (r >= 2.0**-60) & (r <= 2.0**50)


# Rows: x̂ = x · per_unit · root (RMSNorm) or ((x · headroom − center · headroom) · per_unit − rest) · root (LayerNorm)


@triton.jit
def rows_of(block, start, rows, rows_each, ROWS: constexpr):
    """Return the numbers of ROWS rows of a block, beginning with its row `start`, and which of them exist."""
    of_block = (start + tl.arange(0, ROWS))[:, None]
    row = block * rows_each + of_block
    return row, (row < rows) & (of_block < rows_each)


@triton.jit
def fetch(x, columns, width, present):
    """Return elements of the rows that begin at x, in their dtype; 0 beyond the width."""
    return tl.load(x + columns, present & (columns < width), 0.0)


@triton.jit
def read(x, residual, columns, width, present, C: constexpr, ADD: constexpr):
    """Return elements of the rows that begin at x, with the residual's added and rounded; 0 beyond the width."""
    values = fetch(x, columns, width, present)
    if ADD:
        values = narrow(widen(values, C) + widen(fetch(residual, columns, width, present), C), values.dtype)
    return widen(values, C)


@triton.jit
def read_gain(gain, columns, width, default, C: constexpr, GIVEN: constexpr, OFFSET: constexpr = 0.0):
    """Return γ + o or β, or `default` without one."""
    if GIVEN:
        return widen(tl.load(gain + columns, columns < width, 0.0), C) + OFFSET
    else:
        return tl.full(columns.shape, default, C)


@triton.jit
def over(total, width, C: constexpr):
    """Return the sum of each row divided by the width."""
    return divide(total, tl.full((1, 1), 1, C) * width)


@triton.jit
def mean(values, width, C: constexpr):
    """Return the mean of each row, (ROWS, 1); values beyond the width must be 0."""
    return over(tl.sum(values, 1, keep_dims=True), width, C)


@triton.jit
def add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def sums(a, b):
    """Return the sums of two tiles over each row; on GPUs in one reduction, so that warps synchronize once."""
    if _INTERPRETED:
        return tl.sum(a, 1, keep_dims=True), tl.sum(b, 1, keep_dims=True)
    else:
        return tl.reduce((a, b), 1, add_pairs, keep_dims=True)


@triton.jit
def add_triples(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def sums_of_three(a, b, c):
    if _INTERPRETED:
        return tl.sum(a, 1, keep_dims=True), tl.sum(b, 1, keep_dims=True), tl.sum(c, 1, keep_dims=True)
    else:
        return tl.reduce((a, b, c), 1, add_triples, keep_dims=True)


@triton.jit
def measure_rms(held, x, residual, columns, width, present, steps,
                EPS: constexpr, LEAST: constexpr, C: constexpr, ADD: constexpr, WHOLE: constexpr):  # fmt: skip
    """Return root and per_unit of RMSNorm."""
    largest = tl.zeros_like(held)
    for step in range(steps):
        v = held if WHOLE else read(x, residual, columns + step * columns.shape[1], width, present, C, ADD)
        largest = tl.maximum(largest, tl.abs(v))
    per_unit = reciprocal_unit(tl.max(largest, 1, keep_dims=True), LEAST)
    squares = tl.zeros_like(held)
    for step in range(steps):
        v = held if WHOLE else read(x, residual, columns + step * columns.shape[1], width, present, C, ADD)
        v *= per_unit
        squares += v * v
    return reciprocal_root(mean(squares, width, C) + EPS * per_unit * per_unit), per_unit


@triton.jit
def measure_layer(held, x, residual, columns, width, present, steps,
                  EPS: constexpr, LEAST: constexpr, C: constexpr, ADD: constexpr, WHOLE: constexpr):  # fmt: skip
    """Return root, per_unit, rest, headroom and center of LayerNorm; center is the mean in the compute type."""
    top = tl.full(held.shape, float("-inf"), C)
    bottom = tl.full(held.shape, float("inf"), C)
    for step in range(steps):
        at = columns + step * columns.shape[1]
        v = held if WHOLE else read(x, residual, at, width, present, C, ADD)
        top = tl.where(at < width, tl.maximum(top, v), top)
        bottom = tl.where(at < width, tl.minimum(bottom, v), bottom)
    highest = tl.max(top, 1, keep_dims=True)
    largest = tl.maximum(highest, -tl.min(bottom, 1, keep_dims=True))
    headroom = headroom_of(largest)
    per_unit = reciprocal_unit(largest, 0.0)

    # The mean is summed from the differences to an element of the row, so that it is exact for a constant row.
    differences = tl.zeros_like(held)
    for step in range(steps):
        at = columns + step * columns.shape[1]
        v = held if WHOLE else read(x, residual, at, width, present, C, ADD)
        differences += tl.where(at < width, v * per_unit - highest * per_unit, 0.0)
    center = divide(highest * per_unit + mean(differences, width, C), per_unit)

    largest_deviation = tl.zeros_like(held)
    for step in range(steps):
        at = columns + step * columns.shape[1]
        v = held if WHOLE else read(x, residual, at, width, present, C, ADD)
        deviation = tl.abs(v * headroom - center * headroom)
        largest_deviation = tl.where(at < width, tl.maximum(largest_deviation, deviation), largest_deviation)
    per_unit = reciprocal_unit(tl.max(largest_deviation, 1, keep_dims=True), LEAST)

    sums = tl.zeros_like(held)
    for step in range(steps):
        at = columns + step * columns.shape[1]
        v = held if WHOLE else read(x, residual, at, width, present, C, ADD)
        sums += tl.where(at < width, (v * headroom - center * headroom) * per_unit, 0.0)
    rest = mean(sums, width, C)

    squares = tl.zeros_like(held)
    for step in range(steps):
        at = columns + step * columns.shape[1]
        v = held if WHOLE else read(x, residual, at, width, present, C, ADD)
        deviation = (v * headroom - center * headroom) * per_unit - rest
        squares += tl.where(at < width, deviation * deviation, 0.0)
    in_units = per_unit * headroom
    root = reciprocal_root(mean(squares, width, C) + EPS * in_units * in_units)
    return root, per_unit, rest, headroom, center


@triton.jit
def inside_of(values, at, width, EVEN: constexpr):
    """Return the values, with 0 beyond the width; EVEN means that the tile does not extend beyond it."""
    if EVEN:
        return values
    else:
        return tl.where(at < width, values, 0.0)


@triton.jit
def measure_plain_layer(held, x, residual, columns, width, present, steps,
                        EPS: constexpr, C: constexpr, ADD: constexpr, WHOLE: constexpr, EVEN: constexpr):  # fmt: skip
    """Return root, rest and center of rows without division by a unit, and whether they are exact enough.

    They are not if squares overflow or underflow, as in constant rows, or if the spread of a row is too small compared
    with the differences that are squared.

    Rows of 16 bits are read once: their sums are of differences to the first element. Other rows are read twice,
    because the errors of such sums would no longer be small compared with the rounding of y.
    """
    first = read(x, residual, tl.zeros((1, 1), tl.int32), width, present, C, ADD)
    if x.dtype.element_ty.primitive_bitwidth == 16:
        total, square = sums_about(first, held, x, residual, columns, width, present, steps, C, ADD, WHOLE, EVEN)
        difference, mean_square = over(total, width, C), over(square, width, C)
        center = first + difference
        added = center - first
        rest = (first - (center - added)) + (difference - added)  # the rounding error of center, exactly
        variance = mean_square - difference * difference
        exact = difference * difference <= 64 * variance
    else:
        differences = tl.zeros_like(held)
        for step in range(steps):
            at = columns + step * columns.shape[1]
            v = held if WHOLE else read(x, residual, at, width, present, C, ADD)
            differences += inside_of(v - first, at, width, EVEN)
        center = first + mean(differences, width, C)
        total, square = sums_about(center, held, x, residual, columns, width, present, steps, C, ADD, WHOLE, EVEN)
        rest, mean_square = over(total, width, C), over(square, width, C)
        variance = mean_square - rest * rest
        exact = rest * rest <= 0.25 * mean_square
    root = reciprocal_root(variance + EPS)
    return root, rest, center, is_plain(root) & exact & (variance >= 2.0**-100)


@triton.jit
def sums_about(origin, held, x, residual, columns, width, present, steps,
               C: constexpr, ADD: constexpr, WHOLE: constexpr, EVEN: constexpr):  # fmt: skip
    """Return the sums over each row of the differences to `origin`, and of their squares."""
    if WHOLE:
        difference = inside_of(held - origin, columns, width, EVEN)
        return sums(difference, difference * difference)
    else:
        differences, squares = tl.zeros_like(held), tl.zeros_like(held)
        for step in range(steps):
            at = columns + step * columns.shape[1]
            v = read(x, residual, at, width, present, C, ADD)
            difference = inside_of(v - origin, at, width, EVEN)
            differences += difference
            squares = multiply_add(difference, difference, squares)
        return sums(differences, squares)


@triton.jit
def normalize_plain(x, root, rest, center):
    """Return x̂ of LayerNorm for plain rows, which are not divided by a unit."""
    deviation = x - center
    shift = tl.broadcast_to(-rest * root, deviation.shape)
    return multiply_add(deviation, tl.broadcast_to(root, deviation.shape), shift)


@triton.jit
def normalize_layer(x, root, per_unit, rest, headroom, center):
    """Return x̂ of LayerNorm."""
    deviation = (x * headroom - center * headroom) * per_unit
    return multiply_add(
        deviation, tl.broadcast_to(root, deviation.shape), tl.broadcast_to(-rest * root, deviation.shape)
    )


# Kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def rms_norm_forward(
    x_ptr, residual_ptr, gain_ptr, y_ptr, total_ptr, scale_ptr, rows, width, x_stride, residual_stride,
    EPS: constexpr, LEAST: constexpr, OFFSET: constexpr, ROUND_FIRST: constexpr, C: constexpr,
    ADD: constexpr, GAIN: constexpr, KEEP: constexpr, WHOLE: constexpr, ROWS: constexpr, BLOCK: constexpr,
):  # fmt: skip
    """Store y; with ADD also x + residual, with KEEP also r."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    present = row < rows
    x, residual = x_ptr + row * x_stride, residual_ptr + row * residual_stride
    steps = 1 if WHOLE else tl.cdiv(width, BLOCK)
    held = read(x, residual, columns, width, present, C, ADD)
    root, per_unit = measure_rms(held, x, residual, columns, width, present, steps, EPS, LEAST, C, ADD, WHOLE)
    for step in range(steps):
        at = columns + step * BLOCK
        v = held if WHOLE else read(x, residual, at, width, present, C, ADD)
        inside = present & (at < width)
        if ADD:
            tl.store(total_ptr + row * width + at, narrow(v, total_ptr.dtype.element_ty), inside)
        normed = v * per_unit * root
        if ROUND_FIRST:
            normed = widen(narrow(normed, y_ptr.dtype.element_ty), C)
        gain = read_gain(gain_ptr, at, width, 1.0, C, GAIN, OFFSET)
        tl.store(y_ptr + row * width + at, narrow(normed * gain, y_ptr.dtype.element_ty), inside)
    if KEEP:
        tl.store(scale_ptr + row, root * per_unit, present)


@triton.jit
def layer_norm_forward(
    x_ptr, residual_ptr, gain_ptr, bias_ptr, y_ptr, total_ptr, mean_ptr, scale_ptr,
    rows, width, x_stride, residual_stride,
    EPS: constexpr, LEAST: constexpr, C: constexpr, ADD: constexpr, GAIN: constexpr, BIAS: constexpr,
    KEEP: constexpr, WHOLE: constexpr, EVEN: constexpr, ROWS: constexpr, BLOCK: constexpr,
):  # fmt: skip
    """Store y; with ADD also x + residual, with KEEP also μ and r."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    present = row < rows
    x, residual = x_ptr + row * x_stride, residual_ptr + row * residual_stride
    steps = 1 if WHOLE else tl.cdiv(width, BLOCK)
    held = read(x, residual, columns, width, present, C, ADD)
    root, rest, center, plain = measure_plain_layer(
        held, x, residual, columns, width, present, steps, EPS, C, ADD, WHOLE, EVEN
    )
    per_unit, headroom = tl.full((ROWS, 1), 1, C), tl.full((ROWS, 1), 1, C)
    all_plain = tl.min((plain | (row >= rows)).to(tl.int32)) == 1
    if not all_plain:
        # These rows are rare. They are read again in small steps, because this code uses the same registers.
        AGAIN: constexpr = min(BLOCK, 1024)
        root_, per_unit_, rest_, headroom_, center_ = measure_layer(
            tl.zeros((ROWS, AGAIN), C), x, residual, tl.arange(0, AGAIN)[None, :], width, present,
            tl.cdiv(width, AGAIN), EPS, LEAST, C, ADD, False,
        )  # fmt: skip
        root, per_unit, rest = (
            tl.where(plain, root, root_),
            tl.where(plain, per_unit, per_unit_),
            tl.where(plain, rest, rest_),
        )
        headroom, center = tl.where(plain, headroom, headroom_), tl.where(plain, center, center_)
    for step in range(steps):
        at = columns + step * BLOCK
        v = held if WHOLE else read(x, residual, at, width, present, C, ADD)
        inside = present & (at < width)
        if ADD:
            tl.store(total_ptr + row * width + at, narrow(v, total_ptr.dtype.element_ty), inside)
        if all_plain:
            normed = normalize_plain(v, root, rest, center)
        else:
            normed = normalize_layer(v, root, per_unit, rest, headroom, center)
        gain, bias = read_gain(gain_ptr, at, width, 1.0, C, GAIN), read_gain(bias_ptr, at, width, 0.0, C, BIAS)
        y = multiply_add(normed, tl.broadcast_to(gain, normed.shape), tl.broadcast_to(bias, normed.shape))
        tl.store(y_ptr + row * width + at, narrow(y, y_ptr.dtype.element_ty), inside)
    if KEEP:
        tl.store(mean_ptr + row, center, present)
        tl.store(scale_ptr + row, root * per_unit * headroom, present)


@triton.jit
def rms_norm_backward(
    dy_ptr, dtotal_ptr, x_ptr, scale_ptr, gain_ptr, dx_ptr, dgain_ptr,
    rows, width, rows_each, dy_stride, dtotal_stride, x_stride,
    EPS: constexpr, LEAST: constexpr, OFFSET: constexpr, ROUND_FIRST: constexpr, C: constexpr,
    ADD: constexpr, GAIN: constexpr, LEARNS: constexpr, WHOLE: constexpr, ROWS: constexpr, BLOCK: constexpr,
):  # fmt: skip
    """Store dx, with ADD dx + dtotal, and with LEARNS the block's sum of dy · x̂.

    The next rows are loaded while the current ones are computed."""
    block = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)[None, :]
    steps = 1 if WHOLE else tl.cdiv(width, BLOCK)
    dgain = tl.zeros((ROWS, BLOCK), C)
    row, present = rows_of(block, 0, rows, rows_each, ROWS)
    next_x = fetch(x_ptr + row * x_stride, columns, width, present)
    next_dy = fetch(dy_ptr + row * dy_stride, columns, width, present)
    next_root = tl.load(scale_ptr + row, present, 1.0)
    for start in range(0, rows_each, ROWS):
        row, present = rows_of(block, start, rows, rows_each, ROWS)
        x, dy = x_ptr + row * x_stride, dy_ptr + row * dy_stride
        held, held_dy, root = widen(next_x, C), widen(next_dy, C), next_root
        row_after, present_after = rows_of(block, start + ROWS, rows, rows_each, ROWS)
        next_x = fetch(x_ptr + row_after * x_stride, columns, width, present_after)
        next_dy = fetch(dy_ptr + row_after * dy_stride, columns, width, present_after)
        next_root = tl.load(scale_ptr + row_after, present_after, 1.0)
        per_unit = tl.full((ROWS, 1), 1, C)
        plain = is_plain(root)
        if tl.min(plain.to(tl.int32)) == 0:
            measured, unit = measure_rms(held, x, x, columns, width, present, steps, EPS, LEAST, C, False, WHOLE)
            root, per_unit = tl.where(plain, root, measured), tl.where(plain, per_unit, unit)

        products = tl.zeros((ROWS, BLOCK), C)
        for step in range(steps):
            at = columns + step * BLOCK
            v = held if WHOLE else read(x, x, at, width, present, C, False)
            g = held_dy if WHOLE else read(dy, dy, at, width, present, C, False)
            g *= read_gain(gain_ptr, at, width, 1.0, C, GAIN, OFFSET)
            products += g * (v * per_unit * root)
        mean_product = mean(products, width, C)

        for step in range(steps):
            at = columns + step * BLOCK
            v = held if WHOLE else read(x, x, at, width, present, C, False)
            dys = held_dy if WHOLE else read(dy, dy, at, width, present, C, False)
            inside = present & (at < width)
            g = dys * read_gain(gain_ptr, at, width, 1.0, C, GAIN, OFFSET)
            normed = v * per_unit * root
            dx = narrow(projected(g, normed, mean_product) * root * per_unit, dx_ptr.dtype.element_ty)
            if ADD:
                more = tl.load(dtotal_ptr + row * dtotal_stride + at, inside, 0.0)
                dx = narrow(widen(dx, C) + widen(more, C), dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + row * width + at, dx, inside)
            if LEARNS:
                if ROUND_FIRST:
                    normed = widen(narrow(normed, x_ptr.dtype.element_ty), C)
                term = tl.where(inside, dys * normed, 0.0)
                if WHOLE:
                    dgain += term
                else:
                    add_to(dgain_ptr, block, at, width, term, start)
    if LEARNS and WHOLE:
        tl.store(dgain_ptr + block * width + columns, tl.sum(dgain, 0, keep_dims=True), columns < width)


@triton.jit
def backward_sums(held, held_dy, x, dy, gain_ptr, root, center, columns, width, present, steps,
                  C: constexpr, GAIN: constexpr, WHOLE: constexpr, EVEN: constexpr):  # fmt: skip
    """Return the sums over each row of g, g · (x − center) · r and x − center."""
    if WHOLE:
        g = held_dy * read_gain(gain_ptr, columns, width, 1.0, C, GAIN)
        deviation = inside_of(held - center, columns, width, EVEN)
        return sums_of_three(g, g * (deviation * root), deviation)
    else:
        gs, products, deviations = tl.zeros_like(held), tl.zeros_like(held), tl.zeros_like(held)
        for step in range(steps):
            at = columns + step * columns.shape[1]
            g = read(dy, dy, at, width, present, C, False) * read_gain(gain_ptr, at, width, 1.0, C, GAIN)
            deviation = inside_of(read(x, x, at, width, present, C, False) - center, at, width, EVEN)
            gs += g
            products += g * (deviation * root)
            deviations += deviation
        return sums_of_three(gs, products, deviations)


@triton.jit
def layer_norm_backward(
    dy_ptr, dtotal_ptr, x_ptr, mean_ptr, scale_ptr, gain_ptr, dx_ptr, dgain_ptr, dbias_ptr,
    rows, width, rows_each, dy_stride, dtotal_stride, x_stride,
    EPS: constexpr, LEAST: constexpr, C: constexpr, ADD: constexpr, GAIN: constexpr,
    GAIN_LEARNS: constexpr, BIAS_LEARNS: constexpr, WHOLE: constexpr, EVEN: constexpr, ROWS: constexpr,
    BLOCK: constexpr,
):  # fmt: skip
    """Store dx, with ADD dx + dtotal, with GAIN_LEARNS the block's sum of dy · x̂, and with BIAS_LEARNS that of dy.

    The next rows are loaded while the current ones are computed."""
    block = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)[None, :]
    steps = 1 if WHOLE else tl.cdiv(width, BLOCK)
    dgain = tl.zeros((ROWS, BLOCK), C)
    dbias = tl.zeros((ROWS, BLOCK), C)
    row, present = rows_of(block, 0, rows, rows_each, ROWS)
    next_x = fetch(x_ptr + row * x_stride, columns, width, present)
    next_dy = fetch(dy_ptr + row * dy_stride, columns, width, present)
    next_center, next_root = tl.load(mean_ptr + row, present, 0.0), tl.load(scale_ptr + row, present, 1.0)
    for start in range(0, rows_each, ROWS):
        row, present = rows_of(block, start, rows, rows_each, ROWS)
        x, dy = x_ptr + row * x_stride, dy_ptr + row * dy_stride
        held, held_dy, center, root = widen(next_x, C), widen(next_dy, C), next_center, next_root
        row_after, present_after = rows_of(block, start + ROWS, rows, rows_each, ROWS)
        next_x = fetch(x_ptr + row_after * x_stride, columns, width, present_after)
        next_dy = fetch(dy_ptr + row_after * dy_stride, columns, width, present_after)
        next_center = tl.load(mean_ptr + row_after, present_after, 0.0)
        next_root = tl.load(scale_ptr + row_after, present_after, 1.0)

        # With d = x − center, whose mean is `rest`: mean(g · x̂) = mean(g · d · r) − rest · r · mean(g).
        g_sum, product_sum, deviation_sum = backward_sums(
            held, held_dy, x, dy, gain_ptr, root, center, columns, width, present, steps, C, GAIN, WHOLE, EVEN
        )
        rest, mean_g = over(deviation_sum, width, C), over(g_sum, width, C)
        mean_product = over(product_sum, width, C) - rest * root * mean_g
        per_unit, headroom = tl.full((ROWS, 1), 1, C), tl.full((ROWS, 1), 1, C)
        plain = is_plain(root)
        all_plain = tl.min(plain.to(tl.int32)) == 1
        if not all_plain:
            root_, per_unit_, rest_, headroom_, center_ = measure_layer(
                held, x, x, columns, width, present, steps, EPS, LEAST, C, False, WHOLE
            )
            root, per_unit, rest = (
                tl.where(plain, root, root_),
                tl.where(plain, per_unit, per_unit_),
                tl.where(plain, rest, rest_),
            )
            headroom, center = tl.where(plain, headroom, headroom_), tl.where(plain, center, center_)
            products = tl.zeros((ROWS, BLOCK), C)
            for step in range(steps):
                at = columns + step * BLOCK
                v = held if WHOLE else read(x, x, at, width, present, C, False)
                g = held_dy if WHOLE else read(dy, dy, at, width, present, C, False)
                g *= read_gain(gain_ptr, at, width, 1.0, C, GAIN)
                products += inside_of(g * normalize_layer(v, root, per_unit, rest, headroom, center), at, width, EVEN)
            mean_product = tl.where(plain, mean_product, mean(products, width, C))

        for step in range(steps):
            at = columns + step * BLOCK
            v = held if WHOLE else read(x, x, at, width, present, C, False)
            dys = held_dy if WHOLE else read(dy, dy, at, width, present, C, False)
            inside = present & (at < width)
            g = dys * read_gain(gain_ptr, at, width, 1.0, C, GAIN)
            if all_plain:
                normed = normalize_plain(v, root, rest, center)
                dx = projected(g - mean_g, normed, mean_product) * root
            else:
                normed = normalize_layer(v, root, per_unit, rest, headroom, center)
                dx = projected(g - mean_g, normed, mean_product) * root * per_unit * headroom
            dx = narrow(dx, dx_ptr.dtype.element_ty)
            if ADD:
                more = tl.load(dtotal_ptr + row * dtotal_stride + at, inside, 0.0)
                dx = narrow(widen(dx, C) + widen(more, C), dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + row * width + at, dx, inside)
            if GAIN_LEARNS:
                if WHOLE:
                    dgain = multiply_add(dys, inside_of(normed, at, width, EVEN), dgain)
                else:
                    add_to(dgain_ptr, block, at, width, tl.where(inside, dys * normed, 0.0), start)
            if BIAS_LEARNS:
                if WHOLE:
                    dbias += dys
                else:
                    add_to(dbias_ptr, block, at, width, dys, start)
    if GAIN_LEARNS and WHOLE:
        tl.store(dgain_ptr + block * width + columns, tl.sum(dgain, 0, keep_dims=True), columns < width)
    if BIAS_LEARNS and WHOLE:
        tl.store(dbias_ptr + block * width + columns, tl.sum(dbias, 0, keep_dims=True), columns < width)


@triton.jit
def projected(g, normed, mean_product):
    """Return g − x̂ · mean(g · x̂)."""
    return multiply_add(-normed, tl.broadcast_to(mean_product, normed.shape), g)


@triton.jit
def add_to(sums_ptr, block, columns, width, terms, start):
    """Add rows to a block's sums in memory; the first rows (`start` 0) replace what was there."""
    inside = columns < width
    at = sums_ptr + block * width + columns
    before = tl.load(at, inside & (start > 0), 0.0)
    tl.store(at, before + tl.sum(terms, 0, keep_dims=True), inside)
    tl.debug_barrier()


@triton.jit
def column_totals(
    first_ptr, second_ptr, first_total_ptr, second_total_ptr, blocks, width, ROWS: constexpr, BLOCK: constexpr
):
    """Store the sum of all blocks, in their order; if the grid has two rows, also that of a second tensor."""
    if tl.program_id(1) == 0:
        add_blocks(first_ptr, first_total_ptr, blocks, width, ROWS, BLOCK)
    else:
        add_blocks(second_ptr, second_total_ptr, blocks, width, ROWS, BLOCK)


@triton.jit
def add_blocks(blocks_ptr, total_ptr, blocks, width, ROWS: constexpr, BLOCK: constexpr):
    columns = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = columns < width
    total = tl.zeros((1, BLOCK), tl.float64)
    for start in range(0, blocks, ROWS):
        block = (start + tl.arange(0, ROWS))[:, None]
        at = blocks_ptr + block.to(tl.int64) * width + columns
        values = tl.load(at, inside & (block < blocks), 0.0).to(tl.float64)
        total += tl.sum(values, 0, keep_dims=True)
    tl.store(total_ptr + columns, narrow(total, total_ptr.dtype.element_ty), inside)

"""Compile every Triton kernel for a GPU, which needs none: compile_kernels.py CAPABILITY [first].

With `first`, each kernel is compiled in one form only. A kernel whose numbers do not fit a thread's registers is refused: they
would go to memory and back.
"""

import itertools
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from saeflow.operators import gpu
from saeflow.operators.gpu.kernels import (
    columns,
    dead,
    dense,
    lists,
    margins,
    pairs,
    ranks,
    record,
    rows,
    selection,
    soft,
    sparse,
    spill,
    units,
    update,
)

F, H, D, S, L, U = "*fp32", "*bf16", "*fp64", "*i32", "*i64", "*u8"
INT, FLOAT = "i32", "fp32"
RANK, SIMPLEX, ABOVE, AT_LEAST = 0, 1, 2, 3
# entmax of any alpha, of 2, of 1.5
POWERS = [{"LINEAR": linear, "SQUARES": squares} for linear, squares in ((0, 0), (1, 0), (0, 1))]
FLAGS = (False, True)
MOST_STACK = 64  # bytes of a thread
Case = tuple[Any, list[Any], dict[str, Any], int]


def cases() -> Iterator[Case]:
    """Each kernel with types of its arguments, constants, and warps, as its caller launches it."""
    for scores, of_relu in ((F, False), (F, True), (H, True)):
        constants = {"OF_RELU": of_relu, "WIDE": 1024}
        of_k = F if of_relu else D
        yield soft.soft_rows, [scores, of_k, F, FLOAT, scores, F, F, F, S, F, INT], constants, 4
        types = [scores, scores, F, F, F, F, FLOAT, scores, F, F, INT]
        yield soft.soft_gradient_rows, types, constants, 4
    for scores in (F, H):
        yield from dense_steps(scores)
    yield rows.sum_rows, [F, L, L, F, F, INT], {"BLOCK": 256}, 4
    yield rows.row_products, [F, F, L, L, L, F, INT], {"BLOCK": 1024}, 4
    for power in POWERS:
        for has_sizes in FLAGS[: 1 + power["LINEAR"]]:
            constants = {"CAPACITY": 128, "HAS_SIZES": has_sizes} | power
            types = [F, S, F if power["LINEAR"] else D, F, F]
            yield lists.simplex_lists, types, constants, 1
    for has_sizes in FLAGS:
        constants = {"CAPACITY": 128, "HAS_SIZES": has_sizes}
        yield lists.sparsemax_gradient_lists, [F, F, F, F, F], constants, 1
    for capacity, warps in ((128, 1), (1024, 4)):
        for k in (F, D):
            types = [F, S, k, F, FLOAT, F, D]
            yield lists.soft_lists, types, {"CAPACITY": capacity}, warps
        types = [F, S, D, F, FLOAT, F, F, F]
        yield lists.soft_gradient_lists, types, {"CAPACITY": capacity}, warps
        yield lists.jump_lists, [F, S, S, F, F, F], {"CAPACITY": capacity}, warps
        yield lists.jump_gradient_lists, [F, S, S, F, F, F], {"CAPACITY": capacity}, warps
        of_columns = [F, S, S, F, F, F]
        yield lists.gated_lists, [*of_columns, F, F, F], {"CAPACITY": capacity}, warps
        types = [*of_columns, F, F, F, F]
        yield lists.gated_gradient_lists, types, {"CAPACITY": capacity}, warps
    yield lists.jump_gradient_columns, [F, F, L, S, F, F, F, FLOAT], {"BLOCK": 64}, 1
    yield lists.gated_gradient_columns, [F, F, L, S, F, F, F, F, F, F], {"BLOCK": 64}, 1
    yield from selections()
    yield from products()
    yield from of_dead()
    for n in (1, 4):
        parts = {
            "PARTS": n,
            "ARE_UNIT": (True, False, False, False)[:n],
            "BLOCKS": (1024, 1024, 256, 1)[:n],
        }
        pointers, sizes = (F,) * n, (INT,) * n
        yield update.measure_parts, [pointers, pointers, F, sizes, sizes], parts, 4
        shadows = (H, H, F, F)[:n]
        types = [*[pointers] * 4, shadows, pointers, U, *[FLOAT] * 4, sizes, sizes]
        yield update.update_parts, types, parts | {"HAVE_SHADOW": (True, True, False, False)[:n]}, 4
    for beta, largest in ((-0.1, 1.0), (-math.inf, math.inf)):
        constants = {"LOG_BETA1": beta, "LOG_BETA2": beta, "LARGEST_NORM": largest}
        yield update.numbers_of_parts, [F, F, F, U, F, INT], constants, 1
    yield from records()
    for matrix in (F, H):
        types = [F, F, matrix, F, *[INT] * 4]
        sizes = {"ROWS": 8, "BLOCK": 1024, "PIECE": 8192}
        yield margins.squares_of_pieces, types, sizes, 8
    yield margins.margin_of_parts, [F, F, INT, INT, FLOAT], {"WIDE": 1024}, 4
    for has_centre in FLAGS:
        constants = {"HAS_CENTRE": has_centre, "ROWS": 8, "BLOCK": 1024}
        yield units.unit_rows, [F, F, F, F, F, INT, INT], constants, 8
        yield units.unit_gradient_rows, [*[F] * 8, INT, INT], constants, 8
    for of_log in FLAGS:
        types = [F, F, F, FLOAT, FLOAT, INT]
        yield margins.lowered_columns, types, {"OF_LOG": of_log, "WIDE": 1024}, 4


def records() -> Iterator[Case]:
    """Yield what a step notes."""
    for of_finite, has_before in itertools.product(FLAGS, FLAGS):
        constants = {"OF_FINITE": of_finite, "HAS_BEFORE": has_before, "WIDE": 16}
        values = F if of_finite else L
        yield record.keep_first, [values, L, values, L, U, U, INT], constants, 1
    for has_number in FLAGS:
        constants = {"FLAG": 1, "HAS_NUMBER": has_number, "WIDE": 1024}
        yield record.count_flagged, [S, L, L, INT], constants, 4
    yield record.fired_columns, [F, L, S, U, INT], {"WIDE": 128}, 4
    yield record.active_pieces, [F, L, INT], {"WIDE": 4096}, 8
    yield record.count_silent, [L, U, U, INT, INT, INT], {"WIDE": 1024}, 4
    for has_target in FLAGS:
        types = [F, F, F, F, F, INT]
        yield record.penalty_term, types, {"HAS_TARGET": has_target}, 1
    for values in (F, H):
        yield record.least_of_pieces, [values, F, INT], {"WIDE": 4096}, 8
    for is_unbiased in FLAGS:
        types = [F, F, F, FLOAT, FLOAT]
        yield record.follow_least, types, {"IS_UNBIASED": is_unbiased}, 1


def dense_steps(A: str) -> Iterator[Case]:
    """Kernels of dense steps, for scores of a type."""
    wide = {"WIDE": 2048}
    tiles = {"ROWS": 8, "TALL": 256, "WIDE": 256}
    for is_one in FLAGS:
        constants = wide | {"IS_ONE": is_one}
        yield dense.relu_dense, [A, A, F, FLOAT, INT], constants, 8
        yield dense.relu_gradient_dense, [A, A, F, A, FLOAT, INT], constants, 8
        types = [A, F, A, A, F, F, FLOAT, INT, INT]
        yield dense.jump_gradient_dense, types, tiles | {"OF_LATENTS": is_one}, 8
    yield dense.jump_dense, [A, F, A, F, INT], wide, 8
    yield dense.gated_dense, [A, F, F, F, A, A, F, INT], wide, 8
    yield dense.gated_gradient_dense, [A, F, F, F, A, A, F, A, F, F, INT, INT], tiles, 8
    yield dense.count_dense, [A, S, U, INT, INT], tiles, 8
    within = [FLOAT, FLOAT, FLOAT]
    yield dense.error_dense, [A, F, F, F, F, INT], {"BLOCK": 1024}, 4
    yield dense.scaled_dense, [F, F, A, INT], {"BLOCK": 1024}, 4
    yield dense.perceptron_dense, [A, F, F, F, F, *within, INT], wide, 8
    types = [A, F, F, F, A, F, *within, INT, INT]
    yield dense.perceptron_gradient_dense, types, tiles, 8


def of_dead() -> Iterator[Case]:
    """Kernels of AuxK."""
    yield dead.dead_columns, [U, L, L, INT, INT], {"WIDE": 4096}, 8
    tiles, block = {"ROWS": 8, "TALL": 256, "WIDE": 256}, {"BLOCK": 1024}
    for scores, places, wide, warps in ((H, 16, 4096, 8), (H, 16, 16384, 32), (F, 32, 16384, 32)):
        for is_signed in FLAGS:
            constants = {"PLACES": places, "IS_SIGNED": is_signed, "WIDE": wide}
            yield dead.dead_rows, [scores, L, L, scores, INT, INT, INT], constants, warps
    for A in (F, H):
        yield dead.dead_gradient_columns, [A, A, A, F, INT, INT], tiles, 8
        yield dead.share_rows, [F, A, F, F, F, INT, INT], block, 4
        yield dead.share_gradient_rows, [F, A, F, A, INT], block, 4
        yield dead.add_rows, [F, L, A, INT], block, 4
        yield dense.centred_dense, [A, F, H, INT], {"WIDE": 1024}, 8
    yield dead.add_rows, [F, L, F, INT], {"BLOCK": 16}, 1
    yield dead.defined_share, [F, F, L, F, F], {}, 1


def selections() -> Iterator[Case]:
    tensors = [F, F, U, S, F, S, S, S, INT, FLOAT]
    sizes = {"WIDE": 1024, "ROOM": 128}
    fast = {"GROUPS": 1024, "PER_COLUMN": True}
    of_long = {"EACH": 8, "WIDE": 4096}
    none = {"IS_NEAR": False, "HAS_ALLOWED": False, "IS_POSITIVE": False, "OF_RELU": False}
    plain = none | POWERS[0]
    chosen = {"HAS_ALLOWED": True, "IS_POSITIVE": True}
    near = {"IS_NEAR": True}
    for scores, places, ranks_of, changes in (
        (H, 16, S, {}),
        (H, 16, L, chosen),
        (H, 16, F, near | {"OF_RELU": True}),
        (F, 32, L, {}),
        (F, 32, F, near),
    ):
        constants = {"KIND": RANK, "PLACES": places} | sizes | plain | changes
        yield selection.collect_rows, [scores, ranks_of, *tensors, INT], constants | fast, 4
        exact = {"IS_EXACT": not constants["IS_NEAR"]}
        types = [scores, ranks_of, *tensors, INT, INT]
        yield selection.collect_long_rows, types, constants | of_long | exact, 8
    for power, has_allowed in itertools.product(POWERS, FLAGS):
        constants = {"KIND": SIMPLEX, "PLACES": 16} | sizes | plain | power
        constants |= {"HAS_ALLOWED": has_allowed}
        yield selection.collect_rows, [H, F, *tensors, INT], constants | fast, 4
        types, exact = [H, F, *tensors, INT, INT], {"IS_EXACT": False}
        yield selection.collect_long_rows, types, constants | of_long | exact, 8
    for kind, per_column in ((ABOVE, False), (ABOVE, True), (AT_LEAST, False)):
        constants = {"KIND": kind, "PLACES": 16} | sizes | plain | fast | {"PER_COLUMN": per_column}
        yield selection.collect_rows, [H, F, *tensors, INT], constants, 4
    yield from spills()
    for places, room, warps in ((16, 128, 1), (32, 1024, 4)):
        constants = {"PLACES": places, "ROOM": room, "CAPACITY": 64}
        yield selection.choose_rows, [S, F, S, S, S, S, F, S, S, INT], constants, warps


def spills() -> Iterator[Case]:
    """Yield what chooses among all rows' entries and divides them among lists."""
    sizes = {"LONG": 512, "WIDE": 4096}
    for scores, levels in ((H, 2), (F, 4)):
        for level in range(levels):
            constants: dict[str, Any] = {"LEVEL": level, "WIDE": 4096}
            yield ranks.count_keys, [L, L, scores, INT], constants, 8
            of_rows = sizes | {"LEVEL": level, "EACH": 8}
            yield spill.count_rows, [L, L, scores, F, S, INT, INT], of_rows, 8
        yield ranks.ranked_keys, [L, L, F, L], {"LEVELS": levels}, 1
        yield spill.compare_rows, [scores, F, S, F, S, S, INT], sizes, 4
    for has_ties in FLAGS:
        constants = {"HAS_TIES": has_ties, "ROOM": 128, "WIDE": 4096}
        yield spill.spread_rows, [S, S, L, *[S] * 6, INT, INT], constants, 16
        for has_spill in FLAGS:
            for per_column in FLAGS[: 2 - has_ties]:
                constants = {"PER_COLUMN": per_column, "HAS_TIES": has_ties} | sizes
                constants |= {"HAS_SPILL": has_spill, "ROOM": 128}
                types = [H, F, S, S, S, S, S, S, F, S, F, INT, INT]
                yield spill.spill_rows, types, constants, 8


def products() -> Iterator[Case]:
    for has_spill in FLAGS:
        sizes = {"CAPACITY": 32, "HAS_SPILL": has_spill, "BLOCK": 1024, "EACH": 4}
        yield sparse.rescore_lists, [F, F, F, F, S, S, S, F, H, INT, INT], sizes, 4
        constants = {"CAPACITY": 32, "HAS_SPILL": has_spill}
        yield sparse.scale_lists, [F, F, S, F, F, INT, INT], constants, 1
        for W in (F, H):
            yield sparse.products_of_lists, [F, W, S, S, S, F, INT], sizes, 4
            types = [F, W, F, S, F, S, S, F, W, F, F, INT, INT]
            yield sparse.decode_error_of_lists, types, sizes | {"HAS_LOWER": W == H}, 4
            types = [F, W, F, S, F, F, S, S, F, W, F, F, F, F, INT]
            yield pairs.decode_pair_of_lists, types, sizes | {"HAS_LOWER": W == H}, 4
            for has_bias in FLAGS:
                constants = sizes | {"HAS_BIAS": has_bias}
                yield sparse.decode_lists, [W, F, S, F, S, S, S, F, INT], constants, 4
            types = [F, W, F, L, S, F, S, S, S, F, W, F, F, F, INT]
            yield sparse.nested_errors_of_lists, types, sizes | {"GROUPS": 5}, 4
            yield from walks(W, sizes)
    for has_left in FLAGS:
        constants = {"HAS_LEFT": has_left, "PIECE": 256, "BLOCK": 1024}
        yield columns.add_pieces, [S, L, S, F, F, F, F, F, F, INT, INT], constants, 4
        of_rows = {"HAS_LOWER": has_left, "BLOCK": 1024}
        yield sparse.error_of_parts, [F, F, F, S, S, F, H, F, INT, INT], of_rows, 4
    for W in (F, H):
        sizes = {"CAPACITY": 32, "BLOCK": 1024, "EACH": 4}
        yield sparse.sums_of_parts, [W, S, F, S, S, S, F, INT], sizes, 4
        yield sparse.products_of_parts, [F, W, S, S, S, S, F, INT, INT], sizes, 4
    yield columns.totals_by_columns, [F, L, S, F], {"BLOCK": 64}, 1
    for keys in ("*i16", S):
        yield columns.keys_of_lists, [S, S, keys, INT, INT], {"CAPACITY": 32, "WIDE": 1024}, 4
        yield columns.offsets_of_columns, [keys, S, INT, INT], {"HALVINGS": 20, "WIDE": 64}, 1


def walks(W: str, sizes: dict[str, Any]) -> Iterator[Case]:
    """Yield the sums over entries by column, for rows of a type."""
    types = [W, W, F, L, S, S, L, S, F, F, F, F, F, F, F, F, INT, INT]
    for groups in (1, 5):
        for has_left in FLAGS:
            for is_added in FLAGS:
                constants = {"GROUPS": groups, "HAS_LEFT": has_left, "IS_ADDED": is_added}
                constants |= {"HAS_SCALES": not is_added, "PIECE": 256}
                yield columns.walk_columns, types, sizes | constants, 4


def resources(binary: bytes) -> tuple[int, int]:
    """Return registers of a thread, and bytes that lie on its stack, in memory, because they do not fit those."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        tool = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        told = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", told)
    return int(registers), int(stack)


target = GPUTarget("cuda", int(sys.argv[1]), 32)
compiled: set[str] = set()
for kernel, types, constants, warps in cases():
    if kernel.__name__ in compiled and sys.argv[2:] == ["first"]:
        continue
    signature = dict(zip(kernel.arg_names, types, strict=False))
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constants)
    binary = triton.compile(source, target=target, options={"num_warps": warps}).asm["cubin"]
    compiled.add(kernel.__name__)
    registers, stack = resources(binary)
    sys.stdout.write(
        f"{kernel.__name__} {types} {constants} {registers} registers, {stack} bytes of stack\n"
    )
    if stack > MOST_STACK:
        sys.exit(
            f"{kernel.__name__} {types} {constants}: {stack} bytes a thread do not fit registers"
        )
written = {
    name
    for module in map(gpu.load, gpu.MODULES)
    for name, member in vars(module).items()
    if name.endswith(
        (
            "_rows",
            "_lists",
            "_weights",
            "_products",
            "_columns",
            "_dense",
            "_pieces",
            "_parts",
            "_keys",
            "_parts",
            "_first",
            "_flagged",
            "_silent",
            "_share",
            "_term",
        )
    )
    and isinstance(member, triton.JITFunction)
}
if written - compiled:
    sys.exit(f"never compiled: {sorted(written - compiled)}")

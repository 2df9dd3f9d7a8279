"""Compile every Triton kernel for a GPU, which needs none: compile_kernels.py CAPABILITY."""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from saeflow.operators.gpu import kernels

ROWS = {"BLOCK": 32768}
F, D, S, L = "*fp32", "*fp64", "*i32", "*i64"
SIGNATURES = {
    "topk_rows": ([F, L, L, L, F, S, "i32"], [ROWS]),
    "simplex_rows": (
        [F, D, F, S, "i32"],
        [
            {**ROWS, "SQUARES": squares, "LINEAR": linear}
            for squares, linear in ((False, True), (True, False), (False, False))
        ],
    ),
    "soft_topk_rows": ([F, D, "fp32", "fp32", F, F, F, S, "i32"], [ROWS]),
    "sum_rows": ([F, L, L, F, F, "i32"], [{"BLOCK": 256}]),
    "row_products": ([F, F, L, L, L, F, "i32"], [{"BLOCK": 1024}]),
}

target = GPUTarget("cuda", int(sys.argv[1]), 32)
for name, (types, variants) in SIGNATURES.items():
    kernel = getattr(kernels, name)
    for constants in variants:
        names = kernel.arg_names
        signature = dict(zip(names, types, strict=False)) | dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel, signature, constants)
        compiled = triton.compile(source, target=target, options={"num_warps": 32})
        sys.stdout.write(f"{name} {constants} {len(compiled.asm['cubin'])} bytes\n")

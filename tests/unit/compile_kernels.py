"""Compile every kernel for Hopper, without a GPU, as it is launched at the 8B shape. Run by test_kernels.py.

python tests/unit/compile_kernels.py RANK
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from minitune.kernels import adamw, four_bits, launch, low_rank, norm, rotary, softmax, swiglu

BF16, FP32, U8, I64 = "*bf16", "*fp32", "*u8", "*i64"
POINTERS = {
    "factor": FP32, "dweight": FP32, "cos": FP32, "sin": FP32, "seeds": I64, "labels": I64, "losses": FP32, "ha": FP32,
    "packed": U8, "absmax": U8, "nested_absmax": FP32, "offset": FP32, "nested_levels": FP32, "levels": FP32,
}  # fmt: skip
NUMBERS = {"eps": "fp32", "scale": "fp32", "keep_scale": "fp32"}
COUNTS = ("D", "N", "C", "F", "V", "H", "K", "n", "half", "row", "x_row", "threshold", "SPAN", "GRADIENTS")


def is_even(name: str, kind: str) -> bool:
    """Whether it is a multiple of 16 at that shape, as Triton finds out for itself when it launches a kernel."""
    return kind.startswith("*") or name in ("D", "N", "C", "F", "V", "half", "x_row", "SPAN", "GRADIENTS")


SHARED: dict[str, int] = {}  # bytes of a processor's shared memory, by kernel


def compile_kernel(kernel, warps=4, pointers=(), stages=3, **constants) -> None:
    names = kernel.arg_names

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        return (
            dict(pointers).get(name) or POINTERS.get(name) or NUMBERS.get(name) or ("i32" if name in COUNTS else BF16)
        )

    source = ASTSource(
        kernel,
        signature={name: kind(name) for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in names if is_even(name, kind(name))},
    )
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages})
    assert done.metadata.shared <= 227 * 1024, (kernel, done.metadata.shared)
    SHARED[kernel.__name__] = done.metadata.shared


def main(r: int) -> None:
    compile_kernel(launch.one_kernel, pointers=[("out", "*i32")])
    compile_kernel(norm.norm_kernel, 8, ADDED=True, SIZE=4096)
    compile_kernel(norm.norm_backward_kernel, 8, TOO=True, WEIGHT=True, SIZE=4096)
    compile_kernel(softmax.cross_entropy_kernel, 8, SIZE=4096)
    compile_kernel(four_bits.dequantize_kernel, 8, SIZE=4096)
    moments = [(f"{name}{part}", FP32) for name in ("mean", "square") for part in ("_scale", "_levels", "_borders")]
    for eight in (False, True):
        kinds = [*moments, ("lower", "*i16"), *((name, U8 if eight else FP32) for name in ("mean", "square"))]
        kinds += [("rate", FP32), *((name, "fp32") for name in ("lr", "weight_decay", "beta1", "beta2"))]
        compile_kernel(adamw.adamw_kernel, 2, kinds, EIGHT=eight, BLOCK=256, SIZE=512)
    ranks = {"R": r, "RANKS": r}
    thin = {**ranks, "n": 3, "COLUMNS": 128, "stages": low_rank.stages(r)}
    compile_kernel(low_rank.down_kernel, **thin, ROWS=64)
    compile_kernel(low_rank.gradient_kernel, pointers=[("out", FP32)], **thin, ROWS=64)
    compile_kernel(low_rank.up_kernel, **thin, ROWS=64)
    for drop in (False, True):
        tile = {**ranks, "ADAPTED": True, "DOWN": True, "DROP": drop, "STAGES": 3}
        tile |= {"ROWS": swiglu.ROWS, "COLUMNS": swiglu.COLUMNS}
        compile_kernel(swiglu.swiglu_kernel, 2, **tile)
        for again in (False, True):
            compile_kernel(swiglu.swiglu_backward_kernel, pointers=[("found", FP32)], **tile, AGAIN=again)
    compile_kernel(rotary.turn_kernel, 2, **ranks, ADAPTED=True, ROWS=16, HALF=64, HEADS=20)
    compile_kernel(rotary.turn_backward_kernel, **ranks, ADAPTED=True, ROWS=16, HALF=64)
    largest = ["down_kernel", "gradient_kernel", "swiglu_backward_kernel"]  # those that byhand.largest_kernels launches
    assert sorted(SHARED, key=SHARED.get)[-3:] == sorted(largest, key=SHARED.get), SHARED
    print("13 kernels compile")


main(int(sys.argv[1]))

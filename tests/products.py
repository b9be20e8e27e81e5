"""Library products whose last bit depends on where in the batch a value stands, as it may anywhere.

Which kernel of a BLAS, LAPACK or oneDNN multiplies a row, and in what order it sums, depends on the
processor, and there on the sizes, strides, alignment and threads of the call: on one machine a row
has the same bits in any batch, on another it has not. `perturbed` moves each value of such a
product by one unit in the last place, up, down or not at all, by a hash of its place and of all
that. The same call gives the same bits again, as a library's does. A test that promises more than
that fails then on every machine.
"""

import contextlib
import functools
import warnings
import zlib

import numpy as np
import torch

# What calls a library on the CPU. matmul, linear, einsum, mv and conv*d end in these, as do all
# derivatives.
# fmt: off
PRODUCTS = (
    "mm", "mm.out", "addmm", "addmm.out", "addmm_", "bmm", "bmm.out", "baddbmm", "baddbmm.out",
    "baddbmm_", "addmv", "addmv.out", "addmv_", "dot", "vdot", "convolution",
    "convolution_backward", "linalg_cholesky_ex", "_cholesky_solve_helper", "_linalg_solve_ex",
    "linalg_lu_factor_ex", "linalg_lu_solve", "linalg_solve_triangular", "linalg_inv_ex",
    "_linalg_eigh", "_linalg_svd",
)
# fmt: on

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _layout(argument):
    """What of an argument may decide how a library goes about it."""
    if isinstance(argument, torch.Tensor):
        steps = [(n, s) for n, s in zip(argument.shape, argument.stride(), strict=True) if n > 1]
        return argument.dtype, tuple(argument.shape), tuple(steps), argument.data_ptr() % 64
    return argument


def _moves(shape, key, integer):
    """-1, 0 or 1 for each place."""
    hashed = np.arange(np.prod(shape, dtype=np.uint64), dtype=np.uint64) + np.uint64(key)
    hashed *= np.uint64(0x9E3779B97F4A7C15)
    hashed ^= hashed >> np.uint64(31)
    hashed *= np.uint64(0xBF58476D1CE4E5B9)
    moves = (hashed >> np.uint64(33)) % np.uint64(3)
    return torch.from_numpy(moves.astype(np.int64) - 1).reshape(shape).to(integer)


_kept_moves = functools.lru_cache(1000)(_moves)


def _move(t, key):
    if not (isinstance(t, torch.Tensor) and t.is_floating_point() and t.numel()):
        return
    integer = _INTEGERS[t.element_size()]
    moves = (_kept_moves if t.numel() < 1000 else _moves)(tuple(t.shape), key, integer)
    t.view(integer).add_(moves * (t.isfinite() & (t != 0)))  # a sum of nothing is 0 anywhere


def _override(name, plain):
    def product(keys, *args, **kwargs):
        layouts = [_layout(a) for a in (*args, *kwargs.values())]
        key = zlib.crc32(repr((name, layouts, torch.get_num_threads())).encode())
        found = plain.call_boxed(keys, *args, **kwargs)
        with torch._C.DisableTorchFunction():
            for t in found if isinstance(found, tuple) else (found,):
                _move(t, key)
        return found

    return product


@functools.cache
def _kernels():
    return {name: torch.library.get_kernel(f"aten::{name}", "CPU") for name in PRODUCTS}


@contextlib.contextmanager
def perturbed():
    """torch's products on the CPU, in every thread, until the block ends."""
    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():  # torch warns of what is the purpose here
            warnings.simplefilter("ignore")
            for name, plain in _kernels().items():
                library.impl(name, _override(name, plain), "CPU", with_keyset=True)
        yield
    finally:
        library._destroy()

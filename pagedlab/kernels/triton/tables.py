"""``block_of(entries, index, row, i)`` in Triton, one function a layout.

``entries`` and ``index`` are pointers to int32, ``row`` is a scalar, ``i`` a scalar or a tensor of logical indices
within the table. The answer has the shape of ``i``. A kernel takes the function as a ``tl.constexpr``: it is inlined.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
import triton
import triton.language as tl


@triton.jit
def padded(entries, index, row, i):
    """Look into a matrix of ``index[0]`` columns."""
    return tl.load(entries + row * tl.load(index).to(tl.int64) + i)


@triton.jit
def csr(entries, index, row, i):
    """Look into the row's piece, which begins at ``index[row]``."""
    return tl.load(entries + tl.load(index + row) + i)

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


@triton.jit
def two_level(entries, index, row, i):
    """Look into the row's directory for the page, and into the page: ``index`` is page size, width, directories."""
    page, width = tl.load(index), tl.load(index + 1)
    at = tl.load(index + 2 + row * width + i // page).to(tl.int64)
    return tl.load(entries + at * page + i % page)


@triton.jit
def extents(entries, index, row, i):
    """Search the row's runs, pairs of first logical and first physical block, for the last that begins at or before."""
    begin, runs = tl.load(index + 2 * row), tl.load(index + 2 * row + 1)
    low, high = i * 0, i * 0 + runs - 1
    left = runs
    while left > 1:
        middle = (low + high + 1) // 2
        right = tl.load(entries + begin + 2 * middle) <= i
        low = tl.where(right, middle, low)
        high = tl.where(right, high, middle - 1)
        left = (left + 1) // 2
    return tl.load(entries + begin + 2 * low + 1) + i - tl.load(entries + begin + 2 * low)

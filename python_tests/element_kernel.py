"""A Triton kernel that stores term and grad of a divergence, element by element."""

import triton
import triton.language as tl


@triton.jit
def both(lp_ptr, lq_ptr, term_ptr, grad_ptr, a, b, n, TERM: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr):
    """lp, lq, term, grad [n]; a, b numbers."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    lp = tl.load(lp_ptr + i, mask=inside, other=0.0)
    lq = tl.load(lq_ptr + i, mask=inside, other=0.0)
    tl.store(term_ptr + i, TERM(lp, lq, a, b), mask=inside)
    tl.store(grad_ptr + i, GRAD(lp, lq, a, b), mask=inside)

"""Transport plans between the patches of images and the prompts of classes: entropic optimal transport.

Of all plans T [M, N] with given sums of rows and columns, the one that minimises ⟨1 − S, T⟩ − ε·H(T), with
H(T) = −Σ T·(log T − 1). It has the form diag(u)·K·diag(v) with the kernel K = exp((S − 1)/ε). Where the sums are equal
to the given ones, Sinkhorn's scaling finds u and v (Marco Cuturi, NIPS 2013, arXiv:1306.0895); where those of rows are
only bounded, Dykstra's (Jean-David Benamou et al., SIAM Journal on Scientific Computing 2015, arXiv:1412.5154).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# entries of S that are solved together, to bound the temporaries: on a CPU few, for its cache
SLICE_ON_CPU, SLICE_ELSEWHERE = 1 << 17, 1 << 26
# sweeps between two looks at whether all problems have stopped, for which the host waits
LOOK_ON_CPU, LOOK_ELSEWHERE = 1, 8


@dataclass(frozen=True)
class Transport:
    """Which plan is sought, and when the search ends.

    With `mass` γ in (0, 1], columns sum to γ/N and rows to at most 1/M. With None, the balanced problem, columns sum to
    1/N and rows to 1/M; rows of an unbalanced plan with γ = 1 do so too, but it takes far more sweeps.

    A sweep scales rows by a new u, then columns by a new v. With `stopping` "problem" each problem stops by itself,
    after a sweep in which no entry of v moved by a factor of exp(`threshold`) or more. Then columns are exact, balanced
    rows are right to that factor, and capped ones exceed the cap by no more. How far T is from its limit depends also
    on how fast the problem converges, which is slowly for a small ε and for γ near 1.

    "stack" is the rule of FedOTP's authors: all problems stop together, after a sweep that moved v (u in the balanced
    problem) by less than `threshold` in the mean over all of them, whatever their size. Under either rule the sweeps
    end at `max_sweeps`; columns are exact then too, but rows may not be.
    """

    entropy: float  # ε, positive
    mass: float | None
    threshold: float = 1e-3
    max_sweeps: int = 100
    stopping: Literal["problem", "stack"] = "problem"


def transport_plan(similarity: Tensor, transport: Transport) -> Tensor:
    """The plans T [..., M, N] for similarities S [..., M, N] of M patches and N prompts, without gradient.

    In float32, or in float64 if S is, whatever autocast says, and in logarithms, so that no ε is too small. If no row
    reaches its cap, T is γ/N · softmax of S/ε over the patches. Unless they stop as a stack, each plan depends on its
    own S only, on a CPU to the last bit.
    """
    *leading, patches, prompts = similarity.shape
    with torch.no_grad(), torch.autocast(similarity.device.type, enabled=False):
        exact = similarity.to(torch.promote_types(similarity.dtype, torch.float32))
        stack = exact.mT.reshape(math.prod(leading), prompts, patches).contiguous()
        plans = torch.empty_like(stack)
        size = max(1, (SLICE_ON_CPU if stack.device.type == "cpu" else SLICE_ELSEWHERE) // (patches * prompts))
        if transport.stopping == "stack":
            size = max(1, len(stack))
        for part, out in zip(torch.split(stack, size), torch.split(plans, size), strict=True):
            _solve(part, transport, out)
    return plans.reshape(*leading, prompts, patches).mT


def _solve(similarity: Tensor, transport: Transport, out: Tensor) -> None:
    """Write the plans for similarities [P, N, M] into `out` [P, N, M]; the long axis last, where torch is faster.

    u, v and K are held as logarithms. Each column of K is divided by its largest entry and v multiplied by it, `shift`,
    so that all stay near 0 for any ε.
    """
    largest = similarity.amax(-1, keepdim=True)
    kernel, shift = (similarity - largest) / transport.entropy, (largest - 1) / transport.entropy
    row_sum, column_sum = -math.log(kernel.shape[2]), math.log((transport.mass or 1.0) / kernel.shape[1])
    u, v = torch.zeros_like(kernel[:, :1]), shift  # [P, 1, M] and [P, N, 1]; they start from 1, v before the division
    moving = torch.ones_like(kernel[:, :1, :1], dtype=torch.bool)
    look = LOOK_ON_CPU if kernel.device.type == "cpu" else LOOK_ELSEWHERE
    for sweep in range(1, transport.max_sweeps + 1):
        new_u = row_sum - torch.add(kernel, v, out=out).logsumexp(1, keepdim=True)
        if transport.mass is not None:
            new_u.clamp_(max=0)  # a factor of at most 1: rows below their cap are left alone
        new_v = column_sum - torch.add(kernel, new_u, out=out).logsumexp(2, keepdim=True)
        if transport.stopping == "problem":
            moved = (new_v - v).abs().amax(1, keepdim=True)
        elif transport.mass is None:
            moved = (new_u.exp() - u.exp()).abs().mean()
        else:
            moved = ((new_v - shift).exp() - (v - shift).exp()).abs().mean()
        u, v = torch.where(moving, new_u, u), torch.where(moving, new_v, v)
        moving &= ~(moved < transport.threshold)  # not >=, for v may overflow under "stack": then the sweeps go on
        if sweep % look == 0 and not bool(moving.any()):
            break
    # u·K·v, for v is what makes the columns sum to their share; so they do whatever the rounding of large logarithms
    out.copy_(torch.add(kernel, u, out=out).softmax(2)).mul_(math.exp(column_sum))

"""Transport plans between the patches of images and the prompts of classes: entropic optimal transport.

Of all plans T [M, N] with given sums of rows and columns, the one that minimises ⟨1 − S, T⟩ − ε·H(T), with
H(T) = −Σ T·(log T − 1). It has the form diag(u)·K·diag(v) with the kernel K = exp((S − 1)/ε). Where the sums are equal
to the given ones, Sinkhorn's scaling finds u and v (Marco Cuturi, NIPS 2013, arXiv:1306.0895); where those of rows are
only bounded, Dykstra's (Jean-David Benamou et al., SIAM Journal on Scientific Computing 2015, arXiv:1412.5154). For two
prompts v has two entries, which Newton's method finds in few steps: see `_newton`.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

# entries of S that are solved together, to bound the temporaries: on a CPU few, for its cache
SLICE_ON_CPU, SLICE_ELSEWHERE = 1 << 18, 1 << 24
# sweeps or steps between two looks at whether all problems have stopped, for which the host waits
LOOK_ON_CPU, LOOK_ELSEWHERE = 1, 8

# Newton's method: how far a column may be from its sum, relatively
TOLERANCE = {torch.float32: 2.0**-20, torch.float64: 2.0**-36}
# steps at most, of which 107 are the most ever seen (ε = 10⁻⁴ in float64); what a step may leave of the error
STEPS, PROGRESS = 160, 0.8
# logarithms: how far a step goes where that changes next to nothing, padding of the bracket, what counts as infinite
REACH, PADDING, FAR = 8.0, 0.01, 80.0


@dataclass(frozen=True)
class Transport:
    """Which plan is sought, and when the search ends.

    With `mass` γ in (0, 1], columns sum to γ/N and rows to at most 1/M. With None, the balanced problem, columns sum to
    1/N and rows to 1/M; rows of an unbalanced plan with γ = 1 do so too, but for N ≠ 2 it takes far more sweeps.

    With `stopping` "problem" and N = 2, each problem is solved to rounding: columns are exact, and rows too, but for
    10⁻⁶ of their cap in float32 and 10⁻¹¹ in float64. `threshold` and `max_sweeps` mean nothing then; they end the
    sweeps that find all other plans. A sweep scales rows by a new u, then columns by a new v.

    With "problem" and N ≠ 2 each problem stops by itself, after a sweep in which no entry of v moved by a factor of
    exp(`threshold`) or more. Then columns are exact, balanced rows are right to that factor, and capped ones exceed the
    cap by no more. How far T is from its limit depends also on how fast the problem converges, which is slowly for a
    small ε and for γ near 1.

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
    own S only, on a CPU to the last bit. Plans for N = 2 are laid out as [N, ..., M] in memory, and cost least if S is
    so too.
    """
    *leading, patches, prompts = similarity.shape
    with torch.no_grad(), torch.autocast(similarity.device.type, enabled=False):
        exact = similarity.to(torch.promote_types(similarity.dtype, torch.float32))
        size = max(1, (SLICE_ON_CPU if exact.device.type == "cpu" else SLICE_ELSEWHERE) // (patches * prompts))
        if prompts == 2 and transport.stopping == "problem":
            columns = exact.movedim(-1, 0).reshape(prompts, math.prod(leading), patches)
            plans = torch.empty_like(columns)
            work = columns.new_empty((7, min(size, columns.shape[1]), patches))
            for part, out in zip(torch.split(columns, size, 1), torch.split(plans, size, 1), strict=True):
                _newton(part, transport, work[:, : part.shape[1]], out)
            return plans.reshape(prompts, *leading, patches).movedim(0, -1)
        stack = exact.mT.reshape(math.prod(leading), prompts, patches).contiguous()
        plans = torch.empty_like(stack)
        if transport.stopping == "stack":
            size = max(1, len(stack))
        for part, out in zip(torch.split(stack, size), torch.split(plans, size), strict=True):
            _sweep(part, transport, out)
    return plans.reshape(*leading, prompts, patches).mT


def _sweep(similarity: Tensor, transport: Transport, out: Tensor) -> None:
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


class _Bracket(NamedTuple):
    """Where x is: low[k] < x[k] < high[k] [2, P], and least < x[0] − x[1] < most [P]."""

    low: Tensor
    high: Tensor
    least: Tensor
    most: Tensor

    def holds(self, x: Tensor) -> Tensor:
        """Whether x is inside, [P]."""
        difference = x[0] - x[1]
        return ((self.low < x) & (x < self.high)).all(0) & (self.least < difference) & (difference < self.most)

    def centre(self) -> Tensor:
        """The x in the middle of the differences that are left, and then of the values that are left with it."""
        (low, high), least, most = (self.low, self.high), self.least, self.most
        difference = (torch.maximum(least, low[0] - high[1]) + torch.minimum(most, high[0] - low[1])) / 2
        first = (torch.maximum(low[0], low[1] + difference) + torch.minimum(high[0], high[1] + difference)) / 2
        return torch.stack((first, first - difference))

    def narrowed(self, x: Tensor, excess: Tensor) -> "_Bracket":
        """What is left once columns are known to sum to `excess` too much at x.

        A column gains from its own entry of x and loses to the other, and adding the same to both takes from neither.
        So if neither sums to too much, no entry is too large; and if one sums to too little and the other to too much,
        the first is too small compared with the second.
        """
        short, over, difference = excess < 0, excess > 0, x[0] - x[1]
        return _Bracket(
            torch.where(short & ~over.flip(0), x, self.low),
            torch.where(over & ~short.flip(0), x, self.high),
            torch.where(short[0] & over[1], difference, self.least),
            torch.where(over[0] & short[1], difference, self.most),
        )


def _newton(similarity: Tensor, transport: Transport, work: Tensor, out: Tensor) -> None:
    """Write the plans for similarities [2, P, M] into `out` [2, P, M]; `work` [7, P, M] is written over.

    With x = log v, row m could carry w_m = Σ_k K_mk·exp(x_k); it carries min(w_m, 1) in units of its cap, and divides
    that between the prompts like w_m. Sought is the x with which both columns sum to γ·M/2. (It is where a convex
    function is least, so x need not be unique, but T is.) Newton's method finds it once it is near. A step that leaves
    the bracket, or that follows one which took too little off the error, is replaced by one to the centre of the
    bracket, which so shrinks in any case.
    """
    mass = transport.mass or 1.0
    full, wanted = mass >= 1, mass * similarity.shape[2] / 2  # where all rows are full, only x[0] − x[1] matters
    kernel, contrast, work = work[:2], work[2], work[3:]
    torch.sub(similarity, similarity.amax(-1, keepdim=True), out=kernel).div_(transport.entropy)
    torch.sub(kernel[0], kernel[1], out=contrast)
    x, bracket = _start_full(contrast) if full else _start(kernel, mass, work[:2])
    last = torch.full_like(x[0], math.inf)  # the error before a step of Newton's
    look = LOOK_ON_CPU if kernel.device.type == "cpu" else LOOK_ELSEWHERE
    for step in range(1, STEPS + 1):
        sums, loose, exchange = _evaluate(kernel, contrast, x, work, full)
        excess = sums - wanted
        size = excess.abs()
        wrong, error = size > TOLERANCE[kernel.dtype] * wanted, size.amax(0)  # NaN is not wrong, so that it ends
        moving = wrong.any(0)
        if step % look == 0 and not bool(moving.any()):
            break
        bracket = bracket.narrowed(x, torch.where(wrong, excess, 0))  # rounding must not decide which column is short
        near = x + _newton_step(excess, loose, exchange)
        trusted = bracket.holds(near) & (error < PROGRESS * last)
        last = torch.where(trusted, error, math.inf)
        x = torch.where(moving, torch.where(trusted, near, bracket.centre()), x)
    torch.mul(work[2:], (mass / 2 / sums).to(kernel.dtype)[..., None], out=out)


def _start(kernel: Tensor, mass: float, work: Tensor) -> tuple[Tensor, _Bracket]:
    """The x [2, P] that would do if no row had a cap, hence none of its entries too large; and a bracket.

    As not all rows are full, one of them carries less than γ; and so does each of its entries K·exp(x).
    """
    x = math.log(mass * kernel.shape[2] / 2) - _exp(work.copy_(kernel)).sum(-1).double().log()
    low, high = x - PADDING, math.log(mass) - kernel.amin(-1).double() + PADDING
    return x, _Bracket(low, high, low[0] - high[1], high[0] - low[1])


def _start_full(contrast: Tensor) -> tuple[Tensor, _Bracket]:
    """An x [2, P] whose entries sum to 0, as they always do while all rows are full, and a bracket.

    Outside of it, all rows would prefer the same prompt.
    """
    least, most = -contrast.amax(-1).double() - PADDING, -contrast.amin(-1).double() + PADDING
    half = -contrast.mean(-1).double() / 2
    bracket = _Bracket(torch.stack((least, -most)) / 2, torch.stack((most, -least)) / 2, least, most)
    return torch.stack((half, -half)), bracket


def _evaluate(kernel: Tensor, contrast: Tensor, x: Tensor, work: Tensor, full: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The column sums [2, P] of T at x [2, P], and what their derivative H [2, 2] is made of; T itself in `work[2:]`.

    In units of the cap. `loose` U [2, P] is what rows below their cap give to each column, `exchange` X [P] is
    Σ T[0]·T[1] over full rows; H = diag(U) + X·[[1, −1], [−1, 1]]. All in place, for new memory costs more than sums.
    """
    (rows, free), plan = work[:2], work[2:]
    totals = torch.zeros((5, len(contrast)), dtype=work.dtype, device=work.device)
    _exp(_add(contrast, x[0] - x[1], out=plan[0]))  # how many times as much a row carries to the first prompt
    torch.add(plan[0], 1, out=plan[1]).reciprocal_()
    plan[0] *= plan[1]
    if full:
        torch.mul(plan[0], plan[1], out=rows)
    else:
        _exp(_add(kernel, x, out=work[:2]))
        rows += free
        torch.lt(rows, 1, out=free)  # 1 for a row below its cap; torch is slow where masks are Boolean
        plan *= rows.clamp_(max=1)
        torch.mul(plan[0], free, out=rows)
        torch.sum(rows, -1, out=totals[2])
        torch.sub(plan[0], rows, out=rows).mul_(plan[1])
        torch.sum(free.mul_(plan[1]), -1, out=totals[3])
    torch.sum(rows, -1, out=totals[4])
    torch.sum(plan, -1, out=totals[:2])
    totals = totals.double()
    return totals[:2], totals[2:4], totals[4]


def _newton_step(excess: Tensor, loose: Tensor, exchange: Tensor) -> Tensor:
    """−H⁻¹·excess [2, P], with U so large at least that no entry exceeds `REACH`, though H be singular."""
    damped = torch.maximum(loose, excess.abs() / REACH).clamp_(min=1e-30)
    determinant = damped.prod(0) + exchange * damped.sum(0)
    return -(excess * damped.flip(0) + exchange * excess.sum(0)) / determinant


def _add(logarithms: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """`logarithms` [..., M] + x [...] of float64: in two parts, so that large ones cancel and leave no error."""
    large = x.to(logarithms.dtype)
    return torch.add(logarithms, large[..., None], out=out).add_((x - large).to(logarithms.dtype)[..., None])


def _exp(logarithms: Tensor) -> Tensor:
    """The exponential, in place, but for what the plan cannot tell from 0 or infinity, where torch is slow.

    Not `exp2` or `sigmoid`: on a CPU these round otherwise at the ends of a tensor, so that neighbours would matter.
    """
    return logarithms.clamp_(-FAR, FAR).exp_()

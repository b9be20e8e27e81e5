"""The formulas of BiCGSTAB for u = M u + v, one product a step; csrc/math/bicgstab.h has them too.

A row holds an iterate or a direction, and g of it. v is never asked for: with the last iterate that
was judged, x′, and g(x′), a direction y is evaluated at x = x′ + τ y, and M y = (g(x) − g(x′)) / τ
whatever v is. τ is a power of two by which ‖τ y‖ comes near ‖g(x′)‖, so that the difference keeps
its digits. Residuals and directions are kept in a unit of their own, the power of two by which
‖g(x′) − x′‖ comes near 1: no sum of squares under- or overflows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..record import ACTIVE, FALL, GROWTH
from .formulas import Rows, Rule, _freeze, _larger_gain, _noise, _norm, _put, _scale, _stop, _wide

__all__ = ["NUMBERS", "STATES", "VECTORS", "bicgstab", "iterate"]

# What a row of x is, in counters[:, WINDOW]; csrc/math/bicgstab.h has the same, and what follows.
ITERATE, FIRST, SECOND = range(3)
STATES = 2  # of base, [B, STATES, N] in the state's dtype: x′, g(x′)
# Of vectors, [B, VECTORS, N] in the accumulate dtype, in the unit of the residual: what the
# solution is beyond x′; its residual; p; (1 − M) p.
VECTORS = 4
# Columns of numbers, [B, NUMBERS] in the accumulate dtype: the unit, as what residuals are
# multiplied by; τ, as what a direction is; ρ and α of the last p; the norms of p and (1 − M) p.
UNIT, STEP, RHO, ALPHA, P_NORM, Q_NORM = range(6)
NUMBERS = 6

SLANT = 0.7  # the least cosine between s and (1 − M) s that ω is taken by
LOST = 32  # a square of a norm that is so many roundings of its terms is unknown: it is measured


def bicgstab(
    rows: Rows,
    k: Tensor,
    rule: Rule,
    x: Tensor,
    gx: Tensor,
    base: Tensor,
    vectors: Tensor,
    numbers: Tensor,
) -> tuple[Rows, Tensor, Tensor, Tensor, Tensor]:
    """One product's step; see `reference.bicgstab_step` for what it does.

    Args:
        rows: the record; `window` says what x is.
        k: which product this is, from 1; without dimensions.
        rule: when rows stop.
        x: iterates or directions, [R, N].
        gx: g(x), [R, N].
        base: [R, STATES, N].
        vectors: [R, VECTORS, N].
        numbers: [R, NUMBERS].

    Returns:
        The record; what to evaluate next, where a row ended its result, of ended ones x; and base,
        vectors and numbers.
    """
    xa, ga = _wide(rows, x), _wide(rows, gx)
    running, eps = rows.status == ACTIVE, torch.finfo(rows.residual.dtype).eps
    judged = running & (rows.window == ITERATE)
    first, second = (running & (rows.window == phase) for phase in (FIRST, SECOND))
    residual, value = _norm(ga - xa), _norm(ga)
    _, new = _stop(rows, k, rule, residual, value, judged)
    new = new._replace(iterations=torch.where(running, k.to(new.iterations), rows.iterations))
    begins = judged & (new.status == ACTIVE)
    last = k + 1 >= rule.most  # the last product is of an iterate

    # A direction: y, its product, and the step along it.
    unit, tau, rho, alpha, p_norm, q_norm = numbers.unbind(1)
    old, g_old = (_wide(rows, t) for t in base.unbind(1))
    d, r, p, q = vectors.unbind(1)
    dx, dg = xa - old, ga - g_old
    y, my = dx / tau[:, None], dg / tau[:, None]
    z, hat = y - my, (g_old - old) * unit[:, None]
    there = old * unit[:, None] + d
    pairs = (y, y), (my, my), (z, z), (hat, z), (hat, r), (r, z), (r, r), (there, there)
    yy, mm, zz, hz, hr, rz, rr, solution = ((a * b).sum(1) for a, b in pairs)
    start, z_norm = unit * rows.residual, zz.sqrt()  # start: ‖r̂‖
    along = torch.where(rz < 0, -1, 1) * torch.maximum(rz.abs(), SLANT * rr.sqrt() * z_norm)
    length = torch.where(first, hr / hz, along / zz)
    noise = _noise(rows.value, x.dtype)
    sound = (tau * z_norm > noise) & length.isfinite()
    sound = sound & ~(first & (hz.abs() <= eps * start * z_norm))
    length = torch.where(sound, length, 0)
    added = torch.where(sound, length**2 * zz, 0)
    square = rr - 2 * torch.where(sound, length * rz, 0) + added
    lost = square <= LOST * eps * (rr + added)
    norm = torch.where(lost, 0, square).sqrt()
    next_rho = hr - length * hz
    factor = next_rho / rho * (alpha / length)
    sound = sound & (first | ((next_rho.abs() > eps * start * norm) & factor.isfinite()))
    sound = sound & (norm <= GROWTH * start)
    better = norm <= FALL * start
    met = better & (norm <= unit * rule.threshold(solution.sqrt() / unit))
    moves = first | second
    leaves = moves & (~sound | met | lost | last)
    goes = moves & ~leaves

    step, steps = length[:, None], (moves & (length != 0))[:, None]
    d, r = torch.where(steps, d + step * y, d), torch.where(steps, r - step * z, r)
    turned, crossed = goes & second, goes & first
    p = torch.where(turned[:, None], r + factor[:, None] * (p - step * q), p)
    q = torch.where(crossed[:, None], z, q)
    bound = norm + factor.abs() * (p_norm + length.abs() * q_norm)  # of the new ‖p‖
    p_norm = torch.where(first, yy.sqrt(), torch.where(turned, bound, p_norm))
    q_norm = torch.where(first, z_norm, q_norm)
    rho, alpha = torch.where(first, hr, rho), torch.where(first, length, alpha)

    # An iterate that goes on: the recursion begins at it.
    held = torch.where(begins[:, None, None], torch.stack((x, gx), 1), base)
    wide = _wide(rows, held[:, 0])
    unit = torch.where(begins, _power(residual), unit)
    r0 = (ga - xa) * unit[:, None]
    d = torch.where(begins[:, None], 0, d)
    r, p = (torch.where(begins[:, None], r0, t) for t in (r, p))
    p_norm = torch.where(begins, unit * residual, p_norm)

    # What is evaluated next: a direction; or to be judged the solution, where that is better than
    # x′, else g(x′), or as the last of all x′.
    ahead = torch.where(crossed, norm, p_norm)
    tau = torch.where(goes | begins, _power(ahead) / _power(new.value + new.residual), tau)
    towards = wide + tau[:, None] * torch.where(crossed[:, None], r, p)
    back = torch.where(last.expand_as(moves)[:, None], held[:, 0], held[:, 1])
    found = torch.where(better[:, None], (wide + d / unit[:, None]).to(x.dtype), back)
    found = torch.where(begins[:, None], gx, found)
    leaves = leaves | (begins & last)
    moved = torch.where(leaves[:, None], found, towards.to(x.dtype))
    moved = torch.where(moves[:, None], moved, _freeze(x, gx, moved, new.status, running))
    phase = torch.where(leaves, ITERATE, torch.where(crossed, SECOND, FIRST)).to(rows.window)

    seen = moves & (yy > 0) & (mm + zz).isfinite()
    ring = _put(rows.ring, k, seen, mm / yy)
    gain = _larger_gain(rows.gain, dg, dg - dx, noise)
    new = new._replace(
        window=torch.where(moves | begins, phase, rows.window),
        ring=ring,
        gain=torch.where(seen, gain, rows.gain),
    )
    kept = torch.stack((unit, tau, rho, alpha, p_norm, q_norm), 1)
    return new, moved, held, torch.stack((d, r, p, q), 1), kept


def iterate(
    window: Tensor, x: Tensor, gx: Tensor, base: Tensor, vectors: Tensor, numbers: Tensor
) -> tuple[Tensor, Tensor]:
    """The iterate and g of it, where x is a direction those that the recursion has.

    Args:
        window: [R], what x is.
        x: [R, N].
        gx: g(x), [R, N].
        base: as in `bicgstab`.
        vectors: likewise.
        numbers: likewise.
    """
    unit = numbers[:, UNIT, None]
    there = base[:, 0] + vectors[:, 0] / unit
    value = there + vectors[:, 1] / unit
    judged = (window == ITERATE)[:, None]
    return torch.where(judged, x, there.to(x.dtype)), torch.where(judged, gx, value.to(x.dtype))


def _power(norm: Tensor) -> Tensor:
    """[R]: the power of two by which a norm comes near 1."""
    return _scale(norm[:, None])[:, 0]

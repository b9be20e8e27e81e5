"""The oracle: every step operator in plain torch, on any device and any float dtype.

The formulas here are written for reading and for testing the others against; the same ones stand
in csrc/math for the native kernels. Nothing here is tuned.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..record import (
    ACTIVE,
    ACTIVE_ROWS,
    FAILED,
    FALL,
    GAIN,
    GROWTH,
    GROWTH_ITERATIONS,
    HEAD,
    ITERATION,
    ITERATIONS,
    LEAST_GAIN,
    MAX_RETREATS,
    NEAR_END,
    NOISE,
    REFERENCE,
    REFERENCE_ITERATION,
    RESIDUAL,
    RETREATS,
    RING,
    RING_START,
    STATUS,
    TRAIL,
    VALUE,
    WINDOW,
    Progress,
    Status,
)

NAME = "reference"


def picard_step(
    p: Progress, x: Tensor, gx: Tensor, beta: float, trail: Tensor | None = None
) -> None:
    """One damped Picard step of every active row; freezes those that finish.

    Args:
        p: the per-sample record; updated.
        x: iterates, [R, N], contiguous; active rows become x + β (g(x) − x), finished rows their
            result, rows that had finished before stay untouched.
        gx: g(x), [R, N], contiguous; only read.
        beta: weight of the new value.
        trail: the iterates before x, [B, TRAIL, N], as far as they were kept, a ring by sample with
            its newest at HEAD: x joins them where the end is near. None: the gain is not measured.
    """
    k = _next(p)
    xa, ga = x.to(p.dtype), gx.to(p.dtype)
    residual, value = _norm(ga - xa), _norm(ga)
    running = _running(p)
    samples, c, scalars = p.samples, p.counters, p.scalars
    s = samples[running]
    before = scalars[samples, RESIDUAL]
    if k > 1 and beta == 1:  # Δg = r and Δx is the residual before
        scalars[s, RING_START + (k - 2) % RING] = (residual / before)[running] ** 2
    status = _stop(p, residual, value, k, running)
    length = c[samples, WINDOW]
    active = running & (status == ACTIVE)

    (rtol, offset, _, most, _), floor = _limits(p)
    threshold = offset + rtol * (value if floor is None else torch.maximum(value, floor))
    near = (residual * (residual / before) ** 2 <= NEAR_END * threshold) | (threshold < 0)
    near |= (c[samples, REFERENCE_ITERATION] != k) | (k + TRAIL >= most)
    keeps = active & (near if k > TRAIL else torch.ones_like(near))
    t = samples[keeps]
    c[t, HEAD] = 1 - c[t, HEAD]
    c[samples[active], WINDOW] = torch.where(keeps, (length + 1).clamp(max=TRAIL), 0)[active]
    if trail is not None:
        trail[t, c[t, HEAD].long()] = x[keeps]
        last = running & ~active & (status != _code(Status.NONFINITE)) & (length > 0)
        last &= residual > 0
        t = samples[last]
        newest, older = c[t, HEAD].long(), torch.where(c[t, WINDOW] > 1, 1 - c[t, HEAD], c[t, HEAD])
        states = xa[last], trail[t, newest].to(p.dtype), trail[t, older.long()].to(p.dtype)
        # A damped x was rounded, and residuals told from it, by Δx/β, are so much the less exact.
        noise = NOISE * torch.finfo(x.dtype).eps / 2 * value[last] / min(beta, 1)
        _measure(p, t, ga[last], states, beta, noise)
    _freeze(p, x, gx, _damped(xa, ga, beta, gx), status, running)


def _measure(
    p: Progress, s: Tensor, g: Tensor, states: Sequence[Tensor], beta: float, noise: Tensor
) -> None:
    """Gain and damped rate of samples that end, from their last iterates, newest first."""
    x, x1, x2 = states
    long = p.counters[s, WINDOW] > 1
    dx, dx1 = x - x1, x1 - x2
    r, r1, r2 = g - x, dx / beta, dx1 / beta
    dr, dr1 = r - r1, r1 - r2
    dg, dg1 = dx + dr, dx1 + dr1
    gain = _larger_gain(torch.zeros_like(noise), dg, dr, noise)
    far = _larger_gain(gain, dg + dg1, dr + dr1, noise)
    p.scalars[s, GAIN] = torch.where(long, far, gain)
    if beta != 1:
        nothing = torch.zeros_like(noise)
        p.scalars[s, RING_START] = _larger_gain(nothing, dg, dx, noise)
        second = RING_START + 1
        rate = _larger_gain(nothing, dg1, dx1, noise)
        p.scalars[s, second] = torch.where(long, rate, p.scalars[s, second])


def _larger_gain(gain: Tensor, dg: Tensor, dr: Tensor, noise: Tensor) -> Tensor:
    residual = _norm(dr)
    ratio = (_norm(dg) / residual) ** 2
    found = torch.where(residual > noise, ratio.clamp(min=LEAST_GAIN), 0)
    return torch.maximum(gain, found)


def anderson_step(
    p: Progress,
    x: Tensor,
    gx: Tensor,
    beta: float,
    ridge: float,
    restart: float,
    values: Tensor,
    residuals: Tensor,
    gram: Tensor,
) -> None:
    """One Anderson (type II) step of every active row; freezes those that finish.

    With d_i = r_i − r_{i−1} over the window, minimises ‖r_k − Σ γ_i d_i‖² + λ tr(DᵀD)‖γ‖² and sets
    x ← g_k − Σ γ_i (g_i − g_{i−1}) − (1 − β)(r_k − Σ γ_i d_i). A sample whose factorisation fails,
    or whose residual exceeds `restart` times its reference, takes a Picard step and restarts its
    window, alone. One whose g or residual is not finite at a mixture goes back to the last iterate
    where they were, x', and takes x' + β r' instead; if g fails there too, half of the step, and so
    on, MAX_RETREATS times in a solve. After that it takes Picard steps alone.

    Args:
        p: the per-sample record; updated, as in `picard_step`.
        x: iterates, [R, N]; moved.
        gx: g(x), [R, N].
        beta: weight of the new value.
        ridge: λ, relative to the trace of the differences' Gram matrix.
        restart: growth of the residual that restarts the window.
        values: g(x) of the window, [B, m, N], a ring by sample with its newest at HEAD.
        residuals: g(x) − x likewise.
        gram: unused here (the oracle forms it anew); the native kernels refresh one row of it.
    """
    del gram
    m = values.shape[1]
    k = _next(p)
    xa, ga = x.to(p.dtype), gx.to(p.dtype)
    r = ga - xa
    residual, value = _norm(r), _norm(ga)
    running = _running(p)
    c = p.counters
    finite = residual.isfinite() & value.isfinite()
    back = running & ~finite & (c[p.samples, RETREATS] < MAX_RETREATS)
    back &= (c[p.samples, WINDOW] > 1) | (c[p.samples, WINDOW] == 1) & (c[p.samples, RETREATS] > 0)
    _retreat(p, x, back, k, beta, values, residuals)
    running = running & ~back
    seen = running & finite & (c[p.samples, WINDOW] > 0)
    noise = NOISE * torch.finfo(x.dtype).eps / 2 * value
    if bool(seen.any()):
        t = p.samples[seen]
        head = c[t, HEAD].long()
        dg = ga[seen] - values[t, head].to(p.dtype)
        dr = r[seen] - residuals[t, head].to(p.dtype)
        p.scalars[t, RING_START + (k - 2) % RING] = (_norm(dg) / _norm(dg - dr)) ** 2
        p.scalars[t, GAIN] = _larger_gain(p.scalars[t, GAIN], dg, dr, noise[seen])
    reference = p.scalars[p.samples, REFERENCE]
    status = _stop(p, residual, value, k, running)
    p.tally[ACTIVE_ROWS] += (c[p.samples[back], STATUS] == ACTIVE).sum()
    p.tally[FAILED] += (c[p.samples[back], STATUS] != ACTIVE).sum()

    rows = (running & (status == ACTIVE)).nonzero().reshape(-1)
    moved = x.clone()
    if len(rows):
        s = p.samples[rows]
        plain = (k > 1) & (residual[rows] > restart * reference[rows])
        plain |= c[s, RETREATS] == MAX_RETREATS
        window = torch.where(plain, 0, c[s, WINDOW])
        head = (c[s, HEAD] + 1) % m
        values[s, head.long()] = gx[rows]
        residuals[s, head.long()] = r[rows].to(x.dtype)
        window = torch.clamp(window + 1, max=m)
        slots = (head[:, None] - torch.arange(m, device=x.device)) % m  # newest first
        rw = residuals[s[:, None], slots].to(p.dtype)
        gw = values[s[:, None], slots].to(p.dtype)
        d, dg = rw[:, :-1] - rw[:, 1:], gw[:, :-1] - gw[:, 1:]  # [n, m-1, N]
        valid = torch.arange(m - 1, device=x.device) < window[:, None] - 1
        d, dg = d.where(valid[..., None], 0), dg.where(valid[..., None], 0)
        # Scaled by a power of two, so that no square under- or overflows; the weights are the same.
        scale = _scale(torch.cat([rw[:, :1], d], 1).flatten(1))[:, :, None]
        scaled = d * scale
        system = scaled @ scaled.mT
        trace = system.diagonal(dim1=1, dim2=2).sum(1)
        system = system + torch.diag_embed(torch.where(valid, ridge * trace[:, None], 1.0))
        factor, info = torch.linalg.cholesky_ex(system)
        gamma = torch.cholesky_solve(scaled @ (rw[:, 0] * scale[:, 0])[..., None], factor)
        too_small = trace <= (noise[rows] * scale[:, 0, 0]) ** 2
        bad = (info != 0) | ((window > 1) & too_small) | ~gamma.isfinite().all(1).squeeze(1)
        gamma = gamma.where(~bad[:, None, None], 0)  # [n, m-1, 1]
        mixed = ga[rows] - (gamma * dg).sum(1) - (1 - beta) * (r[rows] - (gamma * d).sum(1))
        moved[rows] = mixed.to(x.dtype)
        c[s, WINDOW] = torch.where(bad, 1, window).to(torch.int32)
        c[s, HEAD] = head.to(torch.int32)
    _freeze(p, x, gx, moved, status, running)


def _retreat(
    p: Progress, x: Tensor, back: Tensor, k: int, beta: float, values: Tensor, residuals: Tensor
) -> None:
    """Take rows, bool [R], back to their last good iterate; those at their last iteration end."""
    s, c = p.samples[back], p.counters
    if not len(s):
        return
    (*_, most, _), _ = _limits(p)
    ends = k >= (most[back] if isinstance(most, Tensor) else most)
    head = c[s, HEAD].long()
    good, r = values[s, head].to(p.dtype), residuals[s, head].to(p.dtype)
    halvings = torch.where(c[s, WINDOW] > 1, 0, c[s, RETREATS])
    part = (beta * 0.5 ** halvings.to(p.dtype))[:, None]
    plain = torch.where(part == 1, good, good - (1 - part) * r)  # r may have overflowed a half type
    ended = torch.as_tensor(ends, device=x.device).expand(len(s))
    x[back] = torch.where(ended[:, None], good, plain).to(x.dtype)
    p.out[s[ended]] = good[ended].to(x.dtype)
    c[s, STATUS] = torch.where(ended, _code(Status.MAX_ITERATIONS), ACTIVE).to(torch.int32)
    c[s, ITERATIONS] = k
    c[s, WINDOW] = 1
    c[s, RETREATS] += 1


def _damped(xa: Tensor, ga: Tensor, beta: float, gx: Tensor) -> Tensor:
    if beta == 1:
        return gx
    moved = (xa + beta * (ga - xa)).to(gx.dtype)
    return torch.where(moved.isfinite(), moved, gx)  # where it overflows, g(x)


def _norm(r: Tensor) -> Tensor:
    scale = _scale(r)  # so that no square under- or overflows; NaN and Inf stay what they are
    norm: Tensor = torch.linalg.vector_norm(r * scale, dim=1) / scale.squeeze(1)
    return norm


def _scale(r: Tensor) -> Tensor:
    """[R, 1]: the power of two by which each row's largest entry comes near 1."""
    largest = r.abs().amax(1, keepdim=True) if r.shape[1] else r.new_zeros(len(r), 1)
    most = 1022 if r.dtype == torch.float64 else 126
    exponent = torch.frexp(largest).exponent.clamp(-most, most)
    scale = torch.ldexp(torch.ones_like(largest), -exponent)
    return torch.where((largest > 0) & largest.isfinite(), scale, 1.0)


def _next(p: Progress) -> int:
    p.tally[ITERATION] += 1
    return int(p.tally[ITERATION])


def _running(p: Progress) -> Tensor:
    return p.counters[p.samples, STATUS] == ACTIVE


def _code(status: Status) -> int:
    return status + 1


def _limits(p: Progress) -> tuple[Sequence[float | Tensor], Tensor | None]:
    """Rtol, offset, patience, most iterations and rounding, each for all or [R]; and the floor."""
    lim = p.limits
    own: Sequence[float | Tensor] = (
        lim.rtol, lim.offset, lim.patience, lim.max_iterations, lim.rounding,
    )  # fmt: skip
    if p.bounds is None:
        return own, None
    bounds = p.bounds[p.samples]
    if bounds.dim() == 1:
        return own, bounds
    floor, *own = bounds.unbind(1)
    return own, floor


def _stop(p: Progress, residual: Tensor, value: Tensor, k: int, running: Tensor) -> Tensor:
    """The status of each row after iteration k, [R]; updates the counters of running samples."""
    s = p.samples
    (rtol, offset, patience, most, rounding), floor = _limits(p)
    least = value if floor is None else torch.maximum(value, floor)
    reference = p.scalars[s, REFERENCE]
    since = p.counters[s, REFERENCE_ITERATION]
    fell = (residual <= FALL * reference) | (k == 1)
    reference = torch.where(fell, residual, reference)
    since = torch.where(fell, k, since)
    status = torch.full_like(since, ACTIVE)
    status[running & (k >= most)] = _code(Status.MAX_ITERATIONS)
    stalled = (k - since >= patience) & (residual <= rounding * value)
    status[stalled] = _code(Status.STALLED)
    diverged = (k - since >= GROWTH_ITERATIONS) & (residual > GROWTH * reference)
    status[diverged] = _code(Status.DIVERGED)
    status[residual <= offset + rtol * least] = _code(Status.CONVERGED)
    status[~(residual.isfinite() & value.isfinite())] = _code(Status.NONFINITE)

    t = s[running]
    p.counters[t, STATUS] = status[running].to(torch.int32)
    p.counters[t, ITERATIONS] = k
    p.counters[t, REFERENCE_ITERATION] = since[running].to(torch.int32)
    p.scalars[t, RESIDUAL] = residual[running]
    p.scalars[t, REFERENCE] = reference[running]
    p.scalars[t, VALUE] = value[running]
    ended = status[running]
    p.tally[ACTIVE_ROWS] = (ended == ACTIVE).sum()
    p.tally[FAILED] += ((ended != ACTIVE) & (ended != _code(Status.CONVERGED))).sum()
    return status


def _freeze(
    p: Progress, x: Tensor, gx: Tensor, moved: Tensor, status: Tensor, running: Tensor
) -> None:
    """Move the active rows, write the finished ones to `out`, leave the frozen ones alone."""
    finite = status != _code(Status.NONFINITE)
    result = torch.where(finite[:, None], gx, x)
    finished = running & (status != ACTIVE)
    p.out[p.samples[finished]] = result[finished]
    x.copy_(
        torch.where(
            (running & ~finished)[:, None], moved, torch.where(finished[:, None], result, x)
        )
    )

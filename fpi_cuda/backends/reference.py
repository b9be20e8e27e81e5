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
    GROWTH,
    GROWTH_ITERATIONS,
    HEAD,
    ITERATION,
    ITERATIONS,
    NOISE,
    REFERENCE,
    REFERENCE_ITERATION,
    RESIDUAL,
    RING,
    RING_START,
    STATUS,
    WINDOW,
    Progress,
    Status,
)

NAME = "reference"


def picard_step(p: Progress, x: Tensor, gx: Tensor, beta: float) -> None:
    """One damped Picard step of every active row; freezes those that finish.

    Args:
        p: the per-sample record; updated.
        x: iterates, [R, N], contiguous; active rows become x + β (g(x) − x), finished rows their
            result, rows that had finished before stay untouched.
        gx: g(x), [R, N], contiguous; only read.
        beta: weight of the new value.
    """
    k = _next(p)
    xa, ga = x.to(p.dtype), gx.to(p.dtype)
    residual, value = _norm(ga - xa), _norm(ga)
    running = _running(p)
    samples = p.samples
    _push_ring(p, samples[running], residual[running], k)
    status = _stop(p, residual, value, k, running)
    moved = _damped(xa, ga, beta).to(x.dtype)
    _freeze(p, x, gx, moved, status, running)


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
    window, alone.

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
    s = p.samples[running]
    c = p.counters
    seen = c[s, WINDOW] > 0
    if bool(seen.any()):
        t = s[seen]
        head = c[t, HEAD].long()
        dg = ga[running][seen] - values[t, head].to(p.dtype)
        dr = r[running][seen] - residuals[t, head].to(p.dtype)
        p.scalars[t, RING_START + (k - 2) % RING] = _norm(dg) / _norm(dg - dr)
    reference = p.scalars[p.samples, REFERENCE]
    status = _stop(p, residual, value, k, running)

    rows = (running & (status == ACTIVE)).nonzero().reshape(-1)
    moved = x.clone()
    if len(rows):
        s = p.samples[rows]
        grown = (k > 1) & (residual[rows] > restart * reference[rows])
        window = torch.where(grown, 0, c[s, WINDOW])
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
        system = d @ d.mT
        trace = system.diagonal(dim1=1, dim2=2).sum(1)
        system = system + torch.diag_embed(torch.where(valid, ridge * trace[:, None], 1.0))
        factor, info = torch.linalg.cholesky_ex(system)
        gamma = torch.cholesky_solve(d @ rw[:, 0, :, None], factor)  # [n, m-1, 1]
        noise = NOISE * torch.finfo(x.dtype).eps / 2 * value[rows]
        bad = (
            (info != 0) | ((window > 1) & (trace <= noise**2)) | ~gamma.isfinite().all(1).squeeze(1)
        )
        gamma = gamma.where(~bad[:, None, None], 0)
        mixed = ga[rows] - (gamma * dg).sum(1) - (1 - beta) * (r[rows] - (gamma * d).sum(1))
        moved[rows] = mixed.to(x.dtype)
        c[s, WINDOW] = torch.where(bad, 1, window).to(torch.int32)
        c[s, HEAD] = head.to(torch.int32)
    _freeze(p, x, gx, moved, status, running)


def _damped(xa: Tensor, ga: Tensor, beta: float) -> Tensor:
    return ga if beta == 1 else xa + beta * (ga - xa)


def _norm(r: Tensor) -> Tensor:
    # Scaled, so that no square under- or overflows; NaN and Inf stay what they are.
    largest = r.abs().amax(1, keepdim=True) if r.shape[1] else r.new_zeros(len(r), 1)
    scale = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    norm: Tensor = torch.linalg.vector_norm(r / scale, dim=1) * scale.squeeze(1)
    return norm


def _next(p: Progress) -> int:
    p.tally[ITERATION] += 1
    return int(p.tally[ITERATION])


def _running(p: Progress) -> Tensor:
    return p.counters[p.samples, STATUS] == ACTIVE


def _push_ring(p: Progress, samples: Tensor, residual: Tensor, k: int) -> None:
    p.scalars[samples, RING_START + (k - 1) % RING] = residual


def _code(status: Status) -> int:
    return status + 1


def _stop(p: Progress, residual: Tensor, value: Tensor, k: int, running: Tensor) -> Tensor:
    """The status of each row after iteration k, [R]; updates the counters of running samples."""
    lim, s = p.limits, p.samples
    own: Sequence[float | Tensor] = lim.rtol, lim.offset, lim.patience, lim.max_iterations
    least = value
    if p.bounds is not None:
        bounds = p.bounds[s]
        if bounds.dim() == 2:
            bounds, *own = bounds.unbind(1)
        least = torch.maximum(value, bounds)
    rtol, offset, patience, most = own
    reference = p.scalars[s, REFERENCE]
    since = p.counters[s, REFERENCE_ITERATION]
    fell = (residual <= FALL * reference) | (k == 1)
    reference = torch.where(fell, residual, reference)
    since = torch.where(fell, k, since)
    status = torch.full_like(since, ACTIVE)
    status[running & (k >= most)] = _code(Status.MAX_ITERATIONS)
    stalled = (k - since >= patience) & (residual <= lim.rounding * value)
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

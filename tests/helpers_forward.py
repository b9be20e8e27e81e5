"""Nestings of forward and reverse mode, and problems whose truth is deep unrolling.

A transform takes a function f(z, w) of two tensors and gives another one. A nesting names some, the
outermost first: "jvp grad_w" is the derivative of the gradient in a direction.
"""

import functools
from typing import Any, NamedTuple

import pytest
import torch
from torch import autograd
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap


def direction(t, phase=0.0):
    """A tensor of t's shape: of fixed numbers, which no transform follows."""
    n = torch.Size(t.shape).numel()
    return (1.7 * torch.arange(n, dtype=t.dtype) + 0.4 + phase).sin().reshape(t.shape)


def joined(parts):
    """All numbers of nested tuples of tensors, in one row."""
    if isinstance(parts, torch.Tensor):
        return parts.flatten()
    return torch.cat([joined(part) for part in parts])


def loss(f):
    return lambda z, w: f(z, w).sin().sum()


# --- torch.func --------------------------------------------------------------------------------


def jvp_both(f, phase=0.0):
    return lambda z, w: jvp(f, (z, w), (direction(z, phase), direction(w, phase)))[1]


def jvp_z(f):
    return lambda z, w: jvp(lambda z: f(z, w), (z,), (direction(z),))[1]


def jvp_w(f):
    return lambda z, w: jvp(lambda w: f(z, w), (w,), (direction(w),))[1]


def all_of(transform):
    """By both tensors, everything in one row."""
    return lambda f: lambda z, w: joined(transform(f, (0, 1))(z, w))


def each_tangent(f):
    """Several directions at once: vmap over the tangents."""

    def along(z, w):
        z_s, w_s = (torch.stack([direction(t, 1), direction(t, 2)]) for t in (z, w))
        return vmap(lambda dz, dw: jvp(f, (z, w), (dz, dw))[1])(z_s, w_s)

    return along


def vmap_z(f):
    return lambda z, w: vmap(lambda t: f(z * t, w))(torch.stack([direction(z, 3), direction(z, 4)]))


def vmap_w(f):
    return lambda z, w: vmap(lambda t: f(z, w * t))(torch.stack([direction(w, 3), direction(w, 4)]))


def vmap_both(f):
    return lambda z, w: vmap(f)(torch.stack([z, z.sin()]), torch.stack([w, w.sin()]))


def rows(f):
    """Every sample as a batch of its own."""
    return lambda z, w: vmap(lambda row: f(row[None], w)[0])(z)


# --- dual tensors and autograd -----------------------------------------------------------------


def tangent_of(t):
    tangent = forward_ad.unpack_dual(t).tangent
    assert tangent is not None, "the tangent was lost"
    return tangent


def dual(t):
    return forward_ad.make_dual(t, direction(t))


def leaves(*tensors):
    return [t.detach().requires_grad_() for t in tensors]


def dual_z(f):
    def along(z, w):
        with forward_ad.dual_level():
            return tangent_of(f(dual(z), w))

    return along


def dual_w(f):
    def along(z, w):
        with forward_ad.dual_level():
            return tangent_of(f(z, dual(w)))

    return along


def dual_both(f):
    def along(z, w):
        with forward_ad.dual_level():
            return tangent_of(f(dual(z), dual(w)))

    return along


def backward(f):
    def of(z, w):
        given = leaves(z, w)
        return joined(autograd.grad(loss(f)(*given), given))

    return of


def dual_backward(f, create_graph=False):
    """Forward over reverse: the gradient's tangent."""

    def along(z, w):
        with forward_ad.dual_level():
            given = [dual(t) for t in leaves(z, w)]
            found = autograd.grad(loss(f)(*given), given, create_graph=create_graph)
            return joined([tangent_of(t) for t in found])

    return along


def dual_cotangent(f, create_graph=False):
    """Nothing but the incoming gradient carries a tangent, of a level opened after the solve."""

    def along(z, w):
        given = leaves(z, w)
        y = f(*given)
        with forward_ad.dual_level():
            v = forward_ad.make_dual(direction(y, 5), direction(y, 6))
            found = autograd.grad(y, given, v, create_graph=create_graph)
            return joined([tangent_of(t) for t in found])

    return along


def backward_dual(f, create_graph=False):
    """Reverse over forward: the tangent's gradient, or that one's gradient again."""

    def of(z, w):
        given = leaves(z, w)
        with forward_ad.dual_level():
            value = tangent_of(f(*[dual(t) for t in given])).sin().sum()
            found = autograd.grad(value, given, create_graph=create_graph)
            if create_graph:
                found = autograd.grad(joined(found).sin().sum(), given)
            return joined(found)

    return of


TRANSFORMS = {
    "loss": loss,
    "no_grad": torch.no_grad(),
    "jvp": jvp_both,
    "jvp_z": jvp_z,
    "jvp_w": jvp_w,
    "jvp_other": functools.partial(jvp_both, phase=2.0),
    "grad_z": lambda f: grad(loss(f), 0),
    "grad_w": lambda f: grad(loss(f), 1),
    "jacfwd_z": lambda f: jacfwd(f, 0),
    "jacfwd_w": lambda f: jacfwd(f, 1),
    "jacfwd": all_of(jacfwd),
    "jacrev_z": lambda f: jacrev(f, 0),
    "jacrev_w": lambda f: jacrev(f, 1),
    "jacrev": all_of(jacrev),
    "hessian": lambda f: all_of(hessian)(loss(f)),
    "tangents": each_tangent,
    "vmap_z": vmap_z,
    "vmap_w": vmap_w,
    "vmap": vmap_both,
    "rows": rows,
    "dual_z": dual_z,
    "dual_w": dual_w,
    "dual": dual_both,
    "backward": backward,
    "dual_backward": dual_backward,
    "dual_backward_graph": functools.partial(dual_backward, create_graph=True),
    "dual_cotangent": dual_cotangent,
    "dual_cotangent_graph": functools.partial(dual_cotangent, create_graph=True),
    "backward_dual": backward_dual,
    "backward_backward_dual": functools.partial(backward_dual, create_graph=True),
}

# Torch runs a node's own jvp with forward mode off, so a plain operator in one loses the tangents
# further out: a single jvp, jacfwd or hessian stays right then. Many of these are nested for that.
NESTINGS = (
    *("jvp_z", "jvp_w", "jvp", "jacfwd_z", "jacfwd_w", "jacfwd", "tangents"),
    *("jvp jvp", "jvp_other jvp", "jvp_z jvp_w", "jvp_w jvp_z", "jvp_z jvp_w jvp_z"),
    *("jvp jvp jvp", "jvp jvp_other jvp", "jvp jvp jvp jvp", "no_grad jvp", "no_grad jvp jvp"),
    *("jacfwd_w jacfwd_z", "jacfwd_z jacfwd_z", "jvp hessian", "hessian jvp", "hessian"),
    *("jacfwd_z jacrev_z loss", "jacfwd_w jacrev_w loss", "jacrev_w jacfwd_z", "jacrev jacfwd"),
    *("jacfwd_z jacrev_w jacfwd_z", "jacrev_z jacfwd_w jacrev_z loss"),
    *("jvp grad_z", "jvp grad_w", "grad_w jvp", "grad_w jvp jvp", "jvp jvp grad_z"),
    *("jvp grad_w jvp", "jvp grad_z grad_w", "grad_w jvp grad_z", "grad_z grad_w jvp"),
    *("vmap_z jvp", "vmap_w jvp", "vmap jvp jvp", "jvp vmap", "vmap vmap jvp grad_z"),
    *("jvp rows", "jvp jvp grad_z rows", "rows jvp_w grad_z rows", "jvp_w rows jvp_z"),
    *("vmap jvp rows", "tangents jvp", "tangents grad_w", "tangents tangents"),
    *("dual_z", "dual_w", "dual", "no_grad dual", "dual grad_w", "dual jacrev_z", "dual rows"),
    *("dual vmap grad_w", "backward", "dual_backward", "dual_backward_graph", "backward_dual"),
    *("backward_backward_dual", "dual_cotangent", "dual_cotangent_graph"),
)
FEW = (
    *("jvp", "jacfwd", "hessian", "jvp_other jvp", "jacfwd_w jacfwd_z", "grad_w jvp jvp"),
    *("jvp grad_w jvp", "vmap jvp jvp", "tangents grad_w", "dual", "dual_backward"),
    *("backward_dual", "dual_cotangent"),
)
FEWEST = ("jacfwd", "jvp_other jvp", "hessian", "grad_w jvp", "vmap jvp", "dual", "dual_backward")


def nested(nesting, f):
    """The function that a nesting makes of f."""
    for name in reversed(nesting.split()):
        f = TRANSFORMS[name](f)
    return f


class Problem(NamedTuple):
    """A function to test and the slow one beside it.

    Attributes:
        solved: the options of a solve to f(z, w), by the package.
        unrolled: f(z, w) by a plain loop.
        z: where derivatives are taken.
        w: likewise.
    """

    solved: Any
    unrolled: Any
    z: torch.Tensor
    w: torch.Tensor


def near(found, expected, rtol=1e-8):
    """Compare, by the largest number of what is expected."""
    assert found.shape == expected.shape
    scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=0, atol=rtol * max(scale, 1e-2))


# --- modules as functions of one row of numbers ------------------------------------------------


def numbers_of(module):
    """A module's floating parameters and buffers in one row."""
    return joined([t.detach() for t in tensors_of(module).values()])


def tensors_of(module):
    return dict(module.named_parameters()) | {
        k: t for k, t in module.named_buffers() if t.is_floating_point()
    }


def by_name(module, w):
    """The row's numbers as the module's tensors, for torch.func.functional_call."""
    like = tensors_of(module)
    parts = w.split([t.numel() for t in like.values()])
    return {k: p.reshape(t.shape) for (k, t), p in zip(like.items(), parts, strict=True)}


def _lost_in_inference_mode():
    with torch.inference_mode():
        return not jvp(lambda x: x**3, (torch.ones(1),), (torch.ones(1),))[1].any()


# In torch 2.11 derivatives of torch.func are zero in inference mode, of plain operators too.
func_in_inference_mode = pytest.mark.skipif(
    _lost_in_inference_mode(), reason="torch.func's derivatives are lost in this torch"
)

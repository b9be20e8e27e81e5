"""jaxopt and optimistix, compiled ahead of the timed calls.

Both compare one absolute norm with a tolerance. They are told the number that the rule comes to at
the solution, sample by sample, which nobody knows before the solve: a favour to them. A solver of
one sample is vmapped (its own norm a sample; finished samples are frozen, not left out); a solver
of the whole batch sees x / tolerance, so that no sample can be above its own tolerance when the one
norm is below 1.
"""

from __future__ import annotations

import functools
import math
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..problems import Problem, Step, dense, nets
from .runner import Runner
from .truth import truth

# solve(g, x0, u, s, tolerance, *weights) -> x̂, iterations: of one sample, or of the batch
Solve = Callable[..., tuple[Any, Any]]
Function = Callable[..., Any]

MOST_BYTES = 8 << 30  # of Jacobians: beyond that a machine may kill the process, not the entry


@functools.cache
def jax() -> Any:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs its part of a GPU
    import jax

    return jax


# --- the maps, of one sample or of a batch ----------------------------------------------------


def one_layer(x: Any, u: Any, s: Any, weight: Any) -> Any:
    return jax().numpy.tanh(s * (x @ weight.T) + u)


def two_layers(x: Any, u: Any, s: Any, first: Any, second: Any) -> Any:
    return jax().numpy.tanh(x @ first.T + u) @ second.T


def descent(x: Any, u: Any, s: Any, weight: Any) -> Any:
    slope = jax().numpy.tanh(x @ weight.T + u) @ weight
    return (1 - dense.STEP_SIZE * dense.CURVATURE) * x - dense.STEP_SIZE * slope


def affine(x: Any, u: Any, s: Any, weight: Any) -> Any:
    return s * (x @ weight.T) + u


def convolved(x: Any, weight: Any) -> Any:
    """x: [B, H, W, C]; weight: [C', C, 3, 3]."""
    layout = ("NHWC", "OIHW", "NHWC")
    return jax().lax.conv_general_dilated(x, weight, (1, 1), "SAME", dimension_numbers=layout)


def one_convolution(x: Any, u: Any, s: Any, weight: Any) -> Any:
    side = math.isqrt(x.shape[-1])
    y = convolved(x.reshape(-1, side, side, 1), weight).reshape(x.shape)
    return jax().numpy.tanh(s * y + u)


def net(x: Any, z: Any, s: Any, first: Any, bias: Any, second: Any, last: Any) -> Any:
    side = math.isqrt(z.shape[-1])
    images = (t.reshape(-1, side, side, t.shape[-1] // side**2) for t in (x, z))
    h = jax().nn.relu(convolved(jax().numpy.concatenate(list(images), -1), first) + bias)
    return (convolved(h, second) + last).reshape(x.shape)


STEPS: dict[Step, Function] = {
    dense.one_layer: one_layer,
    dense.two_layers: two_layers,
    dense.descent: descent,
    dense.affine: affine,
    nets.one_convolution: one_convolution,
    nets.net: net,
}
KINDS = ("easy", "hard", "two-layer", "energy", "linear", "stiff", "expanding", "conv", "denoise")


# --- the runner -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A solver and how it is put to use."""

    make: Callable[[Problem], Solve]
    whole: bool = False  # one solve of the whole batch; else one a sample, vmapped
    dense: tuple[str, ...] = ()  # the calls in which it makes a Jacobian of each sample


class Jax(Runner):
    """A setting on a problem; compiled when it is first asked for."""

    def __init__(self, problem: Problem, setting: Setting) -> None:
        super().__init__(problem)
        self.setting, self.g = setting, STEPS[problem.g]
        self.compiled: dict[str, Any] = {}
        with self.precision(), quiet():
            self.solve = setting.make(problem)
            self.arguments = [self.converted(i) for i in range(len(problem.instances))]

    def precision(self) -> Any:
        """float32 problems stay float32: some solvers fail where 64 bits are only allowed."""
        return jax().enable_x64(self.problem.dtype == torch.float64)

    def converted(self, i: int) -> tuple[tuple[Any, ...], Any]:
        problem, instance = self.problem, self.problem.instances[i]
        rule = problem.rule
        size = size_of_answer(problem, i)
        tolerance = (rule.atol * math.sqrt(problem.size) + rule.rtol * size).to(problem.dtype)
        tensors = (instance.x0, instance.u, instance.s, tolerance, *instance.weights)
        return tuple(to_jax(t) for t in tensors), to_jax(instance.loss)

    def batched(self, x0: Any, u: Any, s: Any, tolerance: Any, *weights: Any) -> Any:
        solve = functools.partial(self.solve, self.g)
        if self.setting.whole:
            return solve(x0, u, s, tolerance[:, None], *weights)
        axes = (0, 0, 0, 0, *(None for _ in weights))
        return jax().vmap(solve, in_axes=axes)(x0, u, s, tolerance, *weights)

    def loss(self, inputs: tuple[Any, ...], x0: Any, s: Any, tolerance: Any, loss: Any) -> Any:
        u, *weights = inputs
        x, steps = self.batched(x0, u, s, tolerance, *weights)
        return (loss * x).sum(), (x, steps)

    def squares(self, first: Any, inputs: tuple[Any, ...], *rest: Any) -> Any:
        """‖dL/du‖² as a function of the first weight."""
        u, _, *others = inputs
        (du, *_), _ = jax().grad(self.loss, has_aux=True)((u, first, *others), *rest)
        return (du**2).sum()

    def function(self, name: str) -> tuple[Function, Callable[[int], tuple[Any, ...]]]:
        """What is compiled, and its arguments for an instance."""

        def with_loss(i: int) -> tuple[Any, ...]:
            (x0, u, s, tolerance, *weights), loss = self.arguments[i]
            return (u, *weights), x0, s, tolerance, loss

        if name == "gradients":
            return jax().grad(self.loss, has_aux=True), with_loss
        if name == "second":
            return jax().grad(self.squares), lambda i: (with_loss(i)[0][1], *with_loss(i))
        return self.batched, lambda i: self.arguments[i][0]

    def run(self, name: str, i: int) -> Any:
        with self.precision():
            if name not in self.compiled:
                self.refuse(name)
                start = time.perf_counter()
                of, arguments = self.function(name)
                with quiet():
                    made = jax().jit(of).lower(*arguments(0)).compile()
                self.compile_s += time.perf_counter() - start
                self.compiled[name] = made, arguments
            made, arguments = self.compiled[name]
            out = made(*arguments(i % len(self.arguments)))
            return jax().block_until_ready(out)

    def refuse(self, name: str) -> None:
        item = self.problem.instances[0].x0.element_size()
        needed = 3 * self.problem.batch * self.problem.size**2 * item  # and its factors
        if name in self.setting.dense and needed > MOST_BYTES:
            raise MemoryError(f"Jacobians of the samples would take {needed / 2**30:.0f} GiB")

    def forward(self, i: int) -> Any:
        x, _ = self.run("forward", i)
        return x

    def gradients(self, i: int) -> tuple[Any, ...]:
        (du, *dweights), (x, _) = self.run("gradients", i)
        return x, du, *dweights

    def second(self, i: int) -> Any:
        """The gradient in the first weight of Σ (dL/du)²."""
        return self.run("second", i)

    def tensors(self, out: Any) -> Any:
        if isinstance(out, tuple):
            return tuple(self.tensors(t) for t in out)
        return to_torch(out)

    def count(self) -> tuple[int, float]:
        if "gradients" in self.compiled:
            _, (_, steps) = self.run("gradients", 0)
        else:
            _, steps = self.run("forward", 0)
        counts = to_torch(steps)
        return int(counts.max()), float(counts.double().mean())

    def peak_bytes(self, *, backward: bool) -> int:
        """XLA's own plan: temporaries and results."""
        name = "gradients" if backward else "forward"
        self.run(name, 0)
        plan = self.compiled[name][0].memory_analysis()
        return int(plan.temp_size_in_bytes + plan.output_size_in_bytes)


def quiet() -> Any:
    """They warn about what newer versions of jax call deprecated."""
    return warnings.catch_warnings(action="ignore", category=DeprecationWarning)


def size_of_answer(problem: Problem, i: int) -> Tensor:
    """‖x̂‖₂ a sample, in float64."""
    if problem.kind == "expanding":  # no answer to know; where there is one it is about as large
        return torch.linalg.vector_norm(problem.instances[i].u.double(), dim=1)
    return torch.linalg.vector_norm(truth(problem)[i].x, dim=1)


def to_jax(t: Tensor) -> Any:
    t, numpy = t.detach().cpu(), jax().numpy
    short = t.dtype in (torch.bfloat16, torch.float16)  # numpy lacks the first
    array = numpy.array((t.float() if short else t).numpy())
    return array.astype(str(t.dtype).removeprefix("torch.")) if short else array


def to_torch(array: Any) -> Tensor:
    import numpy as np

    widened = np.array(array, np.float32) if array.dtype.itemsize < 4 else np.array(array)
    return torch.from_numpy(widened)


# --- jaxopt -----------------------------------------------------------------------------------


def jaxopt(
    solver: str,
    linear: str | None = None,
    *,
    whole: bool = False,
    looser: float = 1.0,
    restart: int | None = None,
    **options: Any,
) -> Setting:
    """A setting of jaxopt.

    Args:
        solver: a class of jaxopt.
        linear: the solver of its implicit differentiation, one of `jaxopt.linear_solve` or "fixed
            point", its own iteration, since it takes any function; None: its default, normal CG to
            1e-5.
        whole: of the whole batch at once.
        looser: factor on its tolerance: with `whole` it over-solves.
        restart: GMRES's vectors.
        options: of the solver.
    """

    def make(problem: Problem) -> Solve:
        import jaxopt

        rule, more = problem.rule, dict(options)
        if linear == "fixed point":
            more["implicit_diff_solve"] = functools.partial(by_iteration, problem)
        elif linear is not None:
            of, its = getattr(jaxopt.linear_solve, linear), {"tol": rule.adjoint_rtol}
            its |= {"restart": restart} if restart else {}
            more["implicit_diff_solve"] = functools.partial(of, **its)

        def solve(g: Function, x0: Any, u: Any, s: Any, tolerance: Any, *weights: Any) -> Any:
            unit = tolerance if whole else 1.0

            def step(y: Any, *rest: Any) -> Any:
                return g(unit * y, *rest) / unit if whole else g(y, *rest)

            def root(y: Any, *rest: Any) -> Any:
                return step(y, *rest) - y

            found = getattr(jaxopt, solver)(
                root if solver == "Broyden" else step,
                maxiter=rule.max_iterations,
                tol=looser if whole else looser * tolerance,
                **more,
            ).run(x0 / unit, u, s, *weights)
            return unit * found.params, found.state.iter_num

        return solve

    return Setting(make, whole)


def by_iteration(problem: Problem, matvec: Function, v: Any, **_: Any) -> Any:
    """c with matvec(c) = v, where matvec is Jᵀ − 1 of a contraction: c ← Jᵀ c − v."""
    import jaxopt

    tolerance = problem.rule.adjoint_rtol * jax().numpy.linalg.norm(v)
    found = jaxopt.FixedPointIteration(
        lambda c: c + matvec(c) - v,
        maxiter=problem.rule.max_iterations,
        tol=tolerance,
        implicit_diff=False,
        unroll=False,
    ).run(-v)
    return found.params


# --- optimistix -------------------------------------------------------------------------------


def optimistix(
    linear: str | None = None, *, whole: bool = False, newton: str | None = None, **options: Any
) -> Setting:
    """A setting of optimistix.

    Args:
        linear: lineax's solver in its implicit adjoint; None: its default, which picks a dense one.
        whole: of the whole batch at once, with the worst sample's norm.
        newton: lineax's solver in Newton's method, or "dense"; None: fixed-point iteration.
        options: of the adjoint's solver.
    """

    def make(problem: Problem) -> Solve:
        import optimistix

        rule, numpy = problem.rule, jax().numpy
        # The size of an element of dL/dx̂, which the harness knows.
        size = float(problem.instances[0].loss.double().square().mean().sqrt())
        more = {} if linear is None else of_lineax(linear, rule.adjoint_rtol * size, **options)
        adjoint = optimistix.ImplicitAdjoint(**more)

        def worst(y: Any) -> Any:
            return numpy.linalg.norm(y, axis=1).max()

        def solve(g: Function, x0: Any, u: Any, s: Any, tolerance: Any, *weights: Any) -> Any:
            tolerances = dict(rtol=0.0, atol=tolerance)
            if newton is None:
                norm = worst if whole else optimistix.two_norm
                solver = optimistix.FixedPointIteration(**tolerances, norm=norm)
                find, f = optimistix.fixed_point, lambda x, rest: g(x, *rest)
            else:
                inner = tolerance / (2 * math.sqrt(problem.size))
                its = {} if newton == "dense" else of_lineax(newton, inner)
                solver = optimistix.Newton(**tolerances, norm=optimistix.two_norm, **its)
                find, f = optimistix.root_find, lambda x, rest: x - g(x, *rest)
            found = find(
                f,
                solver,
                x0,
                (u, s, *weights),
                max_steps=rule.max_iterations,
                adjoint=adjoint,
                throw=False,
            )
            return found.value, found.stats["num_steps"]

        return solve

    of_jacobians = [name for name, by in (("forward", newton),) if by == "dense"]
    of_jacobians += ["gradients", "second"] if linear is None or of_jacobians else []
    return Setting(make, whole, tuple(of_jacobians))


def of_lineax(name: str, tolerance: Any, **options: Any) -> dict[str, Any]:
    """A linear solver, to a residual whose elements are as large as `tolerance`.

    lineax's own relative test is one of every element, harsher for those near zero than the others'
    2-norm.
    """
    import lineax
    import optimistix

    of = lineax.CG if name == "normal CG" else getattr(lineax, name)
    solver = of(rtol=0.0, atol=tolerance, norm=optimistix.rms_norm, **options)
    return {"linear_solver": lineax.Normal(solver) if name == "normal CG" else solver}


# --- the lists --------------------------------------------------------------------------------

Entry = tuple[str, str, Callable[[Problem], Runner], tuple[str, ...]]


def entry(name: str, setting: Setting) -> Entry:
    return name, name.partition(" ")[0], functools.partial(Jax, setting=setting), KINDS


PICARD, ANDERSON = "FixedPointIteration", "AndersonAcceleration"
GMRES, BICGSTAB = "solve_gmres", "solve_bicgstab"
DEFAULTS = [
    entry("jaxopt fixed point", jaxopt(PICARD)),
    entry("jaxopt Anderson", jaxopt(ANDERSON)),
    entry("optimistix fixed point", optimistix()),
]
# Left out since they lose wherever they were tried: jaxopt's Broyden with unit steps (diverges on
# "hard"), GMRES with jaxopt's 20 vectors, Newton's method with inner iterations. Left out since
# they raise: lineax's BiCGStab, which in float32 takes any negative step length for a breakdown,
# and J − 1 has such; its normal CG on a whole batch, which ends as "singular" on "energy".
GRID = [
    # Iteration is what easy problems want; the adjoint decides.
    entry("jaxopt fixed point, BiCGStab", jaxopt(PICARD, BICGSTAB)),
    entry("jaxopt fixed point, GMRES(5)", jaxopt(PICARD, GMRES, restart=5)),
    entry("jaxopt fixed point, adjoint by iteration", jaxopt(PICARD, "fixed point")),
    # One loop without selects, and one adjoint system instead of B.
    entry("jaxopt fixed point, whole, BiCGStab", jaxopt(PICARD, BICGSTAB, whole=True)),
    entry(
        "jaxopt fixed point, whole, tolerance × 1.5, BiCGStab",
        jaxopt(PICARD, BICGSTAB, whole=True, looser=1.5),
    ),
    # Where all samples finish together the batch's norm is up to √B times a sample's.
    entry(
        "jaxopt fixed point, whole, tolerance × 8, BiCGStab",
        jaxopt(PICARD, BICGSTAB, whole=True, looser=8.0),
    ),
    entry(
        "jaxopt fixed point, whole, adjoint by iteration",
        jaxopt(PICARD, "fixed point", whole=True),
    ),
    # Its ridge is absolute, 1e-5 by default: a smaller one suits a state of this scale better.
    entry("jaxopt Anderson, BiCGStab", jaxopt(ANDERSON, BICGSTAB)),
    entry("jaxopt Anderson, m=5, ridge 1e-8, BiCGStab", jaxopt(ANDERSON, BICGSTAB, ridge=1e-8)),
    # A mix in every third iteration only: it costs more than this g.
    entry(
        "jaxopt Anderson, m=3, every 3rd, ridge 1e-8, BiCGStab",
        jaxopt(ANDERSON, BICGSTAB, ridge=1e-8, history_size=3, mixing_frequency=3),
    ),
    # In units of the tolerance its ridge is small as it is.
    entry(
        "jaxopt Anderson, whole, m=5, every 2nd, BiCGStab",
        jaxopt(ANDERSON, BICGSTAB, whole=True, mixing_frequency=2),
    ),
    entry(
        "jaxopt Anderson, whole, m=10, BiCGStab",
        jaxopt(ANDERSON, BICGSTAB, whole=True, history_size=10),
    ),
    # The adjoint's dense default costs N³ a sample.
    entry("optimistix fixed point, GMRES", optimistix("GMRES")),
    entry("optimistix fixed point, GMRES(5)", optimistix("GMRES", restart=5)),
    entry("optimistix fixed point, normal CG", optimistix("normal CG")),
    entry("optimistix fixed point, whole, GMRES(10)", optimistix("GMRES", whole=True, restart=10)),
    # Where iteration needs thousands of steps.
    entry("optimistix Newton", optimistix(newton="dense")),
]

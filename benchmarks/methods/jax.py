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
from collections.abc import Callable
from typing import Any

from ..problems import Problem
from .jax_runner import KINDS, Function, Jax, Setting, Solve, jax
from .runner import Runner

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

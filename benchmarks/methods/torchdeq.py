"""torchdeq, with implicit differentiation on and a relative 2-norm test: not its defaults.

By default it takes a one-step ("phantom") gradient and an absolute tolerance, which is another
task; that is a row too, which the gate refuses. Its test has no absolute part, which at these
scales of u changes its iteration counts by at most 3 %.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..problems import Problem, Rule, Step
from .runner import Build, Counting, Runner, Solve, Solver


def torchdeq(
    solver: str,
    *,
    backward: str | None = None,
    looser: float = 1.0,
    more: dict[str, Any] | None = None,
    **options: Any,
) -> Build:
    """A setting of torchdeq.

    `f_stop_mode`, not `stop_mode`: it takes unknown names silently.

    Args:
        solver: its name, of the forward.
        backward: of the backward; None: the same, with the same options.
        looser: factor on its tolerances; its test has no absolute part, and is stricter for that.
        more: of get_deq.
        options: of the solver.
    """

    def build(rule: Rule) -> Solve:
        from torchdeq import get_deq

        f_solver = registered(solver, options)
        deq = get_deq(
            f_solver=f_solver,
            b_solver=backward or f_solver,
            f_max_iter=rule.max_iterations,
            b_max_iter=rule.max_iterations,
            f_tol=looser * rule.rtol,
            b_tol=looser * rule.adjoint_rtol,
            f_stop_mode="rel",
            b_stop_mode="rel",
            **{"ift": True} | (more or {}),
        )
        return solving(deq)

    return build


def registered(solver: str, options: dict[str, Any]) -> str:
    """A name for a solver with these options: get_deq takes names, and none for the backward's."""
    from torchdeq.solver import get_solver, register_solver

    if not options:
        return solver
    name = f"{solver} {options}"
    register_solver(name, functools.partial(get_solver(solver), **options))
    return name


def solving(deq: Any) -> Solve:
    def solve(g: Step, x0: Tensor, u: Tensor, s: Tensor, *weights: Tensor) -> Tensor:
        deq.train(torch.is_grad_enabled())
        out, _ = deq(lambda x: g(x, u, s, *weights), x0)
        return out[-1]

    return solve


def as_it_comes(rule: Rule) -> Solve:
    """get_deq() with nothing said but how many iterations."""
    from torchdeq import get_deq

    return solving(get_deq(f_max_iter=rule.max_iterations))


class Compiled(Solver):
    """With g compiled, for its shapes alone; on request in CUDA graphs when without gradients."""

    def __init__(self, problem: Problem, build: Build, *, graphs: bool = False) -> None:
        if graphs and problem.device.type != "cuda":
            raise ValueError("CUDA graphs need a CUDA device")
        super().__init__(problem, build)
        solve, compiled = self.solve, torch.compile(copied(problem.g), dynamic=False)
        graphed = torch.compile(copied(problem.g), dynamic=False, mode="reduce-overhead")

        def step(*tensors: Tensor) -> Tensor:
            if not graphs or torch.is_grad_enabled():
                return compiled(*tensors)
            torch.compiler.cudagraph_mark_step_begin()
            return graphed(*tensors).clone()  # the graph writes over its value

        def with_compiled(g: Step, *tensors: Tensor) -> Tensor:
            # A g that counts its calls runs as it is: the algorithm is the same.
            return solve(g if isinstance(g, Counting) else step, *tensors)

        self.solve = with_compiled


def copied(g: Step) -> Step:
    """g with code of its own: the compiler counts the shapes it has seen a code object with.

    Beyond eight it would run g as it is, without a word.
    """
    code = g.__code__.replace()
    return types.FunctionType(code, g.__globals__, g.__name__, g.__defaults__, g.__closure__)


Entry = tuple[str, str, Callable[[Problem], Runner], tuple[str, ...] | None]


def entry(
    name: str,
    build: Build,
    kinds: tuple[str, ...] | None = None,
    of: Callable[..., Runner] = Solver,
) -> Entry:
    return f"torchdeq {name}", "torchdeq", functools.partial(of, build=build), kinds


HOOK = {"ift": False, "hook_ift": True}  # its other way of implicit differentiation: one g fewer
DEFAULTS = [
    entry("fixed point", torchdeq("fixed_point_iter")),
    entry("Anderson", torchdeq("anderson")),
    entry("as it comes", as_it_comes, ("easy",)),
]
GRID = [
    entry("fixed point, hook", torchdeq("fixed_point_iter", more=HOOK)),
    # Its own test has no absolute part: a little looser it still meets the rule.
    entry(
        "fixed point, hook, tolerance × 1.5", torchdeq("fixed_point_iter", looser=1.5, more=HOOK)
    ),
    entry("fixed point, hook, g compiled", torchdeq("fixed_point_iter", more=HOOK), of=Compiled),
    entry(
        "fixed point, hook, g in CUDA graphs",
        torchdeq("fixed_point_iter", more=HOOK),
        of=functools.partial(Compiled, graphs=True),
    ),
    # Its ridge is absolute, 1e-4 by default, and too large where residuals are small; its m is 6.
    # A smaller one needs half of the iterations or fewer, but m = 8 has met a singular system.
    *(
        entry(f"Anderson, m={m}, lam {lam}", torchdeq("anderson", m=m, lam=float(lam)))
        for m, lam in ((3, "1e-4"), (3, "1e-8"), (5, "1e-8"), (8, "1e-8"))
    ),
    entry(
        "Anderson, m=5, lam 1e-8, tolerance × 1.5",
        torchdeq("anderson", m=5, lam=1e-8, looser=1.5, more=HOOK),
    ),
    entry("Anderson, m=5, lam 1e-8, g compiled", torchdeq("anderson", m=5, lam=1e-8), of=Compiled),
    # Its memory grows with the cap of iterations, unless it is told how much; as the backward's
    # solver it comes to NaN on some inputs.
    entry("Broyden, memory 30", torchdeq("broyden", LBFGS_thres=30)),
    entry(
        "Broyden, memory 30, backward fixed point",
        torchdeq("broyden", LBFGS_thres=30, backward="fixed_point_iter", more=HOOK),
    ),
]

"""This library: g as an opaque function, and the same map as a module that it knows inside out."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

from torch import Tensor

import fpi_cuda
from fpi_cuda import compat

from ..problems import Problem, Rule, Step, dense, nets
from .runner import Build, NotForThis, Solve, Solver

HISTORY = 5  # Anderson's window, ours and the plain loop's
SOLVERS = {"Picard": fpi_cuda.Picard(), "Anderson": fpi_cuda.Anderson(history=HISTORY)}
FEWER = {  # that mix more seldom
    "Anderson, every 3": fpi_cuda.Anderson(history=HISTORY, every=3),
    "Auto": fpi_cuda.Auto(history=HISTORY),
}


def options_for(solver: Any, rule: Rule, backend: str = "auto") -> dict[str, Any]:
    return dict(
        solver=solver,
        tolerance=fpi_cuda.Tolerance(rule.rtol, rule.atol),
        adjoint=fpi_cuda.ImplicitAdjoint(tolerance=fpi_cuda.Tolerance(rule.adjoint_rtol)),
        max_iterations=rule.max_iterations,
        on_failure="return",  # the harness judges by the true residual
        backend=backend,
    )


def solution(
    solver: Any, backend: str = "auto", **more: Any
) -> Callable[[Rule], Callable[..., fpi_cuda.Solution]]:
    """As `opaque`, with all that the library tells of the solve."""

    def build(rule: Rule) -> Callable[..., fpi_cuda.Solution]:
        options = options_for(solver, rule, backend) | more

        def solve(g: Step, x0: Tensor, u: Tensor, s: Tensor, *weights: Tensor) -> fpi_cuda.Solution:
            return fpi_cuda.fixed_point(g, x0, u, s, params=weights, **options)

        return solve

    return build


def opaque(solver: Any, backend: str = "auto", **more: Any) -> Build:
    def build(rule: Rule) -> Solve:
        solve = solution(solver, backend, **more)(rule)
        return lambda *arguments: solve(*arguments).x

    return build


class Structured(Solver):
    """The problem told to the library as a module of its own; g is not called."""

    last: fpi_cuda.Solution | None = None

    def __init__(self, problem: Problem, solver: Any, backend: str = "auto") -> None:
        def build(rule: Rule) -> Solve:
            options = options_for(solver, rule, backend)

            def solve(g: Step, *tensors: Tensor) -> Tensor:
                return self.solved(options, *tensors)

            return solve

        super().__init__(problem, build)

    def solved(self, options: dict[str, Any], *tensors: Tensor) -> Tensor:
        raise NotImplementedError

    def count(self) -> tuple[int, float]:
        self.forward(0)
        assert self.last is not None
        return self.last.evaluations, float(self.last.iterations.double().mean())


class Whole(Structured):
    """A step of dense layers, solved by one kernel."""

    def __init__(self, problem: Problem, solver: Any, backend: str = "auto") -> None:
        n, weights = problem.size, problem.instances[0].weights
        self.step: Any
        if problem.g is dense.one_layer:
            self.step = fpi_cuda.DenseStep(n, None, bias=False)
        elif problem.g is dense.affine:
            self.step = fpi_cuda.DenseStep(n, None, bias=False, activation="identity")
        elif problem.g is dense.two_layers:
            self.step = fpi_cuda.DenseStep(n, None, hidden=len(weights[0]), bias=False)
        else:
            energy = fpi_cuda.DenseEnergy(
                n, None, len(weights[0]), bias=False, curvature=dense.CURVATURE
            )
            self.step = fpi_cuda.GradientStep(energy, dense.STEP_SIZE)
        self.step.to(problem.device, problem.dtype)
        self.gained = any(bool((i.s != 1).any()) for i in problem.instances)
        super().__init__(problem, solver, backend)

    def solved(
        self, options: dict[str, Any], x0: Tensor, u: Tensor, s: Tensor, *weights: Tensor
    ) -> Tensor:
        owner = getattr(self.step, "energy", self.step)
        # These very tensors, which may need gradients.
        names = ("state_weight", "output_weight")
        owner._parameters.update(zip(names, weights, strict=False))
        gain = (s,) if self.gained else ()
        self.last = fpi_cuda.fixed_point(self.step, x0, u, *gain, **options)
        path = self.last.path
        if not path.startswith("native, whole"):
            if reason := re.search(r"\(not whole: (.*)\)", path):
                raise NotForThis(f"not solved whole: {reason[1]}")
            raise RuntimeError(f"a whole solve was to be measured (got {path})")
        return self.last.x


class Convolutions(Structured):
    """The denoising net as a `ConvStep`."""

    def __init__(self, problem: Problem, solver: Any, backend: str = "auto") -> None:
        self.step = fpi_cuda.ConvStep(nets.CHANNELS, 1, hidden=(nets.WIDTH,))
        super().__init__(problem, solver, backend)

    def solved(
        self, options: dict[str, Any], x0: Tensor, z: Tensor, s: Tensor, *weights: Tensor
    ) -> Tensor:
        first, bias, second, last = weights
        of_x, of_z = first.split([nets.CHANNELS, 1], 1)
        self.step._parameters["input_weight"] = of_z  # type: ignore[assignment]
        for layer, w, b in zip(self.step.layers, (of_x, second), (bias, last), strict=True):
            layer._parameters.update(weight=w, bias=b)  # type: ignore[dict-item]
        side = int(z.shape[1] ** 0.5 + 0.5)
        x0, z = nets.image(x0, side), nets.image(z, side)
        self.last = fpi_cuda.fixed_point(self.step, x0, z, **options)
        return nets.flat(self.last.x)


def drop_in(rule: Rule) -> Solve:
    """`fpi_cuda.compat`: the old layer's call, whose conditions see the whole batch at once."""
    return layer_of(compat.fixed_point_iteration, compat.default_term_cond, rule)


def layer_of(iterate: Any, condition: Any, rule: Rule) -> Solve:
    """A call of the old layer's interface: the batch's change relative to the batch's size.

    For the slowest sample to meet the rule the bound on the whole must be tighter: by the share
    that a sample has of the whole, √B where all are as large.
    """

    def solve(g: Step, x0: Tensor, u: Tensor, s: Tensor, *weights: Tensor) -> Tensor:
        def step(x: Any, y: Any) -> tuple[Tensor]:
            return (g(x[0], *y),)

        share = len(x0) ** 0.5
        forward, backward = (
            functools.partial(
                condition,
                threshold=(rtol / share) ** 2,
                epsilon=1e-30,
                maxIter=rule.max_iterations,
            )
            for rtol in (rule.rtol, rule.adjoint_rtol)
        )
        (x,) = iterate((u, s, *weights), (x0,), step, forward, backward)
        return x

    return solve

"""What the harness asks of a method that was made for one problem."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..clock import timed
from ..memory import peak
from ..problems import Instance, Problem, Rule, Step

Solve = Callable[..., Tensor]  # solve(g, x0, u, s, *weights) -> x̂, attached to autograd
Build = Callable[[Rule], Solve]


class NotForThis(Exception):
    """A method does not take this case, and says so: no failure."""


class Runner:
    """A method on a problem. Inputs are prepared before; calls return when they are done."""

    compile_s = 0.0  # seconds of compilation, where a method knows them

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def forward(self, i: int) -> Any:
        """x̂ of instance i, which rotate."""
        raise NotImplementedError

    def gradients(self, i: int) -> tuple[Any, ...]:
        """x̂, dL/du and dL/dweights of instance i; L = Σ loss·x̂."""
        raise NotImplementedError

    def call(self, *, backward: bool) -> Callable[[int], Any]:
        return self.gradients if backward else self.forward

    def tensors(self, out: Any) -> Any:
        """A result as tensors of torch."""
        return out

    def count(self) -> tuple[int, float]:
        """Evaluations of g in a forward, and the rows in them over B: most and mean iterations."""
        raise NotImplementedError

    def peak_bytes(self, *, backward: bool) -> int:
        """Peak memory of a call beyond its inputs; not of the first, which may keep something."""
        raise NotImplementedError


class Solver(Runner):
    """One that is a function of torch."""

    def __init__(self, problem: Problem, build: Build) -> None:
        super().__init__(problem)
        self.solve = build(problem.rule)

    def forward(self, i: int) -> Tensor:
        instances = self.problem.instances
        with torch.no_grad():
            return self.solve(self.problem.g, *instances[i % len(instances)].arguments)

    def gradients(self, i: int) -> tuple[Tensor, ...]:
        instances = self.problem.instances
        return gradients(self.solve, self.problem.g, instances[i % len(instances)])

    def count(self) -> tuple[int, float]:
        g = Counting(self.problem.g, str(self.problem.device))
        with torch.no_grad():
            for _ in range(2):  # the first call of all may look at g more often
                g.reset()
                self.solve(g, *self.problem.instances[0].arguments)
        return g.calls, g.rows / self.problem.batch

    def peak_bytes(self, *, backward: bool) -> int:
        call = self.call(backward=backward)
        return peak(lambda: call(0), str(self.problem.device))


def gradients(solve: Solve, g: Step, instance: Instance) -> tuple[Tensor, ...]:
    """x̂, dL/du and dL/dweights."""
    leaves = [t.detach().requires_grad_() for t in (instance.u, *instance.weights)]
    x = solve(g, instance.x0, leaves[0], instance.s, *leaves[1:])
    return x.detach(), *torch.autograd.grad((instance.loss * x).sum(), leaves)


class Counting:
    """g that counts its calls, the rows in them and the seconds inside it."""

    def __init__(self, g: Step, device: str = "cpu") -> None:
        self.g, self.device = g, device
        self.reset()

    def reset(self) -> None:
        self.calls, self.rows, self.seconds = 0, 0, 0.0

    def __call__(self, x: Tensor, *rest: Tensor) -> Tensor:
        y: list[Tensor] = []
        self.seconds += timed(lambda: y.append(self.g(x, *rest)), self.device)
        self.calls += 1
        self.rows += len(x)
        return y[0]

"""What must be right before a time counts: judged in float64 against `methods.truth`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .methods.runner import Runner
from .methods.truth import truth
from .problems import Instance, Problem

FACTOR = 2.0  # residuals and gradient errors may differ by this and still be compared


@dataclass(frozen=True)
class Correctness:
    """What one method got, judged in float64. The worst over all instances and samples."""

    residual: float  # ‖g(x) − x‖ / ‖g(x)‖, the worst sample's
    in_tolerances: float  # ‖g(x) − x‖ / (atol·√N + rtol·‖g(x)‖), the worst sample's
    gradient_error: float | None  # ‖dW − dW*‖ / ‖dW*‖ of all weights; None: forward alone
    input_gradient_error: float | None  # the same for u

    def refusal(self, limit: float) -> str | None:
        """Why no time may be reported, or None. limit: of the gradients' errors."""
        if not self.in_tolerances <= FACTOR:
            return f"worst residual {self.in_tolerances:.2g} times the tolerance"
        for name, error in (("W", self.gradient_error), ("u", self.input_gradient_error)):
            if error is not None and not error <= limit:
                return f"gradient of {name} off by {error:.2g}"
        return None

    def row(self, limit: float) -> dict[str, Any]:
        return {
            "worst_residual": self.residual,
            "residual_in_tolerances": self.in_tolerances,
            "gradient_error": self.gradient_error,
            "input_gradient_error": self.input_gradient_error,
            "refused": self.refusal(limit),
        }


def incomparable(ours: Mapping[str, Any], rival: Mapping[str, Any]) -> str | None:
    """Why the times of two rows may not be divided, or None.

    One-sided: a rival that is less exact than ours only gains by being compared.
    """
    for row in (ours, rival):
        if row["refused"]:
            return f"{row['method']}: {row['refused']}"
    for key, what in (("worst_residual", "residual"), ("gradient_error", "gradient error")):
        a, b = ours[key], rival[key]
        if a is not None and b is not None and a > FACTOR * b:
            return f"{what} {a / b:.1f} times the rival's"
    return None


def judge(runner: Runner, *, backward: bool) -> Correctness:
    """Run a method on every instance and recompute its residual and gradients' errors."""
    problem, worst = runner.problem, [0.0, 0.0, 0.0, 0.0]
    answers = truth(problem) if backward else (None,) * len(problem.instances)
    for i, (instance, true) in enumerate(zip(problem.instances, answers, strict=True)):
        if true is None:
            x = runner.tensors(runner.forward(i))
            errors = [*residuals(problem, instance, x), 0.0, 0.0]
        else:
            x, du, *dweights = runner.tensors(runner.gradients(i))
            of_weights = relative_error(joined(dweights), joined(true.dweights))
            errors = [*residuals(problem, instance, x), of_weights, relative_error(du, true.du)]
        # NaN must not vanish in a max.
        worst = [e if math.isnan(e) else max(e, w) for e, w in zip(errors, worst, strict=True)]
    if not backward:
        return Correctness(worst[0], worst[1], None, None)
    return Correctness(*worst)


def joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def sample_residuals(problem: Problem, instance: Instance, x: Tensor) -> tuple[Tensor, Tensor]:
    """[B] each: ‖g(x) − x‖ and ‖g(x)‖, in float64."""
    i, x = instance.to(torch.float64), x.to(instance.u.device).double()
    with torch.no_grad():
        value = problem.g(x, i.u, i.s, *i.weights)
    return torch.linalg.vector_norm(value - x, dim=1), torch.linalg.vector_norm(value, dim=1)


def residuals(problem: Problem, instance: Instance, x: Tensor) -> tuple[float, float]:
    """The worst sample's, relative to g(x), and in tolerances."""
    rule = problem.rule
    r, size = sample_residuals(problem, instance, x)
    threshold = rule.atol * math.sqrt(problem.size) + rule.rtol * size
    return float((r / size).max()), float((r / threshold).max())


def relative_error(a: Tensor, b: Tensor) -> float:
    a = a.to(b.device)
    return float(torch.linalg.vector_norm(a.double() - b) / torch.linalg.vector_norm(b))

"""A solver of jax on a problem: the maps again, compiled ahead of the timed calls."""

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

"""How the iteration of a sample ended, and what to try then."""

from __future__ import annotations

import enum


class Status(enum.IntEnum):
    """How the iteration of one sample ended; `message` says what to try."""

    CONVERGED = 0
    MAX_ITERATIONS = 1
    STALLED = 2
    DIVERGED = 3
    NONFINITE = 4

    @property
    def message(self) -> str:
        """One sentence: what happened, and what to try."""
        return _MESSAGES[self]


_MESSAGES = {
    Status.CONVERGED: "the residual met the tolerance.",
    Status.MAX_ITERATIONS: (
        "the residual was above the tolerance after max_iterations; raise max_iterations, loosen "
        "rtol, use Anderson, damp a rotation or a 2-cycle with beta < 1, or make g a contraction. "
        "(A noisy g, by dropout or atomics, comes no nearer than its noise: freeze it, or loosen "
        "rtol.)"
    ),
    Status.STALLED: (
        "the residual stopped falling at the rounding level of the dtype; loosen rtol or solve in "
        "a wider dtype."
    ),
    Status.DIVERGED: (
        "the residual grew steadily; g is no contraction there: scale its weights down, damp with "
        "beta < 1, or start nearer. (A fixed point that repels this iteration may exist all the "
        "same: Anderson or another solver may reach it.)"
    ),
    Status.NONFINITE: (
        "g returned NaN or Inf, or the input held one; look at this sample's x0 and inputs, or "
        "lower the scale of g."
    ),
}
# To NONFINITE, where the solver mixes iterates and came to do so.
MIXED = "(Mixtures of iterates at which g was not finite were taken back {}; Picard() makes none.)"

# Why an adjoint is NONFINITE, where g itself was finite.
DERIVATIVE = (
    "g's derivative at this sample's x holds NaN or Inf (of a square root, norm or logarithm at 0, "
    "say): add a small number to what is under it."
)
INCOMING = (
    "the gradient of the loss by this sample's x holds NaN or Inf; look at what the loss does to x."
)
TANGENT = (
    "the tangent of what this sample's g takes, or its effect on g, holds NaN or Inf; look at the "
    "tangents given, and at g's derivative by its inputs and parameters."
)

# Gradients of these samples are masked by default: their state means nothing.
MASKED = (Status.DIVERGED, Status.NONFINITE)

"""Does x ↦ g(x) contract? What measures it, what certifies it, and what keeps it so.

*Measured at a point.* Two numbers, both by vector-Jacobian products alone, for any g. The norm
‖∂g/∂x‖₂ below 1 makes g a contraction near x: every step comes nearer (paper theorem 1). The
spectral radius, which is never above the norm, is the rate at which Picard's iteration and the
adjoint's end up: below 1 at x̂ is what a trained layer needs to converge near x̂, and a bound on the
norm can cost it much more. `jacobian_penalty` is a loss term that keeps either small.

*Certified everywhere.* Where a step's layers are known, `lipschitz` bounds ‖g(x) − g(y)‖ / ‖x − y‖
over all x, y and inputs: below 1 there is one fixed point, and Picard finds it. And
`spectral_normalize` scales the weights down so that it stays below 1 while they are trained.
"""

from .certificate import Certified, lipschitz, spectral_normalize
from .convolution import convolution_bound, convolution_norm
from .held import _Estimated, _Held  # noqa: F401  (older pickles name the two here)
from .jacobian import jacobian_norm, jacobian_penalty, jacobian_radius

__all__ = [
    "Certified",
    "convolution_bound",
    "convolution_norm",
    "jacobian_norm",
    "jacobian_penalty",
    "jacobian_radius",
    "lipschitz",
    "spectral_normalize",
]

"""Layers within torch.compile: a solve is one operator of the graph, and its adjoint another.

The compiler sees an operator that takes tensors and returns tensors; when the graph runs, the
operator solves as an uncompiled layer does, with the options that the layer has then. Imported
while compiling only: it loads the compiler.
"""

from .call import call

__all__ = ["call"]

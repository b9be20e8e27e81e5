"""Every part by its name, in the order to run them: what all others need comes first."""

from __future__ import annotations

from . import drivers, kernels, loops, models, solves
from .check import Part

PARTS: dict[str, Part] = {
    "load": kernels.load,
    "picard": kernels.picard,
    "anderson": kernels.anderson,
    "triton_picard": kernels.triton_picard,
    "triton_anderson": kernels.triton_anderson,
    "dense_map": kernels.dense_map,
    "dense_solve": solves.dense_solve,
    "conv_chain": solves.conv_chain,
    "conv_layers": solves.conv_layers,
    "while_graph": drivers.while_graph,
    "graph_forward": drivers.graph_forward,
    "graph_backward": drivers.graph_backward,
    "graph_failed": drivers.graph_failed,
    "graph_refused": drivers.graph_refused,
    "late_read": loops.late_read,
    "compaction": loops.compaction,
    "own_limits": loops.own_limits,
    "training": solves.training,
    "autocast": models.autocast,
    "compiled": models.compiled,
    "threads": loops.threads,
    "streams": loops.streams,
}

"""The first checks on a CUDA device: short parts against float64, each in a process of its own."""

"""What `python -m benchmarks.plot` draws: a module a kind of figure, on one kind of page."""

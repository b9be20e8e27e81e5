"""The paper's experiments: `python -m benchmarks.tasks TASK train|tune|eval|report --data DIR`."""

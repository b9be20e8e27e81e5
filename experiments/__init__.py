"""The paper's experiments: `python -m experiments TASK train|tune|eval|report --data DIR`."""

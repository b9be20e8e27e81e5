import pytest
from machine import Machine


@pytest.fixture
def start():
    """Makes machines, which end with the test."""
    machines = []

    def start(*arguments):
        machines.append(Machine(*arguments))
        return machines[-1]

    yield start
    for machine in machines:
        machine.close()

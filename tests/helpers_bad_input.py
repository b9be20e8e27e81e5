"""What the tests of wrong input share."""

import pytest


def half(x, *_):
    return 0.5 * x


def raises(error, message):
    return pytest.raises(error, match=message)

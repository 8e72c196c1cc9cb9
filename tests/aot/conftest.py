"""Compiling for devices that are not here. `make test-aot` runs all of it; the default suite what bears no marker."""

import pytest

from experiments.aot.targets import find_target


def found(name):
    """The target of a name; the test is skipped where its compiler is not installed, or came too late."""
    try:
        return find_target(name)
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture
def v5e():
    return found("v5e:2x2")


@pytest.fixture
def h100():
    return found("h100")


@pytest.fixture(params=["v5e:2x2", "h100"])
def target(request):
    """One of each kind."""
    return found(request.param)

"""pytest --slow-bounds runs the tests with the fast path of relaxations.py switched off."""
import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--slow-bounds", action="store_true",
                     help="set relaxations.FAST = False first, and leave out tests of fast_path")


def pytest_configure(config):
    config.addinivalue_line("markers", "fast_path: a test of the speed or memory of the fast path, "
                            "which --slow-bounds leaves out")
    if config.getoption("--slow-bounds"):
        import relaxations
        if not hasattr(relaxations, "FAST"):
            raise pytest.UsageError("--slow-bounds: relaxations.py has no FAST to switch off")
        relaxations.FAST = False


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow-bounds"):
        for item in items:
            if item.get_closest_marker("fast_path"):
                item.add_marker(pytest.mark.skip(reason="needs the fast path"))


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Each test draws the same numbers, whichever ran before it."""
    torch.manual_seed(0)

import os

# The tests are small: a second thread gains little, and where it waits for a busy core they take
# many times as long. This has to be set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; run by python -m pytest -m slow")


def pytest_collection_modifyitems(config, items):
    """Without -m the slow tests stay out."""
    if not config.option.markexpr:
        slow = [item for item in items if "slow" in item.keywords]
        items[:] = [item for item in items if "slow" not in item.keywords]
        config.hook.pytest_deselected(items=slow)

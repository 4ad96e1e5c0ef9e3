def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; run by python -m pytest -m slow")


def pytest_collection_modifyitems(config, items):
    """Without -m the slow tests stay out."""
    if not config.option.markexpr:
        slow = [item for item in items if "slow" in item.keywords]
        items[:] = [item for item in items if "slow" not in item.keywords]
        config.hook.pytest_deselected(items=slow)

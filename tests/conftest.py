import os

import pytest

# The tests are small: a second thread gains little, and where it waits for a busy core they take
# many times as long. This has to be set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of ten image files, which no test changes."""
    from runs import encoded                                    # which imports torch
    folder = tmp_path_factory.mktemp("images")
    for i in range(10):
        (folder / f"{i}.png").write_bytes(encoded(i))
    return folder

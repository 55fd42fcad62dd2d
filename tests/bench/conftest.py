import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def _few_objects_to_collect() -> Iterator[None]:
    """Peak memory is measured after a garbage collection, which otherwise visits all of transformers every time."""
    gc.freeze()
    yield
    gc.unfreeze()

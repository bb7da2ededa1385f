"""What several files of tests share."""

import pytest


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where the warmed-up tiny model is made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield

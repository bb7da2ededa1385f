"""What several files of tests share."""

import pytest


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where the warmed-up tiny model is made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def systems_of_chats(monkeypatch):
    """The system text of every chat that is made, as it goes along."""
    import model  # not earlier: test_srpo.py first says that there is no hub

    systems = []
    chat = model.Policy._chat

    def listening(policy, example, n_images):
        systems.append(example.system)
        return chat(policy, example, n_images)

    monkeypatch.setattr(model.Policy, "_chat", listening)
    return systems

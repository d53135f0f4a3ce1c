"""A place to try command lines in."""

import pytest
from command_lines import make_world


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_world(tmp_path)

"""A web server for downloads, and an environment without the user's mirror."""

import pytest

from tests.web import serving


@pytest.fixture
def web():
    with serving() as web:
        yield web


@pytest.fixture
def model(tmp_path):
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def no_mirror(monkeypatch):
    monkeypatch.delenv("UPSNET_WEIGHTS_URL", raising=False)
    monkeypatch.setenv("UPSNET_NPM_REGISTRY", "http://127.0.0.1:9/")

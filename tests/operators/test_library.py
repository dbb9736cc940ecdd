"""What the start-up line says of native code that is there and does not load; wishes that nobody can fulfil."""

import pytest

from upsnet.operators import library
from upsnet.structures.errors import UserError


def test_the_loaders_own_reason_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    monkeypatch.delenv("UPSNET_NATIVE", raising=False)
    (tmp_path / "_native.abi3.so").write_bytes(b"")
    assert library._load("_native", ()).startswith("_native.abi3.so does not load: ")
    assert library._load("_native", ()).endswith("file too short")


@pytest.mark.parametrize("word", ["avx", "AVX2"])
def test_a_variant_that_is_none_is_refused(word, monkeypatch):
    monkeypatch.delenv("UPSNET_NATIVE", raising=False)
    monkeypatch.setenv("UPSNET_NATIVE_CPU", word)
    with pytest.raises(UserError, match=f"UPSNET_NATIVE_CPU is '{word}': choose generic, avx2, avx512, or"):
        library._load("_native", ())
    monkeypatch.setenv("UPSNET_NATIVE", "0")
    assert library._load("_native", ()) == library.SWITCHED_OFF

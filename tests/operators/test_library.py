"""What the start-up line says of native code that is there and does not load."""

from upsnet.operators import library


def test_the_loaders_own_reason_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    monkeypatch.delenv("UPSNET_NATIVE", raising=False)
    (tmp_path / "_native.abi3.so").write_bytes(b"")
    assert library._load("_native", ()).startswith("_native.abi3.so does not load: ")
    assert library._load("_native", ()).endswith("file too short")

"""train.compile through the launcher: the same model, or a plain word that it could not be."""

import pytest

from tests.support.launch import launch

CUT = ("train.max_steps=8", "log.every_steps=4", "eval.max_samples=200")


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """What another run has compiled before must not stand in."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    return monkeypatch


@pytest.mark.timeout(500)
def test_a_compiled_arch_learns_what_the_plain_one_does(tmp_path, own_cache):
    plain = launch(tmp_path / "plain", *CUT)
    compiled = launch(tmp_path / "compiled", *CUT, "train.compile=true", timeout=380)
    assert (plain.code, compiled.code) == (0, 0), compiled.errors
    assert "cannot be compiled" not in compiled.errors
    assert any((tmp_path / "inductor").rglob("*.so")), "nothing was compiled"
    assert compiled.records[0]["losses"] == pytest.approx(plain.records[0]["losses"], abs=2e-5)
    assert compiled.records[0]["metrics"]["click"]["ne"] == pytest.approx(
        plain.records[0]["metrics"]["click"]["ne"], abs=1e-4
    )


@pytest.mark.timeout(300)
def test_without_a_compiler_it_trains_all_the_same_and_says_why(tmp_path, own_cache):
    own_cache.setenv("CXX", "/nowhere/g++")
    outcome = launch(tmp_path, *CUT, "train.compile=true", timeout=280)
    assert outcome.code == 0, outcome.errors
    assert "train.compile: InterFormer runs as it is, since it cannot be compiled" in outcome.errors
    assert outcome.records[0]["num_steps"] == 8

"""train.compile: the same model, or a plain word that it could not be."""

import pytest
import torch

from dlrm_scale.models.compiled import compile_arch
from dlrm_scale.models.ranking_model import build_model
from tests.support.launch import launch
from tests.support.model_inputs import FEATURES, random_batch, run_config, with_features

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


@pytest.mark.timeout(500)
def test_compiled_chunks_in_bf16_are_as_near_to_fp32_as_the_plain_ones():
    """As trained on a CPU: several chunks a batch, whose lengths change from batch to batch, and the kernels of attention and PFFN."""
    (config, model), (_, exact) = _model("bf16"), _model("fp32")
    batches = [random_batch(config.features, 520 + 7 * seed, seed) for seed in range(2)]
    plain = [_gradients(model, batch) for batch in batches]
    compile_arch(model.dense.arch, on_cpu=True)
    for batch, by_eager in zip(batches, plain, strict=True):
        by_compiled, expected = _gradients(model, batch), _gradients(exact, batch)
        error = (by_eager - expected).norm()
        assert 0 < error < 0.05 * expected.norm()
        assert (by_compiled - expected).norm() < 1.5 * error


def _model(precision):
    history = FEATURES["sequences"][0] | {"max_length": 40}
    config = run_config(with_features(sequences=[history]), precision=precision, num_layers=1, dim=16)
    model = build_model(config, table_device=torch.device("cpu"), dense_device=torch.device("cpu"))
    torch.manual_seed(0)
    for table in model.embeddings.parameters():
        torch.nn.init.normal_(table)
    return config, model


def _gradients(model, batch):
    """All of them, one behind the other."""
    model.zero_grad(set_to_none=True)
    loss, _ = model(batch)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

"""The precision of exchanges as the sharders get it, and what a configuration may say of it."""

import pytest
import torch
from torchrec.distributed.types import CommOp

from dlrm_scale.communication_config import Communication
from dlrm_scale.config import SparseOptimizer
from dlrm_scale.errors import ConfigError
from dlrm_scale.sharding.sharders import make_sharders
from dlrm_scale.training.run_folder import differences
from tests.support.configs import tiny_config

EXCHANGES = (
    CommOp.POOLED_EMBEDDINGS_ALL_TO_ALL,
    CommOp.POOLED_EMBEDDINGS_REDUCE_SCATTER,
    CommOp.SEQUENCE_EMBEDDINGS_ALL_TO_ALL,
)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_each_direction_of_every_exchange_has_its_own_precision(device):
    """Also bf16 on the CPU, which TorchRec replaces by fp16 if it is told the device."""
    for sharder in make_sharders(SparseOptimizer(), device, Communication(forward="fp16", backward="bf16")):
        codecs = sharder.qcomm_codecs_registry
        assert set(codecs) == {op.name for op in EXCHANGES}
        assert {codec.forward.quantized_dtype for codec in codecs.values()} == {torch.float16}
        assert {codec.backward.quantized_dtype for codec in codecs.values()} == {torch.bfloat16}


def test_fp32_needs_no_codec():
    assert not any(sharder.qcomm_codecs_registry for sharder in make_sharders(SparseOptimizer(), "cpu"))


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_precisions_that_some_sharding_types_lack_are_refused(precision):
    with pytest.raises(ConfigError, match=r"sharding\.communication\.forward"):
        tiny_config(sharding={"communication": {"forward": precision}})


def test_a_run_that_goes_on_keeps_its_precision_but_not_its_buckets():
    then, other, buckets = (
        tiny_config(**sections).model_dump(mode="json")
        for sections in (
            {},
            {"sharding": {"communication": {"backward": "bf16"}}, "train": {"all_reduce": {"precision": "fp16"}}},
            {"train": {"all_reduce": {"bucket_mb": 3}}},
        )
    )
    assert differences(then, buckets) == []
    assert [line.split(":")[0] for line in differences(then, other)] == [
        "sharding.communication.backward",
        "train.all_reduce.precision",
    ]

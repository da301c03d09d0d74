"""The model under TorchRec's own wrapping and train pipeline, on one gloo rank."""

import copy

import pytest
import torch
import torch.distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.train_pipeline.tracing import Tracer, _get_leaf_module_names

from dlrm_scale.models.ranking_model import build_model
from tests.support.model_inputs import random_batch, run_config

CPU = torch.device("cpu")


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("arch", ["interformer", "dlrm"])
def test_pipelined_predictions_are_those_of_the_plain_model(one_rank, arch):
    config = run_config(arch=arch)
    plain = build_model(config, table_device=CPU, dense_device=CPU)
    sharded = DistributedModelParallel(copy.deepcopy(plain), device=CPU)
    sharded.load_state_dict(plain.state_dict())  # wrapping drew new tables

    model = sharded.module
    graph = Tracer(leaf_modules=_get_leaf_module_names(model)).trace(model)
    called = [node.target for node in graph.nodes if node.op == "call_module"]
    assert called == ["embeddings.ebc", "embeddings.ec", "dense", "loss"]

    batch = random_batch(config.features, 16)
    expected = plain(batch)[1].logits_BT  # tables train in the pipeline's backward, so only the first step compares
    optimizer = torch.optim.SGD(model.dense.parameters(), lr=0.1)
    predictions = TrainPipelineSparseDist(sharded, optimizer, CPU).progress(iter([batch, copy.deepcopy(batch)]))
    torch.testing.assert_close(predictions.logits_BT, expected)

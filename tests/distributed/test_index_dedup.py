"""Each id sent, looked up and updated once a rank: the results are the twin's, and what is sent is really less."""

import pytest
import torch
from torchrec.distributed.embedding import ShardedEmbeddingCollection

from dlrm_scale.config import RunConfig
from dlrm_scale.models.ranking_model import build_model
from dlrm_scale.sharding.apply import shard_model
from dlrm_scale.sharding.plan import Plan
from tests.distributed.test_communication import changed
from tests.distributed.test_sharding_parity import SEQUENCE_TYPES, check
from tests.support.twin import case_config, global_batches, make_plan

ADAGRAD = {"name": "rowwise_adagrad", "lr": 0.1}


@pytest.mark.parametrize("sparse", [ADAGRAD, {"name": "sgd", "lr": 0.5}], ids=lambda s: s["name"])
@pytest.mark.parametrize("sequence_type", SEQUENCE_TYPES)
@pytest.mark.parametrize("world", ["two_ranks", "four_ranks"])
def test_trains_as_the_twin_does(request, world, sequence_type, sparse):
    """Tables that two features read, of which one is a sequence; rounding is summed in another order, not larger."""
    config = changed(case_config("table_wise", sequence_type, sparse), train={"index_dedup": True})
    check(request.getfixturevalue(world), config, 2, {"item": sequence_type, "category": sequence_type})


def test_tables_of_two_sharding_types(two_ranks):
    config = case_config("table_wise", "row_wise", ADAGRAD)
    tables = config.model_dump(mode="json")["sharding"]["tables"] | {"category": {"types": ["table_wise"]}}
    config = changed(config, train={"index_dedup": True}, sharding={"tables": tables})
    check(two_ranks, config, 2, {"item": "row_wise", "category": "table_wise"})


def ids_received(config: RunConfig, plan: Plan) -> tuple[list[list[int]], dict[str, list[int]]]:
    """Of this rank's first batch: the ids that a rank gets of each table, and all ids of each table that the rank reads."""
    cpu = torch.device("cpu")
    model = shard_model(build_model(config, dense_device=cpu), plan, config, cpu)
    collection = model.module.embeddings.ec
    assert isinstance(collection, ShardedEmbeddingCollection)
    sequences = global_batches(config, torch.distributed.get_world_size(), torch.distributed.get_rank())[0].sequences
    received = collection.input_dist(collection.create_context(), sequences).wait().wait()
    read = {
        table: [i for key in config.features.features_of(table) for i in sequences[key].values().tolist()]
        for table in config.features.sequence_tables
    }
    return [features.values().tolist() for features in received], read


def test_each_id_is_sent_once(two_ranks):
    """Both tables whole on one rank each: a rank receives both ranks' different ids of its table, and without deduplication all of them."""
    plain = case_config("table_wise", "table_wise", ADAGRAD)
    pins = {"item": {"types": ["table_wise"], "pin": [0]}, "category": {"types": ["table_wise"], "pin": [1]}}
    tables = plain.model_dump(mode="json")["sharding"]["tables"] | pins
    for index_dedup in (False, True):
        config = changed(plain, train={"index_dedup": index_dedup}, sharding={"tables": tables})
        by_rank = two_ranks.run(ids_received, config, make_plan(config, 2, 2))
        for rank, table in enumerate(("item", "category")):
            (ids,) = by_rank[rank][0]
            sent = [read[table] for _, read in by_rank]
            expected = [set(ids) for ids in sent] if index_dedup else sent
            assert sorted(ids) == sorted(i for of_rank in expected for i in of_rank)
            assert any(len(set(ids)) < len(ids) / 2 for ids in sent), "nothing to be left out"

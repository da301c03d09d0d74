import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import dlrm_scale.sharding.index_dedup  # noqa: F401  the operator's CPU kernel
from dlrm_scale.errors import ConfigError
from tests.support.configs import TINY, tiny_config

TABLES = [(7, 2), (5, 1), (1, 1), (1000, 3)]  # rows and features
# as TorchRec makes them: the rows of a table stand at its last feature, its number of features at its first
FIRST_ROW = torch.tensor([0, 0, 7, 12, 13, 13, 13, 1013])
TABLE_FEATURES = torch.tensor([0, 2, 2, 3, 4, 7, 7, 7])
FEATURE_ROWS = [rows for rows, num_features in TABLES for _ in range(num_features)]
NUM_SAMPLES = 9


@pytest.mark.parametrize("most", [0, 1, 20])
def test_each_table_has_its_ids_once(most):
    torch.manual_seed(0)
    lengths = torch.randint(0, most + 1, (len(FEATURE_ROWS) * NUM_SAMPLES,))
    counts = lengths.view(len(FEATURE_ROWS), NUM_SAMPLES).sum(1).tolist()
    ids = torch.cat([torch.randint(0, rows, (n,)) for rows, n in zip(FEATURE_ROWS, counts, strict=True)])
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))

    new_lengths, new_offsets, unique, place = torch.ops.fbgemm.jagged_unique_indices(
        FIRST_ROW, TABLE_FEATURES, offsets, ids
    )

    assert torch.equal(unique[place], ids)
    assert torch.equal(new_offsets[1:], new_lengths.cumsum(0)) and new_offsets[0] == 0
    keys = [str(f) for f in range(len(FEATURE_ROWS))]
    left = KeyedJaggedTensor(keys, unique, lengths=new_lengths, offsets=new_offsets).to_dict()
    places = place.split(counts)
    first = 0
    for _, num_features in TABLES:
        features = slice(first, first + num_features)
        read = {i for of_feature in ids.split(counts)[features] for i in of_feature.tolist()}
        of_table = torch.cat([left[key].values() for key in keys[features]])
        assert of_table.tolist() == sorted(read)
        spread = new_lengths[first * NUM_SAMPLES : (first + num_features) * NUM_SAMPLES]
        assert spread.max() - spread.min() <= 1
        begin = int(new_offsets[first * NUM_SAMPLES])
        assert all(begin <= p < begin + len(read) for of_feature in places[features] for p in of_feature.tolist())
        first += num_features


def test_without_sequences_it_is_refused():
    features = TINY["features"] | {"sequences": []}
    with pytest.raises(ConfigError, match=r"train\.index_dedup is true.*no sequences"):
        tiny_config(features=features, model={"arch": "interformer", "mode": "sole"}, train={"index_dedup": True})

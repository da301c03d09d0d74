"""A small schema with every kind of feature, and random batches of any schema."""

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dlrm_scale.config import RunConfig
from dlrm_scale.config_io import parse_config
from dlrm_scale.data.batch import RecBatch
from dlrm_scale.features import FeatureSchema

FEATURES = {
    "tables": {
        "item": {"num_embeddings": 50, "embedding_dim": 8},
        "cate": {"num_embeddings": 10, "embedding_dim": 8},
        "user": {"num_embeddings": 40, "embedding_dim": 8},
        "tags": {"num_embeddings": 30, "embedding_dim": 8, "pooling": "mean"},
    },
    "dense": [{"name": "price"}, {"name": "age"}],
    "categorical": [
        {"name": "item_id", "table": "item"},
        {"name": "user_id", "table": "user"},
        {"name": "tag_ids", "table": "tags", "multi_hot": True, "pooling_factor": 3.0},
    ],
    "sequences": [
        {
            "name": "history",
            "max_length": 6,
            "fields": [{"name": "item_hist", "table": "item"}, {"name": "cate_hist", "table": "cate"}],
        }
    ],
    "labels": ["click", "buy"],
}
SMALL_INTERFORMER = {
    "arch": "interformer",
    "dim": 8,
    "num_layers": 2,
    "num_heads": 2,
    "dcn_rank": 4,
    "head_hidden": [16],
}


def run_config(features: dict | None = None, seed: int = 0, precision: str = "fp32", **model: object) -> RunConfig:
    tree = {
        "name": "test",
        "seed": seed,
        "features": features or FEATURES,
        "data": {"source": {"kind": "synthetic", "num_train": 64, "num_eval": 64}},
        "model": {**SMALL_INTERFORMER, **model} if model.get("arch", "interformer") == "interformer" else model,
        "train": {"global_batch_size": 64, "precision": precision},
    }
    return parse_config(tree, origin="test")


def with_checkpointing(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"activation_checkpointing": True})})


def with_features(**changes: object) -> dict:
    return {**FEATURES, **changes}


def random_batch(schema: FeatureSchema, batch_size: int, seed: int = 0) -> RecBatch:
    """Sequences are 0 .. max_length events long and include both ends; single and multi-hot ids may be missing."""
    generator = torch.Generator().manual_seed(seed)
    lengths = {}
    for s in schema.sequences:
        drawn = torch.randint(0, s.max_length + 1, (batch_size,), generator=generator)
        drawn[0], drawn[-1] = 0, s.max_length
        lengths |= {f.name: drawn for f in s.fields}
    for f in schema.categorical:
        most = 4 if f.multi_hot else 1
        lengths[f.name] = torch.randint(0, most + 1, (batch_size,), generator=generator)
    labels = torch.randint(0, 2, (batch_size, len(schema.labels)), generator=generator).float()
    return RecBatch(
        dense_BF=torch.randn(batch_size, len(schema.dense), generator=generator),
        bags=_jagged(schema, schema.bag_keys, lengths, generator),
        sequences=_jagged(schema, schema.sequence_keys, lengths, generator),
        labels_BT=labels,
        weights_B=torch.rand(batch_size, generator=generator) + 0.5,
        groups_B=torch.zeros(batch_size, dtype=torch.int64),
        mean_rank_weight=torch.tensor(float(batch_size)),
    )


def _jagged(
    schema: FeatureSchema, keys: tuple[str, ...], lengths: dict[str, torch.Tensor], generator: torch.Generator
) -> KeyedJaggedTensor | None:
    if not keys:
        return None
    values = [
        torch.randint(
            0, schema.tables[schema.table_of[k]].num_embeddings, (int(lengths[k].sum()),), generator=generator
        )
        for k in keys
    ]
    return KeyedJaggedTensor(list(keys), torch.cat(values), lengths=torch.cat([lengths[k] for k in keys]))

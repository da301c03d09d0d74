"""A small configuration that has one of everything, as the plain tree that a YAML file would hold."""

from typing import Any

from dlrm_scale.config import RunConfig
from dlrm_scale.config_io import parse_config

TINY: dict[str, Any] = {
    "name": "tiny",
    "device": "cpu",
    "features": {
        "tables": {
            "user": {"num_embeddings": 500, "embedding_dim": 8},
            "item": {"num_embeddings": 300, "embedding_dim": 8},
            "category": {"num_embeddings": 20, "embedding_dim": 8},
            "tag": {"num_embeddings": 100, "embedding_dim": 8, "pooling": "mean"},
        },
        "dense": [{"name": "age"}, {"name": "price", "transform": "log1p"}],
        "categorical": [
            {"name": "user", "table": "user"},
            {"name": "item", "table": "item"},
            {"name": "category", "table": "category"},
            {"name": "tags", "table": "tag", "multi_hot": True, "pooling_factor": 3.0},
        ],
        "sequences": [
            {
                "name": "history",
                "max_length": 6,
                "fields": [
                    {"name": "history_item", "table": "item"},
                    {"name": "history_category", "table": "category"},
                ],
            }
        ],
        "labels": ["click"],
        "group": "user_group",
    },
    "data": {"source": {"kind": "synthetic", "num_train": 4000, "num_eval": 1000}, "lanes": 4},
    "model": {
        "arch": "interformer",
        "dim": 8,
        "num_layers": 1,
        "num_heads": 2,
        "dcn_rank": 4,
        "head_hidden": [16],
    },
    "train": {"global_batch_size": 64, "max_steps": 20},
    "log": {"every_steps": 5, "warmup_steps": 2, "window_samples": 1000},
}


def tiny_config(**sections: dict[str, Any]) -> RunConfig:
    """TINY with some values of its sections replaced: tiny_config(train={"max_steps": 3})."""
    tree = {**TINY, **{name: {**TINY.get(name, {}), **values} for name, values in sections.items()}}
    return parse_config(tree, origin="tests")

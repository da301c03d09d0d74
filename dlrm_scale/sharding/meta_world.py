"""A world of any size in one process without memory: what TorchRec and FBGEMM need to build one rank's modules on meta.

Everything is the real thing but for the stand-ins below, each for a step that needs data, other ranks or a GPU. Found on
TorchRec 1.8.0 and FBGEMM 1.8.0.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu import split_table_batched_embeddings_ops_training as fbgemm_training
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchrec.distributed import batched_embedding_kernel, collective_utils, comm, embeddingbag
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, compute_kernel_to_embedding_location
from torchrec.distributed.sharding import grid_sharding, twrw_sharding
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from dlrm_scale.meta import META, without_memory
from dlrm_scale.sharding.plan import Plan, PlanRequest


def bare_collections(request: PlanRequest) -> nn.Module:
    """`ebc` and `ec` of the request's tables, as attributes, on meta."""
    columns: dict[str, list[dict[str, Any]]] = {"bags": [], "sequences": []}
    for name, spec in request.tables.items():
        columns[spec.collection].append(
            {
                "name": name,
                "num_embeddings": spec.num_embeddings,
                "embedding_dim": spec.embedding_dim,
                "feature_names": list(spec.expected_ids_by_feature),
                "data_type": DataType[spec.data_type.upper()],
            }
        )
    bags = [
        EmbeddingBagConfig(**table, pooling=PoolingType[request.tables[table["name"]].pooling.upper()])
        for table in columns["bags"]
    ]
    sequences = [EmbeddingConfig(**table) for table in columns["sequences"]]
    collections = nn.Module()
    with without_memory():
        collections.ebc = EmbeddingBagCollection(bags, device=META) if bags else None
        collections.ec = EmbeddingCollection(sequences, device=META) if sequences else None
    return collections


@contextmanager
def meta_world(plan: Plan, rank: int) -> Iterator[None]:
    """This process as `rank` of the plan's cluster: environment, process group and stand-ins, all undone at the end.

    Raises:
        RuntimeError: this process is a rank of a real group.
    """
    if dist.is_initialized():
        raise RuntimeError("this process has a process group; a dry run needs one that has none")
    cluster = plan.request.group
    environment = {
        "RANK": rank,
        "WORLD_SIZE": cluster.num_ranks,
        "LOCAL_RANK": rank % cluster.ranks_per_host,
        "LOCAL_WORLD_SIZE": cluster.ranks_per_host,
    }
    with ExitStack() as undo:
        undo.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.WARNING)  # TorchRec warns of its own defaults
        undo.enter_context(_environment({name: str(value) for name, value in environment.items()}))
        for owner, name, stand_in in _stand_ins(plan):
            undo.enter_context(_replaced(owner, name, stand_in))
        dist.init_process_group("fake", rank=rank, world_size=cluster.num_ranks, store=FakeStore())
        undo.callback(dist.destroy_process_group)
        undo.enter_context(_LargeTensorsOnMeta())
        yield


def _stand_ins(plan: Plan) -> list[tuple[Any, str, Any]]:
    stand_ins = [
        (collective_utils, "_INITIALIZED", True),  # else it reads what a fake broadcast left in memory
        (comm, "_INTRA_PG", None),
        (comm, "_CROSS_PG", None),
        (twrw_sharding, "intra_and_cross_node_pg", _groups_of_hosts),  # there are none for modules on meta
        (grid_sharding, "intra_and_cross_node_pg", _groups_of_hosts),
        (embeddingbag, "DistributedDataParallel", _Unreplicated),  # compares its parameters' shapes with other ranks'
        (ShardedEmbeddingCollection, "_initialize_torch_state", lambda self: None),  # gathers from other ranks
    ]
    if plan.request.group.device == "cuda":
        hbm = SimpleNamespace(total_memory=int(plan.request.group.hbm_bytes_per_rank))
        stand_ins += [
            (batched_embedding_kernel, "SplitTableBatchedEmbeddingBagsCodegen", _cuda_kernel(plan)),
            (fbgemm_training, "construct_cache_state", _cache_state),
            (torch.cuda, "get_device_properties", lambda device: hbm),  # a cache is no larger than the free HBM
            (torch.cuda, "memory_reserved", lambda device: 0),
        ]
    return stand_ins


class _Unreplicated(nn.Module):
    """Where `DistributedDataParallel` would be: holds the module and does nothing."""

    def __init__(self, module: nn.Module, **_: Any) -> None:
        super().__init__()
        self.module = module


def _groups_of_hosts(device: torch.device | None = None, backend: str | None = None) -> tuple:
    return comm.intra_and_cross_node_pg(backend="fake")


def _cuda_kernel(plan: Plan) -> type:
    """FBGEMM's module as TorchRec builds it for CUDA: for meta it asks for the CPU's, with all rows in host memory."""
    location = {
        name: compute_kernel_to_embedding_location(EmbeddingComputeKernel(table.compute_kernel))
        for name, table in plan.tables.items()
    }

    class OnCuda(fbgemm_training.SplitTableBatchedEmbeddingBagsCodegen):
        def __init__(self, embedding_specs: list[tuple], table_names: list[str], **options: Any) -> None:
            cuda = fbgemm_training.ComputeDevice.CUDA
            specs = [(s[0], s[1], location[name], cuda) for s, name in zip(embedding_specs, table_names, strict=True)]
            super().__init__(embedding_specs=specs, table_names=table_names, **options)

    return OnCuda


class _TableOfEachRow:
    """Stands for FBGEMM's list of as many numbers as there are cached rows, 8 bytes each."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows


_construct_cache_state = fbgemm_training.construct_cache_state


def _cache_state(row_list: list[int], location_list: list[EmbeddingLocation], feature_table_map: list[int]) -> Any:
    num_cached = sum(
        rows for rows, place in zip(row_list, location_list, strict=True) if place == EmbeddingLocation.MANAGED_CACHING
    )
    state = _construct_cache_state([0] * len(row_list), location_list, feature_table_map)
    return state._replace(cache_index_table_map=_TableOfEachRow(num_cached), total_cache_hash_size=num_cached)


class _LargeTensorsOnMeta(TorchFunctionMode):
    """Keeps on meta what FBGEMM makes on the CPU: replicated tables, drawn at random, and the table of each cached row."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn:
            kwargs = {**kwargs, "device": "meta"}
        elif func is torch.tensor and isinstance(args[0], _TableOfEachRow):
            return torch.empty(args[0].num_rows, **kwargs)
        return func(*args, **kwargs)


@contextmanager
def _replaced(owner: Any, name: str, stand_in: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

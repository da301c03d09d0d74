"""The least that reading a file for training can be: whole blocks as they lie there, to tensors; nothing checked or shuffled."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dlrm_scale.config import CriteoSource, ParquetSource, RunConfig
from dlrm_scale.data.columns import column_names, is_list
from dlrm_scale.data.criteo import CATEGORIES, INTEGERS, LABEL, NPY_SUFFIX, ROWS_PER_BLOCK
from dlrm_scale.data.files import expand
from dlrm_scale.features import FeatureSchema


def plain_batches(config: RunConfig) -> Iterator[int] | None:
    """Rows of each block of the training files, made into tensors; None for a source that is no file, or TSV, held in memory."""
    source = config.data.source
    if isinstance(source, ParquetSource):
        blocks = _row_groups(source.train.paths, config.features)
    elif isinstance(source, CriteoSource) and source.format == "npy":
        blocks = _npy_blocks(source.train.paths)
    else:
        return None
    return (_to_tensors(block, config.features) for block in blocks)


def _row_groups(paths: tuple[str, ...], schema: FeatureSchema) -> Iterator[dict[str, pa.Array]]:
    columns = column_names(schema)
    for file in expand(paths):
        with pq.ParquetFile(file) as opened:
            for group in range(opened.num_row_groups):
                table = opened.read_row_group(group, columns=columns)
                yield {name: table.column(name).combine_chunks() for name in columns}


def _npy_blocks(paths: tuple[str, ...]) -> Iterator[dict[str, pa.Array]]:
    for file in expand(paths):
        stem = str(file).removesuffix(NPY_SUFFIX)
        parts = [np.load(f"{stem}_{part}.npy", mmap_mode="r") for part in ("labels", "dense", "sparse")]
        for first in range(0, len(parts[0]), ROWS_PER_BLOCK):
            labels, dense, sparse = (np.ascontiguousarray(part[first : first + ROWS_PER_BLOCK].T) for part in parts)
            names = (LABEL, *INTEGERS, *CATEGORIES)
            yield dict(zip(names, map(pa.array, (*labels, *dense, *sparse)), strict=True))


def _to_tensors(block: dict[str, pa.Array], schema: FeatureSchema) -> int:
    """Makes dense, labels and the KJTs of one block, and gives its number of rows. A null number becomes NaN."""
    labels_RT = torch.from_numpy(np.stack([_numbers(block[name]) for name in schema.labels], axis=1))
    if schema.dense:
        torch.from_numpy(np.stack([_numbers(block[f.name]) for f in schema.dense], axis=1))
    for keys in (schema.bag_keys, schema.sequence_keys):
        if keys:
            values, lengths = zip(*(_ids(block[key]) for key in keys), strict=True)
            KeyedJaggedTensor(
                keys=list(keys),
                values=torch.from_numpy(np.concatenate(values, dtype=np.int64, casting="unsafe")),
                lengths=torch.from_numpy(np.concatenate(lengths)),
            )
    return len(labels_RT)


def _numbers(column: pa.Array) -> np.ndarray:
    return column.to_numpy(zero_copy_only=False).astype(np.float32, copy=False)


def _ids(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Values, and int32 lengths."""
    if is_list(column.type):
        return column.flatten().to_numpy(zero_copy_only=False), np.diff(column.offsets.to_numpy()).astype(np.int32)
    if not column.null_count:
        return column.to_numpy(), np.ones(len(column), np.int32)
    return column.drop_null().to_numpy(), column.is_valid().to_numpy(zero_copy_only=False).astype(np.int32)

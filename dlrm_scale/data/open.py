"""Opens the source that a configuration names, and reads ahead of training so that bad data shows first."""

from typing import Literal

from dlrm_scale.config import CriteoSource, DataConfig, ParquetSource
from dlrm_scale.data import criteo, parquet
from dlrm_scale.data.source import Source
from dlrm_scale.features import FeatureSchema


def open_source(data: DataConfig, schema: FeatureSchema, split: Literal["train", "eval"], seed: int) -> Source | None:
    """The source of one split; None where the configuration has no eval split.

    Raises:
        DataError: what opening the files shows to be wrong.
    """
    source = data.source
    if not isinstance(source, (ParquetSource, CriteoSource)):
        from dlrm_scale.data.synthetic import SyntheticSource

        return SyntheticSource(source, schema, split, seed)
    rows = source.train if split == "train" else source.eval
    if rows is None:
        return None
    if isinstance(source, ParquetSource):
        return parquet.ParquetSource(rows, schema)
    opened = criteo.CriteoTsvSource if source.format == "tsv" else criteo.CriteoNpySource
    return opened(rows, schema)


def preflight(source: Source, max_rows: int) -> int:
    """Reads whole blocks from the first on until `max_rows` rows are checked or none is left.

    Returns:
        Rows checked.

    Raises:
        DataError: the first bad value.
    """
    checked = 0
    for block in range(len(source.block_starts) - 1):
        if checked >= max_rows:
            break
        checked += source.read_block(block).num_rows
    return checked

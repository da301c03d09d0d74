"""Click samples in the manner of DIN (arXiv 1706.06978) from reviews split by time.

A review is a positive; sampled items that its user never reviewed are its negatives, with the same history.
The history is the user's earlier items with their categories, oldest first, from any earlier split.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dlrm_scale.errors import DataError

SPLITS = ("train", "val", "test")
ROWS_PER_GROUP = 8192


@dataclass(frozen=True)
class Items:
    """I items, numbered by their row in items.parquet, so that an item first met in val or test has an id too."""

    names_I: pa.Array
    category_I: pa.Array
    brand_I: pa.Array
    price_I: pa.Array
    num_categories: int
    num_brands: int


# E reviews of all splits, in the order (user, time, row)  S samples: positives, each followed by its negatives
@dataclass(frozen=True)
class Reviews:
    """All reviews, so that a history reaches back into earlier splits.

    Attributes:
        row_E: number of the review in the files' order.
        split_E: index in SPLITS.
        history_start_E, history_stop_E: the user's strictly earlier reviews, as positions on this axis.
        is_repeat_E: the user reviewed this item before.
    """

    user_E: np.ndarray
    item_E: np.ndarray
    row_E: np.ndarray
    split_E: np.ndarray
    history_start_E: np.ndarray
    history_stop_E: np.ndarray
    is_repeat_E: np.ndarray
    num_users: int


@dataclass(frozen=True)
class Summary:
    num_rows: dict[str, int]
    num_without_history: int
    num_repeats: int
    num_embeddings: dict[str, int]


def prepare(source: Path, output: Path, negatives: int, max_history: int, seed: int) -> Summary:
    """Reads {train,val,test,items}.parquet of `source`, writes {train,val,test}.parquet to `output`.

    As in DIN, a review without history gives no sample. Neither does a second review of the same item: its
    target stands in its own history, which no negative's can. Rows keep the order of time.
    Columns: label, user, item, category, brand (null: unknown), price (null: unknown), history_item, history_category.

    Raises:
        DataError: a file is absent, lacks a column, or names an item that items.parquet has not.
    """
    items = _read_items(source / "items.parquet")
    reviews = _read_reviews(source, items)
    has_history_E = reviews.history_stop_E > reviews.history_start_E
    is_sample_E = has_history_E & ~reviews.is_repeat_E
    rng = np.random.default_rng(seed)
    output.mkdir(parents=True, exist_ok=True)
    num_rows = {}
    for number, split in enumerate(SPLITS):
        positives = np.flatnonzero(is_sample_E & (reviews.split_E == number))
        positives = positives[np.argsort(reviews.row_E[positives])]
        table = _samples(items, reviews, positives, negatives, max_history, rng)
        _write(table, output / f"{split}.parquet")
        num_rows[split] = table.num_rows
    return Summary(
        num_rows=num_rows,
        num_without_history=int((~has_history_E).sum()),
        num_repeats=int((has_history_E & reviews.is_repeat_E).sum()),
        num_embeddings={
            "user": reviews.num_users,
            "item": len(items.names_I),
            "category": items.num_categories,
            "brand": items.num_brands,
        },
    )


def _read(file: Path, columns: list[str]) -> pa.Table:
    try:
        return pq.read_table(file, columns=columns)
    except FileNotFoundError:
        raise DataError(f"{file} is absent; --input names the folder that holds it") from None
    except (OSError, pa.ArrowException) as e:
        raise DataError(f"{file} cannot be read as Parquet with columns {', '.join(columns)}: {e}") from None


def _read_items(file: Path) -> Items:
    table = _read(file, ["item_id", "category", "brand", "price"]).combine_chunks()
    categories, brands = (pc.unique(table[name]).drop_null().sort() for name in ("category", "brand"))
    return Items(
        names_I=table["item_id"].chunk(0),
        category_I=pc.index_in(table["category"], categories).chunk(0),
        brand_I=pc.index_in(table["brand"], brands).chunk(0),
        price_I=table["price"].chunk(0).cast(pa.float32()),
        num_categories=len(categories),
        num_brands=len(brands),
    )


def _read_reviews(source: Path, items: Items) -> Reviews:
    files = [source / f"{split}.parquet" for split in SPLITS]
    tables = [_read(file, ["user_id", "item_id", "timestamp"]) for file in files]
    for file, table in zip(files, tables, strict=True):
        unknown = pc.filter(table["item_id"], pc.invert(pc.is_in(table["item_id"], items.names_I)))
        if len(unknown):
            raise DataError(f"{file} reviews item {unknown[0].as_py()}, which is not in items.parquet; add it there")
    table = pa.concat_tables(tables)
    user_names = pc.unique(table["user_id"]).sort()
    user = pc.index_in(table["user_id"], user_names).to_numpy().astype(np.int64)
    item = pc.index_in(table["item_id"], items.names_I).to_numpy().astype(np.int64)
    time = table["timestamp"].to_numpy()
    split = np.repeat(np.arange(len(SPLITS)), [t.num_rows for t in tables])
    order = np.lexsort((time, user))  # stable: ties stay in the files' order
    user_E, item_E, time_E = user[order], item[order], time[order]
    new_user_E = np.diff(user_E, prepend=-1) != 0
    new_time_E = new_user_E | (np.diff(time_E, prepend=0) != 0)
    return Reviews(
        user_E=user_E,
        item_E=item_E,
        row_E=order,
        split_E=split[order],
        history_start_E=_latest_true(new_user_E),
        history_stop_E=_latest_true(new_time_E),
        is_repeat_E=_is_repeat(user_E * len(items.names_I) + item_E),
        num_users=len(user_names),
    )


def _latest_true(flags: np.ndarray) -> np.ndarray:
    """For each position the last one, up to itself, whose flag is set; the first is."""
    return np.maximum.accumulate(np.where(flags, np.arange(len(flags)), 0))


def _is_repeat(keys: np.ndarray) -> np.ndarray:
    repeat = np.ones(len(keys), bool)
    repeat[np.unique(keys, return_index=True)[1]] = False
    return repeat


def _samples(
    items: Items,
    reviews: Reviews,
    positives: np.ndarray,
    negatives: int,
    max_history: int,
    rng: np.random.Generator,
) -> pa.Table:
    per_review = 1 + negatives
    review_S = np.repeat(positives, per_review)
    label_S = np.tile(np.arange(per_review) == 0, len(positives))
    item_S = reviews.item_E[review_S]
    item_S[~label_S] = _draw_unseen(reviews, review_S[~label_S], len(items.names_I), rng)

    stop_S = reviews.history_stop_E[review_S]
    length_S = np.minimum(stop_S - reviews.history_start_E[review_S], max_history)
    offsets = np.concatenate([[0], np.cumsum(length_S)])
    list_offsets = pa.array(offsets, pa.int32())
    events = np.arange(offsets[-1]) + np.repeat(stop_S - offsets[1:], length_S)
    history_item = pa.array(reviews.item_E[events].astype(np.int32))
    history_category = items.category_I.take(history_item)
    target = pa.array(item_S.astype(np.int32))
    return pa.table(
        {
            "label": label_S.astype(np.int8),
            "user": reviews.user_E[review_S].astype(np.int32),
            "item": target,
            "category": items.category_I.take(target),
            "brand": items.brand_I.take(target),
            "price": items.price_I.take(target),
            "history_item": pa.ListArray.from_arrays(list_offsets, history_item),
            "history_category": pa.ListArray.from_arrays(list_offsets, history_category),
        }
    )


def _draw_unseen(reviews: Reviews, review_N: np.ndarray, num_items: int, rng: np.random.Generator) -> np.ndarray:
    """For each given review an item, uniform over those that its user reviews nowhere in the data."""
    seen = np.unique(reviews.user_E * num_items + reviews.item_E)
    most = int(np.bincount(seen // num_items).max())
    if most == num_items:
        raise DataError(
            f"a user reviewed all {num_items} items, so that none is left for a negative; leave the user out"
        )
    user_N = reviews.user_E[review_N]
    item_N = np.empty(len(review_N), np.int64)
    missing = np.arange(len(review_N))
    while len(missing):
        item_N[missing] = rng.integers(num_items, size=len(missing))
        missing = missing[np.isin(user_N[missing] * num_items + item_N[missing], seen)]
    return item_N


def _write(table: pa.Table, file: Path) -> None:
    part = file.with_suffix(".part")
    pq.write_table(table, part, row_group_size=ROWS_PER_GROUP)
    part.replace(file)  # an interrupted run leaves no half file under the final name

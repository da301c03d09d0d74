"""TorchRec's deduplication of a collection's ids, for CPUs.

With `use_index_dedup`, `EmbeddingCollection` sends, looks up and updates each id of a rank's batch once, whichever features of a table and
however many samples read it, and copies the rows afterwards. It asks one operator of FBGEMM for that, which FBGEMM 1.8.0 has for CUDA
only. This module gives it a CPU kernel.
"""

from itertools import pairwise

import torch
from torch import Tensor


# F features, those of one table next to each other  B samples  V ids  U different ones
def jagged_unique_indices(
    first_row_F1: Tensor, table_features_F1: Tensor, offsets_FB1: Tensor, ids_V: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The different ids of each table.

    Args:
        first_row_F1: where the rows of a feature's table begin if all tables stand one below the other; at last, where they end.
        table_features_F1: at a table's first feature, that feature's number, and behind it the number behind the table's last one.
        offsets_FB1: where the ids of each sample of each feature begin, feature by feature.
        ids_V: rows of the feature's table, in its range.

    Returns:
        Lengths (F B,) and offsets (F B + 1,) of the different ids, spread evenly over the samples of their table's features as if they
        read them; the ids (U,), ascending in each table; and for each of ids_V its place among them (V,).
    """
    num_features = len(first_row_F1) - 1
    num_samples = (len(offsets_FB1) - 1) // num_features
    ids_of_feature_F = offsets_FB1[::num_samples].diff()
    rows_U, place_V = torch.unique(ids_V + first_row_F1[:-1].repeat_interleave(ids_of_feature_F), return_inverse=True)
    unique_U = torch.empty_like(rows_U)
    unique_U[place_V] = ids_V

    lengths_FB = torch.zeros_like(offsets_FB1[1:])
    first_place_F1 = torch.searchsorted(rows_U, first_row_F1)
    for first, last in pairwise(sorted(set(table_features_F1.tolist()))):
        of_table = lengths_FB[first * num_samples : last * num_samples]
        each, rest = divmod(int(first_place_F1[last] - first_place_F1[first]), len(of_table))
        of_table.fill_(each)
        of_table[:rest] += 1
    return lengths_FB, torch.cat((lengths_FB.new_zeros(1), lengths_FB.cumsum(0))), unique_U, place_V


torch.library.impl("fbgemm::jagged_unique_indices", "CPU", jagged_unique_indices)

"""Make the batch of some examples, their noise included: the same whoever makes it, in the loader's workers as a rule.

Shapes: as in `data/batch.py`. An example with fewer scored canvases than another gets empty ones: nothing of theirs is
supervised.
"""

from collections.abc import Sequence

import numpy as np
import torch

from ds_dgemma.data.batch import Batch, Example
from ds_dgemma.objective.corruption import Corruption


def collate(corruption: Corruption, examples: Sequence[tuple[Example, int]]) -> Batch:
    """Make the micro-batch of `(example, epoch)` pairs."""
    canvases = [[corruption.corrupt(e, epoch, c) for c in corruption.choose(e, epoch)] for e, epoch in examples]
    rows = [example for example, _ in examples]
    B, K, L = len(rows), max(map(len, canvases)), rows[0].canvas_length
    S, pad_id = max(len(example.tokens_S) for example in rows), corruption.pad_id

    clean_ids, clean_valid = np.full((B, S), pad_id), np.zeros((B, S), dtype=bool)
    ids, targets = np.full((B, K, L), pad_id), np.full((B, K, L), pad_id)
    supervised = np.zeros((B, K, L), dtype=bool)
    start, coin = np.zeros((B, K), dtype=np.int64), np.zeros((B, K), dtype=bool)
    level = np.ones((B, K), dtype=np.float32)  # an empty canvas: all noise
    for b, example in enumerate(rows):
        clean_ids[b, : len(example.tokens_S)] = example.tokens_S
        clean_valid[b, : len(example.tokens_S)] = True
        for k, canvas in enumerate(canvases[b]):
            ids[b, k], targets[b, k], supervised[b, k] = canvas.noised_L, canvas.target_L, True
            start[b, k], coin[b, k], level[b, k] = canvas.start, canvas.self_condition, canvas.noise_level
    nobody = torch.empty(0, dtype=torch.int64)
    return Batch(
        clean_ids_BS=torch.from_numpy(clean_ids),
        clean_valid_BS=torch.from_numpy(clean_valid),
        canvas_ids_BKL=torch.from_numpy(ids),
        target_ids_BKL=torch.from_numpy(targets),
        supervised_BKL=torch.from_numpy(supervised),
        canvas_start_BK=torch.from_numpy(start),
        noise_level_BK=torch.from_numpy(level),
        starts=tuple(tuple(row) for row in start.tolist()),
        guessed=(),
        guessed_M=nobody,
        coin_M=nobody.bool(),
        sample_ids=tuple(example.sample_id for example in rows),
        noise_levels=tuple(tuple(canvas.noise_level for canvas in row) for row in canvases),
    ).with_coins(torch.from_numpy(coin))

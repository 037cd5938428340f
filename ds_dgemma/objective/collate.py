"""Make the batch of some examples, their noise included: the same whoever makes it, in the loader's workers as a rule.

Shapes: as in `data/batch.py`.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from ds_dgemma.data.batch import Batch, Example, Image, Pictures
from ds_dgemma.data.image_files import ImageFiles
from ds_dgemma.objective.corruption import Corruption


def collate(corruption: Corruption, examples: Sequence[tuple[Example, int]], images: ImageFiles | None = None) -> Batch:
    """Make the micro-batch of `(example, epoch)` pairs; `images`: what reads theirs."""
    documents = [example for example, _ in examples]
    canvases = [
        (number, canvas)
        for number, (example, epoch) in enumerate(examples)
        for canvas in corruption.canvases(example, epoch)
    ]
    noisy = [canvas for _, canvas in canvases]
    length = documents[0].canvas_length
    weight_C = np.array([canvas.weight for canvas in noisy], dtype=np.float32)
    levels = tuple(canvas.noise_level for canvas in noisy)
    ar_weight_S = np.concatenate([example.ar_weight_S for example in documents])
    (ar_place_A,) = ar_weight_S.nonzero()
    nobody = torch.empty(0, dtype=torch.int64)
    return Batch(
        clean_ids_S=torch.from_numpy(np.concatenate([example.tokens_S for example in documents])),
        position_S=torch.from_numpy(np.concatenate([np.arange(len(example.tokens_S)) for example in documents])),
        ar_place_A=torch.from_numpy(ar_place_A),
        ar_weight_A=torch.from_numpy(ar_weight_S[ar_place_A]),
        canvas_ids_CL=torch.from_numpy(np.stack([canvas.noised_L for canvas in noisy])),
        target_ids_CL=torch.from_numpy(np.stack([canvas.target_L for canvas in noisy])),
        canvas_weight_CL=torch.from_numpy(np.repeat(weight_C[:, None], length, axis=1)),
        canvas_start_C=torch.tensor([canvas.start for canvas in noisy]),
        noise_level_C=torch.tensor(levels, dtype=torch.float32),
        documents=tuple(len(example.tokens_S) for example in documents),
        canvases=tuple((number, canvas.start) for number, canvas in canvases),
        guessed=(),
        guessed_M=nobody,
        coin_M=nobody.bool(),
        sample_ids=tuple(example.sample_id for example in documents),
        noise_levels=levels,
        pictures=_pictures(documents, images),
    ).with_coins(torch.tensor([canvas.self_condition for canvas in noisy]))


def _pictures(documents: Sequence[Example], files: ImageFiles | None) -> Pictures | None:
    """The images of all documents; None: there are none."""
    found = [(number, image) for number, example in enumerate(documents) for image in example.images]
    if not found:
        return None
    assert files, "documents have images, and nothing reads them"
    pixels, position = patches_of(files, [image for _, image in found])
    first_D = np.cumsum([0, *(len(example.tokens_S) for example in documents)])
    places = [np.arange(image.tokens) + first_D[number] + image.start for number, image in found]
    return Pictures(
        blocks=tuple((number, image.start, image.start + image.tokens) for number, image in found),
        place_K=torch.from_numpy(np.concatenate(places)),
        pixel_values_IPD=pixels,
        position_IP2=position,
    )


def patches_of(files: ImageFiles, images: Sequence[Image]) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches [I, P, D] of images, and their columns and rows [I, P, 2], padded to the one that has most."""
    patches = [files.patches(image) for image in images]
    most = max(len(pixels) for pixels, _ in patches)
    return (
        torch.stack([_padded(pixels, most, 0.0) for pixels, _ in patches]),
        torch.stack([_padded(position, most, -1) for _, position in patches]),
    )


def _padded(values_PX: np.ndarray, length: int, value: float) -> torch.Tensor:
    """Rows of `value` behind the others."""
    return F.pad(torch.from_numpy(values_PX), (0, 0, 0, length - len(values_PX)), value=value)

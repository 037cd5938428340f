"""Model FLOPs utilisation: useful arithmetic of what a step read, over what its devices could have done meanwhile."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ds_dgemma.data.batch import Batch
from ds_dgemma.model.flops import Products, batch_work, products_of
from ds_dgemma.model.stack import DiffusionGemmaStack
from ds_dgemma.tracking.metrics import peak_flops


@dataclass(frozen=True)
class Utilisation:
    """What a run's steps are measured with."""

    products: Products
    peak_flops: float | None  # FLOP/s of a device in dense bf16 products; None: unknown, so nothing is measured

    @classmethod
    def on(cls, device: torch.device, said_tflops: float | None, stack: DiffusionGemmaStack) -> "Utilisation":
        """For a stack that trains on `device` and the like."""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        return cls(products_of(stack), peak_flops(name, said_tflops))

    def work(self, batches: Sequence[Batch]) -> float:
        """Useful FLOPs of micro-batches; 0 where nothing is measured."""
        return 0.0 if self.peak_flops is None else batch_work(self.products, documents_of(batches), images_of(batches))

    def of(self, work: float, seconds: float, devices: int) -> float | None:
        """The share of `devices` at their peak that did `work` FLOPs in `seconds`."""
        return None if self.peak_flops is None else work / (seconds * devices * self.peak_flops)


def images_of(batches: Iterable[Batch]) -> Iterator[int]:
    """Soft tokens of each image."""
    for batch in batches:
        yield from (end - begin for _, begin, end in (batch.pictures.blocks if batch.pictures else ()))


def documents_of(batches: Iterable[Batch]) -> Iterator[tuple[int, list[int], list[int]]]:
    """Each document's clean tokens, the starts of its scored canvases, and of those whose first guess counts."""
    for batch in batches:
        coins = {number for number, coin in zip(batch.guessed, batch.coin_M.tolist(), strict=True) if coin}
        for document, clean in enumerate(batch.documents):
            starts = {number: batch.canvases[number][1] for number in batch.canvases_of(document)}
            yield clean, list(starts.values()), [start for number, start in starts.items() if number in coins]

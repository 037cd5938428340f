"""Image files: found, checked, measured in soft tokens, and made into patches by the checkpoint's own processor.

What a row brings as bytes, or an address that is fetched, is kept once in a folder under `HF_HOME`, named by its
content, so every image is a file. Patches are made when a batch is (280 soft tokens are 7.7 MB of them), and the file
must then still be what was measured.

Shapes: P patches with D numbers each. Source: transformers `image_processing_pil_gemma4.py`.
"""

import hashlib
import io
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import urlopen

import numpy as np
from huggingface_hub.constants import HF_HOME
from PIL import Image as Pillow
from PIL import UnidentifiedImageError
from transformers import AutoImageProcessor, DiffusionGemmaConfig, PreTrainedTokenizerFast
from transformers.image_utils import load_image
from transformers.models.gemma4.image_processing_pil_gemma4 import get_aspect_ratio_preserving_size

from ds_dgemma.config.data import DataSection
from ds_dgemma.data.batch import Image
from ds_dgemma.data.messages import BadRow, Message
from ds_dgemma.data.pictures import Origin, image_parts, is_url, shortened
from ds_dgemma.data.tokenizer import image_tokens
from ds_dgemma.errors import UserError, first_line
from ds_dgemma.files import atomic_file

FOLDER = Path(HF_HOME) / "ds_dgemma" / "images"
MOST_PIXELS = 2**26
MOST_BYTES = 2**28  # of a file
FEWER = f"at most {MOST_PIXELS // 2**20} million were expected: scale it down."
LONGEST_PATH = 1024  # what is longer may be a file itself, in base64
SECONDS = 30
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # others are programs, or take one

Render = Callable[[list[Message], bool], str]  # as in `rendering.py`


class Measured(NamedTuple):
    """An image that was found good."""

    tokens: int  # soft ones
    file: str
    digest: str  # of the file's bytes
    width: int  # pixels
    height: int


@dataclass(frozen=True)
class ImageFiles:
    """How images are read for one checkpoint."""

    directory: Path  # of the checkpoint
    tokens: tuple[str, ...]  # the tokenizer's for an image, its begin and its end
    allow_urls: bool = False
    max_soft_tokens: int | None = None  # None: the processor's own
    positions: int | None = None  # patches on a side that the tower has positions for; None: not known
    folder: Path = FOLDER

    @cached_property
    def processor(self) -> Any:
        """The checkpoint's.

        Raises:
            UserError: it has none, or it is of another kind.
        """
        if len(self.tokens) != 3:
            raise UserError(f"the tokenizer of {self.directory} has no tokens for images, so rows may not have any.")
        try:
            # Pillow's, also where torchvision is installed: rows must not depend on what else is
            processor: Any = AutoImageProcessor.from_pretrained(self.directory, backend="pil")
        except Exception as error:  # transformers raises many kinds; each means that there is no usable one
            raise UserError(
                f"{self.directory} has no image processor, but rows have images: {first_line(error)}. Copy "
                "processor_config.json or preprocessor_config.json of the model beside it."
            ) from error
        if not hasattr(processor, "max_soft_tokens"):
            raise UserError(f"{self.directory} has a {type(processor).__name__}; Gemma 4's image processor is needed.")
        if self.max_soft_tokens:
            processor.max_soft_tokens = self.max_soft_tokens
        return processor

    @property
    def settings(self) -> list[Any]:
        """Equal settings, equal soft tokens and patches; the processor's as its files have them, if there are any."""
        files = [self.directory / name for name in PROCESSOR_FILES]
        written = [hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "" for file in files]
        return [self.tokens, self.allow_urls, self.max_soft_tokens, self.positions, *written]

    def written(self, tokens: int) -> str:
        """An image as the tokenizer reads it, as transformers' `Gemma4Processor` writes it."""
        image, begin, end = self.tokens
        return f"{begin}{image * tokens}{end}"

    def rendering(self, render: Render, found: Sequence[Measured]) -> Render:
        """A rendering in which every image has as many tokens as it takes.

        Raises:
            BadRow: while rendering, where the template leaves an image out.
        """

        def expanded(messages: list[Message], add_generation_prompt: bool) -> str:
            first, *others = render(messages, add_generation_prompt).split(self.tokens[0])
            if len(others) != (count := sum(1 for _ in image_parts(messages))):
                raise BadRow(
                    f"the chat template writes {len(others)} of {count} images: it has no place for one in such a "
                    "message. Change the template, or the row."
                )
            pieces = zip(found, others, strict=False)
            return first + "".join(self.written(image.tokens) + text for image, text in pieces)

        return expanded

    def find(self, origin: Origin) -> Measured:
        """Check an image and measure it.

        Raises:
            BadRow: it is missing, broken, animated, too large or of a shape that the processor refuses.
        """
        data = self._bytes(origin)
        digest = hashlib.sha256(data).hexdigest()
        width, height = _checked(data, origin)
        tokens = self._soft_tokens(width, height, origin)
        is_file = isinstance(origin.address, str) and not is_url(origin.address)
        file = str(origin.address) if is_file else self._kept(data, digest)
        return Measured(tokens, file, digest, width, height)

    def patches(self, image: Image) -> tuple[np.ndarray, np.ndarray]:
        """Patches [P, D] in fp32, and their columns and rows [P, 2]; padding is cut off.

        Raises:
            UserError: the file is not what it was when rows were read.
        """
        return _patches(self, image)

    def _bytes(self, origin: Origin) -> bytes:
        if isinstance(origin.address, bytes):
            return origin.address
        if is_url(origin.address):
            return self._fetched(origin)
        path, shown = Path(origin.address), shortened(origin.address)
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise BadRow(f"{origin.name}: {shown} is no file.")
            _check_size(status.st_size, origin)
            return path.read_bytes()
        except (OSError, ValueError) as error:  # a NUL is no part of a path
            reason = getattr(error, "strerror", None) or error
            hint = " Base64 is written data:image/png;base64,..." if len(origin.address) > LONGEST_PATH else ""
            raise BadRow(f"{origin.name}: no image {shown}: {reason}.{hint}") from error

    def _fetched(self, origin: Origin) -> bytes:
        if not self.allow_urls:
            raise BadRow(
                f"{origin.name} is {shortened(origin.address)}, which would be fetched. Set data.allow_urls: true, or "
                "give a file."
            )
        try:
            with urlopen(str(origin.address), timeout=SECONDS) as answer:
                data = answer.read(MOST_BYTES + 1)
        except (OSError, ValueError, HTTPException) as error:
            where = f"{origin.name}: {shortened(origin.address)}"
            raise BadRow(f"{where} cannot be fetched: {first_line(error)}.") from error
        _check_size(len(data), origin)
        return data

    def _kept(self, data: bytes, digest: str) -> str:
        path = self.folder / digest
        if not path.exists():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with atomic_file(path, binary=True) as file:
                    file.write(data)
            except OSError as error:
                raise UserError(
                    f"images of rows cannot be kept in {self.folder}: {error.strerror or error}. Set HF_HOME to a "
                    "writable folder with room."
                ) from error
        return str(path)

    def _soft_tokens(self, width: int, height: int, origin: Origin) -> int:
        own = self.processor
        pool, patch = own.pooling_kernel_size, own.patch_size
        try:
            high, wide = get_aspect_ratio_preserving_size(height, width, patch, own.max_soft_tokens * pool**2, pool)
        except ValueError as error:
            raise BadRow(f"{origin.name}: {width} x {height} pixels, which the processor refuses: {error}") from error
        high, wide = high // patch, wide // patch
        if self.positions and max(high, wide) > self.positions:
            raise BadRow(
                f"{origin.name}: {width} x {height} pixels would be {wide} x {high} patches, and the vision tower "
                f"knows {self.positions} on a side: crop the image."
            )
        return high * wide // pool**2


@lru_cache(maxsize=64)
def _patches(files: ImageFiles, image: Image) -> tuple[np.ndarray, np.ndarray]:
    try:
        data = Path(image.file).read_bytes()
    except OSError as error:
        raise UserError(f"{image.file}: an image of the data is gone: {error.strerror or error}.") from error
    if hashlib.sha256(data).hexdigest() != image.digest:
        raise UserError(f"{image.file}: this image has changed since the rows were read. Start again to read it anew.")
    with _opened(data) as picture:
        # as transformers' processors load images: turned by EXIF, in RGB
        made = files.processor(load_image(picture), return_tensors="np")
    pixels, position = made["pixel_values"][0], made["image_position_ids"][0]
    if (tokens := int(made["num_soft_tokens_per_image"][0])) != image.tokens:
        raise UserError(
            f"{image.file}: {tokens} soft tokens, but the rows were read with {image.tokens}: the image processor of "
            f"{files.directory} has changed meanwhile. Start again."
        )
    is_real = (position >= 0).all(-1)
    return np.asarray(pixels[is_real], np.float32), np.asarray(position[is_real], np.int64)


def _check_size(size: int, origin: Origin) -> None:
    if size > MOST_BYTES:
        shown, most = shortened(origin.address), MOST_BYTES // 2**20
        raise BadRow(f"{origin.name}: {shown} has over {most} MiB, which is no image to train on: scale it down.")


def size_of(data: bytes) -> tuple[int, int]:
    """Width and height of an image as it is seen: turned by its EXIF mark."""
    with _opened(data) as picture:
        return load_image(picture).size


def _checked(data: bytes, origin: Origin) -> tuple[int, int]:
    """Width and height of an image, as it is seen."""
    where = f"{origin.name}: {shortened(origin.address)}" if isinstance(origin.address, str) else origin.name
    if not data:
        raise BadRow(f"{where} is empty: no byte is in it.")
    try:
        with _opened(data) as picture:
            if (frames := getattr(picture, "n_frames", 1)) > 1:
                raise BadRow(f"{where} has {frames} frames: a still image was expected.")
            if picture.width * picture.height > MOST_PIXELS:
                raise BadRow(f"{where} has {picture.width} x {picture.height} pixels, {FEWER}")
            return load_image(picture).size
    except Pillow.DecompressionBombError as error:
        raise BadRow(
            f"{where} has over {2 * (Pillow.MAX_IMAGE_PIXELS or 0) // 10**6} million pixels, {FEWER}"
        ) from error
    except UnidentifiedImageError as error:
        raise BadRow(f"{where} is no image, or a broken one: {', '.join(KINDS)} are read.") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise BadRow(f"{where} is no image, or a broken one: {first_line(error)}.") from error


@contextmanager
def _opened(data: bytes) -> Iterator[Pillow.Image]:
    with Pillow.open(io.BytesIO(data), formats=KINDS) as picture:
        yield picture


def place_images(ids: Sequence[int], image_id: int, found: Sequence[Measured]) -> tuple[Image, ...]:
    """Those of a conversation's images that are in a document, which has the first of its messages."""
    placed, behind = [], 0
    for image in found:
        try:
            start = ids.index(image_id, behind)
        except ValueError:
            break
        placed.append(Image(start, image.tokens, image.file, image.digest))
        behind = start + image.tokens
    return tuple(placed)


def image_files(tokenizer: PreTrainedTokenizerFast, spec: DiffusionGemmaConfig, data: DataSection) -> ImageFiles:
    """How images are read for the checkpoint that a tokenizer was loaded from."""
    return of_model(Path(tokenizer.name_or_path), tokenizer, spec, data.allow_urls, data.max_soft_tokens)


def of_model(
    directory: Path,
    tokenizer: PreTrainedTokenizerFast,
    spec: DiffusionGemmaConfig,
    allow_urls: bool = False,
    max_soft_tokens: int | None = None,
) -> ImageFiles:
    """How images are read for a checkpoint."""
    tokens = image_tokens(tokenizer, (spec.image_token_id, spec.boi_token_id, spec.eoi_token_id))
    positions = getattr(getattr(spec, "vision_config", None), "position_embedding_size", None)
    return ImageFiles(directory, tokens, allow_urls, max_soft_tokens, positions)

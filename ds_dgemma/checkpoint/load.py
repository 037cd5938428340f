"""Put a checkpoint's weights into a stack that was built on meta, each rank only its own part.

`materialise` walks the parameters, asks `make_real` for each one's storage and which flat range of it this rank
keeps (ZeRO-3's answer is in `engine/sharding.py`, the plain one, all of it, here), and fills it: from the
checkpoint to start from, or, for what a resumed run has trained, from its training state.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ds_dgemma.checkpoint.run_state import StateReader
from ds_dgemma.checkpoint.weights import FLOATS, WeightReader, pieces
from ds_dgemma.errors import one_line_each
from ds_dgemma.model.names import DECODER, DECODER_LAYERS, ENCODER_LAYERS, Place, is_expert, tied_to
from ds_dgemma.model.spec import text_spec
from ds_dgemma.model.stack import DiffusionGemmaStack

# (name, meta parameter) -> (the real parameter, its storage to fill, first and last flat element that it holds)
MakeReal = Callable[[str, nn.Parameter], tuple[nn.Parameter, torch.Tensor, int, int]]


def plain(dtype: torch.dtype, device: torch.device | str) -> MakeReal:
    """Hold every parameter whole."""

    def make(name: str, parameter: nn.Parameter) -> tuple[nn.Parameter, torch.Tensor, int, int]:
        real: Any = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device), parameter.requires_grad)
        real.__dict__.update(parameter.__dict__)  # AutoEP's tags
        return real, real.data.view(-1), 0, real.numel()

    return make


def check_places(
    stack: DiffusionGemmaStack, places: dict[str, Place], reader: WeightReader, *, copy_decoder_scalars: bool = False
) -> dict[str, Place]:
    """Hold the places of a stack (`names.places_of`) against what a checkpoint has, and return them; those of encoder
    scalars that it lacks are the decoder's, if so wished. Reads headers, and samples of what is stored twice.

    Raises:
        UserError: the checkpoint, vision tower and all, lacks tensors or has them in another shape than config.json
        says; all of them are named.
    """
    if copy_decoder_scalars:
        places = {name: _decoder_scalar(place, reader) for name, place in places.items()}
    _check(stack, reader, places)
    return places


def materialise(
    stack: DiffusionGemmaStack,
    reader: WeightReader,
    places: dict[str, Place],
    make_real: MakeReal,
    *,
    device: torch.device | str,
    expert_rank: int = 0,
    trained: StateReader | None = None,
    advance: Callable[[int], object] = lambda elements: None,
) -> None:
    """Fill every meta parameter and buffer of `stack` from `reader`, or from `trained` what that has; `advance` is
    told the size of every parameter that is done.
    """
    for owner_name, owner in stack.named_modules():
        prefix = f"{owner_name}." if owner_name else ""
        for name, parameter in list(owner.named_parameters(recurse=False)):
            real, storage, start, stop = make_real(prefix + name, parameter)
            logical = f"model.{prefix}{name}"
            with torch.no_grad():
                if trained is not None and logical in trained:
                    offset = expert_rank * parameter.numel() if is_expert(logical) else 0
                    for first, last in pieces(start, stop):
                        part = trained.read(logical, "fp32", offset + first, offset + last)
                        storage[first - start : last - start] = part
                else:
                    reader.read_into(storage, places[prefix + name], start, stop)
                storage[stop - start :].zero_()  # ZeRO pads a tensor to equal shares
            setattr(owner, name, real)
            advance(parameter.numel())
        for name, buffer in list(owner.named_buffers(recurse=False)):
            if buffer.is_meta:
                setattr(owner, name, reader.read(places[prefix + name].tensor).to(device, torch.float32))
    stack.to(device)  # what was never on meta: rotary frequencies, counters

    def read_vision(tensor: str, real: torch.Tensor) -> bool:
        if tensor in reader:
            reader.read_into(real.view(-1), Place(tensor), 0, real.numel())
            reader.close()
        return tensor in reader

    stack.vision.read = read_vision  # when an image comes


def _decoder_scalar(place: Place, reader: WeightReader) -> Place:
    """The decoder's layer scalar where the encoder's is missing."""
    if place.tensor in reader or not place.tensor.startswith(ENCODER_LAYERS):
        return place
    return Place(DECODER_LAYERS + place.tensor.removeprefix(ENCODER_LAYERS))


def _check(stack: DiffusionGemmaStack, reader: WeightReader, places: dict[str, Place]) -> None:
    local = dict([*stack.named_parameters(), *stack.named_buffers()])
    problems = []
    for name, place in places.items():
        if place.tensor not in reader:
            hint = ""
            if place.tensor.startswith(ENCODER_LAYERS):
                hint = " transformers would leave it uninitialised; set model.missing_encoder_scalars: copy_decoder."
            problems.append(f"{place.tensor} is missing, shape {tuple(local[name].shape)} was expected.{hint}")
            continue
        stored = reader.shape(place.tensor)
        expected = tuple(local[name].shape)
        if is_expert(name):
            _, rows, *rest = expected
            parts = 1 if name.endswith("w2") else 2
            expected = (text_spec(stack.config).num_experts, rows * parts, *rest)
        if stored != expected:
            problems.append(f"{place.tensor} has shape {stored}, {expected} was expected from config.json.")
    problems += _outside_problems(stack, reader)
    problems += _tied_problems(reader)
    known = {place.tensor for place in places.values()} | {DECODER + name for name in local}
    for tensor in sorted(reader.files, key=reader.files.__getitem__):  # a file is opened once
        if (dtype := reader.dtype(tensor)) not in FLOATS:  # carried over or not: an export reads them all
            shape = reader.shape(tensor)
            problems.append(f"{tensor} of shape {shape} is {dtype}; {', '.join(FLOATS)} can be trained from.")
        name = tied_to(tensor) or tensor
        if name not in known and (name.startswith(DECODER) or name.endswith(".layer_scalar")):
            shape = reader.shape(tensor)
            problems.append(f"{tensor}, shape {shape}, has no place in the model that config.json describes.")
    problems = list(dict.fromkeys(problems))  # gate and up lie in the same tensor
    if problems:
        shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise one_line_each(f"the checkpoint {reader.directory}", shown)


def _outside_problems(stack: DiffusionGemmaStack, reader: WeightReader) -> list[str]:
    """What an export could not carry over: transformers would fill it at random, without a word."""
    problems = []
    for tensor, expected in stack.outside.items():
        if tensor not in reader:
            problems.append(f"{tensor} is missing, shape {expected} was expected.")
        elif (stored := reader.shape(tensor)) != expected:
            problems.append(f"{tensor} has shape {stored}, {expected} was expected from config.json.")
    return problems


def _tied_problems(reader: WeightReader) -> list[str]:
    """Copies that differ from the tensor that they are tied to: transformers would not tie them, and they would not be
    trained.
    """
    problems = []
    for copy in reader.files:
        original = tied_to(copy)
        if original not in reader.files:
            continue
        stored, expected = reader.shape(copy), reader.shape(original)
        if stored != expected:
            problems.append(f"{copy} has shape {stored}, {expected} was expected: it is tied to {original}.")
        elif not torch.equal(reader.sample(copy), reader.sample(original)):
            problems.append(
                f"{copy} has other values than {original}, which it is tied to. Only tied ones are trained."
            )
    return problems

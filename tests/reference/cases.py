"""Parity cases: what unmodified transformers made of a checkpoint and a batch, and how far we are from it.

A case is a folder with `model/`, `case.safetensors` and `grad_norms.json` (`tests/reference/fixtures.py` says what is
in them), and for LoRA `lora.safetensors` and `lora.json` (`tests/reference/lora.py`).
"""

import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ds_dgemma.checkpoint.adapter import to_peft
from ds_dgemma.checkpoint.weights import WeightReader
from ds_dgemma.data.batch import Batch, Pictures
from ds_dgemma.errors import UserError, first_line
from ds_dgemma.model.names import DECODER, checkpoint_name
from ds_dgemma.model.spec import read_spec
from ds_dgemma.ranks.layout import RankLayout

OF_IMAGES = ("pixel_values", "image_position_ids", "image_of_row")  # an entry an image, not a row
COINS = ("none", "all", "mixed")
QUANTITIES = ("diffusion loss", "AR loss", "pass-2 logits", "encoder lse", "gradient norm", "gradient")
# absolute for losses and logits (largest element), relative for gradient norms and elements (of adapters only)
TOLERANCES = {
    "float32": (2e-4, 2e-4, 5e-3, 5e-3, 2e-3, 2e-3),
    "float64": (1e-9, 1e-9, 1e-5, 1e-9, 1e-6, 1e-6),
    "bfloat16": (sys.float_info.max,) * 6,  # flips experts: only has to be finite
}
# A gradient norm below this share of the whole gradient's is a sum that cancels (top-1 routing weights, which a norm
# divides out again): rounding, so it is compared with this share instead of itself.
CANCELS = {"float32": 1e-4, "float64": 1e-9, "bfloat16": 1e-2}


@dataclass(frozen=True)
class LoraCase:
    """An adapter on a case's model, its factors by the decoder's PEFT names; `tensors` and `norms` are then with it."""

    settings: dict[str, Any]  # of lora.json: r, alpha
    factors: dict[str, Tensor]
    gradients: dict[str, Tensor]  # for the mixed coins


@dataclass(frozen=True)
class Case:
    """A checkpoint, a batch, and what transformers made of them."""

    directory: Path
    text: Any  # transformers' config of the text model
    tensors: dict[str, Tensor]
    norms: dict[str, dict[str, float]]  # coins -> checkpoint tensor -> norm of its gradient
    lora: LoraCase | None = None

    @property
    def train_router(self) -> bool:
        """Whether the routers had gradients."""
        return any(name.endswith("router.scale") for name in self.norms["all"])

    @property
    def rows(self) -> int:
        """Examples of the batch."""
        return len(self.tensors["input_ids"])


@dataclass(frozen=True)
class Observed:
    """One step's numbers."""

    diffusion_nll: float  # sums over the whole batch
    ar_nll: float
    hidden_NH: Tensor  # what the loss was computed from, this rank's rows: canvas tokens, then clean ones with a target
    gradients: dict[str, Tensor]  # whole, of all ranks' experts, by the parameter's name in the stack

    @property
    def grad_square(self) -> dict[str, float]:
        """Checkpoint tensor -> squared norm of its gradient."""
        squares: dict[str, float] = {}
        for name, gradient in self.gradients.items():
            tensor = checkpoint_name(name)
            squares[tensor] = squares.get(tensor, 0.0) + float(gradient.double().square().sum())
        return squares


def read_case(directory: Path) -> Case:
    """Read one case's folder."""
    try:
        tensors = load_file(directory / "case.safetensors")
        norms = json.loads((directory / "grad_norms.json").read_text())
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{directory} is no whole case: {first_line(error)}") from error
    lacking = {f"expected.{coins}.pass2_logits" for coins in COINS} - set(tensors)
    if lacking or set(COINS) - set(norms):
        raise UserError(f"{directory} is no whole case: {', '.join(COINS)} were expected as coins.")
    return Case(directory, read_spec(str(directory / "model")).text_config, tensors, norms)


def read_lora(case: Case) -> Case:
    """The case with its adapter on."""
    try:
        tensors = load_file(case.directory / "lora.safetensors")
        settings = json.loads((case.directory / "lora.json").read_text())
        coins = settings["coins"]
        expected = {
            f"expected.{name}.{loss}": torch.tensor([coins[name][loss]], dtype=torch.float64)
            for name in COINS
            for loss in ("diffusion_loss", "ar_loss")
        }
        expected |= {f"expected.{name}.pass2_logits": tensors[f"expected.{name}.pass2_logits"] for name in COINS}
        norms = {name: {_factor(k): norm for k, norm in coins[name]["grad_norms"].items()} for name in COINS}
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{case.directory} has no whole LoRA case: {first_line(error)}") from error
    gradient = "expected.mixed.grad."
    lora = LoraCase(
        settings,
        factors={name: value for name, value in tensors.items() if not name.startswith("expected.")},
        gradients={n.removeprefix(gradient): value for n, value in tensors.items() if n.startswith(gradient)},
    )
    inputs = {name: value for name, value in case.tensors.items() if not name.startswith("expected.")}
    return replace(case, tensors=inputs | expected, norms=norms, lora=lora)


def _factor(peft: str) -> str:
    """Our name of a factor; of the two wrappers around experts, the inner one is gate and up's."""
    name = peft.removesuffix(".weight").replace(".experts.base_layer.", ".experts.gate_up_proj.")
    return name.replace(".experts.lora_", ".experts.down_proj.lora_")


def gradient_difference(seen: Observed, case: Case) -> float:
    """The largest difference of an element of an adapter's gradient, in shares of that factor's largest element."""
    assert case.lora is not None
    differences = []
    ours = {checkpoint_name(name): gradient for name, gradient in seen.gradients.items()}
    for peft, gradient in case.lora.gradients.items():
        name = _factor(peft)
        observed = ours[name].double().cpu()
        if observed.ndim == 3:
            observed = to_peft(observed, "lora_A" if name.endswith("lora_A") else "lora_B")
        differences.append(float((observed - gradient).abs().max() / gradient.abs().max()))
    return max(differences)


def share(rows: int, ranks: RankLayout) -> slice:
    """This rank's rows; none when there are fewer rows than ranks."""
    return slice(ranks.rank * rows // ranks.world, (ranks.rank + 1) * rows // ranks.world)


def to_batch(tensors: dict[str, Tensor], coins: str, rows: slice = slice(None)) -> Batch:
    """`rows` of a case's batch in our container; no rows: the first one, with nothing in it that counts."""
    counts = rows.start is None or rows.start < rows.stop
    picked = rows if counts else slice(0, 1)
    of_rows = {name: value for name, value in tensors.items() if not name.startswith(("expected", *OF_IMAGES))}
    part = {name: value[picked] for name, value in of_rows.items()}
    valid, start = part["attention_mask"].bool(), part["canvas_start"]
    documents = tuple(valid.sum(1).tolist())
    position_S = torch.cat([torch.arange(length) for length in documents])
    is_image_S = part["image_mask"][valid] if "image_mask" in part else torch.zeros_like(position_S, dtype=torch.bool)
    ar_place_A = ((position_S > 0) & ~is_image_S).nonzero().flatten()
    return Batch(
        clean_ids_S=part["input_ids"][valid],
        position_S=position_S,
        ar_place_A=ar_place_A,
        ar_weight_A=torch.full(ar_place_A.shape, float(counts)),
        canvas_ids_CL=part["canvas_ids"],
        target_ids_CL=part["target_ids"],
        canvas_weight_CL=part["canvas_loss_mask"].float() * counts,
        canvas_start_C=start,
        noise_level_C=torch.ones(start.shape),  # nobody asks: the cases are of the base loss
        documents=documents,
        canvases=tuple(enumerate(start.tolist())),
        guessed=(),
        guessed_M=torch.empty(0, dtype=torch.int64),
        coin_M=torch.empty(0, dtype=torch.bool),
        sample_ids=tuple(range(len(start))),
        noise_levels=(),
        pictures=_pictures(tensors, picked, is_image_S, documents),
    ).with_coins(part[f"coins.{coins}"])


def _pictures(
    tensors: dict[str, Tensor], rows: slice, is_image_S: Tensor, documents: tuple[int, ...]
) -> Pictures | None:
    """The images of `rows`, in reading order; None: there are none."""
    if not is_image_S.any():
        return None
    blocks = []
    for document, mask in enumerate(is_image_S.split(documents)):
        edges = F.pad(mask.int(), (1, 1)).diff()
        pairs = zip(*(edges.eq(step).nonzero().flatten().tolist() for step in (1, -1)), strict=True)
        blocks += [(document, begin, end) for begin, end in pairs]
    row_I = tensors["image_of_row"]
    numbers = range(*rows.indices(len(tensors["input_ids"])))
    mine = torch.tensor([row in numbers for row in row_I.tolist()])
    pixels, position = (tensors[name][mine] for name in OF_IMAGES[:2])
    return Pictures(tuple(blocks), is_image_S.nonzero().flatten(), pixels, position)


def compare(seen: Observed, case: Case, coins: str, dtype: str, rows: slice = slice(None)) -> list[float]:
    """Differences in the order of QUANTITIES, logits over `rows`; infinite where something is not a number."""
    expected, batch = case.tensors, to_batch(case.tensors, coins)
    diffusion_tokens, ar_tokens = (max(1.0, count) for count in batch.counts())
    canvas_logits, logsumexp = read_hidden(seen.hidden_NH, case, rows)
    wrong_logits = canvas_logits - expected[f"expected.{coins}.pass2_logits"][rows]
    has_next = expected["attention_mask"][rows, 1:].bool()
    if "image_mask" in expected:
        has_next &= ~expected["image_mask"][rows, 1:]
    known = expected.get("expected.encoder_logsumexp")  # LoRA cases have none
    if (hidden_BSH := expected.get("expected.encoder_hidden")) is not None:
        known = logits_of(hidden_BSH, case).logsumexp(-1)
    wrong_logsumexp = logsumexp - known[rows, :-1][has_next] if known is not None else logsumexp.new_empty(0)
    differences: tuple[float, ...] = (
        abs(seen.diffusion_nll / diffusion_tokens - float(expected[f"expected.{coins}.diffusion_loss"])),
        abs(seen.ar_nll / ar_tokens - float(expected[f"expected.{coins}.ar_loss"])),
        *(float(wrong.abs().max()) if wrong.numel() else 0.0 for wrong in (wrong_logits, wrong_logsumexp)),
        max(norm_differences(seen.grad_square, case.norms[coins], CANCELS[dtype]).values()),
    )
    if case.lora is not None and coins == "mixed":
        differences = (*differences, gradient_difference(seen, case))
    return [math.inf if math.isnan(difference) else difference for difference in differences]


def logits_of(hidden: Tensor, case: Case) -> Tensor:
    """Logits [..., V] of hidden states, through the checkpoint's embedding."""
    weight = WeightReader(case.directory / "model").read(DECODER + "embed_tokens.weight").to(hidden)
    cap = case.text.final_logit_softcapping
    return (torch.tanh(hidden @ weight.t() / cap) * cap).cpu()


def read_hidden(hidden_NH: Tensor, case: Case, rows: slice) -> tuple[Tensor, Tensor]:
    """Canvas logits [B, L, V] and the encoder's log-sum-exp [A] of `rows`, through the checkpoint's embedding."""
    canvas = case.tensors["canvas_ids"][rows]
    if not len(canvas):  # the rank computed a row that counts for nothing
        return torch.empty(*canvas.shape, case.text.vocab_size), torch.empty(0)
    logits = logits_of(hidden_NH, case)
    return logits[: canvas.numel()].view(*canvas.shape, -1), logits[canvas.numel() :].logsumexp(-1)


def norm_differences(squares: dict[str, float], norms: dict[str, float], cancels: float) -> dict[str, float]:
    """Relative difference of every gradient norm; infinite where only one side has a gradient or it is not a number."""
    floor = cancels * math.sqrt(sum(norm**2 for norm in norms.values()))
    differences = {}
    for name in {*squares, *norms}:
        observed, norm = math.sqrt(squares.get(name, math.nan)), norms.get(name, math.nan)
        difference = abs(observed - norm) / max(floor, norm)
        differences[name] = math.inf if math.isnan(difference) else difference
    return differences

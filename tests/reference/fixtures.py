"""Make parity cases: what unmodified transformers computes for one training step, in float64, the slow and obvious way.

    python tests/reference/fixtures.py OUT [--case NAME ...]

Nothing of ours takes part, not even a mask: every example runs alone and unpadded. Its canvas meets just what
`generate()` would show it, the tokens before the canvas in transformers' own cache; its autoregressive loss comes from
a second run over all of its tokens. Images are read under the masks that `generate()` makes. The losses are means over
the tokens of the batch; one backward through both gives the gradients.

Each case is a folder for `tests/parity.py`. B examples, S padded length, L canvas length, V vocabulary:

- `model/`: a transformers checkpoint, fp32, with no scale or norm equal to one;
- `case.safetensors`: `input_ids`, `attention_mask` [B, S]; `canvas_start` [B]; `canvas_ids`, `target_ids`,
  `canvas_loss_mask` [B, L]; `coins.NAME` [B] for three sets of self-conditioning coins;
  with images `image_mask` [B, S], `pixel_values` [I, P, D], `image_position_ids` [I, P, 2] and `image_of_row` [I];
  `expected.encoder_logsumexp` [B, S]; and for each set of coins
  `expected.NAME.diffusion_loss`, `.ar_loss` [1], `.pass2_logits` [B, L, V];
- `grad_norms.json`: {coins: {checkpoint tensor: norm of its gradient}}, parameters without a gradient left out.
"""

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, DynamicCache
from transformers.utils.logging import disable_progress_bar

from tests.reference.float64 import DoublePrecision

PATCH, POOL = 4, 3  # pixels of a patch's side, patches of a soft token's
MOST_PATCHES = 108
Model = Any  # DiffusionGemmaForBlockDiffusion, whose submodules' types are not declared
PAD, EOS = 0, 1
LAYER_TYPES = {"S": "sliding_attention", "F": "full_attention"}


@dataclass(frozen=True)
class Row:
    """One example: tokens of prompt and response, the number of the canvas that is denoised."""

    prompt: int
    response: int
    canvas: int = 0
    images: tuple[tuple[int, int], ...] = ()  # in the prompt: where the token that begins one is, and its soft tokens


@dataclass(frozen=True)
class Case:
    """A model and a batch."""

    rows: tuple[Row, ...] = (Row(3, 5), Row(9, 14, 1), Row(14, 8), Row(21, 20, 2))
    layers: str = "SF"
    hidden: int = 48  # its square root is not a float32: the rounding of the embedding scale shows
    vocabulary: int = 96
    experts: int = 4
    top_k: int = 2
    heads: int = 4
    kv_heads: int = 2
    window: int = 8
    canvas: int = 8
    extra_padding: int = 3
    holes: bool = False  # canvas tokens that are not supervised
    train_router: bool = True
    same_scalars: bool = False  # the encoder's layer scalars equal the decoder's
    seed: int = 0


CASES = {
    "base": Case(),
    "wide_canvas": Case(  # wider than the window
        rows=(Row(4, 16), Row(9, 33, 1), Row(26, 20, 1)),
        canvas=16,
        holes=True,
        train_router=False,
        layers="SSF",
        seed=1,
    ),
    "many_experts": Case(experts=12, top_k=3, heads=6, kv_heads=3, layers="SFF", same_scalars=True, seed=2),
    "one_expert_each": Case(top_k=1, experts=6, vocabulary=131, layers="FF", extra_padding=0, seed=3),
    "one_row": Case(rows=(Row(11, 13, 1),), experts=5, layers="SSSF", hidden=32, kv_heads=1, seed=4),
    "images": Case(  # one is longer than the window, some lie across its edges
        rows=(Row(30, 5, 0, ((2, 10), (14, 2))), Row(9, 14, 1), Row(21, 8, 0, ((11, 6),)), Row(25, 20, 2, ((0, 4),))),
        layers="SSF",
        train_router=False,
        seed=6,
    ),
    "three_rows": Case(rows=(Row(1, 1), Row(40, 3), Row(6, 17, 1)), window=5, seed=5),
}


def make_config(case: Case) -> DiffusionGemmaConfig:
    """transformers' config of a case's model."""
    text_config = {
        "vocab_size": case.vocabulary,
        "hidden_size": case.hidden,
        "intermediate_size": 2 * case.hidden,
        "num_hidden_layers": len(case.layers),
        "layer_types": [LAYER_TYPES[layer] for layer in case.layers],
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.kv_heads,
        "num_global_key_value_heads": 1,
        "head_dim": 8,
        "global_head_dim": 16,
        "num_experts": case.experts,
        "top_k_experts": case.top_k,
        "moe_intermediate_size": 24,
        "sliding_window": case.window,
        "max_position_embeddings": 1024,
        "use_bidirectional_attention": "vision",
    }
    vision_config = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "patch_size": 4,
        "position_embedding_size": 16,
    }
    last = case.vocabulary - 1
    return DiffusionGemmaConfig(
        text_config=text_config,
        vision_config=vision_config,
        canvas_length=case.canvas,
        boi_token_id=last - 2,
        eoi_token_id=last - 1,
        image_token_id=last,
    )


@torch.no_grad()
def make_model(case: Case) -> Model:
    """Random weights in which a forgotten norm, scale or scalar shows."""
    torch.manual_seed(case.seed)
    model: Model = DiffusionGemmaForBlockDiffusion(make_config(case))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.uniform_(0.5, 1.5)
        elif name.endswith("embed_tokens.weight"):
            parameter.normal_(std=0.3)
        elif name.endswith("router.proj.weight"):
            parameter.normal_()
        else:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    encoder = model.model.encoder.language_model
    for layer, twin in zip(model.model.decoder.layers, encoder.layers, strict=True):
        layer.layer_scalar.uniform_(0.6, 1.3)
        twin.layer_scalar.copy_(layer.layer_scalar if case.same_scalars else twin.layer_scalar.uniform_(0.6, 1.3))
    return model


def make_batch(case: Case) -> dict[str, Tensor]:
    """Random tokens, noise and coins; each canvas holds the pad id once."""
    draw = torch.Generator().manual_seed(1000 + case.seed)
    L, B = case.canvas, len(case.rows)
    tokens = []
    for row in case.rows:
        assert row.canvas * L < row.response, "the denoised canvas lies behind the response"
        text = torch.randint(3, case.vocabulary - 3, (row.prompt + row.response,), generator=draw)
        for at, soft in row.images:
            text[at : at + soft + 2] = torch.tensor(
                [case.vocabulary - 3, *[case.vocabulary - 1] * soft, case.vocabulary - 2]
            )
        tokens.append(F.pad(text, (0, -row.response % L), value=EOS))
    S = max(map(len, tokens)) + case.extra_padding
    start = torch.tensor([row.prompt + row.canvas * L for row in case.rows])
    target = torch.stack([text[s : s + L] for text, s in zip(tokens, start.tolist(), strict=True)])
    level = 0.2 + 0.8 * torch.rand(B, 1, generator=draw)
    anything = torch.randint(case.vocabulary, (B, L), generator=draw)
    noised = torch.where(torch.rand(B, L, generator=draw) < level, anything, target)
    noised[:, 2] = PAD
    supervised = torch.ones(B, L, dtype=torch.bool)
    if case.holes:
        supervised[0, 3] = supervised[-1, L - 2 :] = False
    ids = torch.stack([F.pad(text, (0, S - len(text)), value=PAD) for text in tokens])
    return {
        "input_ids": ids,
        "attention_mask": torch.stack([(torch.arange(S) < len(text)).long() for text in tokens]),
        "canvas_start": start,
        "canvas_ids": noised,
        "target_ids": target,
        "canvas_loss_mask": supervised,
        "coins.none": torch.zeros(B, dtype=torch.bool),
        "coins.all": torch.ones(B, dtype=torch.bool),
        "coins.mixed": torch.arange(B) % 2 == 0,
        **(
            make_images(case, draw) | {"image_mask": ids == case.vocabulary - 1}
            if any(r.images for r in case.rows)
            else {}
        ),
    }


def make_images(case: Case, draw: torch.Generator) -> dict[str, Tensor]:
    """Random pixels, two soft tokens high; the rest of an image's patches is padding."""
    images = [(number, soft) for number, row in enumerate(case.rows) for _, soft in row.images]
    pixels = torch.zeros(len(images), MOST_PATCHES, 3 * PATCH**2)
    position = torch.full((len(images), MOST_PATCHES, 2), -1)
    for number, (_, soft) in enumerate(images):
        grid = torch.cartesian_prod(torch.arange(2 * POOL), torch.arange(soft // 2 * POOL)).flip(1)  # column, row
        pixels[number, : len(grid)] = torch.rand(len(grid), 3 * PATCH**2, generator=draw)
        position[number, : len(grid)] = grid
    row_I = torch.tensor([row for row, _ in images])
    return {"pixel_values": pixels, "image_position_ids": position, "image_of_row": row_I}


def images_of(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """What the encoder takes for a row's images; nothing where it has none."""
    mine = batch["image_of_row"] == row if "image_of_row" in batch else torch.zeros(1, dtype=torch.bool)
    if not mine.any():
        return {}
    return {
        "pixel_values": batch["pixel_values"][mine].double(),
        "image_position_ids": batch["image_position_ids"][mine],
    }


def encode(model: Model, tokens: Tensor, images: dict[str, Tensor]) -> tuple[Tensor, DynamicCache]:
    """The encoder's hidden states [S, H] and its cache, as `generate()` prepares them for a prompt with images."""
    encoder, cache = model.model.encoder, DynamicCache(config=model.config.text_config)
    mask = encoder.create_masks_for_generate(
        config=model.config,
        inputs_embeds=torch.empty(1, len(tokens), 0, dtype=torch.float64),
        attention_mask=torch.ones_like(tokens)[None],
        past_key_values=cache,
        position_ids=torch.arange(len(tokens))[None],
        mm_token_type_ids=(tokens == model.config.image_token_id)[None].long(),
    )
    output = encoder(input_ids=tokens[None], attention_mask=mask, past_key_values=cache, **images)
    return output.last_hidden_state[0], cache


def canvas_logits(model: Model, before: Tensor, canvas: Tensor, coin: bool, images: dict[str, Tensor]) -> Tensor:
    """Logits [L, V] of one canvas after the tokens `before` it, with self-conditioning when the coin says so."""

    def denoise(**conditions: Tensor) -> Tensor:
        if images:
            cache = encode(model, before, images)[1]
            return model(decoder_input_ids=canvas[None], past_key_values=cache, **conditions).logits
        cache = DynamicCache(config=model.config.text_config)
        prompt = {"input_ids": before[None], "decoder_input_ids": canvas[None]}
        return model(**prompt, past_key_values=cache, **conditions).logits

    if not coin:
        return denoise()[0]
    with torch.no_grad():
        guess = denoise()
    return denoise(self_conditioning_logits=guess)[0]


def encoder_logits(model: Model, tokens: Tensor, images: dict[str, Tensor]) -> Tensor:
    """The encoder's next-token logits [S, V]; the forward offers only its hidden states, the head is applied here."""
    if images:
        hidden, _ = encode(model, tokens, images)
    else:
        canvas = tokens.new_zeros(1, 1)  # the forward wants one; it changes nothing in the encoder
        cache = DynamicCache(config=model.config.text_config)
        output = model(input_ids=tokens[None], decoder_input_ids=canvas, past_key_values=cache)
        hidden = output.encoder_last_hidden_state[0]
    cap = model.config.text_config.final_logit_softcapping
    return torch.tanh(model.lm_head(hidden) / cap) * cap


def step(model: Model, batch: dict[str, Tensor], coins: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    """One forward and backward: what is expected, and the norm of every gradient. `model` is float64."""
    model.zero_grad(set_to_none=True)
    logits, canvas_nll, pair_nll, logsumexp = [], [], [], []
    with DoublePrecision():
        for b, coin in enumerate(batch[f"coins.{coins}"].tolist()):
            text = batch["input_ids"][b, : batch["attention_mask"][b].sum()]
            images, before = images_of(batch, b), text[: batch["canvas_start"][b]]
            logits.append(canvas_logits(model, before, batch["canvas_ids"][b], coin, images))
            nll = F.cross_entropy(logits[-1], batch["target_ids"][b], reduction="none")
            canvas_nll.append(nll[batch["canvas_loss_mask"][b]])
            following = encoder_logits(model, text, images)
            learned = text[1:] != model.config.image_token_id
            pair_nll.append(F.cross_entropy(following[:-1], text[1:], reduction="none")[learned])
            padding = batch["input_ids"].shape[1] - len(text)
            logsumexp.append(F.pad(following.detach().logsumexp(-1), (0, padding)))
        diffusion, ar = torch.cat(canvas_nll).mean(), torch.cat(pair_nll).mean()
        (diffusion + ar).backward()
    expected = {
        "encoder_logsumexp": torch.stack(logsumexp),
        f"{coins}.diffusion_loss": diffusion.detach().reshape(1),
        f"{coins}.ar_loss": ar.detach().reshape(1),
        f"{coins}.pass2_logits": torch.stack(logits).detach().float(),
    }
    norms = {  # a tied weight has several names: the checkpoint's is the decoder's
        name: float(parameter.grad.norm())
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name.startswith("model.decoder.") and parameter.grad is not None
    }
    return expected, norms


def write_expected(folder: Path, batch: dict[str, Tensor], train_router: bool) -> None:
    """Add `case.safetensors` and `grad_norms.json` to a folder that has its `model/`."""
    model: Model = DiffusionGemmaForBlockDiffusion.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    model.train().double()
    for layer in model.model.decoder.layers:
        layer.router.requires_grad_(train_router)
    tensors, norms = dict(batch), {}
    for coins in ("none", "all", "mixed"):
        expected, norms[coins] = step(model, batch, coins)
        tensors |= {f"expected.{name}": value for name, value in expected.items()}
    save_file(tensors, folder / "case.safetensors")
    (folder / "grad_norms.json").write_text(json.dumps(norms, indent=1, sort_keys=True))


def write_case(folder: Path, case: Case) -> None:
    """Write one case's folder."""
    make_model(case).save_pretrained(folder / "model")
    write_expected(folder, make_batch(case), case.train_router)


def main(argv: list[str]) -> int:
    """Write the named cases, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES), dest="names")
    args = parser.parse_args(argv)
    disable_progress_bar()
    for name in args.names:
        write_case(args.out / name, CASES[name])
        print(f"wrote {args.out / name}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

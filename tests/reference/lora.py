"""Add LoRA to parity cases: what unmodified transformers with unmodified PEFT computes for the same batch, in float64.

    python tests/reference/lora.py OUT        # every case in OUT, made by tests/reference/fixtures.py

PEFT puts separate adapters on encoder and decoder; both get the same random factors, and a factor's gradient is the
sum of the two. They sit on attention, dense MLP and experts. Each case's folder gets

- `lora.safetensors`: the factors by the decoder's names, `NAME.lora_A.weight`, in PEFT's own layout;
  `expected.COINS.pass2_logits`; `expected.mixed.grad.NAME...`
- `lora.json`: `r`, `alpha`, and for each set of coins the losses and the norm of every gradient.
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DiffusionGemmaForBlockDiffusion

from tests.reference.fixtures import Model, step

R, ALPHA = 8, 5  # a rank that grouped products take
LINEARS = r"model\.(decoder|encoder\.language_model)\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
TENSORS = ["experts.gate_up_proj", "experts.down_proj"]
DECODER, ENCODER = "model.decoder.", "model.encoder.language_model."


def with_adapters(model: Model, seed: int) -> dict[str, Tensor]:
    """Put random adapters on a model, frozen otherwise; the decoder's factors by name, float64."""
    model.requires_grad_(False)
    config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=LINEARS, target_parameters=TENSORS)
    inject_adapter_in_model(config, model)
    draw = torch.Generator().manual_seed(seed)
    named = dict(model.named_parameters(remove_duplicate=False))
    factors = {}
    for name in sorted(name for name in named if name.startswith(DECODER) and ".lora_" in name):
        value = torch.randn(named[name].shape, generator=draw)
        factors[name] = value * (value.shape[-1] ** -0.5 if "lora_A" in name else 0.3)
        for copy in (name, name.replace(DECODER, ENCODER)):
            named[copy].data.copy_(factors[name])
            named[copy].requires_grad_(True)
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 2 * len(factors)
    model.double()
    return factors


def write_lora(folder: Path) -> None:
    """Add an adapter and what is expected of it to one case's folder."""
    model: Model = DiffusionGemmaForBlockDiffusion.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    model.train()
    factors = with_adapters(model, seed=7)
    named = dict(model.named_parameters(remove_duplicate=False))
    batch = load_file(folder / "case.safetensors")
    tensors = {_stored(name): value.contiguous() for name, value in factors.items()}
    described = {}
    for coins in ("none", "all", "mixed"):
        expected, _ = step(model, batch, coins)
        gradients = {name: named[name].grad + named[name.replace(DECODER, ENCODER)].grad for name in factors}
        tensors[f"expected.{coins}.pass2_logits"] = expected[f"{coins}.pass2_logits"]
        if coins == "mixed":
            tensors |= {f"expected.mixed.grad.{_stored(name)}": g.contiguous() for name, g in gradients.items()}
        losses = {loss: float(expected[f"{coins}.{loss}"]) for loss in ("diffusion_loss", "ar_loss")}
        described[coins] = {**losses, "grad_norms": {_stored(name): float(g.norm()) for name, g in gradients.items()}}
    save_file(tensors, folder / "lora.safetensors")
    (folder / "lora.json").write_text(json.dumps({"r": R, "alpha": ALPHA, "coins": described}, indent=1))


def _stored(name: str) -> str:
    """PEFT leaves the adapter's name out of its files."""
    return name.replace(".default.", ".")


def main(argv: list[str]) -> int:
    """Add LoRA to every case of a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for case in sorted(parser.parse_args(argv).out.glob("*/case.safetensors")):
        write_lora(case.parent)
        print(f"wrote {case.parent / 'lora.safetensors'}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Make a checkpoint of random bf16 weights in the released model's shapes, with few layers.

    python -m tests.benchmarks.real_checkpoint DIR [--layers 2] [--experts 128] [--vocab 262144] [--shard-gb 2]

Two layers are 4.8 GB. All that a transformers checkpoint has is there: shards under an index (one file with a large
enough --shard-gb), the vision tower (a small one), the layer scalars of encoder and decoder, generation config, a
byte-level tokenizer with a chat template. Weights go to the file in pieces, so making it takes no memory to speak of.
A tensor's values depend on its name, its size and --seed alone: matrices +-[2^-7, 2^-5), the router's +-[0.5, 2) (equal
scores would let rounding choose the experts), norms and scales [1, 1.25).
"""

import argparse
import json
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion
from transformers.models.diffusion_gemma.generation_diffusion_gemma import DiffusionGemmaGenerationConfig

from ds_dgemma.tools.tiny import END_OF_TURN, text_tokenizer
from tests.gpu import ROOT, shapes

PIECE = 2**25  # elements written at once
ROUTER, MATRIX, SCALE = (0x80FF, 0x3F00), (0x80FF, 0x3C00), (0x001F, 0x3F80)  # random bits kept, bits set


def make_checkpoint(config: DiffusionGemmaConfig, out: Path, shard_gb: float = 2, seed: int = 0) -> None:
    """Write the checkpoint of a config; `out` appears whole or not at all, and is left alone if it is there."""
    if out.exists():
        return
    config.dtype, config.architectures = torch.bfloat16, ["DiffusionGemmaForBlockDiffusion"]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as part:
        fresh = Path(part, "new")
        config.save_pretrained(fresh)
        _save_tokenizer(fresh)
        tensors = outline(config)
        split = split_torch_state_dict_into_shards(tensors, max_shard_size=int(shard_gb * 1e9))
        shards = [
            (fresh / file, {name: tensors[name] for name in names}, seed)
            for file, names in split.filename_to_tensors.items()
        ]
        with ThreadPoolExecutor() as writers:
            list(writers.map(write_random, *zip(*shards, strict=True)))
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (fresh / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        fresh.rename(out)


def outline(config: DiffusionGemmaConfig) -> dict[str, Tensor]:
    """Every tensor that `save_pretrained` would write, bf16, on meta."""
    with torch.device("meta"):
        model = DiffusionGemmaForBlockDiffusion(config).to(torch.bfloat16)
    tied = model.all_tied_weights_keys
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def write_random(file: Path, tensors: dict[str, Tensor], seed: int) -> None:
    """Write a safetensors file piece by piece: a header, then the values, one tensor after another."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    written = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    written += b" " * (-len(written) % 8)
    with file.open("wb") as stream:
        stream.write(len(written).to_bytes(8, "little") + written)
        for name, tensor in tensors.items():
            bits = np.random.SFC64([seed, *name.encode()])
            kept, set_bits = ROUTER if name.endswith("router.proj.weight") else MATRIX if tensor.ndim > 1 else SCALE
            for start in range(0, tensor.numel(), PIECE):
                count = min(PIECE, tensor.numel() - start)
                piece = bits.random_raw(-(-count // 4)).view(np.uint16)[:count]
                piece &= np.uint16(kept)
                piece |= np.uint16(set_bits)
                stream.write(piece.data)


def _save_tokenizer(out: Path) -> None:
    tokenizer = text_tokenizer(ROOT / "README.md", vocab_size=512)
    tokenizer.save_pretrained(out)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TURN)]
    DiffusionGemmaGenerationConfig(
        max_new_tokens=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(out)


def main() -> None:
    """Make one; an existing one is replaced only with --force."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=2, help="the last one has full attention, the others slide")
    parser.add_argument("--experts", type=int)
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--shard-gb", type=float, default=2, help="largest shard, GB; a larger tensor has its own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--miniature", action="store_true", help="small shapes, to rehearse with")
    parser.add_argument("--force", action="store_true", help="replace an existing one")
    args = parser.parse_args()
    if args.force and (args.out / "config.json").is_file():
        shutil.rmtree(args.out)
    changes = {"num_experts": args.experts, "vocab_size": args.vocab}
    changes = {name: value for name, value in changes.items() if value is not None}
    make_checkpoint(shapes.config(args.miniature, args.layers, **changes), args.out, args.shard_gb, args.seed)
    print(f"{args.out}: {sum(file.stat().st_size for file in args.out.iterdir()) / 1e9:.3f} GB")


if __name__ == "__main__":
    main()

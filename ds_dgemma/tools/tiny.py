"""Make a tiny DiffusionGemma from random weights, with a tokenizer: for the demo, tests, first experiments.

Nothing is special about the result: transformers' own config and model class, saved by `save_pretrained`, so
all that reads it reads the released checkpoint too. Ids: pad 0, eos 1, bos 2, `<|turn>` 3, `<turn|>` 4; the
last three are image tokens, which config.json must name and text never uses. Turns are written as Gemma
does, `<|turn>role\\ncontent<turn|>\\n`.

- `sudoku4`: a character is a token (digits, letters A to I, `.`), a role is one, and the template leaves out
  the newlines: a 4x4 puzzle is 22 prompt tokens, its answer 16 digits and `<turn|>` in a canvas of 20. `sudoku9` is
  the same for 9x9, with a canvas of 96.
- `shapes`: characters and turns likewise, with letters for words; a vision tower that works and an image processor
  (`tiny_vision.py`), and a template that takes images among the parts of a content.
- `text`: byte-level BPE trained on a file, so no text is unknown and decoding gives back every byte. A
  newline is always a token of its own: no merge reaches across the border between prompt and answer. Its template
  (`text_template.jinja`) has tools and thoughts.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, PreTrainedTokenizerFast
from transformers.models.diffusion_gemma.generation_diffusion_gemma import DiffusionGemmaGenerationConfig

from ds_dgemma.errors import UserError, first_line
from ds_dgemma.tools import tiny_vision


@dataclass(frozen=True)
class Shape:
    """Sizes of one preset; what is not named here is the same for all."""

    hidden: int
    dense_intermediate: int
    layers: int  # the last one has full attention, the others slide
    heads: int
    head_dim: int  # of sliding layers; full layers have one key-value head of twice the size
    experts: int
    experts_per_token: int
    expert_intermediate: int
    window: int  # tokens
    canvas: int  # tokens
    new_tokens: int  # what generate() makes unless told otherwise


SHAPES = {
    "sudoku4": Shape(128, 256, 4, 4, 16, 8, 2, 64, window=64, canvas=20, new_tokens=20),
    "sudoku9": Shape(128, 256, 4, 4, 16, 8, 2, 64, window=192, canvas=96, new_tokens=96),
    "shapes": Shape(128, 256, 4, 4, 16, 8, 2, 64, window=128, canvas=12, new_tokens=12),
    "text": Shape(256, 512, 6, 4, 32, 8, 2, 128, window=128, canvas=64, new_tokens=256),
}

PAD, EOS, BOS, TURN, END_OF_TURN, UNKNOWN = "<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>", "<unk>"
IMAGE_TOKENS = ["<|image>", "<image|>", "<|image|>"]  # begin, end, placeholder
CONTROL_TOKENS = [PAD, EOS, BOS, TURN, END_OF_TURN]
TEXT_CONTROL_TOKENS = [
    *CONTROL_TOKENS,
    *("<|think|>", "<|channel>", "<channel|>", "<|tool>", "<tool|>"),
    *("<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>"),
]
ROLES = ["user", "model", "system"]
SUDOKU_CHARACTERS = [".", *"123456789", *"ABCDEFGHI", "\n"]

SUDOKU_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|turn>' + ('model' if message.role == 'assistant' else message.role) + message.content + '<turn|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|turn>model' }}{% endif %}"
)
CHARACTERS = {
    "sudoku4": (SUDOKU_CHARACTERS, SUDOKU_TEMPLATE),
    "sudoku9": (SUDOKU_CHARACTERS, SUDOKU_TEMPLATE),
    "shapes": (tiny_vision.CHARACTERS, tiny_vision.TEMPLATE),
}
TEXT_TEMPLATE = Path(__file__).with_name("text_template.jinja")
TEXT_VOCABULARY = 4096
SMALLEST_TEXT_VOCABULARY = len(TEXT_CONTROL_TOKENS) + 256 + len(IMAGE_TOKENS)  # every byte is a token


def make_tiny(
    preset: str,
    out: Path,
    text: Path | None = None,
    seed: int = 0,
    vocab_size: int | None = None,
    force: bool = False,
) -> int:
    """Write a checkpoint directory, whole or not at all, and return its tokens; `force` replaces one that is there.

    Raises:
        UserError: `out` may not be written or replaced, or an argument does not fit the preset.
    """
    _check_out(out, force)
    tokenizer = text_tokenizer(text, vocab_size) if preset == "text" else _tokenizer(preset, text, vocab_size)
    sees = preset == "shapes"
    model = _random_model(SHAPES[preset], tokenizer, seed, sees)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as part:
            fresh, old = Path(part, "new"), Path(part, "old")
            model.save_pretrained(fresh)
            tokenizer.save_pretrained(fresh)
            if sees:
                tiny_vision.image_processor().save_pretrained(fresh)
            if out.exists():
                out.rename(old)
            fresh.rename(out)
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there ({error.strerror}). Name another directory.") from error
    return len(tokenizer)


def _check_out(out: Path, force: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not force:
        raise UserError(f"--out {out} already exists. Name a new directory, or add --force to replace it.")
    if not (out / "config.json").is_file():  # a slip of the hand must not cost somebody's home directory
        raise UserError(f"--out {out} is no checkpoint, so --force does not replace it. Name a new directory.")


def _random_model(
    shape: Shape, tokenizer: PreTrainedTokenizerFast, seed: int, sees: bool
) -> DiffusionGemmaForBlockDiffusion:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DiffusionGemmaForBlockDiffusion(_config(shape, len(tokenizer), sees))
        decoder: Any = model.model.decoder
        for layer in decoder.layers:
            # Experts with near-equal scores swap places by rounding alone, and a run would depend on its topology.
            torch.nn.init.normal_(layer.router.proj.weight, std=1.0)
            # Attention scales by 1, so norms of weight 1 would give scores a deviation of sqrt(head_dim): near a hard
            # choice, in which rounding grows. These give 1, as dividing by sqrt(head_dim) does elsewhere.
            for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
                torch.nn.init.constant_(norm.weight, layer.self_attn.head_dim**-0.25)
        if sees:
            tiny_vision.initialise_vision(model)
    end_of_turn = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    model.generation_config = DiffusionGemmaGenerationConfig(
        max_new_tokens=shape.new_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, end_of_turn],
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def _config(shape: Shape, vocab_size: int, sees: bool) -> DiffusionGemmaConfig:
    text: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.dense_intermediate,
        "num_hidden_layers": shape.layers,
        "layer_types": ["sliding_attention"] * (shape.layers - 1) + ["full_attention"],
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads // 2,
        "head_dim": shape.head_dim,
        "num_global_key_value_heads": 1,
        "global_head_dim": 2 * shape.head_dim,
        "num_experts": shape.experts,
        "top_k_experts": shape.experts_per_token,
        "moe_intermediate_size": shape.expert_intermediate,
        "sliding_window": shape.window,
        "max_position_embeddings": 4096,
    }
    return small_config(text, shape.canvas, tiny_vision.VISION if sees else None)


def small_config(
    text: dict[str, Any], canvas_length: int, vision: dict[str, Any] | None = None
) -> DiffusionGemmaConfig:
    """transformers' config of a text model, by default with the smallest vision tower; ids of image tokens end the
    vocabulary.
    """
    smallest: dict[str, Any] = {  # transformers builds the tower always
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "patch_size": 4,
        "position_embedding_size": 16,
    }
    return DiffusionGemmaConfig(
        text_config={**text, "use_bidirectional_attention": "vision"},  # as released: only image tokens look ahead
        vision_config=vision or smallest,
        canvas_length=canvas_length,
        boi_token_id=text["vocab_size"] - 3,
        eoi_token_id=text["vocab_size"] - 2,
        image_token_id=text["vocab_size"] - 1,
    )


def _tokenizer(preset: str, text: Path | None, vocab_size: int | None) -> PreTrainedTokenizerFast:
    """One token a character."""
    if text is not None or vocab_size is not None:
        raise UserError(f"--text and --vocab-size belong to --preset text; the vocabulary of {preset} is fixed.")
    characters, template = CHARACTERS[preset]
    vocabulary = [*CONTROL_TOKENS, *ROLES, *characters, UNKNOWN, *IMAGE_TOKENS]
    ids = {token: number for number, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    _mark_special(tokenizer, [*CONTROL_TOKENS, *ROLES, UNKNOWN, *IMAGE_TOKENS])
    return _with_template(tokenizer, template, unk_token=UNKNOWN)


def text_tokenizer(text: Path | None, vocab_size: int | None) -> PreTrainedTokenizerFast:
    """Train the byte-level tokenizer of preset `text` on a file (JSONL or plain)."""
    if text is None:
        raise UserError("--preset text needs --text FILE: JSONL or plain text to train the tokenizer on.")
    size = TEXT_VOCABULARY if vocab_size is None else vocab_size
    if size < SMALLEST_TEXT_VOCABULARY:
        raise UserError(f"--vocab-size {size}: at least {SMALLEST_TEXT_VOCABULARY}, for all bytes and special tokens.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(IMAGE_TOKENS),
        special_tokens=TEXT_CONTROL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    strings = _strings(text)
    first = next(strings, None)
    if first is None:
        raise UserError(f"--text {text}: holds no text to train the tokenizer on.")
    tokenizer.train_from_iterator(chain([first], strings), trainer)
    _mark_special(tokenizer, [*TEXT_CONTROL_TOKENS, *IMAGE_TOKENS])
    return _with_template(tokenizer, TEXT_TEMPLATE.read_text())


def _mark_special(tokenizer: Tokenizer, tokens: list[str]) -> None:
    """Cut these out of a text before anything else looks at it."""
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])


def _with_template(tokenizer: Tokenizer, template: str, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=template,
        pad_token=PAD,
        eos_token=EOS,
        bos_token=BOS,
        clean_up_tokenization_spaces=False,  # decoding gives back the text as it was
        **special,
    )


def _strings(path: Path) -> Iterator[str]:
    """Yield the lines of a text, or of JSONL every string in every record."""
    is_jsonl = path.suffix in (".jsonl", ".json")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for number, line in enumerate(file, 1):
                if not is_jsonl:
                    yield line
                elif line.strip():
                    yield from _strings_in(_parse(line, f"{path}:{number}"))
    except OSError as error:
        raise UserError(f"--text {path}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--text {path}: not UTF-8 ({error.reason} at byte {error.start}).") from error


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise UserError(f"--text {where}: broken JSON ({first_line(error)}). One object a line is expected.") from error


def _strings_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings_in(part)

"""Answer prompts with unmodified transformers `generate()`, and score the answers.

A prompt is what training calls one (`data/chat.py`): all messages before the last answer, with the generation
prompt. Prompts of equal length share a batch, so nothing is padded. Facts about DiffusionGemma's `generate()`
in transformers 5.23:

- It makes whole canvases, ceil(max_new_tokens / canvas_length) of them: up to a canvas more than asked for.
- A canvas starts as uniform random ids and gets at most `max_denoising_steps` (48) decoder passes. A row is
  done early once its argmax stayed the same for `stability_threshold` (1) steps and its mean entropy is below
  `confidence_threshold` (0.005); then its canvas is frozen, but the batch goes on until its slowest row. What
  is kept is the last argmax: the samples only steer the next pass.
- Logits are divided by a temperature, 0.8 falling to 0.4, before sampling, entropy and self-conditioning.
- Stop ids are looked for in finished canvases. What follows the first becomes the pad id where there is one,
  and a stopped row gets canvases of pad until all have stopped. Without `eos_token_id` in
  generation_config.json nothing stops.
- Randomness is torch's global generator over the whole batch: equal answers need equal seed, batch size and
  data.
- Positions count padding too, and eager attention raises a TypeError on a padded prompt: unequal prompts in
  one batch would need padding on the left, an `attention_mask` and SDPA. Only a static cache is compiled; the
  default one is not.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError
from transformers import DiffusionGemmaForBlockDiffusion, PreTrainedTokenizerFast

from ds_dgemma.checkpoint.adapter import AdapterReader
from ds_dgemma.checkpoint.weights import local_directory
from ds_dgemma.config_data import DataSection
from ds_dgemma.data.chat import Document, prompt_text, tokenize_rows
from ds_dgemma.data.drafts import Drafter
from ds_dgemma.data.formats import Conversation
from ds_dgemma.data.messages import BadRow
from ds_dgemma.data.reading import Reading, settle
from ds_dgemma.data.sources import open_sources, read_rows
from ds_dgemma.data.tokenizer import image_tokens, load_tokenizer
from ds_dgemma.errors import UserError, did_you_mean, first_line
from ds_dgemma.evaluation.scorers import SCORERS, Score, summarise
from ds_dgemma.model.build import build_stack
from ds_dgemma.model.lora import possible_targets
from ds_dgemma.model.spec import read_spec, text_spec

ONE_THREAD_BELOW = 50_000_000  # parameters: a smaller model's CPU threads mostly wait for each other


@dataclass(frozen=True)
class Source:
    """A transformers checkpoint or a hub id, and a PEFT adapter to put onto it."""

    model: str
    revision: str | None = None  # of a hub id
    adapter: Path | None = None


@dataclass(frozen=True)
class Generator:
    """A model that answers, its tokenizer, and the ids that end an answer."""

    model: DiffusionGemmaForBlockDiffusion
    tokenizer: PreTrainedTokenizerFast
    stop_ids: frozenset[int]


def load_generator(source: Source) -> Generator:
    """Load a model onto the GPU in its own dtype, or onto the CPU in float32; PEFT adds the adapter.

    Raises:
        UserError: no DiffusionGemma checkpoint, weights missing, no tokenizer, or no adapter of this model.
    """
    path, adapter = source.model, source.adapter
    directory = local_directory(path, source.revision)
    spec = read_spec(str(directory))
    tokenizer = load_tokenizer(directory, text_spec(spec).vocab_size)
    if adapter is not None:  # looked at before the model is read
        outline = build_stack(spec)
        if warning := AdapterReader(adapter, possible_targets(outline)).base_warning(path):
            print(warning, file=sys.stderr)
    on_gpu = torch.cuda.is_available()
    try:
        loaded: Any = DiffusionGemmaForBlockDiffusion.from_pretrained(
            directory,
            dtype="auto" if on_gpu else torch.float32,
            attn_implementation="sdpa",
            output_loading_info=True,
            use_safetensors=True,  # never what has to be unpickled
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path} could not be loaded: {first_line(error)}") from error
    model, info = loaded
    if info["missing_keys"]:  # transformers would answer with random weights in their place
        missing = sorted(info["missing_keys"])
        raise UserError(f"{path} lacks {len(missing)} weights, {missing[0]} first. Export or download it again.")
    if adapter is not None:
        model = _with_adapter(model, adapter)
    if not on_gpu and model.num_parameters() < ONE_THREAD_BELOW:
        torch.set_num_threads(1)
    stop = model.generation_config.eos_token_id
    eos = tokenizer.eos_token_id
    assert isinstance(eos, int)  # load_tokenizer looked
    stop_ids = {eos, *(stop if isinstance(stop, list) else [stop])} - {None}
    return Generator(model.to("cuda" if on_gpu else "cpu").eval(), tokenizer, frozenset(stop_ids))


def _with_adapter(model: Any, adapter: Path) -> Any:
    """The model with PEFT's layers in place; factors that are missing would be left random, so they are an error."""
    try:
        config = PeftConfig.from_pretrained(str(adapter))
        adapted = PeftModel(model, config)
        loaded = adapted.load_adapter(str(adapter), adapter_name="default")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"--adapter {adapter} could not be loaded: {first_line(error)}") from error
    missing = [key for key in loaded.missing_keys if "lora_" in key]
    if missing or loaded.unexpected_keys:
        first = [*missing, *loaded.unexpected_keys][0]
        raise UserError(f"--adapter {adapter} does not fit this model: {first}, among others.")
    return adapted.get_base_model()


def answer_prompts(generator: Generator, prompts: list[list[int]], batch_size: int, seed: int) -> list[str]:
    """Answer prompts of token ids; the answers are text, in the order of the prompts.

    Raises:
        UserError: the model's scores are no numbers.
    """
    torch.manual_seed(seed)
    generate: Callable[..., Any] = generator.model.generate  # typed for LongTensor, a type no tensor has
    batches = list(_equal_length_batches(prompts, batch_size))
    answers = [""] * len(prompts)
    console = Console(stderr=True)
    for rows in track(batches, "answering", console=console, transient=True, disable=not console.is_terminal):
        ids = torch.tensor([prompts[row] for row in rows], device=generator.model.device)
        try:
            output = generate(input_ids=ids)
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise UserError(
                f"{generator.model.name_or_path} answers with NaN or infinity: its weights hold some, or training has "
                "diverged. Take an earlier checkpoint."
            ) from error
        for row, generated in zip(rows, output.sequences[:, ids.shape[1] :].tolist(), strict=True):
            answers[row] = _text_before_stop(generated, generator)
    return answers


def evaluate(source: Source, data: str, scorer: str, batch_size: int, limit: int | None, seed: int) -> dict[str, Any]:
    """Answer the conversations of a JSONL file; return the report of `summarise` and what was evaluated."""
    if scorer not in SCORERS:
        raise UserError(f"--scorer {scorer}: known are {', '.join(SCORERS)}.{did_you_mean(scorer, SCORERS)}")
    if batch_size < 1 or (limit is not None and limit < 1):
        raise UserError(f"--batch-size {batch_size}, --limit {limit}: both must be at least 1.")
    asked = _read_conversations(data, limit)
    for where, conversation in asked:  # a record of another task is refused before minutes are spent on answers
        _score(scorer, where, conversation, answer="")
    generator = load_generator(source)
    prompts = _prompts(asked, generator.tokenizer)
    answers = answer_prompts(generator, prompts, batch_size, seed)
    scores = [_score(scorer, *one, answer) for one, answer in zip(asked, answers, strict=True)]
    named = {"model": source.model, "revision": source.revision, "adapter": source.adapter and str(source.adapter)}
    evaluated = {key: value for key, value in named.items() if value is not None}
    return {**evaluated, "data": data, "scorer": scorer, "seed": seed, **summarise(scores)}


def answer_text(source: Source, prompt: str, seed: int) -> str:
    """Answer one user's message.

    Raises:
        UserError: a message that is more than text, or text without a token; nothing of the model is loaded then.
    """
    ids = _prompt_ids(source, prompt)
    return answer_prompts(load_generator(source), [ids], batch_size=1, seed=seed)[0]


def _prompt_ids(source: Source, prompt: str) -> list[int]:
    directory = local_directory(source.model, source.revision)
    spec = read_spec(str(directory))
    tokenizer = load_tokenizer(directory, text_spec(spec).vocab_size)
    for token in image_tokens(tokenizer, (spec.image_token_id, spec.boi_token_id, spec.eoi_token_id)):
        if token in prompt:
            raise UserError(f"--prompt holds {token}, which stands for an image. Only text is answered: leave it out.")
    try:
        text = prompt_text([{"role": "user", "content": prompt}], tokenizer)
    except BadRow as problem:
        raise UserError(f"--prompt: {problem}") from problem
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.unk_token_id in ids:
        raise UserError(
            f"--prompt: the tokenizer of {source.model} has no token for a part of it, which would become "
            f"{tokenizer.unk_token}. Change the text."
        )
    return ids


def _equal_length_batches(prompts: list[list[int]], batch_size: int) -> Iterator[list[int]]:
    """Yield rows of prompts, short prompts first."""
    by_length: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(row)
    for _, rows in sorted(by_length.items()):
        for start in range(0, len(rows), batch_size):
            yield rows[start : start + batch_size]


def _text_before_stop(generated: list[int], generator: Generator) -> str:
    """Decode up to the first stop id; stray special tokens stay visible, for they make an answer wrong."""
    stop = next((place for place, token in enumerate(generated) if token in generator.stop_ids), len(generated))
    text = generator.tokenizer.decode(generated[:stop])
    assert isinstance(text, str)  # one sequence
    return text


def _read_conversations(data: str, limit: int | None) -> list[tuple[str, Conversation]]:
    """The first conversations of a source, each with its place."""
    (source,) = open_sources(DataSection.model_validate({"train": data}), "train")
    found, reading = [], Reading()
    for chunk in source.chunks():
        found += [(source.where(row), read) for row, read in read_rows(chunk, source.layout, reading)]
        if limit is not None and len(found) >= limit:
            break
    settle([(source, reading)], "train")
    for where, read in found:
        if not isinstance(read, Conversation):
            raise UserError(f"{where}: a text has no answer to compare with. Give conversations.")
    return found[:limit]


def _prompts(asked: list[tuple[str, Conversation]], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """What is put before the last answers, as training has it."""
    prompts = []
    rows = [(n, read) for n, (_, read) in enumerate(asked)]
    for made in tokenize_rows(rows, Drafter(tokenizer, "last", "error", {})):
        if not isinstance(made, Document):
            row, problem = made
            raise UserError(f"{asked[row][0]}: {problem}")
        prompts.append(made.ids[: made.spans[-1].start])
    return prompts


def _score(scorer: str, where: str, conversation: Conversation, answer: str) -> Score:
    *prompt, reference = conversation.messages
    try:
        return SCORERS[scorer](prompt, reference["content"], answer)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error

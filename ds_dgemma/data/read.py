"""A split of a run's data: the conversations checked, tokenized and cut into examples."""

from typing import Literal

from transformers import DiffusionGemmaConfig, PreTrainedTokenizerFast

from ds_dgemma.config import DataSection
from ds_dgemma.data.sources import Conversations, load_conversations
from ds_dgemma.data.stream import ExampleSet, prepare_examples
from ds_dgemma.data.tokenizer import image_tokens


def read_split(
    data: DataSection,
    split: Literal["train", "validation"],
    spec: DiffusionGemmaConfig,
    tokenizer: PreTrainedTokenizerFast,
) -> tuple[Conversations, ExampleSet]:
    """The conversations of a split, and the examples made of them.

    Raises:
        UserError: all that is wrong with the data.
    """
    canvas_length, eos_id = spec.canvas_length, tokenizer.eos_token_id
    assert isinstance(canvas_length, int)
    assert isinstance(eos_id, int)
    images = image_tokens(tokenizer, (spec.image_token_id, spec.boi_token_id, spec.eoi_token_id))
    conversations = load_conversations(data, split, images)
    return conversations, prepare_examples(conversations, tokenizer, data, canvas_length, eos_id)

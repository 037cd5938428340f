"""Small tokenizers with a chat template, made on the spot: marks of turns special."""

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>", "<|channel>", "<channel|>"]
TOOLS = ["<|think|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>"]
LETTERS = "äöüßÖé你好ぎさようなら再见👩👧\u200d\u0301\u2028"
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}"
    "{{ message.content | trim + '<turn|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|turn>model\\n' }}{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A token per printable ASCII character; others have none."""
    vocabulary = [*SPECIAL, "<unk>", "\n", *(chr(code) for code in range(32, 127))]
    characters = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    characters.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        chat_template=GEMMA,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


@pytest.fixture(scope="module")
def gemma_tokenizer() -> PreTrainedTokenizerFast:
    """Pairs of characters, spaces as in Gemma's, with Gemma 4's control tokens."""
    special = [*SPECIAL, *TOOLS, '<|"|>']
    pairs = Tokenizer(models.BPE())
    pairs.normalizer = normalizers.Replace(" ", "▁")
    pairs.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    alphabet = ["\n", *(chr(code) for code in range(33, 127)), *LETTERS]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    pairs.train_from_iterator(["the tide at the pier is at three, the model and the user say so\n\n"] * 4, trainer)
    pairs.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=pairs, chat_template=GEMMA, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )

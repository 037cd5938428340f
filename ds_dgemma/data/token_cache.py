"""Conversations tokenized once and kept on disk, shared by all ranks and later runs.

Lengths must be known before training (which examples stay, in which order), so all turns are tokenized
first. The result is a folder named by a digest of the conversations, the tokenizer and the options, under
`HF_HOME`: `tokens.bin` (int32: prompt, response, EOS; turn after turn) and `turns.npy` (where each lies).
It is written beside and renamed, so it is there whole or not at all; ranks that come at once wait for the
first by a file lock, and where a file system has no locks they merely do the work twice. Shapes: N turns.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import transformers
from huggingface_hub.constants import HF_HOME
from transformers import PreTrainedTokenizerFast

from ds_dgemma.data.canvas import end_response
from ds_dgemma.data.chat import tokenize_turns
from ds_dgemma.data.sources import Conversations
from ds_dgemma.data.workers import map_in_order
from ds_dgemma.errors import UserError

FORMAT = 1  # raise it when what is stored changes
CHUNK = 500  # conversations per piece of work
PARALLEL_FROM = 20_000  # conversations; fewer are done before worker processes are up
MAX_WORKERS = 16
DEFAULT_FOLDER = Path(HF_HOME) / "ds_dgemma" / "tokens"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizedTurns:
    """Where each turn's tokens are; they are read from the file, whose page cache all ranks share."""

    folder: Path
    sample_ids_N: np.ndarray  # int64
    starts_N: np.ndarray  # int64, token offset of the prompt in tokens.bin
    prompt_lengths_N: np.ndarray  # int64
    response_lengths_N: np.ndarray  # int64, EOS counted

    def read(self, turn: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (prompt, response with EOS)."""
        start, prompt = int(self.starts_N[turn]), int(self.prompt_lengths_N[turn])
        count = prompt + int(self.response_lengths_N[turn])
        tokens = np.fromfile(self.folder / "tokens.bin", np.int32, count=count, offset=4 * start)
        return tokens[:prompt], tokens[prompt:]


def tokenized_turns(
    conversations: Conversations,
    tokenizer: PreTrainedTokenizerFast,
    assistant_turns: Literal["last", "all"],
    eos_id: int,
    cache: Path = DEFAULT_FOLDER,
) -> TokenizedTurns:
    """Tokenize every learned turn, or open what an earlier call made of the same; several ranks may call."""
    folder = cache / _digest(conversations, tokenizer, assistant_turns, eos_id)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock")):
            if not folder.exists():
                _write(folder, conversations, tokenizer, assistant_turns, eos_id)
        return TokenizedTurns(folder, *np.load(folder / "turns.npy"))
    except OSError as error:
        raise UserError(
            f"the tokenized data cannot be kept in {cache}: {error.strerror or error}. "
            "Set HF_HOME to a writable folder with room."
        ) from error


def _digest(conversations: Conversations, tokenizer: PreTrainedTokenizerFast, assistant_turns: str, eos_id: int) -> str:
    parts = [
        FORMAT,
        transformers.__version__,
        conversations.digest,
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.chat_template,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},  # templates read them
        assistant_turns,
        eos_id,
    ]
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock, which a killed process gives back."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: the rename alone keeps the result whole
            log.warning("no file locks in %s: every rank tokenizes for itself", path.parent)
        yield


def _write(
    folder: Path,
    conversations: Conversations,
    tokenizer: PreTrainedTokenizerFast,
    assistant_turns: Literal["last", "all"],
    eos_id: int,
) -> None:
    log.info("tokenizing %d conversations of %s", len(conversations), conversations.name)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        rows = range(len(conversations))
        chunks = (rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK))
        make = partial(
            _tokenize_chunk,
            conversations=conversations,
            tokenizer=tokenizer,
            assistant_turns=assistant_turns,
            eos_id=eos_id,
        )
        workers = min(len(os.sched_getaffinity(0)), MAX_WORKERS) if len(rows) >= PARALLEL_FROM else 0
        tables = []
        with (beside / "tokens.bin").open("wb") as file:
            for tokens, table in map_in_order(make, chunks, workers):
                tokens.tofile(file)
                tables.append(table)
            _sync(file)
        sample_ids, prompts, responses = np.concatenate(tables, axis=1)
        starts = np.cumsum(prompts + responses) - (prompts + responses)
        with (beside / "turns.npy").open("wb") as file:
            np.save(file, np.stack([sample_ids, starts, prompts, responses]))
            _sync(file)
        beside.rename(folder)
    except OSError:
        if not folder.exists():  # else another process was first, without a lock to wait for
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _tokenize_chunk(
    rows: range,
    conversations: Conversations,
    tokenizer: PreTrainedTokenizerFast,
    assistant_turns: Literal["last", "all"],
    eos_id: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the chunk's tokens in one row, and int64 [3, turns]: sample id, prompt and response length."""
    flat: list[int] = []
    table = []
    for turn in tokenize_turns(conversations, rows, tokenizer, assistant_turns):
        response = end_response(turn.response_ids, eos_id)
        flat += turn.prompt_ids + response
        table.append((turn.sample_id, len(turn.prompt_ids), len(response)))
    return np.array(flat, dtype=np.int32), np.array(table, dtype=np.int64).T

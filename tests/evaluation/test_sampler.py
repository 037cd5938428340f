"""Our sampler says what unmodified transformers' `generate()` says, token for token."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DiffusionGemmaForBlockDiffusion
from transformers.models.diffusion_gemma.generation_diffusion_gemma import EntropyBoundSamplerConfig

from ds_dgemma.evaluation.sampler import Answer, Group, Sampler
from ds_dgemma.evaluation.sampler_settings import read_settings
from tests import generate_parity
from tests.reference.fixtures import CASES, make_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["base", "wide_canvas"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights; a window of the second is smaller than its canvas."""
    folder = tmp_path_factory.mktemp(request.param)
    make_model(CASES[request.param]).save_pretrained(folder)
    return folder


def theirs(model: Path, prompts: list[list[int]], seed: int, **settings: Any) -> torch.Tensor:
    """What transformers adds to the prompts, which it wants padded on the left."""
    loaded: Any = DiffusionGemmaForBlockDiffusion.from_pretrained(
        model, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="eager"
    )
    for parameter in loaded.parameters():  # its file begins them anywhere, and a product's last bit may depend on that
        parameter.data = parameter.data.clone()
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    torch.manual_seed(seed)
    said = loaded.eval().generate(input_ids=ids, attention_mask=mask, disable_compile=True, **settings).sequences
    return said[:, longest:]


def ours(model: Path, groups: list[Group], **settings: Any) -> list[list[Answer]]:
    stack = generate_parity.open_plain(model)
    eos, pad = settings.pop("eos_token_id", None), settings.pop("pad_token_id", None)
    overrides = {**settings, "eos_token_id": eos, "pad_token_id": pad}
    return Sampler(stack, read_settings(model, overrides), CPU).answer(groups)


def prompts_of(lengths: tuple[int, ...], vocabulary: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(3, vocabulary - 3, (length,), generator=draw).tolist() for length in lengths]


@pytest.mark.parametrize(
    ("lengths", "canvases", "settings"),
    [
        ((7,), 1, {}),
        ((21,), 3, {"max_denoising_steps": 4}),
        ((5, 18), 2, {"max_denoising_steps": 5}),
        ((16, 3, 40), 1, {"entropy_bound": 2.0, "max_denoising_steps": 6}),
        ((9, 9), 3, {"eos_token_id": [5, 6, 7, 8, 9, 10, 11, 12], "pad_token_id": 0, "max_denoising_steps": 3}),
        ((12, 4), 3, {"confidence_threshold": 4.0, "stability_threshold": 0, "eos_token_id": 7, "pad_token_id": 0}),
        ((12, 4), 2, {"confidence_threshold": 9.0, "t_min": 0.05, "t_max": 0.1, "max_denoising_steps": 8}),
    ],
    ids=["one", "canvases", "unequal", "bound", "stops", "done at once", "stable"],
)
def test_answers_are_transformers_token_for_token(model, lengths, canvases, settings):
    case = CASES["wide_canvas" if "wide" in str(model) else "base"]
    prompts = prompts_of(lengths, case.vocabulary)
    settings = {"max_new_tokens": canvases * case.canvas, **settings}
    given = dict(settings)
    if (bound := given.pop("entropy_bound", None)) is not None:
        given["sampler_config"] = EntropyBoundSamplerConfig(entropy_bound=bound)
    expected = theirs(model, prompts, seed=3, **given)
    (answers,) = ours(model, [Group(prompts, 3)], **settings)
    for answer, row in zip(answers, expected.tolist(), strict=True):
        assert answer.tokens == row[: len(answer.tokens)]
        assert all(token == 0 for token in row[len(answer.tokens) :])
        if answer.stopped:
            assert len(answer.before_stop(frozenset({5, 6, 7, 8, 9, 10, 11, 12}))) < len(answer.tokens)
        else:
            assert len(answer.tokens) == len(row)

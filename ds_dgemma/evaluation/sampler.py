"""DiffusionGemma's sampler over our stack: what transformers' `generate()` does, prompts read once, rows that are done
left out.

A *group* is what one call of `generate()` would have as its batch: its rows share a stream of random numbers and stop
together, and every answer equals transformers', token for token in fp32. Groups share the decoder's calls and nothing
else, so with groups of one prompt an answer depends on its prompt and its seed, whatever it is batched with.

The loop, for each canvas: start from uniform random ids; in each step the decoder's logits, divided by a temperature
that falls, condition the next step, and a token of each place is drawn from them; the places with the least entropy
are accepted as long as the others' summed entropy stays below a bound (arXiv 2505.24857), the rest gets new random
ids. A row is done early when its likeliest tokens stayed the same and its mean entropy is low. The likeliest tokens
of the last step are what is said; a stop id among them ends the row.

Shapes: R rows, L canvas tokens, V vocabulary. Source: transformers
`models/diffusion_gemma/generation_diffusion_gemma.py`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ds_dgemma.data.batch import Image
from ds_dgemma.data.image_files import ImageFiles
from ds_dgemma.evaluation.sampler_settings import SamplerSettings
from ds_dgemma.model.attention import MASK
from ds_dgemma.model.prefix import Prefix
from ds_dgemma.model.spec import text_spec
from ds_dgemma.model.stack import DiffusionGemmaStack
from ds_dgemma.objective.collate import patches_of

LOGITS = 2**28  # bytes of them that are made at once


class Prompt(list[int]):
    """Token ids, with the images among them."""

    def __init__(self, ids: Sequence[int], images: tuple[Image, ...] = ()) -> None:
        super().__init__(ids)
        self.images = images


class Group(NamedTuple):
    """Prompts that are answered as one batch of `generate()` would be, token ids; and its seed."""

    prompts: Sequence[Sequence[int]]
    seed: int


@dataclass
class Answer:
    """What was said to a prompt."""

    tokens: list[int] = field(default_factory=list)  # whole canvases
    stopped: bool = False  # a stop id is among them
    steps: int = 0  # decoder passes that it needed
    canvases: int = 0
    is_finite: bool = True  # else the model's scores are no numbers

    def before_stop(self, stop_ids: frozenset[int]) -> list[int]:
        """The tokens before the first stop id."""
        end = next((place for place, token in enumerate(self.tokens) if token in stop_ids), len(self.tokens))
        return self.tokens[:end]


class Draft(NamedTuple):
    """A canvas while it is denoised, for who watches."""

    row: int
    step: int  # from 1
    tokens: Tensor  # [L], the likeliest
    entropy_L: Tensor
    is_accepted_L: Tensor


@dataclass
class _Row:
    """An answer, and the canvas of it that is denoised."""

    number: int  # of its document
    read_next: list[int]  # tokens
    images: tuple[Image, ...] = ()  # among them
    answer: Answer = field(default_factory=Answer)
    canvas_L: Tensor = field(default_factory=lambda: torch.empty(0))
    soft_LH: Tensor | None = None
    likeliest: list[Tensor] = field(default_factory=list)  # of the last steps, [L]
    entropy_L: Tensor = field(default_factory=lambda: torch.empty(0))
    is_done: bool = False  # with this canvas


class _Group:
    """Rows, and their random numbers in the order in which `generate()` draws them."""

    def __init__(self, rows: list[_Row], seed: int, device: torch.device, length: int, vocabulary: int) -> None:
        self.rows = rows
        self._generator = torch.Generator(device).manual_seed(seed)
        self._shape, self._vocabulary, self._device = (len(rows), length), vocabulary, device

    @property
    def goes_on(self) -> bool:
        """Whether an answer is not stopped: `generate()` goes on with all of them."""
        return not all(row.answer.stopped for row in self.rows)

    def ids(self) -> Tensor:
        """Uniform random ids, [rows, L]."""
        return torch.randint(0, self._vocabulary, self._shape, generator=self._generator, device=self._device)

    def exponentials(self) -> Tensor:
        """For each token that may be drawn one, [rows, L, V]: `torch.multinomial` takes the token with the largest
        probability over an exponential.
        """
        rows, length = self._shape
        flat = torch.empty(rows * length, self._vocabulary, device=self._device)
        return flat.exponential_(generator=self._generator).view(rows, length, -1)


class _Step(NamedTuple):
    """What a step makes of a row's canvas."""

    likeliest_L: Tensor
    drawn_L: Tensor
    is_accepted_L: Tensor
    entropy_L: Tensor


class Sampler:
    """Answers prompts."""

    def __init__(
        self,
        stack: DiffusionGemmaStack,
        settings: SamplerSettings,
        device: torch.device,
        any_rank: Callable[[bool], bool] = bool,
        images: ImageFiles | None = None,
    ) -> None:
        """`any_rank`: whether it holds on any of the ranks that share the model, which must make the same calls;
        `images`: what reads those of prompts.
        """
        self._stack, self._settings, self._device, self._any_rank = stack, settings, device, any_rank
        self._images = images
        self._vocabulary = text_spec(stack.config).vocab_size
        length = stack.config.canvas_length
        assert isinstance(length, int)
        self._length = length

    def answer(self, groups: Sequence[Group], watch: Callable[[Draft], None] | None = None) -> list[list[Answer]]:
        """The answers of each group's prompts. All groups are in memory at once; ranks may bring none."""
        canvases = math.ceil(self._settings.max_new_tokens / self._length)
        made, rooms, padding = [], [], []
        for group in groups:
            longest = max(map(len, group.prompts))
            padded = self._device.type == "cpu" and longest**2 <= MASK
            rows = []
            for prompt in group.prompts:
                before = longest - len(prompt) if padded else 0  # as `generate()` has it, positions and all
                images = tuple(i._replace(start=i.start + before) for i in getattr(prompt, "images", ()))
                rows.append(_Row(len(rooms), [0] * before + list(prompt), images))
                rooms.append(before + len(prompt) + canvases * self._length)
                padding.append(before)
            made.append(_Group(rows, group.seed, self._device, self._length, self._vocabulary))
        # The last document is for a rank that has nothing left to do while others have.
        prefix = Prefix(
            self._stack, [*rooms, canvases + self._length], self._device, [*padding, 0] if any(padding) else ()
        )
        for _ in range(canvases):
            open_groups = [group for group in made if group.goes_on]
            if not self._any_rank(bool(open_groups)):
                break
            self._read(prefix, [row for group in open_groups for row in group.rows])
            self._denoise(prefix, open_groups, watch)
            for group in open_groups:
                for row in group.rows:
                    self._end_canvas(row)
        return [[row.answer for row in group.rows] for group in made]

    def _read(self, prefix: Prefix, rows: list[_Row]) -> None:
        if rows:
            seen = [(row.number, image) for row in rows for image in row.images]
            places = [(number, image.start, image.start + image.tokens) for number, image in seen]
            pixels = None
            if seen:
                assert self._images, "prompts have images, and nothing reads them"
                pixels = patches_of(self._images, [image for _, image in seen])
            prefix.read([row.number for row in rows], [row.read_next for row in rows], places, pixels)
            for row in rows:
                row.images = ()
        else:
            prefix.read([len(prefix.lengths) - 1], [[0]])

    def _denoise(self, prefix: Prefix, groups: list[_Group], watch: Callable[[Draft], None] | None) -> None:
        """A canvas of every row, to its end."""
        settings = self._settings
        for group in groups:
            for row, canvas in zip(group.rows, group.ids(), strict=True):
                row.canvas_L, row.soft_LH, row.likeliest, row.is_done = canvas, None, [], False
        for left in range(settings.max_denoising_steps, 0, -1):
            groups = [group for group in groups if not all(row.is_done for row in group.rows)]
            if not self._any_rank(bool(groups)):
                break
            # in fp32, as `generate()` has it
            share = torch.tensor(left, device=self._device) / settings.max_denoising_steps
            temperature = settings.t_min + (settings.t_max - settings.t_min) * share
            rows = [row for group in groups for row in group.rows if not row.is_done]
            steps = self._step(prefix, groups, rows, temperature)
            self._finish(rows, steps)
            for row, step in zip(rows, steps, strict=True):
                row.answer.steps += not row.answer.stopped
                if watch is not None:
                    done = settings.max_denoising_steps - left + 1
                    watch(Draft(row.number, done, step.likeliest_L, step.entropy_L, step.is_accepted_L))

    def _step(self, prefix: Prefix, groups: list[_Group], rows: list[_Row], temperature: Tensor) -> list[_Step]:
        """One decoder pass over the canvases of `rows`, and new canvases for them."""
        if not rows:  # a rank without work, in others' calls
            ids = torch.zeros(1, self._length, dtype=torch.int64, device=self._device)
            hidden = prefix.denoise([len(prefix.lengths) - 1], ids, None)
            self._stack.embed_tokens.sample(hidden, temperature, lambda logits, share: None, self._length)
            return []
        soft = [row.soft_LH for row in rows if row.soft_LH is not None]  # of all, but for the first step of a canvas
        canvases = torch.stack([row.canvas_L for row in rows])
        hidden = prefix.denoise([row.number for row in rows], canvases, torch.stack(soft) if soft else None)
        numbered = [(group, place) for group in groups for place, row in enumerate(group.rows) if not row.is_done]
        steps: list[_Step] = []
        drawing: dict[int, Tensor] = {}

        def take(logits_NV: Tensor, share_NV: Tensor) -> None:
            for logits_LV, share_LV in zip(*(each.split(self._length) for each in (logits_NV, share_NV)), strict=True):
                group, place = numbered[len(steps)]
                if id(group) not in drawing:
                    drawing.clear()
                    drawing[id(group)] = group.exponentials()
                steps.append(self._choose(logits_LV, share_LV, drawing[id(group)][place]))

        at_once = max(1, LOGITS // (4 * self._vocabulary * self._length)) * self._length
        soft_NH = self._stack.embed_tokens.sample(hidden, temperature, take, at_once)
        fresh = {id(group): group.ids() for group in groups}
        for row, step, soft_LH, (group, place) in zip(rows, steps, soft_NH.split(self._length), numbered, strict=True):
            row.canvas_L = torch.where(step.is_accepted_L, step.drawn_L, fresh[id(group)][place])
            row.soft_LH = soft_LH
        return steps

    def _choose(self, logits_LV: Tensor, probability_LV: Tensor, exponential_LV: Tensor) -> _Step:
        entropy = -(logits_LV.log_softmax(-1) * probability_LV).sum(-1)
        by_entropy, order = entropy.sort()
        is_accepted = torch.empty_like(order, dtype=torch.bool)
        is_accepted[order] = by_entropy.cumsum(0) - by_entropy <= self._settings.entropy_bound
        drawn = (probability_LV / exponential_LV).argmax(-1)
        return _Step(logits_LV.argmax(-1), drawn, is_accepted, entropy)

    def _finish(self, rows: list[_Row], steps: list[_Step]) -> None:
        """Note the likeliest tokens, and which rows are done with their canvas."""
        stable, sure = self._settings.stability_threshold, self._settings.confidence_threshold
        done: list[Tensor] = []
        for row, step in zip(rows, steps, strict=True):
            if stable is not None and sure is not None:
                same = [(earlier == step.likeliest_L).all() for earlier in row.likeliest[-stable:]] if stable else []
                is_done = step.entropy_L.mean() < sure
                if len(same) < stable:
                    is_done = torch.zeros_like(is_done)
                done.append(torch.stack([is_done, *same]).all())
            row.likeliest, row.entropy_L = [*row.likeliest[-(stable or 1) :], step.likeliest_L], step.entropy_L
        if done:
            for row, is_done in zip(rows, torch.stack(done).tolist(), strict=True):
                row.is_done = is_done

    def _end_canvas(self, row: _Row) -> None:
        """Say what a canvas came to; what stands behind a stop becomes padding, as in `generate()`."""
        said, pad, stops = row.likeliest[-1].tolist(), self._settings.pad_id, self._settings.stop_ids
        if row.answer.stopped:
            row.read_next = said if pad is None else [pad] * len(said)
            return
        end = next((place + 1 for place, token in enumerate(said) if token in stops), None)
        if end is not None and pad is not None:
            said = said[:end] + [pad] * (len(said) - end)
        row.answer.tokens += said
        row.answer.canvases += 1
        row.answer.is_finite &= bool(row.entropy_L.isfinite().all())
        row.answer.stopped = end is not None
        row.read_next = said

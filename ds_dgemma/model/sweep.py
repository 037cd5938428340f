"""Encode once: two visits of every layer make both decoder passes and the encoder's, a third all gradients.

- `read`, without gradient: clean tokens of all rows, and beside them the canvases that get a first guess. It leaves
  each layer's clean output and the clean keys and values that canvases see. It is pass 1 of self-conditioning and the
  forward of activation checkpointing at once.
- `denoise`: canvases alone, against those keys and values.
- The backward pass takes a layer once, over `[clean | canvases]`, so under ZeRO-3 a layer is gathered three times, and
  its gradients are final when it is left. What it needs is computed again, once, from the two saved inputs; or it was
  kept, for clean tokens and canvases each, when nothing is to be recomputed.

A recomputation runs other shapes than the forward did. So it takes the routers' choice from there (near ties would
change sides in bf16), and LoRA's dropout is drawn by the token's part, not by the call: see `dropout.py`. Parameters
are no inputs of the autograd function here: while they are partitioned, autograd would want their gradients empty.

    activation_checkpointing   kept of a layer, beside K and V for the moment between the visits
    full                       its input; of the last layer everything, for the backward pass begins with it
    selective                  the same, and the attention's output and normaliser: heads * head size + heads numbers a
                               token, for a forward product of queries and keys that grows with the length
    none                       everything that autograd keeps

Shapes: N tokens of a call, S clean ones of all documents, C canvases, L canvas tokens, M canvases that get a first
guess, H hidden, E experts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ds_dgemma.model.attention import Attended, keep, keep_all
from ds_dgemma.model.dropout import Sections
from ds_dgemma.model.parts import Canvas, Image, Tokens
from ds_dgemma.model.routing import ExpertLoads

Checkpointing = Literal["full", "selective", "none"]


@dataclass(frozen=True)
class Call:
    """One call of every layer: its tokens, and what a layer must be told of them."""

    tokens: Tokens
    rotary: dict[str, tuple[Tensor, Tensor]]  # cos and sin by layer type, [1, N, head size]
    is_canvas_N1: Tensor  # bool
    counted: int  # the first tokens, so many, of which routers' loads count; 0: routers are not balanced
    dropout: Sections | None  # None: no adapter has dropout


class LayerOutput(NamedTuple):
    """What a layer computes."""

    hidden_1NH: Tensor
    load: Tensor  # `routing.expert_load` of the counted tokens, [2, E]; empty when routers are not balanced
    chosen_Nk: Tensor  # the experts of every token
    attended: Attended


@dataclass(frozen=True)
class Places:
    """Where the clean tokens and canvases of a micro-batch are, on the host, and what of it the device needs too."""

    documents: tuple[int, ...]  # clean tokens of each
    canvases: tuple[Canvas, ...]
    length: int  # L
    position_S: Tensor  # int64, in its document
    start_C: Tensor  # int64
    guessed: tuple[int, ...]  # canvases that get a first guess
    guessed_M: Tensor
    images: tuple[Image, ...] = ()

    @classmethod
    def on(
        cls,
        device: torch.device | str,
        documents: Sequence[int],
        canvases: Sequence[Canvas],
        length: int,
        guessed: tuple[int, ...],
    ) -> "Places":
        """Places whose tensors are made of what the host knows."""

        def tensor(values: Iterable[int]) -> Tensor:
            return torch.tensor(list(values), dtype=torch.int64, device=device)

        return cls(
            documents=tuple(documents),
            canvases=tuple(canvases),
            length=length,
            position_S=tensor(chain.from_iterable(map(range, documents))),
            start_C=tensor(canvas.start for canvas in canvases),
            guessed=guessed,
            guessed_M=tensor(guessed),
        )


@dataclass(frozen=True)
class Calls:
    """The calls of a micro-batch."""

    clean: Call
    guesses: Call
    clean_and_guesses: Call
    canvases: Call
    all: Call
    checkpointing: Checkpointing


def make_calls(stack: Any, places: Places, balances: bool, like: Tensor) -> Calls:
    """All calls of a micro-batch; `like` has the type and device of the hidden states; `balances`: routers are."""
    documents, canvases, L = places.documents, places.canvases, places.length
    seen = {"images": places.images, "image_rule": stack.image_rule}
    guesses = tuple(canvases[number] for number in places.guessed)
    n, c, device = sum(documents), len(canvases) * L, like.device
    # Clean tokens, canvases, and once more the canvases that are guessed: a call takes some of these.
    canvas_position = places.start_C[:, None] + torch.arange(L, device=device)
    guess_position = canvas_position[places.guessed_M].flatten()
    position_1N = torch.cat([places.position_S, canvas_position.flatten(), guess_position])[None]
    rotary = {kind: stack.rotary_emb(like, position_1N, kind) for kind in set(stack.layer_types)}
    at_clean, at_canvases, at_guesses, at_all = slice(0, n), slice(n, n + c), slice(n + c, None), slice(0, n + c)
    number_N = torch.arange(position_1N.shape[1], device=device)
    seed = int(torch.randint(2**62, ())) if stack.has_dropout and stack.training else None
    of_clean, of_guess, of_canvas = (n, seed), (len(guesses) * L, None), (c, seed and seed + 1)

    def call(tokens: Tokens, at: slice | Tensor, counted: int, draws: Sections) -> Call:
        return Call(
            tokens=tokens,
            rotary={kind: (cos[:, at], sin[:, at]) for kind, (cos, sin) in rotary.items()},
            is_canvas_N1=(number_N[at] >= n).unsqueeze(-1),
            counted=counted if balances else 0,
            dropout=None if seed is None else draws,
        )

    guesses_behind = torch.cat([number_N[at_clean], number_N[at_guesses]])
    return Calls(
        clean=call(Tokens(documents, (), L, **seen), at_clean, n, (of_clean,)),
        guesses=call(Tokens(documents, guesses, L, reads_clean=False), at_guesses, 0, (of_guess,)),
        clean_and_guesses=call(Tokens(documents, guesses, L, **seen), guesses_behind, n, (of_clean, of_guess)),
        canvases=call(Tokens(documents, canvases, L, reads_clean=False), at_canvases, c, (of_canvas,)),
        all=call(Tokens(documents, canvases, L, **seen), at_all, n + c, (of_clean, of_canvas)),
        checkpointing=stack.activation_checkpointing,
    )


class Sweep:
    """The layers over one micro-batch; `read`, then `denoise`."""

    def __init__(self, stack: Any, places: Places, like: Tensor, loads: ExpertLoads | None = None) -> None:
        self._loads = loads
        self._calls = make_calls(stack, places, loads is not None, like)
        self._norm = stack.norm
        before = (stack.embed_tokens, stack.self_conditioning, stack.embed_vision)
        self._trains_before = any(_trains(module) for module in before if module is not None)
        self._passes = [
            LayerPass(
                layer=layer,
                calls=self._calls,
                window=stack.window if layer.kind == "sliding_attention" else None,
                is_last=number == len(stack.layer_types) - 1,
            )
            for number, layer in enumerate(stack.sweep_layers())
        ]

    @torch.no_grad()
    def read(self, clean_NH: Tensor, guess_NH: Tensor, differentiates: bool) -> Tensor:
        """Read the clean tokens [S, H], and with them make the first guesses, [M * L, H]: normed hidden states."""
        clean, guess = clean_NH[None], guess_NH[None]
        trains = self._trains_before
        for layer_pass in self._passes:
            trains = trains or _trains(layer_pass.layer)
            layer_pass.differentiates = differentiates and trains  # or the backward pass never comes here
            clean, guess = layer_pass.layer(clean, guess, job=layer_pass.read)
            layer_pass.clean_out = clean
        return self._norm(guess[0])

    def denoise(self, clean_NH: Tensor, canvas_NH: Tensor) -> tuple[Tensor, Tensor]:
        """Denoise the canvases [C * L, H]: normed hidden states of the clean tokens, which were read before, and of
        the canvases. Fills `loads`.
        """
        clean, canvas = clean_NH[None], canvas_NH[None]
        for layer_pass in self._passes:
            layer = layer_pass.layer
            inputs = with_gradient(clean, layer), with_gradient(canvas, layer)
            clean, canvas, load = layer(*inputs, job=layer_pass.denoise)
            if self._loads is not None:
                self._loads.layers.append(load)
        return self._norm(clean[0]), self._norm(canvas[0])


@dataclass
class LayerPass:
    """A layer's way through a micro-batch: what its visits leave for each other. All of it happens inside the layer's
    forward, where ZeRO-3 has its weights whole.
    """

    layer: Any  # SweepLayer
    calls: Calls
    window: int | None
    is_last: bool
    differentiates: bool = False
    seen: list[Tensor] = field(default_factory=list)  # kept keys and values, by run of canvases
    clean_out: Tensor | None = None
    load: Tensor | None = None  # of clean tokens
    chosen: list[Tensor] = field(default_factory=list)  # experts of clean tokens, of canvas tokens
    known: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # attention's output and normaliser, of both
    graph: list[tuple[Tensor, LayerOutput]] = field(default_factory=list)  # input and outputs, of both

    @property
    def keeps_graph(self) -> bool:
        """Whether the layer keeps its graph for the backward pass; the last one may, for that begins with it."""
        return self.differentiates and (self.is_last or self.calls.checkpointing == "none")

    def read(self, clean_1NH: Tensor, guess_1NH: Tensor) -> tuple[Tensor, Tensor]:
        """Visit clean tokens and first guesses; returns the outputs of both, without a graph."""
        if self.keeps_graph:
            return self._read_with_graph(clean_1NH, guess_1NH)
        calls, n = self.calls, clean_1NH.shape[1]
        done = self.layer.block(torch.cat([clean_1NH, guess_1NH], dim=1), calls.clean_and_guesses)
        canvases = calls.canvases.tokens.canvases
        self.seen = keep(done.attended, calls.clean_and_guesses.tokens, canvases, self.window)
        self.load = done.load
        if self.differentiates:
            self._note(done, n)
        return done.hidden_1NH[:, :n], done.hidden_1NH[:, n:]

    def _read_with_graph(self, clean_1NH: Tensor, guess_1NH: Tensor) -> tuple[Tensor, Tensor]:
        calls = self.calls
        done = self._recorded(clean_1NH, calls.clean)
        with torch.enable_grad():  # all keys and values stay in the graph anyway
            self.seen = keep_all(done.attended, calls.clean.tokens)
        self.load = done.load.detach()
        guess = self.layer.block(guess_1NH, calls.guesses, kept=self.seen)
        return done.hidden_1NH.detach(), guess.hidden_1NH

    def denoise(self, clean_1NH: Tensor, canvas_1NH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Visit the canvases; returns the outputs of clean tokens, which `read` left, and of canvases, and the load of
        all.
        """
        return _Both.apply(clean_1NH, canvas_1NH, self)  # type: ignore[no-any-return]

    def denoise_canvases(self, canvas_1NH: Tensor) -> tuple[Tensor, Tensor]:
        """The canvases' output and the load of all tokens, without a graph."""
        if self.keeps_graph:
            done = self._recorded(canvas_1NH, self.calls.canvases, self.seen)
        else:
            done = self.layer.block(canvas_1NH, self.calls.canvases, kept=self.seen)
            if self.differentiates:
                self._note(done, canvas_1NH.shape[1])
        self.seen = []
        assert self.load is not None
        return done.hidden_1NH.detach(), self.load + done.load.detach()

    def differentiate(self, inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Gradients of the clean and the canvas input from those of what `denoise` returned; parameters get theirs."""
        if self.keeps_graph:
            parts, self.graph = self.graph, []  # or what it holds would outlive the other layers' backward passes
            outputs, loads = [done.hidden_1NH for _, done in parts], [done.load for _, done in parts]
            _backward([*outputs, *loads], [*gradients[:2], gradients[2], gradients[2]])
            (clean, _), (canvas, _) = parts
            return _gradient(clean), _gradient(canvas)
        n, both = inputs[0].shape[1], torch.cat(tuple(inputs), dim=1).requires_grad_(True)
        done = self.again(both)
        _backward([done.hidden_1NH, done.load], [torch.cat(tuple(gradients[:2]), dim=1), gradients[2]])
        return _gradient(both)[:, :n], _gradient(both)[:, n:]

    def again(self, both_1NH: Tensor) -> LayerOutput:
        """Clean tokens and canvases computed once more, with a graph."""
        known = tuple(torch.cat(pair) for pair in zip(*self.known, strict=True)) if self.known else None
        with torch.enable_grad():
            return self.layer.block(both_1NH, self.calls.all, chosen_Nk=torch.cat(self.chosen), known=known)

    def _note(self, done: LayerOutput, n: int) -> None:
        self.chosen.append(done.chosen_Nk[:n].clone())
        if self.calls.checkpointing == "selective":
            self.known.append((done.attended.output[:n].clone(), done.attended.normaliser[:n].clone()))

    def _recorded(self, hidden_1NH: Tensor, call: Call, kept: Sequence[Tensor] = ()) -> LayerOutput:
        leaf = hidden_1NH.detach().requires_grad_(True)
        with torch.enable_grad():
            done = self.layer.block(leaf, call, kept=kept)
        self.graph.append((leaf, done))
        return done


class _Both(torch.autograd.Function):
    """A layer over clean tokens, which were read, and canvases, which are denoised here: both ways inside the layer's
    forward and backward pass, as DeepSpeed sees them. A layer that was called again to compute it again would keep its
    frozen weights gathered to the end of the backward pass (`partitioned_param_coordinator.py`,
    `update_recompute_parameters`).
    """

    @staticmethod
    def forward(ctx: Any, clean_1NH: Tensor, canvas_1NH: Tensor, layer_pass: LayerPass) -> tuple[Tensor, ...]:
        ctx.layer_pass = layer_pass
        ctx.save_for_backward(clean_1NH, canvas_1NH)
        canvas_out, load = layer_pass.denoise_canvases(canvas_1NH)
        assert layer_pass.clean_out is not None
        clean_out, layer_pass.clean_out = layer_pass.clean_out, None
        return clean_out, canvas_out, load

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return *ctx.layer_pass.differentiate(ctx.saved_tensors, grads), None


def _backward(outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Differentiate those of the outputs that have a graph."""
    pairs = [pair for pair in zip(outputs, gradients, strict=True) if pair[0].requires_grad]
    torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def with_gradient(inputs: Tensor, module: nn.Module) -> Tensor:
    """The inputs of a module that trains, asked for a gradient where nothing before them trains.

    The layers' parameters are no inputs of the function that differentiates them; and DeepSpeed finishes a leaf
    module's backward pass at the gradient of its inputs, without one it reduces the leaf's gradients before they are
    there: "0 != 256 Cannot reduce scatter".
    """
    if not torch.is_grad_enabled() or inputs.requires_grad:
        return inputs
    return inputs.detach().requires_grad_(True) if _trains(module) else inputs


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())

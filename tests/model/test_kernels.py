"""Attention kernels without a GPU: what is passed to them, and which one is taken."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from ds_dgemma.config.run import ModelSection
from ds_dgemma.engine.experts import grouped
from ds_dgemma.errors import UserError
from ds_dgemma.model import kernel_choice, kernels
from ds_dgemma.model.kernel_choice import Wanted, choose, choose_all, disagreement, torchs_own
from ds_dgemma.model.kernels import CPU, EFFICIENT, FLASH, PACKAGES, Kernel, Package, Problem
from tests.gpu import fake
from tests.reference import kernel as reference

HERE = torch.device("cpu")
EXACT = 1e-5  # relative, of fp32


def problem(head_size: int = 16, heads: int = 4, kv_heads: int = 2) -> Problem:
    return Problem(HERE, None, torch.float32, heads, kv_heads, head_size)


def on(capability: tuple[int, int], dtype: torch.dtype, head_size: int) -> Problem:
    return Problem(torch.device("cuda", 0), capability, dtype, 16, 2, head_size)


class Operators:
    """Torch's operators for CUDA, under their schemas, by the formulas; they read memory as the kernels do."""

    def _scaled_dot_product_flash_attention(self, *args: Any, **kwargs: Any) -> Any:
        query, key, value, dropout, causal, debug, scale = bound("flash_attention", args, kwargs)
        assert (dropout, debug) == (0.0, False)
        assert query.shape[-1] % 8 == 0
        return *reference.forward(query, key, value, causal, scale), None, None, 0, 0, None, None, None

    def _scaled_dot_product_flash_attention_backward(self, *args: Any, **kwargs: Any) -> Any:
        given = bound("flash_attention_backward", args, kwargs)
        grad, query, key, value, out, log, packed_q, packed_k, most_q, most_k, dropout, causal, _, _, scale = given
        assert (packed_q, packed_k, dropout) == (None, None, 0.0)
        assert (most_q, most_k) == (query.shape[2], key.shape[2])
        log = log.as_strided(query.shape[:3], (query.shape[1] * query.shape[2], query.shape[2], 1))
        return reference.backward(grad, query, key, value, out, log, causal, scale)

    def _scaled_dot_product_efficient_attention(self, *args: Any, **kwargs: Any) -> Any:
        query, key, value, bias, with_log, dropout, causal, scale = bound("efficient_attention", args, kwargs)
        assert (bias, with_log, dropout) == (None, True, 0.0)
        assert query.shape[1] == key.shape[1]
        out, log = reference.forward(query, key, value, causal, scale)
        whole = log.new_full((*log.shape[:2], -(-log.shape[2] // 32) * 32), torch.inf)
        whole[..., : log.shape[2]] = log
        return out, whole, None, None

    def _scaled_dot_product_efficient_attention_backward(self, *args: Any, **kwargs: Any) -> Any:
        given = bound("efficient_attention_backward", args, kwargs)
        grad, query, key, value, bias, out, log, _, _, dropout, wanted, causal, scale = given
        assert (bias, dropout, wanted) == (None, 0.0, [True, True, True, False])
        heads, tokens, size = out.shape[1:]
        out = out.as_strided(out.shape, (out.stride(0), out.stride(1), heads * size, 1), out.storage_offset())
        assert log.shape[2] % 32 == 0
        assert bool((log[..., tokens:] == torch.inf).all())
        found = reference.backward(grad, query, key, value, out, log[..., :tokens], causal, scale)
        return *found, None


def bound(name: str, args: tuple, kwargs: dict[str, Any]) -> list:
    """A call's arguments in the order of the operator's schema."""
    schema = getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default._schema
    names = [argument.name for argument in schema.arguments]
    assert len(args) + len(kwargs) == len(names)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return [given[name] for name in names]


@pytest.mark.parametrize("kernel", [CPU, FLASH, EFFICIENT], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("head_size", [16, 20])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_torchs_kernels_are_called_so_that_they_compute_attention_and_its_gradients(
    monkeypatch: pytest.MonkeyPatch, kernel: Kernel, head_size: int, kv_heads: int
):
    if kernel is not CPU:
        monkeypatch.setattr(kernels, "_ATEN", Operators())
    monkeypatch.setattr(kernel_choice, "LARGEST", EXACT)
    assert disagreement(kernel, reference.EXACT, problem(head_size, 4, kv_heads)) is None


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages with the inner functions that are called, tokens first as theirs are."""

    def turned(*tensors: Tensor) -> list[Tensor]:
        assert all(tensor.is_contiguous() for tensor in tensors)
        return [tensor.transpose(1, 2) for tensor in tensors]

    # The first arguments of flash-attn-4 4.0.0b36's functions, by name
    def _flash_attn_fwd(q: Any, k: Any, v: Any, *, softmax_scale: float, causal: bool, return_lse: bool) -> Any:
        assert return_lse
        out, log = reference.forward(*turned(q, k, v), causal, softmax_scale)
        return out.transpose(1, 2), log, None, None, None

    def _flash_attn_bwd(q: Any, k: Any, v: Any, out: Any, dout: Any, lse: Any, *, softmax_scale: float, causal: bool):
        grad, *others = turned(dout, q, k, v, out)
        found = reference.backward(grad, *others, lse, causal, softmax_scale)
        return tuple(tensor.transpose(1, 2) for tensor in found)

    # ffpa-attn 0.2.4's, heads first
    def _ffpa_attn_forward_cute(q: Any, k: Any, v: Any, softmax_scale: float, causal: bool) -> Any:
        return reference.forward(q, k, v, causal, softmax_scale)

    def _ffpa_attn_backward_cute(
        grad_out: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, softmax_scale: float, causal: bool
    ) -> Any:
        return reference.backward(grad_out, q, k, v, out, lse, causal, softmax_scale)

    for name, functions in {
        "flash_attn": (),
        "flash_attn.cute": (),
        "flash_attn.cute.interface": (_flash_attn_fwd, _flash_attn_bwd),
        "ffpa_attn": (),
        "ffpa_attn.cute": (_ffpa_attn_forward_cute, _ffpa_attn_backward_cute),
    }.items():
        module = ModuleType(name)
        for function in functions:
            setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_a_packages_kernels_are_called_so_that_they_compute_attention_and_its_gradients(
    monkeypatch: pytest.MonkeyPatch, package: Package
):
    install(monkeypatch)
    monkeypatch.setattr(kernel_choice, "LARGEST", EXACT)
    assert disagreement(package.load(), reference.EXACT, problem()) is None


@pytest.mark.parametrize(
    ("capability", "dtype", "head_size", "taken"),
    [
        ((9, 0), torch.bfloat16, 256, FLASH),
        ((9, 0), torch.bfloat16, 512, EFFICIENT),
        ((9, 0), torch.float32, 256, EFFICIENT),
        ((8, 9), torch.bfloat16, 256, FLASH),
        ((8, 9), torch.bfloat16, 224, EFFICIENT),
        ((12, 0), torch.bfloat16, 200, EFFICIENT),
        ((7, 5), torch.float16, 64, EFFICIENT),
    ],
)
def test_torchs_kernel_follows_device_type_and_head_size(capability, dtype, head_size, taken):
    assert torchs_own(on(capability, dtype, head_size)) is taken


def test_what_no_kernel_takes_is_an_error_and_not_a_wrong_one():
    for capability, dtype in (((7, 5), torch.bfloat16), ((9, 0), torch.float64)):
        with pytest.raises(NotImplementedError):
            torchs_own(on(capability, dtype, 64))


@pytest.mark.parametrize(
    ("capability", "dtype", "head_size", "packages"),
    [
        ((9, 0), torch.bfloat16, 256, ["flash_attn_4"]),
        ((9, 0), torch.bfloat16, 192, ["flash_attn_4"]),
        ((9, 0), torch.bfloat16, 512, ["ffpa"]),
        ((10, 0), torch.bfloat16, 256, ["flash_attn_4"]),
        ((10, 0), torch.bfloat16, 192, []),
        ((10, 0), torch.bfloat16, 512, ["ffpa"]),
        ((9, 0), torch.float32, 256, []),
        ((9, 0), torch.float32, 512, []),
        ((8, 0), torch.bfloat16, 256, []),
        ((8, 0), torch.bfloat16, 512, []),
    ],
)
def test_packages_fit_what_their_kernels_are_made_for(capability, dtype, head_size, packages):
    fitting = [package.name for package in PACKAGES if package.fits(on(capability, dtype, head_size))]
    assert fitting == packages


def candidate(**changes: Any) -> Package:
    """A package that is there, and computes what `changes` leave right."""
    kernel = Kernel("flash_attn_4", changes.get("forward", CPU.forward), changes.get("backward", CPU.backward))
    load = changes.get("load", lambda: kernel)
    return Package("flash_attn_4", "flash-attn-4", "flash-attn-4", "a GPU", lambda problem: True, load)


def raises() -> Kernel:
    raise ImportError("libcuda.so.1: cannot open\nmore")


def base_two(*args: Any) -> tuple[Tensor, Tensor]:
    out, log = CPU.forward(*args)
    return out, log / 0.6931


def of_its_own(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log: Tensor, *rest: Any) -> Any:
    """A backward pass that does not take another normaliser than its forward pass gave."""
    return CPU.backward(grad, query, key, value, *CPU.forward(query, key, value, *rest), *rest)


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> Callable[[Package], None]:
    def offer(package: Package) -> None:
        choose.cache_clear()
        monkeypatch.setattr(kernel_choice, "PACKAGES", (package,))
        monkeypatch.setattr(kernel_choice, "is_installed", lambda package: True)

    return offer


@pytest.fixture(autouse=True)
def _forget():
    yield
    choose.cache_clear()


def test_an_installed_kernel_that_computes_the_same_is_taken_unless_torchs_is_asked_for(offered):
    offered(candidate())
    assert choose("auto", problem()).kernel.name == "flash_attn_4"
    assert choose("flash_attn_4", problem()).kernel.name == "flash_attn_4"
    assert choose("sdpa", problem()) == (CPU, ())


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"forward": base_two}, "its normaliser is off"),
        ({"backward": of_its_own}, "its gradient of queries is off"),
        ({"load": raises}, "ImportError: libcuda.so.1: cannot open"),
    ],
)
def test_a_kernel_that_computes_something_else_or_fails_is_dropped_with_a_line_and_is_an_error_when_forced(
    offered, changes, line
):
    offered(candidate(**changes))
    chosen = choose("auto", problem())
    assert chosen.kernel is CPU
    (told,) = chosen.dropped
    assert told.startswith(f"flash-attn-4 is not used at head size 16: {line}")
    assert "\n" not in told
    with pytest.raises(UserError, match=line):
        choose_all("flash_attn_4", {"full_attention": problem()})


@pytest.mark.parametrize("wanted", ["flash_attn_4", "ffpa"])
def test_a_forced_kernel_that_cannot_serve_says_why_and_what_to_do(wanted: Wanted):
    with pytest.raises(UserError, match=f"model.attention = {wanted}: it needs a CUDA device"):
        choose_all(wanted, {"full_attention": problem()})
    with pytest.raises(UserError, match=r"it needs bf16.*found head size 200 in float32, compute capability 9\.0"):
        choose_all(wanted, {"full_attention": on((9, 0), torch.float32, 200)})
    layers = {"sliding_attention": on((9, 0), torch.bfloat16, 256), "full_attention": on((9, 0), torch.bfloat16, 512)}
    with pytest.raises(
        UserError, match=rf"is not installed: pip install --editable '\.\[{wanted.replace('_', '-')}\]'"
    ):
        choose_all(wanted, layers)
    assert [choice.kernel for choice in choose_all("auto", layers).values()] == [FLASH, EFFICIENT]


def test_the_config_knows_every_kernel():
    assert get_args(ModelSection.model_fields["attention"].annotation) == get_args(Wanted)
    assert set(get_args(Wanted)) == {"auto", "sdpa", *(package.name for package in PACKAGES)}


def test_both_layer_types_of_the_released_model_run_on_a_device_that_is_not_there():
    assert fake.check().keys() == fake.CHECKS.keys()


def attended(kernel: Kernel, head_size: int, kv_heads: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """A part as the layers have it, forward and backward, on a fake device."""
    with fake.hopper():

        def some(heads: int, *size: int, like: torch.dtype = dtype) -> Tensor:
            return torch.empty(2, 300, heads, *size, dtype=like, device="cuda").transpose(1, 2)

        query, key = some(16, head_size), some(kv_heads, head_size)
        out, grad, log = some(16, head_size), some(16, head_size), some(16, like=torch.float32)
        kernel.forward(query, key, key, True, 1.0)
        kernel.backward(grad, query, key, key, out.contiguous(), log, True, 1.0)


@pytest.mark.parametrize(("kernel", "size"), [(FLASH, 256), (FLASH, 20), (EFFICIENT, 512), (EFFICIENT, 20)])
def test_parts_of_any_head_size_and_layout_pass_the_kernels_rules(kernel: Kernel, size: int):
    attended(kernel, size, 2)


def as_it_is(tensor: Tensor, *_: Any) -> Tensor:
    return tensor


@pytest.mark.parametrize(
    ("kernel", "size", "broken", "refused"),
    [
        (FLASH, 512, {}, "head size 512"),
        (FLASH, 20, {"_padded": as_it_is, "in_vectors": as_it_is}, "heads must begin at multiples of 16 bytes"),
        (EFFICIENT, 20, {"_padded": as_it_is, "in_vectors": as_it_is}, "heads must begin at multiples of 16 bytes"),
        (EFFICIENT, 512, {"_expanded": as_it_is}, "16 query heads on 2 key heads"),
        (EFFICIENT, 512, {"_whole_blocks": as_it_is}, "normalisers for 300, not 320"),
        (EFFICIENT, 512, {"_tokens_first": lambda out: out.transpose(1, 2)}, "not contiguous as"),
    ],
)
def test_a_rule_that_is_broken_is_seen_without_a_gpu(monkeypatch, kernel, size, broken, refused):
    for name, function in broken.items():
        monkeypatch.setattr(kernels, name, function)
    with pytest.raises(fake.Refused, match=refused):
        attended(kernel, size, 2)


def test_types_and_normalisers_that_a_kernel_reads_wrongly_are_seen_without_a_gpu():
    with pytest.raises(fake.Refused, match="float32 is not 16 bits"):
        attended(FLASH, 256, 2, torch.float32)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
    with fake.hopper():
        query = torch.empty(2, 16, 300, 256, dtype=torch.bfloat16, device="cuda")
        log = torch.empty(2, 300, 16, device="cuda").transpose(1, 2)
        seed = torch.empty(0, dtype=torch.uint64, device="cuda")
        with pytest.raises(fake.Refused, match="are read as if contiguous"):
            backward(query, query, query, query, query, log, None, None, 300, 300, 0.0, True, seed, seed)


def test_a_weight_that_begins_anywhere_is_moved_before_a_grouped_product():
    with fake.hopper():
        rows = torch.empty(32, 16, dtype=torch.bfloat16, device="cuda")
        ends = torch.empty(4, dtype=torch.int32, device="cuda")
        gathered = torch.empty(4 + 4 * 8 * 16, dtype=torch.bfloat16, device="cuda")
        weight = gathered.narrow(0, 4, 4 * 8 * 16).view(4, 8, 16)
        with pytest.raises(fake.Refused, match="mat2 does not begin at a multiple of 16 bytes"):
            torch._grouped_mm(rows, weight.transpose(-2, -1), offs=ends)
        assert grouped(rows, weight, ends).shape == (32, 8)

"""What DeepSpeed's private names mean to us, held against the version that is installed: one test for each meaning.

After an upgrade of DeepSpeed run this first: a test that fails names what to read again in `engine/private.py`.
"""

import os
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import nn

from ds_dgemma.engine import private
from tests.ranks import on_ranks

WORLD = 2
ADAMW = {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True}}


def plain() -> nn.Module:
    """13 and 3 elements: no rank's share is a whole parameter, and one share is padded."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(13, 1, bias=False), nn.Linear(1, 3, bias=False))
    for number, parameter in enumerate(module.parameters()):
        parameter.data = torch.arange(parameter.numel(), dtype=torch.float32).view_as(parameter) + 100 * number
    return module


def join() -> None:
    private.without_shared_memory()
    os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))  # a fork's own
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)


def engine_of(stage: int, **settings: Any) -> Any:
    join()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "optimizer": ADAMW,
        "zero_optimization": {"stage": stage},
        **settings,
    }
    module = plain()
    return deepspeed.initialize(model=module, model_parameters=list(module.parameters()), config=config)[0]


def step(engine: Any, factor: float = 1.0) -> None:
    for _ in range(2):
        engine.backward(factor * engine(torch.ones(1, 13)).sum())
        engine.step()


def below_stage_3(rank: int, stage: int, precision: dict) -> list[tuple[int, int, bool]]:
    """Of each fragment: where it lies in which parameter, and whether `masters` has its values there."""
    engine = engine_of(stage, **precision)
    found = []
    for number, parameter in enumerate(plain().parameters()):
        own = private.fragment(list(engine.module.parameters())[number])
        if own is not None:
            here = private.masters(engine)[own.partition][own.place]
            stop = own.start + len(here)
            found.append((number, own.start, stop, torch.equal(here, parameter.flatten()[own.start : stop])))
    return found


@pytest.mark.parametrize(
    ("stage", "precision"), [(1, {}), (2, {}), (1, {"bf16": {"enabled": True}}), (2, {"bf16": {"enabled": True}})]
)
def test_below_stage_3_masters_hold_each_parameter_once_in_fragments(stage: int, precision: dict, tmp_path: Path):
    found = sorted(one for of_rank in on_ranks(WORLD, tmp_path, below_stage_3, stage, precision) for one in of_rank)
    assert all(is_equal for *_, is_equal in found)
    covered = [(number, place) for number, start, stop, _ in found for place in range(start, stop)]
    assert covered == [(0, place) for place in range(13)] + [(1, place) for place in range(3)]


def stage_3(rank: int) -> list[Any]:
    engine = engine_of(3)
    found = []
    for number, parameter in enumerate(plain().parameters()):
        sharded = list(engine.module.parameters())[number]
        own = private.interval(sharded)
        same = private.held(sharded)[: own.stop - own.start] == parameter.flatten()[own.start : own.stop]
        found.append((own, bool(same.all()), private.shape_of(sharded) == parameter.shape))
    masters = torch.cat([flat.flatten() for flat in private.masters(engine)])
    held = torch.cat([private.held(parameter) for parameter in engine.module.parameters()])
    return [found, torch.equal(masters[: len(held)], held)]


def test_a_zero_3_parameter_is_held_in_padded_shares_and_masters_hold_them_one_behind_another(tmp_path: Path):
    found, in_order = zip(*on_ranks(WORLD, tmp_path, stage_3), strict=True)
    assert [[own for own, *_ in of_rank] for of_rank in found] == [[(0, 7, 7), (0, 2, 2)], [(7, 13, 7), (2, 3, 2)]]
    assert all(same and shape for of_rank in found for _, same, shape in of_rank)
    assert all(in_order)


def born_partitioned(rank: int) -> list[Any]:
    join()
    replicas = private.expert_replicas(WORLD)  # each rank has experts of its own
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    init = deepspeed.zero.Init(config_dict_or_path=config, dtype=torch.float32, enabled=True)
    found = []
    for group in (None, replicas):
        real: Any = nn.Parameter(torch.arange(5.0))
        own = private.partition(real, init, group)
        found.append((own, private.held(real)[: own.stop - own.start].tolist(), tuple(private.shape_of(real))))
    return [dist.get_world_size(replicas), found]


def test_a_parameter_is_partitioned_over_all_ranks_or_over_those_with_the_same_experts(tmp_path: Path):
    first, second = on_ranks(WORLD, tmp_path, born_partitioned)
    whole = ((0, 5, 5), [0.0, 1.0, 2.0, 3.0, 4.0], (5,))
    assert first == [1, [((0, 3, 3), [0.0, 1.0, 2.0], (5,)), whole]]
    assert second == [1, [((3, 5, 3), [3.0, 4.0], (5,)), whole]]


def after_nan(rank: int, offload: bool) -> list[Any]:
    where = {"offload_optimizer": {"device": "cpu"}} if offload else {}
    engine = engine_of(2, zero_optimization={"stage": 2, **where}, zero_force_ds_cpu_optimizer=False)
    step(engine, float("nan"))
    skipped = not engine.was_step_applied()
    private.forget_gradients(engine)
    private.count_steps_done(engine, 7)
    before = torch.cat([flat.flatten().clone() for flat in private.masters(engine)])
    step(engine)
    after = torch.cat([flat.flatten() for flat in private.masters(engine)])
    state = private.base_optimizer(engine).state
    return [skipped, bool(after.isfinite().all()), not torch.equal(before, after), engine.global_steps, len(state)]


@pytest.mark.parametrize("offload", [False, True])
def test_a_step_of_nan_is_left_out_and_forgotten_and_the_count_of_steps_goes_on(offload: bool, tmp_path: Path):
    assert on_ranks(WORLD, tmp_path, after_nan, offload) == [[True, True, True, 8, 1]] * WORLD


def all_to_all(rank: int) -> list[Any]:
    join()
    rows = (torch.arange(3.0)[:, None] + 10 * rank).requires_grad_()
    to, of = ([1, 2], [1, 2]) if rank == 0 else ([2, 1], [2, 1])
    got = private.AllToAll.apply(dist.group.WORLD, rows, to, of)
    (got * (rank + 1)).sum().backward()
    assert rows.grad is not None
    return [got.flatten().tolist(), rows.grad.flatten().tolist()]


def test_rows_go_to_ranks_by_their_counts_and_gradients_go_back(tmp_path: Path):
    first, second = on_ranks(WORLD, tmp_path, all_to_all)
    assert first == [[0.0, 10.0, 11.0], [1.0, 2.0, 2.0]]
    assert second == [[1.0, 2.0, 12.0], [1.0, 1.0, 2.0]]


def test_muon_makes_matrices_orthogonal_in_the_type_that_was_asked_for(monkeypatch):
    from deepspeed.runtime.zero.muon import original_muon

    torch.compiler.set_stance("force_eager")
    monkeypatch.setattr(original_muon, "ns_compute_dtype", lambda ns_method="gram": torch.bfloat16)  # as on a GPU
    draw = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))

    def update(scale: float) -> torch.Tensor:
        return original_muon.muon_update(scale * draw, torch.zeros_like(draw), beta=0.0, nesterov=False)

    in_half = update(1)
    private.orthogonalise_in_fp32()
    assert float((update(1) - update(3)).abs().max()) < 1e-5  # an orthogonal factor knows no scale
    assert float((update(1) - in_half).abs().max()) > 1e-4

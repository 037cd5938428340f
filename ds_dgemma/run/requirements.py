"""What a run needs of its surroundings, looked at before anything else: libraries, the launcher's variables, GPUs."""

import os
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement

from ds_dgemma.errors import one_line_each

PACKAGE = "ds_dgemma"
DRIVER = Path("/proc/driver/nvidia/version")
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # a launcher sets all of them, or there is none


def check_environment() -> None:
    """Look at what a rank was started with and into.

    Raises:
        UserError: a library of another version than `pyproject.toml` names, ranks that cannot be, or GPUs that torch
        does not see or that are fewer than this machine's ranks.
    """
    problems = [*_library_problems(), *(_rank_problems() or _device_problems())]
    if problems:
        raise one_line_each("the environment", problems)


def _library_problems() -> list[str]:
    try:
        requirements = metadata.requires(PACKAGE) or ()
    except metadata.PackageNotFoundError:  # a checkout on PYTHONPATH that nobody installed names no requirements
        return []
    problems = []
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            found = "no version"
        if found == "no version" or not requirement.specifier.contains(found, prereleases=True):
            problems.append(
                f"{requirement.name}: {found} is installed, {requirement.specifier} is needed. Run launch/setup.sh, or "
                f"pip install '{requirement.name}{requirement.specifier}'."
            )
    return problems


def _rank_problems() -> list[str]:
    given = {name: os.environ[name] for name in RANK_VARIABLES if name in os.environ}
    if not given:
        return []
    start = "Start with `deepspeed --module ds_dgemma.train ...`, or unset them to train on one process."
    if missing := [name for name in RANK_VARIABLES if name not in given]:
        return [f"{', '.join(given)} set, but not {', '.join(missing)}. {start}"]
    if strange := [f"{name}={value}" for name, value in given.items() if not value.isdecimal()]:
        return [f"{', '.join(strange)}: whole numbers were expected. {start}"]
    if int(given["RANK"]) >= int(given["WORLD_SIZE"]):
        return [f"RANK={given['RANK']} of WORLD_SIZE={given['WORLD_SIZE']}: ranks count from 0. {start}"]
    return []


def _device_problems() -> list[str]:
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return []
    found = torch.cuda.device_count()
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)  # torchrun's, DeepSpeed's
    if not found and DRIVER.exists():
        return [
            "torch sees none of this machine's GPUs. CUDA_VISIBLE_DEVICES, or a torch without CUDA? On purpose, for "
            "the CPU: DS_ACCELERATOR=cpu."
        ]
    if found and ranks > found:
        return [
            f"{ranks} ranks on a machine where torch sees {found} GPUs. Start fewer: --num_gpus, or a hostfile's slots."
        ]
    return []

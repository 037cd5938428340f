"""The environment of ranks on other machines: DeepSpeed's `.deepspeed_env`, checked.

DeepSpeed looks for the file in the home directory and in the current one, under the name that DS_ENV_FILE gives. A
value is read by the node's shell inside double quotes, so `$HOME` and `$(cat ~/.wandb_key)` mean the node's; the
second is how a secret gets there: the launcher's command line, which everybody on a node can read, has its name only.
"""

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from ds_dgemma.errors import UserError, one_line_each, told

# What DeepSpeed's runner exports from the shell that starts it, secrets such as MLFLOW_TRACKING_TOKEN among it
# (EXPORT_ENVS of deepspeed/launcher/runner.py).
EXPORTED_UNASKED = ("MLFLOW", "PYTHON", "MV2", "UCX")
SECRET_NAME = re.compile(
    r"((KEY|SECRET|PASSWORD|CREDENTIAL)S?|TOKEN|PASSWD|PASSPHRASE|(^|_)(PASS|PWD|PAT|O?AUTH))$", re.IGNORECASE
)
SECRET_IN_ADDRESS = re.compile(r"://[^/@\s]*:[^$/@\s][^/@\s]*@")  # http://user:password@host


def environment_files() -> list[Path]:
    """The files that DeepSpeed would read, the later one over the earlier."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    found = [path for path in (Path.home() / name, Path(name)) if path.is_file()]
    return list({path.resolve(): path for path in found}.values())


def rank_environment(files: list[Path]) -> dict[str, str]:
    """What the files say, over the virtual environment's PATH, this directory's PYTHONPATH and this shell's NCCL_*.

    Raises:
        UserError: lines that are not NAME=VALUE, and secrets written out.
    """
    values = {
        "PATH": f"{Path(sys.executable).parent}:$PATH",
        "PYTHONPATH": ":".join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH", "")])),
    }
    values |= {name: value for name, value in os.environ.items() if name.startswith("NCCL_")}
    problems = []
    for path in files:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read as UTF-8 text: {told(error)}. It has lines NAME=VALUE.") from None
        for number, line in enumerate(lines, start=1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            name, equals, value = (part.strip() for part in line.partition("="))
            value = value[1:-1] if len(value) > 1 and value[0] == value[-1] == '"' else value
            if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                problems.append(f"{path}:{number}: is not NAME=VALUE, without `export`")
            elif _written_out(name, value):
                problems.append(
                    f"{path}:{number}: {name} is written out, and every process list would show it. Write "
                    f"{name}=$(cat FILE), which the node reads, or log in on the nodes"
                )
            else:
                values[name] = value
    if problems:
        raise one_line_each("the ranks' environment", problems)
    return values


def _written_out(name: str, value: str) -> bool:
    """Whether a value is, or holds, a secret that the node does not read from somewhere."""
    if SECRET_IN_ADDRESS.search(value):
        return True
    return bool(SECRET_NAME.search(name)) and bool(value) and not value.startswith("$")


def without_exports(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for DeepSpeed's runner without what that would put on the ranks' command lines."""
    return {
        name: value
        for name, value in environment.items()
        if name == "PYTHONPATH" or not name.startswith(EXPORTED_UNASKED)
    }


def quoted(value: str) -> str:
    """A value inside double quotes: the shell still expands `$`."""
    return '"' + value.replace('"', '\\"') + '"'


def exports(values: Mapping[str, str]) -> str:
    """The beginning of a shell's line that has this environment."""
    return "".join(f"export {name}={quoted(value)}; " for name, value in values.items())


def write_for_deepspeed(path: Path, values: Mapping[str, str]) -> None:
    """A file for DeepSpeed's launcher, which quotes what needs it and takes comments and blank lines for names."""
    lines = (f"{name}={_escaped(value)}\n" for name, value in values.items())
    path.write_text("".join(lines))


def _escaped(value: str) -> str:
    return value.replace('"', '\\"').replace("%", "%%")  # pdsh has its own meaning for %


def for_pdsh(argument: str) -> str:
    """An argument of the training command, so that the node's shell hands it on as it is.

    DeepSpeed passes it bare, or inside double quotes with its own escaped where there is a blank in it.
    """
    argument = argument.replace("%", "%%")
    if " " in argument:
        return re.sub(r"([\\$`])", r"\\\1", argument)
    return argument if re.fullmatch(r"[\w@%+=:,./-]+", argument) else "'" + argument.replace("'", "'\\''") + "'"

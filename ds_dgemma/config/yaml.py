"""YAML 1.2's core types for PyYAML, which alone reads YAML 1.1: `1e-4` is a number, `on` is text, `010` is ten."""

import re

import yaml

LONGEST_INT = 100  # digits


class CoreLoader(yaml.SafeLoader):
    """YAML 1.2's core types."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  (PyYAML's own name and type; empty, so that 1.1's are not inherited)


class CoreDumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as another type."""


_CORE_TYPES = {
    "null": r"^(~|null|Null|NULL|)$",
    "bool": r"^(true|True|TRUE|false|False|FALSE)$",
    "int": r"^([-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$",
    "float": r"^([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$",
}
for _name, _pattern in _CORE_TYPES.items():
    for _yaml in (CoreLoader, CoreDumper):
        _yaml.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(_pattern), None)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int | str:
    text = str(loader.construct_scalar(node))
    if len(text) > LONGEST_INT:
        return text  # Python refuses thousands of digits; no setting is a text of digits, so it is told as a wrong one
    return int(text, 0 if text[:2] in ("0o", "0x") else 10)


CoreLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)

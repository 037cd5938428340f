"""What of a tool's declaration a chat template shows to the model.

Templates pick parts of a declaration, each its own: the released one shows a function's description and its parameters'
names, types, descriptions, texts of an enum, and neither `default` nor `anyOf`. So each part is taken out, and put in
another's place, and the renderings are compared: what changes nothing is not shown.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

MARK = "\ue003"  # stands for a part
# Keys that repeat a name, or tell an API's server how to check a call
ASIDE = frozenset(("title", "$schema", "$id", "strict", "additionalProperties"))
SAYS = frozenset(("default", "const", "enum", "examples"))  # true and false are words to the model here

Path = tuple[Any, ...]  # keys and list places, from the declaration on


class Unseen(NamedTuple):
    """A part of a declaration that is not shown."""

    path: Path
    says: bool  # something that the model is to know

    @property
    def key(self) -> str:
        """The last key on its path."""
        return next(key for key in reversed(self.path) if isinstance(key, str))

    @property
    def name(self) -> str:
        """As messages spell it: function.parameters.properties.city.default."""
        return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in self.path)[1:]


def unseen_parts(tool: dict[str, Any], render: Callable[[dict[str, Any]], str]) -> list[Unseen]:
    """The parts of a declaration that `render` does not show, outermost only.

    None where not even the name is: the template knows no tools, which a row's whole rendering tells. That `render`
    raises for a changed part is a sign that it looks at it.
    """
    shown = _renders(tool, render)
    known = shown is not None and tool["function"]["name"] in shown
    return list(_unseen(tool, tool, (), render, shown)) if known else []


def _unseen(
    tool: dict[str, Any], node: Any, path: Path, render: Callable[[dict[str, Any]], str], shown: str | None
) -> Iterator[Unseen]:
    for key, item in list(node.items() if isinstance(node, dict) else enumerate(node)):
        here = (*path, key)
        if item in (None, "", [], {}) or here in (("type",), ("function", "name")):
            continue
        if all(_renders(changed, render) == shown for changed in (_without(tool, here), _changed(tool, here, MARK))):
            yield Unseen(here, _says(here, item))
        elif isinstance(item, dict | list):
            yield from _unseen(tool, item, here, render, shown)


def _renders(tool: dict[str, Any], render: Callable[[dict[str, Any]], str]) -> str | None:
    try:
        return render(tool)
    except Exception:  # a template's own errors, of any kind
        return None


def _says(path: Path, item: Any) -> bool:
    named = [key for key in path if isinstance(key, str)]
    is_name = len(named) > 1 and named[-2] == "properties"  # of a parameter, whatever it is called
    if named[-1] in ASIDE and not is_name:
        return False
    return not isinstance(item, bool) or is_name or not SAYS.isdisjoint(named[-1:])


def _without(tree: Any, path: Path) -> Any:
    key, *rest = path
    if rest:
        return _with(tree, key, _without(tree[key], tuple(rest)))
    if isinstance(tree, dict):
        return {other: item for other, item in tree.items() if other != key}
    return [item for place, item in enumerate(tree) if place != key]


def _changed(tree: Any, path: Path, value: Any) -> Any:
    key, *rest = path
    return _with(tree, key, _changed(tree[key], tuple(rest), value) if rest else value)


def _with(tree: Any, key: Any, value: Any) -> Any:
    if isinstance(tree, dict):
        return {**tree, key: value}
    return [value if place == key else item for place, item in enumerate(tree)]

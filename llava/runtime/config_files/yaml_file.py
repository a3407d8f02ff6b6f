"""Options in a YAML file: a table of names and values, whose scalars stay the text that is written there.

On a command line everything is text, and the option decides what it means. So `no`, `1e-4` and `0x10` are here what
they are there, and not what YAML 1.1 makes of them. Nothing in a file can construct an object.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from llava.errors import FlagError

CORE = "tag:yaml.org,2002:"
SCALARS = frozenset(CORE + kind for kind in ("str", "int", "float", "bool", "null", "timestamp", "value"))
COLLECTIONS = frozenset({f"{CORE}seq", f"{CORE}map"})
NULL = f"{CORE}null"


def read_yaml(path: Path, text: str) -> dict[str, Any]:
    """The options in a file.

    Args:
        path: of the file, for messages.
        text: its content.

    Returns:
        By name: a text, None, a list of texts, or for tables and nested lists the value that JSON has for it.

    Raises:
        FlagError: the text is not a YAML table, has a name twice, or a value of a type that YAML's core does not have.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise FlagError(f"{path}: is not a table of options (name: value)")
        found: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise FlagError(f"{path}:{_line(key)}: the name of an option is text")
            name = key.value.removeprefix("--").replace("-", "_")
            if name in found:
                raise FlagError(f"{path}:{_line(key)}: {name} is there twice; leave one of them out")
            found[name] = _value(loader, value, path)
        return found
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f":{mark.line + 1}"
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise FlagError(f"{path}{place}: is not YAML that can be read ({problem})") from error
    finally:
        loader.dispose()


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _value(loader: yaml.SafeLoader, node: yaml.Node, path: Path) -> Any:
    if node.tag not in (SCALARS if isinstance(node, yaml.ScalarNode) else COLLECTIONS):
        raise FlagError(f"{path}:{_line(node)}: {node.tag} is not a kind of value that an option has")
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == NULL else node.value
    if isinstance(node, yaml.SequenceNode) and all(isinstance(each, yaml.ScalarNode) for each in node.value):
        return [_value(loader, each, path) for each in node.value]
    return loader.construct_object(node, deep=True)

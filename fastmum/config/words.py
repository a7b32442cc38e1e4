"""Words of files and command lines as values of a type. YAML's own types are not used: there 007 is 7, on is true."""

import math
import re
from typing import Any, cast

import yaml

from fastmum.config.schema import ConfigError

NULLS = ("", "null", "Null", "NULL")
BOOLS = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)
ITEM = re.compile(r"""\s*("(?:\\.|[^"\\])*"|'(?:''|[^'])*'|[^,]*?)\s*,""")


class Unquoted(str):
    """A word without quotes; `cut` is what follows it if it may be a part of the word instead of a comment."""

    cut = ""


class _Loader(yaml.SafeLoader):
    """Keeps every word as it is written; refuses a key that is given twice."""

    yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}  # noqa: RUF012 (PyYAML's)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [str(name.value) for name, _ in node.value]
        if twice := next((name for name in names if name != "<<" and names.count(name) > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"found the key '{twice}' twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_word(self, node: yaml.ScalarNode) -> str:
        if node.style:
            return cast(str, node.value)
        word = Unquoted(node.value)
        if found := re.compile(r"[ \t]+#[^\s\0][^\n\0]*").match(node.end_mark.buffer or "", node.end_mark.pointer):
            word.cut = found[0]
        return word


_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_word)


def read_yaml(content: bytes | str) -> Any:
    """Mappings, lists and words, `Unquoted` if they have no quotes. yaml.YAMLError, ValueError: not YAML, not text."""
    if isinstance(content, bytes):
        content = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    return yaml.load(content, _Loader)


def read_word(word: str, kind: str) -> Any:
    """A word of the command line for a value of a kind, such as "str" or "list[int]"; errors as `read_yaml`."""
    word, quoted = word.strip() if kind.startswith(("list", "dict")) else word, word[:1] in ("'", '"')
    if kind.startswith("list") and word.startswith("[") and word.endswith("]"):
        inner = word[1:-1].strip()
        return [read_word(item, "item") for item in ITEM.findall(inner.removesuffix(",") + ",")] if inner else []
    if (kind.startswith("dict") and word.startswith("{")) or (quoted and len(word) > 1 and word[0] == word[-1]):
        return read_yaml(word)
    return word if word == "~" else Unquoted(word)  # the folder, for the command line is not YAML


def typed(value: Any, kind: str) -> Any:
    """A value of a kind, such as "int", "str or null", "list[float]", from words; ValueError if it is no such value.

    Numbers are decimal: 010 is 10. Words with `${` are left to OmegaConf. ConfigError: a word that may be cut.
    """
    optional, kind = kind.endswith(" or null"), kind.removesuffix(" or null")
    if optional and isinstance(value, Unquoted) and value in (*NULLS, "~"):
        return None
    if kind.startswith("list") and isinstance(value, list):
        return [typed(item, kind[len("list[") : -1]) for item in value]
    if not value or not isinstance(value, str) or kind.startswith(("list", "dict")):
        raise ValueError
    if "${" in value:
        return str(value)
    if kind == "str":
        if value == "???":
            raise ConfigError("'???' stands for a missing value")
        if isinstance(value, Unquoted) and value.cut:
            raise ConfigError(f"'{value}' or '{value}{value.cut}'? Quote it, or write a space after the #")
        return str(value)
    if kind == "bool":
        if value.lower() not in BOOLS:
            raise ValueError
        return BOOLS[value.lower()]
    exact = kind == "int" and re.fullmatch(r"\s*[+-]?\d[\d_]*\s*", value)
    number = int(value) if exact else float(value)
    if kind == "int" and not (abs(number) < 1 << 63 and number == int(number)):  # false for nan, too
        raise ValueError
    if not math.isfinite(number):
        raise ValueError
    return int(number) if kind == "int" else number

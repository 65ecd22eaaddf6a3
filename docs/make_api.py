"""Write docs/api.md: the public API, from the docstrings as they are.

python docs/make_api.py
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import peft_eas

PAGE = Path(__file__).with_name("api.md")
INTRODUCTION = """# API

What `import peft_eas` offers, from the docstrings; `make api` writes this page. Public members of `EASModel` are
members of the `PeftModel` around it, too. In shapes, `B` is rows, `T` tokens, and `d` the width of the residual
stream."""
WITHOUT_DOCSTRING = {"FAMILIES": "`{model_type: Family}`: the table of all families; `register_family` adds to it."}
SECTIONS = ("Args", "Attributes", "Returns", "Raises")


class Annotation(str):
    """A type as the source has it; as a plain string, `inspect` would put it in quotes."""

    __repr__ = str.__str__


def page() -> str:
    index = "\n".join(f"- [`{name}`](#{name.lower()})" for name in peft_eas.__all__)
    return "\n\n".join([INTRODUCTION, index, *(part for name in peft_eas.__all__ for part in entry(name))]) + "\n"


def entry(name: str) -> Iterator[str]:
    """The paragraphs about one public name, and about its public members."""
    yield f"## {name}"
    if name in WITHOUT_DOCSTRING:
        yield WITHOUT_DOCSTRING[name]
        return
    thing = getattr(peft_eas, name)
    if not isinstance(thing, type):
        yield code(call(name, thing))
    elif dataclasses.is_dataclass(thing):
        base = "" if thing.__base__ is object else f"({thing.__base__.__name__})"
        yield code(f"class {name}{base}:", *own_fields(thing))
    elif "__init__" in vars(thing):
        yield code(call(name, thing.__init__))
    yield text(thing)
    for member, value in vars(thing).items():
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if isinstance(thing, type) and not member.startswith("_") and inspect.isfunction(function) and function.__doc__:
            yield f"### {name}.{member}"
            if not isinstance(value, property):
                yield code(call(member, function))
            yield text(function)


def own_fields(thing: type) -> Iterator[str]:
    """The fields of a dataclass that its base class has not."""
    for field in dataclasses.fields(thing):
        if field.name in thing.__annotations__:
            default = repr(field.default) if len(repr(field.default)) <= 60 else "..."
            is_needed = field.default is dataclasses.MISSING
            yield f"    {field.name}: {field.type}" + ("" if is_needed else f" = {default}")


def call(name: str, function: Callable) -> str:
    """How a function is called: in a line, or with an argument a line; `self` is left out."""
    signature = inspect.signature(function)
    arguments = []
    for parameter in signature.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in arguments:
            arguments.append("*")
        arguments.append(str(parameter.replace(annotation=Annotation(parameter.annotation))))
    returned = f" -> {signature.return_annotation}"
    line = f"{name}({', '.join(arguments)}){returned}"
    if len(line) <= 100:
        return line
    return "\n".join([f"{name}(", *(f"    {argument}," for argument in arguments), f"){returned}"])


def code(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"]).replace("'", '"')


def text(thing: Callable) -> str:
    """A docstring in Markdown: the items of its sections become those of lists."""
    lines = []
    section = ""
    for line in inspect.cleandoc(thing.__doc__).splitlines():
        if line.rstrip(":") in SECTIONS:
            section = line.rstrip(":")
            lines += [f"**{section}**", ""]
        elif section in ("", "Returns"):
            lines.append(line.strip())
        elif item := re.fullmatch(r"    (\w+)( \(.*?\))?: (.*)", line):
            lines.append("- `{}`{}: {}".format(item[1], item[2] or "", item[3]))
        else:
            lines.append(f"  {line.strip()}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

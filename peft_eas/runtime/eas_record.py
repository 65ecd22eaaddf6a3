"""`config.eas`: what became of the attentions of a merged model, as typed, checked values."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import reprlib
import types
import typing
from dataclasses import dataclass, field
from typing import Any

FORMAT = 8
"""Version of the record; one of another version is refused."""
MOST = 10_000
"""Entries of a list, or layers: more than any model has."""
LARGEST = 2**20
"""Size of a vector: likewise."""
LONGEST = 200
"""Characters of a name: likewise."""
NAME = re.compile(r"[\w.|]*", re.ASCII)
"""A name of a module, of an argument, or of a model type (these have a `-`, see `MODEL_TYPE`)."""
CONVENTIONS = ("plain", "adds_input", "adds_residual")
"""What an attention returns, see `eas_convention`."""
MODEL_TYPE = re.compile(r"[\w.-]+", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Form:
    """How attentions of one kind, in one list of layers, are built and called; `families.Attentions` says what each of
    these is."""

    stack: str
    layers: str
    attention: str
    core: str
    residual_norm: str
    convention: str
    returns: tuple[str, ...] | None
    causal: bool
    answers: bool
    context: str
    mask: str
    mask_hides: bool
    shows_keys: bool

    @property
    def kind(self) -> str:
        """`"self"` or `"cross"`, the last part of the names of these attentions."""
        return "cross" if self.context else "self"


@dataclass(frozen=True, kw_only=True)
class StandInShape:
    """The sizes of what a skipped attention leaves, see `StandIn`.

    Attributes:
        width: `d`, that of the residual stream.
        constant: Whether there is a constant.
        read: `d'`, that of what the attention reads.
        rank: `r` of the linear map of it; 0 if there is none.
        pooled: `d''`, that of the tokens that the attention looks at.
        mean_rank: `r` of the mean over these; 0 if there is none.
    """

    width: int
    constant: bool = False
    read: int = 0
    rank: int = 0
    pooled: int = 0
    mean_rank: int = 0

    @property
    def reads(self) -> bool:
        """Whether it reads anything of what the attention reads, so that the norm in front has to stay."""
        return bool(self.rank or self.mean_rank)


@dataclass(frozen=True, kw_only=True)
class Stripped(Form):
    """What became of the attentions of one kind.

    Attributes:
        present: Indices of the layers that had one.
        norms: The norms, in a layer, that its attention alone reads, and go with it.
        output_norms: Likewise those that its output goes through.
        skip: Indices of the layers that have lost it.
        stand_ins: For each of these, the sizes of what it leaves.
        biased: Linears, in the list of layers, that a fold has given a bias.
        shifted: Attentions and FFNs, likewise, whose input is shifted, with its size.
    """

    present: tuple[int, ...]
    norms: tuple[str, ...]
    output_norms: tuple[str, ...]
    skip: tuple[int, ...] = ()
    stand_ins: tuple[StandInShape, ...] = ()
    biased: tuple[str, ...] = ()
    shifted: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is skipped and folded in a merged model, as `config.eas` has it in JSON.

    Attributes:
        model_type: The type of the base model.
        decoder: Name of a vision-language model's language model.
        attentions: By kind.
        by_name: Whether attentions go by names, such as `"decoder.3.cross"`, since indices are not enough.
        config: For people: what the adapter was configured with, or `skip_attentions` called with.
    """

    model_type: str
    decoder: str | None
    attentions: tuple[Stripped, ...]
    by_name: bool
    config: dict[str, str | int | float | bool | None]

    @classmethod
    def read(cls, eas: Any) -> Record:
        """Check `config.eas`, all of it.

        Raises:
            ValueError: if it was written by another version, has been changed since, or is anything else than a record.
        """
        record = cls.parse(eas)
        if eas["checksum"] != _checksum(eas):
            raise ValueError(
                "`eas` in config.json was changed after it was written, as its `checksum` tells. Ways out: the "
                "config.json that was saved with the weights, or merging the adapter again."
            )
        return record

    @classmethod
    def parse(cls, eas: Any) -> Record:
        """The same, but for what only the checksum tells; so that errors name the field.

        Raises:
            ValueError: likewise; says which field it is.
        """
        if not isinstance(eas, dict):
            raise _wrong("eas", "the record of a model merged by peft_eas", eas)
        if eas.get("format") != FORMAT:
            raise ValueError(
                f"This checkpoint has format {_short(eas.get('format'))} of `config.eas`, but this code reads format "
                f"{FORMAT}: merge the adapter again, or use the version of peft_eas (or the modelling file) that the "
                "checkpoint came with."
            )
        record = _dataclass(cls, {k: v for k, v in eas.items() if k not in ("format", "checksum")}, "eas")
        if not MODEL_TYPE.fullmatch(record.model_type):
            raise _wrong("eas.model_type", "the type of a model", record.model_type)
        if not record.attentions:
            raise _wrong("eas.attentions", "a list with an entry for each kind of attention", [])
        for number, kind in enumerate(record.attentions):
            _check_kind(kind, f"eas.attentions[{number}]")
        if not isinstance(eas.get("checksum"), str):
            raise _wrong("eas.checksum", "text", eas.get("checksum"))
        return record

    def written(self) -> dict[str, Any]:
        """As JSON has it."""
        eas = json.loads(json.dumps({"format": FORMAT} | dataclasses.asdict(self)))
        return eas | {"checksum": _checksum(eas)}

    @property
    def skipped(self) -> list[int | str]:
        """The attentions that the model has lost: indices of layers, or names (`by_name`)."""
        return self._listed("skip")

    @property
    def present(self) -> list[int | str]:
        """The attentions that its base model has, likewise."""
        return self._listed("present")

    def _listed(self, which: str) -> list[int | str]:
        found = [(kind, index) for kind in self.attentions for index in getattr(kind, which)]
        if not self.by_name:
            return sorted(index for _, index in found)
        return [f"{kind.stack}.{index}.{kind.kind}" for kind, index in found]

    @property
    def ranks(self) -> list[int]:
        """Ranks of what skipped attentions say of other tokens, of those that do."""
        return [shape.mean_rank for kind in self.attentions for shape in kind.stand_ins if shape.mean_rank]

    @property
    def propagates(self) -> bool:
        """Whether there are any."""
        return bool(self.ranks)

    @property
    def is_plain(self) -> bool:
        """Whether skipped attentions leave constants at most, which plain weights can hold."""
        return not any(shape.reads for kind in self.attentions for shape in kind.stand_ins)


def check_layers(config: dict) -> None:
    """Refuse a config.json with more layers than any model has: transformers makes lists of them, for minutes.

    Raises:
        ValueError: says how many there are.
    """
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        layers = part.get("num_hidden_layers")
        if isinstance(layers, int) and layers > MOST:
            raise ValueError(f"`num_hidden_layers` in config.json must be at most {MOST}, got {_short(layers)}.")


def _checksum(eas: dict) -> str:
    content = json.dumps({key: value for key, value in eas.items() if key != "checksum"}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _check_kind(kind: Stripped, where: str) -> None:
    for name in ("present", "skip"):
        indices = getattr(kind, name)
        if list(indices) != sorted(set(indices)) or not all(0 <= index < MOST for index in indices):
            raise _wrong(f"{where}.{name}", f"distinct indices of layers, in order, below {MOST}", list(indices))
    if not set(kind.skip) <= set(kind.present):
        raise _wrong(f"{where}.skip", f"some of `present`, {list(kind.present)[:40]}", list(kind.skip))
    if kind.convention not in CONVENTIONS:
        raise _wrong(f"{where}.convention", f"one of {', '.join(CONVENTIONS)}", kind.convention)
    if len(kind.stand_ins) != len(kind.skip):
        raise _wrong(f"{where}.stand_ins", f"{len(kind.skip)} entries, one for each of `skip`", len(kind.stand_ins))
    for name in ("layers", "attention"):
        if not getattr(kind, name):
            raise _wrong(f"{where}.{name}", "the name of a module", "")
    for number, shape in enumerate(kind.stand_ins):
        inside = f"{where}.stand_ins[{number}]"
        needed = {"width": True, "read": shape.rank, "rank": False, "pooled": shape.mean_rank, "mean_rank": False}
        for name, is_needed in needed.items():
            least = 1 if is_needed else 0
            if not least <= getattr(shape, name) <= LARGEST:
                raise _wrong(f"{inside}.{name}", f"a size from {least} to {LARGEST}", getattr(shape, name))
        if shape.mean_rank % 2:
            raise _wrong(f"{inside}.mean_rank", "an even number", shape.mean_rank)
    for name, width in kind.shifted.items():
        if not 1 <= width <= LARGEST:
            raise _wrong(f"{where}.shifted[{name!r}]", f"a size from 1 to {LARGEST}", width)


# ----------------------------------------------------------------------------------------------------------------------
# Types
# ----------------------------------------------------------------------------------------------------------------------


def _dataclass(cls: type, value: object, where: str) -> Any:
    """The dataclass that a dict of JSON is meant to be."""
    if not isinstance(value, dict):
        raise _wrong(where, "a dict", value)
    annotations = typing.get_type_hints(cls)
    unknown = [key for key in value if key not in annotations]
    if unknown:
        raise ValueError(f"`{where}` in config.json has {_short(unknown[0])}, which is not known.")
    for name in annotations:
        if name not in value:
            raise ValueError(f"`{where}` in config.json lacks `{name}`.")
    return cls(**{name: _typed(kind, value[name], f"{where}.{name}") for name, kind in annotations.items()})


def _typed(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        if type(value) in arguments:
            return value if type(value) is not str else _typed(str, value, where)
        others = [each for each in arguments if typing.get_origin(each)]
        if not others:
            raise _wrong(where, " or ".join(_name(each) for each in arguments), value)
        return _typed(others[0], value, where)
    if origin in (tuple, dict):
        if not isinstance(value, (list, tuple) if origin is tuple else dict):
            raise _wrong(where, "a list" if origin is tuple else "a dict", value)
        if len(value) > MOST:
            raise ValueError(f"`{where}` in config.json has {len(value)} entries, more than the {MOST} that may be.")
        if origin is tuple:
            return tuple(_typed(arguments[0], each, f"{where}[{number}]") for number, each in enumerate(value))
        return {
            _typed(str, key, where): _typed(arguments[1], each, f"{where}[{_short(key)}]")
            for key, each in dict(value).items()
        }
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, where)
    if type(value) is not kind:
        raise _wrong(where, _name(kind), value)
    if kind is str:
        is_name = not where.startswith(("eas.config", "eas.model_type"))
        if len(value) > LONGEST or (is_name and not NAME.fullmatch(value)):
            raise _wrong(where, f"{'a name' if is_name else 'text'} of at most {LONGEST} characters", value)
    return value


def _name(kind: type) -> str:
    return {str: "text", int: "an integer", float: "a number", bool: "true or false", type(None): "null"}[kind]


def _short(value: object) -> str:
    return reprlib.repr(value)  # of a long list, a part


def _wrong(where: str, allowed: str, value: object) -> ValueError:
    return ValueError(f"`{where}` in config.json must be {allowed}, got {_short(value)}.")

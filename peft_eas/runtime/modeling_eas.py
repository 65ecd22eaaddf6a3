"""Models merged by peft_eas.

A merged model is a transformers model of its base class with some attentions gone. This file, and those beside it that
it imports, hold all that such a model needs, for every family, and import nothing but torch and transformers: they
travel with each checkpoint, so that `AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)` loads it where
`peft_eas` is not installed. The names `EAS<class>` (`EASLlamaForCausalLM`, `EASLlamaConfig`, ...) are made on demand
from the transformers `<class>`.
"""

from __future__ import annotations

import copy
import importlib
import re
import sys
import tempfile
import types
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

from .eas_files import CHECKSUMS, SCRATCH, clear, install
from .eas_files import verify as verify_files
from .eas_propagation import UNREADABLE
from .eas_record import Record, check_layers
from .eas_structure import restructure


def describe(model: PreTrainedModel, folder: str | Path, repo_id: str | None = None) -> None:
    """Write the model card into a folder, for a repository if there is one: where this file is a part of `peft_eas`,
    which knows how."""
    package, is_part, _ = __name__.rpartition(".runtime.")
    if is_part:
        importlib.import_module(f"{package}.card").write_card(model, folder, repo_id)


_Mixin: Any = object  # which may take all that there is in the class it is mixed into


class EASMixin(_Mixin):
    """A transformers model whose attentions are partly gone; comes before the base class."""

    def __init__(self, config: PreTrainedConfig, *args, **kwargs) -> None:
        record = Record.parse(getattr(config, "eas", None))
        own = self._base().config_class.model_type
        if record.model_type != own:
            raise ValueError(f"`eas.model_type` in config.json is {record.model_type!r}, but the model is a {own!r}.")
        super().__init__(config, *args, **kwargs)
        restructure(self, record)
        Record.read(config.eas)  # what nothing of this has found

    @classmethod
    def _base(cls) -> type[PreTrainedModel]:
        return next(c for c in cls.__mro__ if c.__module__ != __name__)

    @classmethod
    def is_custom_code(cls) -> bool:
        """As the base class: of other classes, transformers leaves buffers that no checkpoint holds without values."""
        return not cls._base().__module__.startswith("transformers.")

    def init_continuous_batching(self, *args, **kwargs):
        """As in transformers, but refused where the mask is read, before anything runs."""
        if Record.read(self.config.eas).propagates:
            raise ValueError(UNREADABLE.format("continuous batching"))
        return super().init_continuous_batching(*args, **kwargs)

    # transformers reads in the module of a class whether it can

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return cls._base()._can_set_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return cls._base()._can_set_experts_implementation()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, verify: bool = False, **kwargs
    ):
        """As in transformers, but a checkpoint that is not what its configuration says is an error.

        Args:
            pretrained_model_name_or_path: As in transformers, and so are all others but `verify`.
            verify: Whether to compare the weights with the checksums that were saved with them, which reads all of the
                files.

        Raises:
            ValueError: if weights are missing, other than those of a head that the checkpoint's class does not have; if
                there are some of layers that no layer has; or if `verify` finds a file that is not as it was saved.
            OSError: if a file of weights is truncated or corrupt.
        """
        name = pretrained_model_name_or_path
        if verify:
            verify_files(name, **{key: kwargs[key] for key in _WHERE if key in kwargs})
        try:
            model, info = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        except SafetensorError as error:
            raise OSError(
                f"The weights in {name} can't be read ({error}): a file is truncated or corrupt. Download it again, or "
                "merge again."
            ) from error
        record = Record.read(model.config.eas)
        of_layer = re.compile(rf"(^|\.)({'|'.join(re.escape(kind.layers) for kind in record.attentions)})\.\d+\.")
        wrong = {
            "missing": sorted(set(info["missing_keys"]) - model._new_by_right(info["missing_keys"])),
            "unexpected": sorted(filter(of_layer.search, info["unexpected_keys"])),  # a head may be left out
        }
        if any(wrong.values()):
            listed = "; ".join(
                f"{kind}: {', '.join(keys[:4])}{' ...' * (len(keys) > 4)}" for kind, keys in wrong.items() if keys
            )
            raise ValueError(
                f"The weights in {name} are not those of its config.json, which skips the attentions of layers "
                f"{record.skipped} ({listed}). Use the config.json that was saved with the weights."
            )
        return (model, info) if output_loading_info else model

    def _new_by_right(self, names: Collection[str]) -> set[str]:
        """Those of the names of weights that a checkpoint can't have, as its class doesn't: of a head for another task,
        with or without the prefix of the body."""
        saved, *_ = self.config.architectures or [type(self).__name__]
        if not names or saved == type(self).__name__:
            return set()
        bases = auto_classes(self._model_type()).values()
        known: dict[str, Any] = {eas_class(base).__name__: eas_class(base) for base in bases}
        if saved not in known:
            return set()
        with torch.device("meta"):
            weights = known[saved]._from_config(copy.deepcopy(self.config)).state_dict()
        prefix = f"{self.base_model_prefix}."
        return {name for name in names if not {name, name.removeprefix(prefix), prefix + name} & weights.keys()}

    def _model_type(self) -> str:
        return self._base().config_class.model_type

    def save_pretrained(
        self,
        save_directory,
        is_main_process: bool = True,
        *args,
        push_to_hub: bool = False,
        distributed_checkpoint: bool = False,
        **kwargs,
    ) -> None:
        """As in transformers, but at every moment the folder holds a model that loads: the one that was there, or the
        new one. See `eas_files.install`."""
        self.config.auto_map = {
            "AutoConfig": f"modeling_eas.{type(self.config).__name__}",
            **{auto: f"modeling_eas.EAS{c.__name__}" for auto, c in auto_classes(self._model_type()).items()},
        }
        # by the names of its own modules, and not by those of the checkpoint that the base model came from
        kwargs.setdefault("save_original_format", False)
        folder = Path(save_directory)
        if push_to_hub:
            saving = {key: value for key, value in kwargs.items() if key not in _HUB_KWARGS}
            self.save_pretrained(folder, is_main_process, *args, **saving)
            self.push_to_hub(kwargs.pop("repo_id", None) or folder.name, *args, **kwargs)
            return
        if distributed_checkpoint:  # all processes write to one folder
            super().save_pretrained(folder, is_main_process, *args, distributed_checkpoint=True, **kwargs)
            return
        if not self.should_save_on_this_rank(is_main_process):  # it takes part in gathering the weights
            with tempfile.TemporaryDirectory() as scratch:
                super().save_pretrained(scratch, is_main_process, *args, **kwargs)
            return
        folder.mkdir(parents=True, exist_ok=True)
        clear(folder)
        with tempfile.TemporaryDirectory(dir=folder, prefix=SCRATCH) as scratch:
            super().save_pretrained(scratch, is_main_process, *args, **kwargs)
            install(Path(scratch), folder)
        describe(self, folder)

    def _upload_modified_files(self, working_dir, repo_id, *args, **kwargs):
        # transformers has put an empty card there since `save_pretrained`
        describe(self, working_dir, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


_HUB_KWARGS = ("repo_id", "commit_message", "commit_description", "private", "revision", "create_pr", "tags")
_WHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def auto_classes(model_type: str) -> dict[str, type[PreTrainedModel]]:
    """`{auto class: model class}` that transformers has for `model_type`, those registered from outside included."""
    found = {}
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        if mapping is None or not name.startswith("AutoModel"):
            continue
        value = mapping._model_mapping.get(model_type)
        candidates = [getattr(transformers, value)] if isinstance(value, str) else []
        candidates += [model for config, model in mapping._extra_content.items() if config.model_type == model_type]
        for model in candidates:
            if model.config_class.model_type == model_type:  # some entries are models of another configuration
                found[name] = model
    return found


class EASConfigMixin(_Mixin):
    """A transformers configuration with the record `eas`; comes before the base class."""

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        check_layers(config_dict)
        register_models(cls)
        of_its_own = {key: value for key, value in config_dict.items() if key != CHECKSUMS}
        return super().from_dict(of_its_own, **kwargs)


def register_config(base: type[PreTrainedConfig]) -> None:
    """Let `AutoConfig` know merged models over `base`; their model classes follow when one is loaded."""
    AutoConfig.register(f"eas_{base.model_type}", eas_class(base), exist_ok=True)


def register_by_name(model_types: Iterable[str]) -> None:
    """The same over transformers' own models of these types, none of which is imported before one is asked for."""
    for model_type in model_types:
        key = f"eas_{model_type}"
        CONFIG_MAPPING._mapping[key] = f"EAS{CONFIG_MAPPING_NAMES[model_type]}"
        CONFIG_MAPPING._modules[model_type_to_module_name(key)] = sys.modules[__name__]


def register_models(config_class: type[PreTrainedConfig]) -> None:
    """Let transformers' auto classes know the merged models of `config_class`."""
    for auto, base in auto_classes(config_class.model_type.removeprefix("eas_")).items():
        getattr(modeling_auto, auto).register(config_class, eas_class(base), exist_ok=True)


def eas_class(base: Any) -> type:
    """The class of merged models over the model class `base`, or of their configurations over the class `base`."""
    name = f"EAS{base.__name__}"
    known = globals().get(name)
    if known is not None and base in known.__bases__:
        return known
    if issubclass(base, PreTrainedConfig):
        mixin: type = EASConfigMixin
        members: dict[str, Any] = {"model_type": f"eas_{base.model_type}", "_auto_class": "AutoConfig"}
    else:
        autos = [auto for auto, cls in auto_classes(base.config_class.model_type).items() if cls is base]
        members = {"config_class": eas_class(base.config_class), "_auto_class": autos[0] if autos else "AutoModel"}
        mixin = EASMixin
    made = types.new_class(name, (mixin, base), exec_body=lambda ns: ns.update(members, __module__=__name__))
    globals()[name] = made
    return made


def __getattr__(name: str) -> type:
    """Make `EAS<class>` from the transformers class `<class>`."""
    base = getattr(transformers, name.removeprefix("EAS"), None) if name.startswith("EAS") else None
    if not (isinstance(base, type) and issubclass(base, (PreTrainedConfig, PreTrainedModel))):
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}: transformers {transformers.__version__} has no class "
            f"{name.removeprefix('EAS')!r}. If the family was registered from outside, import what registers it."
        )
    return eas_class(base)

"""Merging from files to files, a tensor at a time: `merge_checkpoint`.

The base model is loaded as one of `Unread` tensors, which is what `merge_and_unload()` then folds the adapter into. So
there is one way to merge; only that here the weights are read, folded and written one after the other, into files that
have the very bytes of those that `save_pretrained` writes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from peft import PeftConfig, PeftModel, TaskType
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.models.auto import modeling_auto
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME, cached_file
from transformers.utils.logging import tqdm

from .config import EASType
from .folders import kept_folder
from .runtime.eas_files import CONFIG, install
from .tensor_files import Shard, bytes_of, check_finite, sources_of, tensors_in
from .unread import Recipe, Unread, meta_of

MAX_SHARD_SIZE = "50GB"
"""As in `save_pretrained`."""

WAY_OUT = (
    "Way out: load the model as a whole, put the adapter on it with `PeftModel.from_pretrained(model, adapter)`, and "
    "save what `merge_and_unload()` returns."
)
_TASKS = {
    TaskType.SEQ_CLS: modeling_auto.AutoModelForSequenceClassification,
    TaskType.TOKEN_CLS: modeling_auto.AutoModelForTokenClassification,
    TaskType.QUESTION_ANS: modeling_auto.AutoModelForQuestionAnswering,
    TaskType.SEQ_2_SEQ_LM: modeling_auto.AutoModelForSeq2SeqLM,
    TaskType.FEATURE_EXTRACTION: modeling_auto.AutoModel,
}
_GENERATE = (
    (modeling_auto.AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    (modeling_auto.AutoModelForImageTextToText, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    (modeling_auto.AutoModelForMultimodalLM, modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES),
)


def merge_checkpoint(
    base: str | os.PathLike,
    adapter: str | os.PathLike,
    out: str | os.PathLike,
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Merge an adapter into a base model, both in files, without having the model in memory.

    The files are those of `merge_and_unload().save_pretrained(out, max_shard_size=max_shard_size)`, byte for byte. One
    tensor at a time is in memory. A merge that was killed goes on where it was, when it is called again with the same
    base and adapter; until all is written there is no `out`, but a folder `.OUT.merging` beside it.

    Args:
        base: The base model, a folder or a name on the Hub.
        adapter: The adapter, likewise.
        out: Folder for the merged model: a name that is free, or an empty folder.
        dtype: Of the merged model; by default that of the base model, as with `from_pretrained(dtype="auto")`.
        max_shard_size: Of a file of weights, as in `save_pretrained`.

    Raises:
        ValueError: for an adapter of another kind, and a base model that is quantised, has no safetensors, or lacks
            weights; for an `out` that is something else; for NaN in folded weights. There is no `out` then.
        OSError: for files that are not there, or can't be read.
    """
    plan_checkpoint(base, adapter, dtype=dtype, max_shard_size=max_shard_size).write(out)


@dataclass(frozen=True)
class CheckpointPlan:
    """A merge from files to files, as it is going to be.

    Attributes:
        model: The merged model, whose weights are unread.
        skipped: The attentions that it does without.
        shards: Its files of weights.
        index: What says where each weight is, if there are several files.
        sources: The files that the base model's weights are read from. If there are none, shapes are those that its
            configuration gives.
    """

    model: PreTrainedModel
    skipped: list[int | str]
    shards: tuple[Shard, ...]
    index: dict[str, Any] | None
    sources: tuple[str, ...]

    @property
    def size(self) -> int:
        """Of all files of weights, in bytes."""
        return sum(shard.size for shard in self.shards)

    @property
    def peak(self) -> int:
        """How many bytes of tensors there are in memory at most: what the adapter has, and what one tensor takes."""
        tensors = [tensor for shard in self.shards for tensor in shard.tensors.values()]
        held = {id(source): source for tensor in tensors for source in sources_of(tensor)}
        of_adapter = sum(source.nbytes for source in held.values() if isinstance(source, torch.Tensor))
        return of_adapter + max(tensor.recipe.peak() for tensor in tensors if isinstance(tensor, Unread))

    def write(self, out: str | os.PathLike, finish: Callable[[Path], None] = lambda folder: None) -> None:
        """Read, fold and write.

        Args:
            out: As in `merge_checkpoint`.
            finish: Puts more files into the folder of the merged model.

        Raises:
            ValueError: as `merge_checkpoint`.
        """
        if not self.sources:
            raise ValueError(f"{self.model.name_or_path} has no weights to merge into, only a configuration.")
        with kept_folder(out) as (kept, folder):
            weights, made_of = kept / "weights", kept / "made_of"
            fingerprint = self._fingerprint()
            if not made_of.exists() or made_of.read_text() != fingerprint:
                shutil.rmtree(weights, ignore_errors=True)
                weights.mkdir()
                made_of.write_text(fingerprint)
            with tqdm(total=self.size, unit="B", unit_scale=True, desc="Merging") as progress:
                for shard in self.shards:
                    shard.write(weights, progress.update)
            if self.index is not None:
                text = json.dumps(self.index, indent=2, sort_keys=True) + "\n"
                (weights / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")
            self.model.save_pretrained(folder, state_dict={})  # all but the weights
            finish(folder)
            # the last that can fail is behind, and the weights may leave where they are kept
            if hasattr(self.model.config, "eas"):
                (folder / CONFIG).replace(weights / CONFIG)
                install(weights, folder)
            else:
                for file in weights.iterdir():
                    file.replace(folder / file.name)

    def _fingerprint(self) -> str:
        """Of all that the bytes of the weights depend on."""
        from . import __version__

        files = [(os.path.realpath(file), os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in self.sources]
        digest = hashlib.sha256(repr((__version__, torch.__version__, transformers.__version__, files)).encode())
        for shard in self.shards:
            digest.update(shard.name.encode() + shard.header)
            for tensor in shard.tensors.values():
                for source in sources_of(tensor):
                    digest.update(repr(source.args).encode() if isinstance(source, Recipe) else bytes_of(source))
        return digest.hexdigest()


def plan_checkpoint(
    base: str | os.PathLike,
    adapter: str | os.PathLike,
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> CheckpointPlan:
    """Merge without reading any weights but the adapter's. Arguments and errors are those of `merge_checkpoint`."""
    base, adapter = os.fspath(base), os.fspath(adapter)
    config = PeftConfig.from_pretrained(adapter)
    if config.peft_type != EASType.EAS:
        raise ValueError(f"{adapter} is an adapter of type {config.peft_type!s}, not an EAS adapter.")
    sources, base_model, missing = _load(base, model_class_of(base, config), dtype or "auto")
    class_name = type(base_model).__name__
    model = PeftModel.from_pretrained(base_model, adapter, config=config)
    for parameter in model.parameters():
        if not isinstance(parameter, Unread):  # these are looked at when they are written
            check_finite(parameter)
    skipped = model.skip_layers
    merged = model.merge_and_unload()
    tensors = _saved(merged)
    lacking = [name for name, tensor in tensors.items() if any(tensor is one for one in missing)]
    if lacking:
        raise ValueError(
            f"{base} lacks {len(lacking)} weights of a {class_name}, such as {lacking[0]}, which the adapter does not "
            "have: is it the base model that the adapter was trained with?"
        )
    split = split_torch_state_dict_into_shards(
        _storages(tensors), filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    index = None
    if split.is_sharded:
        metadata = {"total_parameters": merged.num_parameters(), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
    shards = [Shard.of(name, {key: tensors[key] for key in keys}) for name, keys in split.filename_to_tensors.items()]
    return CheckpointPlan(merged, skipped, tuple(shards), index, sources)


def model_class_of(base: str, adapter: PeftConfig | None = None) -> Any:
    """What loads a model: the class that an adapter was trained with, or the auto class of its task; else that of
    models that generate text.

    Raises:
        ValueError: if the adapter names something else than a class of models.
    """
    mapping = None if adapter is None else adapter.auto_mapping
    name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    own = getattr(transformers, name, None) if isinstance(name, str) else None
    if own is not None:
        if not (isinstance(own, type) and issubclass(own, PreTrainedModel)):
            raise ValueError(
                f"adapter_config.json names {name!r} as its `base_model_class`, which is no class of models."
            )
        return own
    if adapter is not None and adapter.task_type in _TASKS:
        return _TASKS[adapter.task_type]
    model_type = AutoConfig.from_pretrained(base).model_type
    return next((auto for auto, names in _GENERATE if model_type in names), modeling_auto.AutoModelForCausalLM)


def _load(base: str, model_class: Any, dtype: Any) -> tuple[tuple[str, ...], PreTrainedModel, list[torch.Tensor]]:
    """The files of a model's weights, the model, unread, and those of its tensors that the files lack."""
    config = getattr(model_class, "config_class", AutoConfig).from_pretrained(base)
    parts = [config, *(value for value in vars(config).values() if isinstance(value, PreTrainedConfig))]
    if any(getattr(part, "quantization_config", None) for part in parts):
        raise ValueError(
            f"{base} is quantised, and a merge from files to files does not dequantise. {WAY_OUT} That dequantises; or "
            "merge into the float model that it was made from (`--base`)."
        )
    make = getattr(model_class, "from_config", None) or model_class._from_config
    with torch.device("meta"):
        skeleton = make(config, dtype=config.dtype if dtype == "auto" else dtype)
    if not isinstance(skeleton.config, type(config)):  # a model of text alone, of a checkpoint of text and images
        config = config.get_text_config()
    files = _files(base, getattr(config, "transformers_weights", None))
    state = {key: value for file in files for key, value in tensors_in(file)}
    if not files:
        state = {key: Unread(Recipe(value, torch.empty)) for key, value in skeleton.state_dict().items()}
    try:
        model, info = type(skeleton).from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    except NotImplementedError as error:
        raise ValueError(
            f"{base} has to be converted when it is loaded, which takes its values ({error}). {WAY_OUT}"
        ) from error
    model.name_or_path = model.config.name_or_path = base  # what `from_pretrained(base)` knows besides
    if model.can_generate():
        try:
            model.generation_config = GenerationConfig.from_pretrained(base)
        except OSError:
            model.generation_config = GenerationConfig.from_pretrained(
                base, config_file_name=CONFIG, _from_model_config=True
            )
    return files, model, [model.get_parameter_or_buffer(name) for name in info["missing_keys"]]


def _files(base: str, named: str | None) -> tuple[str, ...]:
    """The safetensors files of a model, on this machine; none if it has no weights at all."""
    for name in [named] if named else [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME]:
        file = cached_file(base, name, _raise_exceptions_for_missing_entries=False)
        if file is not None and name.endswith(".json"):
            index = json.loads(Path(file).read_text(encoding="utf-8"))
            return tuple(cached_file(base, part) for part in sorted(set(index["weight_map"].values())))
        if file is not None:
            return (file,)
    others = (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
    if any(cached_file(base, name, _raise_exceptions_for_missing_entries=False) for name in others):
        raise ValueError(f"{base} has its weights in PyTorch's format, not in safetensors. {WAY_OUT}")
    return ()


def _saved(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors that `save_pretrained` would write, in its order."""
    ignored = model._keys_to_ignore_on_save or ()
    shapes = {name: meta_of(tensor) for name, tensor in model.state_dict().items() if name not in ignored}
    names = remove_tied_weights_from_state_dict(shapes, model)
    tensors = {name: model.get_parameter_or_buffer(name) for name in names}
    return tensors if hasattr(model.config, "eas") else revert_weight_conversion(model, tensors)


def _storages(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors on the meta device whose storages are as large as those that `save_pretrained` counts: of views of one
    storage it makes copies, and a view that is left alone it takes for all of its storage."""
    shapes = {name: meta_of(tensor) for name, tensor in tensors.items()}
    views = Counter(shape.untyped_storage()._cdata for shape in shapes.values())
    return {
        name: shape if views[shape.untyped_storage()._cdata] == 1 else torch.empty_like(shape)
        for name, shape in shapes.items()
    }

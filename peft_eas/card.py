"""The model card of a merged model: metadata for the Hub, and as text what is skipped, saved and to be known."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, constants, model_info, try_to_load_from_cache
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel

from .checks import one_line
from .config import RECORDED, EASConfig
from .folders import new_file
from .runtime.eas_record import Record
from .runtime.modeling_eas import auto_classes
from .work import Work, base_of, count, on_meta

logger = logging.getLogger(__name__)

TAGS = ["eas", "attention-skipping"]
TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModel": "feature-extraction",
}
"""The Hub's names of tasks, by the auto class that loads a model for it."""
OWN = ("library_name", "pipeline_tag", "base_model", "base_model_relation", "datasets", "metrics", "model-index")
"""Metadata that says the same as the text: who edits it has edited the card."""
INHERITED = ("license", "license_name", "license_link", "language")
"""Metadata of the base model's, until somebody edits it. What is in neither of the lists is somebody's, and stays."""
MARK = "<!-- Written by peft_eas, which replaces it as long as nobody edits it:"


def model_card(
    model: PreTrainedModel,
    repo_id: str | None = None,
    *,
    base_model: str | None = None,
    datasets: str | list[str] | None = None,
    language: str | list[str] | None = None,
    eval_results: list[EvalResult] | None = None,
    measured: Mapping[str, float] | None = None,
) -> ModelCard:
    """The card of a merged model.

    License and language are those of the base model's card: the `README.md` beside the base model, or the one on the
    Hub. If neither can be read, they are left out.

    Args:
        model: A model from `merge_and_unload()`.
        repo_id: The name of its repository, for the title and the code that loads it.
        base_model: The base model's name on the Hub. By default that which the adapter has, unless it is a folder.
        datasets: Names, on the Hub, of the datasets that it was trained on.
        language: Codes of languages, in place of the base model's.
        eval_results: Evaluation results, for the text and the Hub's `model-index`.
        measured: How many times as fast as the base model it was, by what was timed: `{"prefill of 512 tokens": 1.13}`.

    Raises:
        ValueError: if the model was not merged by peft_eas, or if `base_model` can't be the name of a repository.
    """
    eas = getattr(model.config, "eas", None)
    if eas is None:
        raise ValueError(
            f"This {type(model).__name__} was not merged by peft_eas, or nothing was left to merge (its config has no "
            "`eas`): there is nothing to say about it."
        )
    for given in (base_model, repo_id):
        if given is not None:
            validate_repo_id(given)
    record = Record.read(eas)
    base_model = base_model or _repository(record.config.get("base_model"))
    name = repo_id or f"{base_model.split('/')[-1] if base_model else record.model_type} with EAS"
    auto = _auto_class(model, record)
    inherited = _inherited(model.name_or_path, base_model)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=TASKS.get(auto),
        base_model=base_model,
        # What the Hub calls a merge is made of several models, and an adapter is no whole model.
        base_model_relation="finetune" if base_model else None,
        tags=[*TAGS, *(model.model_tags or ())],
        datasets=datasets,
        metrics=_unique(result.metric_type for result in eval_results or ()) or None,
        eval_results=eval_results or None,
        model_name=name.split("/")[-1] if eval_results else None,
        **inherited | ({"language": language} if language else {}),
    )
    text = [
        f"# {name}",
        _summary(record, base_model),
        _how_to_load(auto, repo_id, type(model).__bases__[1]),
        _costs(model, count(base_of(model)), count(on_meta(model)), measured),
        _results(eval_results),
        _how_made(record),
        _limits(model, record),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, text)) + "\n")


def write_card(model: PreTrainedModel, folder: str | os.PathLike, repo_id: str | None = None, **about: Any) -> None:
    """Write `model_card(model, repo_id, **about)` to `README.md` in a folder, unless somebody's text is there.

    A card that this function wrote is replaced until its text, or the metadata that says the same, is edited; so is one
    without any text of its own (transformers' empty template, or a license that was chosen on the Hub). Other metadata
    that somebody wrote is kept: tags, license, language, widgets and so on.
    """
    path = Path(folder) / constants.REPOCARD_NAME
    kept: dict[str, Any] = {}
    if path.exists():
        try:
            kept = _metadata_to_keep(ModelCard.load(path))
        except Exception as error:  # somebody's text, or YAML with errors of whatever kind
            logger.warning("%s is kept. %s `peft_eas.model_card(model)` makes another.", path, error)
            return
    try:
        card = model_card(model, repo_id, **about)
    except Exception as error:  # a family that can't be described is saved all the same
        logger.warning("%s has no model card: %s", path.parent, error)
        return
    own = card.data.to_dict()
    mark = f"{MARK} {_checksum(own, OWN, card.text)} {_checksum(own, INHERITED)} -->"
    if "license" in kept:
        own = {key: value for key, value in own.items() if not key.startswith("license")}
    card.data = ModelCardData(**own | kept | {"tags": _unique([*own["tags"], *kept.get("tags", ())])})
    card.text += f"\n{mark}\n"
    with new_file(path) as file:
        card.save(file)


def read_card(name: str) -> ModelCardData:
    """The metadata of the model or adapter `name`, a folder or a name on the Hub; empty if there is none to be had."""
    return _read_card(name) if Path(name).is_dir() else _read_card_once(name)


def layer_picture(skip: Collection[int], present: Collection[int]) -> list[str]:
    """The layers up to the last with an attention, in lines of 40: `#` for one that is kept, `.` for a skipped one, and
    `-` for a layer without."""
    marks = ["." if i in skip else "#" if i in present else "-" for i in range(max(present) + 1)]
    rows = [marks[start : start + 40] for start in range(0, len(marks), 40)]
    return [f"{40 * n:>3} {''.join(row)} {40 * n + len(row) - 1}" for n, row in enumerate(rows)]


# ----------------------------------------------------------------------------------------------------------------------
# Metadata
# ----------------------------------------------------------------------------------------------------------------------


def _repository(name: Any) -> str | None:
    """A name out of a file, if it can be that of a repository."""
    try:
        validate_repo_id(name)
    except ValueError:
        return None
    return name


def _auto_class(model: PreTrainedModel, record: Record) -> str:
    name = type(model).__name__.removeprefix("EAS")
    autos = [auto for auto, found in auto_classes(record.model_type).items() if found.__name__ == name]
    return next((auto for auto in TASKS if auto in autos), "AutoModel")


def _read_card(name: str) -> ModelCardData:
    folder = Path(name)
    try:
        path = folder / constants.REPOCARD_NAME if folder.is_dir() else try_to_load_from_cache(name, "README.md")
        if isinstance(path, (str, Path)):
            return ModelCard.load(path, ignore_metadata_errors=True).data
        return model_info(name, timeout=10).card_data or ModelCardData()
    except Exception as error:  # the network's, the Hub's, YAML's: none is worth a model that is not saved
        logger.info("The card of %s can't be read: %s", name, error)
        return ModelCardData()


_read_card_once = functools.cache(_read_card)
"""For the Hub: one that does not answer is not to be waited for at each checkpoint."""


def _inherited(*sources: str | None) -> dict[str, Any]:
    """License and language, each from the first of these cards that has it."""
    found: dict[str, Any] = {}
    for source in _unique(filter(None, sources)):
        data = read_card(source).to_dict()
        if "license" not in found and isinstance(data.get("license"), str):
            terms = {key: data.get(key) for key in ("license", "license_name", "license_link")}
            found |= {key: value for key, value in terms.items() if isinstance(value, str)}
            link = found.get("license_link")
            if link and "://" not in link:  # a file in the base model's repository
                del found["license_link"]
                if not Path(source).is_dir():
                    found["license_link"] = f"{constants.ENDPOINT}/{source}/blob/main/{link}"
        if "language" in data:
            found.setdefault("language", data["language"])
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Text
# ----------------------------------------------------------------------------------------------------------------------


def escaped(text: object) -> str:
    """Text that came from a file, fit for a line or a table's cell: words, and no Markdown or HTML."""
    return re.sub(r"([\\`<>|\[\]])", r"\\\1", one_line(" ".join(str(text).split())))


def _is_skipped_first(record: Record) -> bool:
    """Whether the attentions were taken out before anything was trained, by `skip_attentions`."""
    return record.config.get("skipped") == "first"


def _summary(record: Record, base_model: str | None) -> str:
    base = f"[{base_model}]({constants.ENDPOINT}/{base_model})" if base_model else f"A `{record.model_type}` model"
    skip, lines = record.skipped, []
    for kind in record.attentions:
        lines += [f"{kind.stack}, {kind.kind}"] * record.by_name
        lines += layer_picture(kind.skip, kind.present) if kind.present else []
    picture = "\n".join(lines)
    total = len(record.present)
    has_others = "  - no attention" * any("-" in line for line in lines)
    method = "[Effective Attention Skipping](https://arxiv.org/abs/2403.15226) (EAS)"
    if _is_skipped_first(record):
        how = f"without {len(skip)} of its {total} attentions, which {method} took out before any training"
    else:
        how = f"fine-tuned with {method}: {len(skip)} of its {total} attentions are gone, and the adapters of the "
        how += "training are folded into the weights"
    return (
        f"{base}, {how}.\n\n"
        f"```\nlayers  # attention kept  . skipped{has_others}\n{picture}\n```\n\n"
        f"Skipped: {', '.join(map(escaped, skip)) or 'none'}."
    )


TRUSTED = """\
`trust_remote_code=True` lets transformers run `modeling_eas.py` and the files beside it, which need only torch and
transformers. Where `peft_eas` is installed, `import peft_eas` takes its place."""
OUTSIDE = """\
{} is no class of transformers: `peft_eas` has to be installed, and the module imported that registers this class with
transformers and its row with `peft_eas`."""


def _how_to_load(auto: str, repo_id: str | None, base_class: type) -> str:
    reader = "AutoProcessor" if auto == "AutoModelForImageTextToText" else "AutoTokenizer"
    is_stock = base_class.__module__.startswith("transformers.")
    first = "" if is_stock else f"import {base_class.__module__}\n"
    trust = ", trust_remote_code=True" if is_stock else ""  # else the tokenizer asks for it, too
    return f"""\
## Loading

```python
{first}from transformers import {auto}, {reader}

name = "{repo_id or "..."}"{"" if repo_id else "  # this repository, or a folder with its files"}
model = {auto}.from_pretrained(name{trust})
{"processor" if reader == "AutoProcessor" else "tokenizer"} = {reader}.from_pretrained(name{trust})
```

{TRUSTED if is_stock else OUTSIDE.format(base_class.__name__)}"""


def _costs(model: PreTrainedModel, base: Work, merged: Work, measured: Mapping[str, float] | None) -> str:
    rows = [("parameters", base.parameters, merged.parameters)]
    if model.can_generate() and base.kv_bytes and merged.kv_bytes:
        rows.append(("KV cache, bytes a token", base.kv_bytes, merged.kv_bytes))
    rows += [(f"operations to read {n} tokens", base.prefill[n], merged.prefill[n]) for n in base.prefill]
    lines = ["## Size and speed", "", "| computed | base model | this model | ratio |", "|---|---:|---:|---:|"]
    lines += [f"| {what} | {_short(old)} | {_short(new)} | {new / old:.3f} |" for what, old, new in rows]
    lines += [
        "",
        "Computed from the shapes, not measured: operations are those of matrix products. Time goes into other",
    ]
    lines += [f"things, too. Bytes are those of {str(model.dtype).removeprefix('torch.')}."]
    if measured:
        lines += ["", "| measured | times as fast as the base model |", "|---|---:|"]
        lines += [f"| {escaped(what)} | {ratio:.2f} |" for what, ratio in measured.items()]
    return "\n".join(lines)


def _results(eval_results: list[EvalResult] | None) -> str:
    if not eval_results:
        return ""
    lines = ["## Evaluation", "", "| task | dataset | metric | value |", "|---|---|---|---:|"]
    for result in eval_results:
        task, metric = result.task_name or result.task_type, result.metric_name or result.metric_type
        cells = (task, result.dataset_name, metric, result.metric_value)
        lines.append(f"| {' | '.join(map(escaped, cells))} |")
    return "\n".join(lines)


def _how_made(record: Record) -> str:
    from . import __version__

    settings: dict[str, Any] = {key: record.config[key] for key in RECORDED if key in record.config}
    try:
        EASConfig(**settings)
    except ValueError:  # somebody changed the file
        settings = {}
    listed = ", ".join(f"`{key}={value!r}`" for key, value in settings.items())
    if _is_skipped_first(record):
        text = f"The attentions were taken out by `skip_attentions` of peft_eas {__version__}"
        text += f" with {listed}." if listed else "."
        text += "\nWhether the model was trained since then, and how, is not known here."
    else:
        text = f"Fine-tuned and merged with peft_eas {__version__}"
        text += f": `EASConfig` with {listed}." if listed else "."
    return f"## Training\n\n{text}"


def _limits(model: PreTrainedModel, record: Record) -> str:
    made = "measured" if _is_skipped_first(record) else "trained"
    lines = [
        "## Limits",
        "",
        f"- The attentions to skip were chosen, and their stand-ins {made}, for one task. Others may have suffered.",
        f"- It is a model of a class of its own (`model_type: {escaped(model.config.model_type)}`), for transformers "
        "5.15 or later. Other engines don't load it as it is.",
    ]
    if record.propagates:
        lines.append(
            "- Where an attention is gone, a mean over other tokens is left, which reads the attention's mask: it runs "
            "with `attn_implementation='sdpa'` and `'eager'`, and not in continuous batching."
        )
    return "\n".join(lines)


def _short(number: int) -> str:
    if number < 10**6:
        return f"{number:,}"
    power = min(4, (len(str(number)) - 1) // 3)
    return f"{number / 1000**power:,.1f} {' kMGT'[power]}"


def _unique(items: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(items))


# ----------------------------------------------------------------------------------------------------------------------
# Whose card it is
# ----------------------------------------------------------------------------------------------------------------------


def _checksum(metadata: dict[str, Any], keys: Sequence[str], text: str = "") -> str:
    lines = [line for line in text.splitlines() if not line.startswith(MARK)]
    content = [{key: metadata[key] for key in keys if key in metadata}, "\n".join(lines).strip()]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _metadata_to_keep(there: ModelCard) -> dict[str, Any]:
    """What somebody wrote into a card, if it was into the metadata only.

    Raises:
        ValueError: if it was into the text.
    """
    metadata = there.data.to_dict()
    mark = next((line.split() for line in there.text.splitlines() if line.startswith(MARK)), None)
    if mark is None:
        lines = set(there.text.splitlines()) - set(ModelCard.from_template(ModelCardData()).text.splitlines())
        if any(line.strip() and "has been automatically generated" not in line for line in lines):
            raise ValueError("Somebody wrote it.")
        return metadata
    *_, own, inherited, _ = mark
    if own != _checksum(metadata, OWN, there.text):
        raise ValueError("Somebody edited it.")
    ours = OWN if inherited != _checksum(metadata, INHERITED) else OWN + INHERITED
    return {key: value for key, value in metadata.items() if key not in ours}

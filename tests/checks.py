"""What holds for every family, and what tests compare by."""

from __future__ import annotations

import copy
import functools
import re
import tempfile
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel, Trainer, TrainingArguments
from zoo import tiny
from zoo.audio_language import SOUNDS
from zoo.families import EXAMPLES, adapted, auto_class, generates, skipped, tiny_inputs, tiny_model
from zoo.sizes import SPECIAL
from zoo.vision_language import IMAGES

from peft_eas import EASConfig, initialize_eas_weights
from peft_eas.export import onnx_file
from peft_eas.families import find_layers


def close(actual: torch.Tensor, expected: torch.Tensor, kept=..., tolerance: float = 1e-4) -> None:
    """Logits of `kept` tokens are the same, to this part of the largest one."""
    error = distance(expected[kept], actual[kept])
    assert error <= tolerance, f"differs by {error:.1e}"


@torch.no_grad()
def distance(expected: torch.Tensor, *actual: torch.Tensor) -> float:
    """The largest difference, relative to the largest of what is expected."""
    scale = expected.abs().max()
    return float(torch.stack([(logits - expected).abs().max() for logits in actual]).max() / scale)


def nothing_of_peft_is_left(merged: PreTrainedModel) -> None:
    for module in merged.modules():
        assert not type(module).__module__.startswith("peft."), module
        assert type(module).__module__ != "peft_eas.layer", module
        assert not hasattr(module, "base_layer")
    assert not hasattr(merged, "peft_config")
    assert "generate" not in vars(merged)
    assert not [n for n, _ in merged.named_parameters() if "lora" in n or "base_layer" in n]


def skip_unless_compiled() -> None:
    """Skip a test of `torch.compile` where it can't compile the base model, either."""
    try:
        torch.compile(tiny.model("llama"), backend="eager", fullgraph=True)(**tiny.inputs("llama"))
    except torch._dynamo.exc.TorchDynamoException as error:
        pytest.skip(f"torch {torch.__version__} can't compile the base model: {str(error)[:80]}")


def skip_without_onnx() -> None:
    """Skip a test of ONNX with a torch that is too old for it."""
    if Version(torch.__version__) < Version(onnx_file.TORCH):
        pytest.skip(f"exporting ONNX needs torch {onnx_file.TORCH}")


def logits(model: nn.Module, model_type: str, inputs: dict | None = None) -> torch.Tensor:
    inputs = inputs or tiny_inputs(model_type)
    torch.manual_seed(0)  # ViLT shuffles patches, which rounding shows
    with torch.no_grad():
        outputs = model(**inputs)
    if model_type in EXAMPLES:
        return outputs[EXAMPLES[model_type].output]
    found = outputs.logits[inputs["attention_mask"].bool()]
    return found.masked_fill(found == torch.finfo(found.dtype).min, 0)  # what Chameleon never says


def cache_of(model: nn.Module, inputs: dict) -> Cache:
    """What a forward leaves in the KV cache; in one of ours if the outputs have none (RecurrentGemma)."""
    outputs = model(**inputs, **asking(model))
    outputs = getattr(outputs, "language_model_outputs", outputs)
    if "past_key_values" in outputs:
        return outputs.past_key_values
    cache = DynamicCache(config=model.config)
    model(**inputs, use_cache=True, past_key_values=cache)
    return cache


def asking(model: nn.Module) -> dict[str, bool]:
    """For a cache; to ask again for what is the default is an error in the encoder of Switch Transformers."""
    return {} if getattr(model.config, "use_cache", False) else {"use_cache": True}


# ----------------------------------------------------------------------------------------------------------------------
# The checks, in the order of the page's columns
# ----------------------------------------------------------------------------------------------------------------------


def identity(model_type: str) -> None:
    """A fresh adapter changes nothing."""
    base = tiny_model(model_type)
    expected = logits(base, model_type)
    close(logits(get_peft_model(base, EASConfig(skip_layers=[])).eval(), model_type), expected, tolerance=1e-6)


def skipping(model_type: str) -> None:
    """Fresh adapters that skip are the base model whose attentions give zero."""
    base = tiny_model(model_type)
    layers = find_layers(base)
    dropped = skipped(base)
    whole = logits(base, model_type)
    for index in dropped:
        attention = base.get_submodule(layers[index].attention)
        if layers[index].row.core:  # the attention adds its input itself
            *_, projection = (m for m in attention.modules() if isinstance(m, nn.Linear))
            projection.register_forward_hook(lambda m, args, output: torch.zeros_like(output))
        else:
            attention.register_forward_hook(partial(_dropped, layers[index].row.convention == "adds_residual"))
    expected = logits(base, model_type)
    model = get_peft_model(tiny_model(model_type), EASConfig(skip_layers=dropped)).eval()
    close(logits(model, model_type), expected, tolerance=1e-5)
    assert (expected - whole).abs().max() > 1e-3, "the attentions do nothing"


def _dropped(adds_residual: bool, module: nn.Module, args: tuple, output):
    first = args[1] if adds_residual else torch.zeros_like(output[0] if isinstance(output, tuple) else output)
    return (first, *output[1:]) if isinstance(output, tuple) else first


def standing_in(model_type: str) -> None:
    """An attention whose output is a constant costs nothing to skip: its stand-in is that constant."""
    base = tiny_model(model_type)
    layers, dropped = find_layers(base), skipped(base)
    before = logits(base, model_type)
    generator = torch.Generator().manual_seed(3)
    shared = {base.get_submodule(layers[key].attention): layers[key].row for key in dropped}  # Zamba's serve several
    for attention, row in shared.items():
        module = attention
        if row.core:  # the attention adds its input itself
            *_, module = (m for m in attention.modules() if isinstance(m, nn.Linear))
        module.register_forward_hook(
            partial(_constant, row.convention == "adds_residual", torch.randn(64, generator=generator))
        )
    expected = logits(base, model_type)
    assert (expected - before).abs().max() > 1e-3, "the attentions did nothing"
    model = get_peft_model(base, EASConfig(skip_layers=dropped, propagation="none")).eval()
    initialize_eas_weights(model, [tiny_inputs(model_type)])
    close(logits(model, model_type), expected, tolerance=2e-4)
    merged = model.merge_and_unload()
    close(logits(merged, model_type), expected, tolerance=2e-4)
    close(logits(reloaded(merged, model_type), model_type), expected, tolerance=2e-4)


def _constant(adds_residual: bool, constant: torch.Tensor, module: nn.Module, args: tuple, output):
    first = output[0] if isinstance(output, tuple) else output
    first = torch.zeros_like(first) + constant[: first.shape[-1]] + (args[1] if adds_residual else 0)
    return (first, *output[1:]) if isinstance(output, tuple) else first


def reloaded(merged: PreTrainedModel, model_type: str) -> PreTrainedModel:
    with tempfile.TemporaryDirectory() as folder:
        merged.save_pretrained(folder)
        cls = auto_class(model_type)
        return (cls if hasattr(cls, "_model_mapping") else type(merged)).from_pretrained(folder).eval()


def merging(model_type: str) -> None:
    """Merged equals unmerged, with and without propagation, with one branch and two."""
    for settings in (dict(router="static", groups=2), dict(propagation="none")):
        model = adapted(model_type, **settings)
        expected = logits(model, model_type)
        base = tiny_model(model_type)
        fresh = get_peft_model(base, EASConfig(skip_layers=skipped(base))).eval()
        assert (expected - logits(fresh, model_type)).abs().max() > 1e-3, "the adapters do nothing"
        try:
            close(logits(model.merge_and_unload(), model_type), expected)
        except AssertionError:
            if not any("expert" in name for name, _ in model.named_parameters()):
                raise
            # where two experts are as likely, rounding may choose the other one: not with other adapters, too
            model = adapted(model_type, seed=3, **settings)
            expected = logits(model, model_type)
            close(logits(model.merge_and_unload(), model_type), expected)


def generation(model_type: str) -> None:
    """With a KV cache as without, before and after merging."""
    model = adapted(model_type)
    if not generates(model_type):
        return
    inputs = {name: value for name, value in tiny_inputs(model_type).items() if not name.startswith("decoder_")}
    for _ in range(2):
        settings = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, suppress_tokens=SPECIAL)
        expected = model.generate(**inputs, use_cache=False, **settings)
        assert torch.equal(model.generate(**inputs, **settings), expected)
        if "decoder_input_ids" in tiny_inputs(model_type):
            read_in_two(model, model_type)
        if isinstance(model, PeftModel):
            model = model.merge_and_unload()


def read_in_two(model: nn.Module, model_type: str) -> None:
    """A decoder that goes on from its cache gives what it gives at once."""
    whole, inputs = logits(model, model_type), tiny_inputs(model_type)
    ids = inputs.pop("decoder_input_ids")
    with torch.no_grad():
        cache = model(**inputs, decoder_input_ids=ids[:, :2], **asking(model)).past_key_values
        rest = model(**inputs, decoder_input_ids=ids[:, 2:], past_key_values=cache, **asking(model)).logits
    close(rest, whole[:, 2:])


def training(model_type: str) -> None:
    """A step of the Trainer changes every adapter, and nothing else."""
    model, example, loss = adapted(model_type), EXAMPLES.get(model_type), None
    if example is not None:
        batch = tiny_inputs(model_type) | (example.labels or {})
        if example.labels is None:
            loss = partial(_mean_square, example.output)
    else:
        labels = tiny_inputs(model_type)["input_ids"].clone()
        labels[:, :8] = -100
        batch = tiny_inputs(model_type) | {"labels": labels}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=1, per_device_train_batch_size=3, learning_rate=1e-2, report_to=[], save_strategy="no",
            use_cpu=True, disable_tqdm=True,
            gradient_checkpointing=model.base_model.model.supports_gradient_checkpointing
            and (example is None or example.checkpoints),
        )  # fmt: skip
        Trainer(
            model, args, train_dataset=[0, 1, 2], data_collator=lambda rows: batch, compute_loss_func=loss
        ).train()  # fmt: skip
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if example is not None and example.unused:
        trainable = {name for name in trainable if not re.search(example.unused, name)}
    assert changed == trainable, f"not trained: {sorted(trainable - changed)[:5]}"


def _mean_square(name: str, outputs, labels: None, num_items_in_batch: None) -> torch.Tensor:
    return outputs[name].square().mean()


def reloading(model_type: str) -> None:
    """Adapter and merged model give the same after saving and loading."""
    model = adapted(model_type)
    expected = logits(model, model_type)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(tiny_model(model_type), folder).eval()
        # tensors that were loaded are aligned in another way, for which some kernels add up in another order
        close(logits(loaded, model_type), expected, tolerance=1e-5)
    merged = model.merge_and_unload()
    expected = logits(merged, model_type)
    loaded = reloaded(merged, model_type)
    assert type(loaded) is type(merged)
    close(logits(loaded, model_type), expected, tolerance=1e-5)


def sizes(model_type: str) -> None:
    """The parameters of the skipped attentions are gone, and so are their keys and values."""
    base = tiny_model(model_type)
    layers, dropped = find_layers(base), skipped(base)
    prefixes, stays = [], []
    for place in map(layers.get, dropped):
        prefixes += [
            f"{place.layer}.{name}."
            for name in (place.row.attention, *place.row.attention_norms, *place.row.output_norms)
        ]
        stays += [f"{place.attention}.{place.row.residual_norm}."] if place.row.residual_norm else []
    named = list(base.named_parameters(remove_duplicate=False))
    removed = {n for n, _ in named if n.startswith(tuple(prefixes)) and not n.startswith(tuple(stays))}
    used_elsewhere = {id(p) for n, p in named if n not in removed}  # layers may share weights
    gone = sum(p.numel() for p in {p for n, p in named if n in removed} if id(p) not in used_elsewhere)
    assert gone > 0
    merged = get_peft_model(
        base, EASConfig(skip_layers=dropped, propagation="none", stand_in="zero", use_bias=False)
    ).merge_and_unload()
    assert tiny_model(model_type).num_parameters() - merged.num_parameters() == gone
    if generates(model_type):
        cache = cache_of(merged, tiny_inputs(model_type))
        for row in layers.family.attentions:
            own = cache
            if isinstance(cache, EncoderDecoderCache):
                own = cache.cross_attention_cache if row.context else cache.self_attention_cache
            elements = [
                sum(vars(layer)[name].numel() for name in ("keys", "prefill_keys") if vars(layer).get(name) is not None)
                for layer in own.layers
            ]
            places = {place.index: key in dropped for key, place in layers.items() if place.row == row}
            if row.stack == "decoder":
                assert all((elements[index] <= 1) == is_dropped for index, is_dropped in places.items())


def images(model_type: str) -> None:
    """The image, or the sound, is among what a skipped attention says: another one changes what it keeps."""
    if model_type not in IMAGES | SOUNDS:
        return
    model = adapted(model_type)
    inputs = tiny_inputs(model_type)
    seen = ("pixel_values", "patches", "input_features", "input_values")
    name = next(name for name in inputs if any(part in name for part in seen))
    other = inputs | {name: inputs[name].roll(len(inputs[name]) // 3, 0)}
    kept = []
    for given in (inputs, other):
        cache = cache_of(model, given)
        layers = [vars(cache.layers[index]) for index in skipped(model.base_model.model)]
        kept.append([layer["prefill_values" if "prefill_values" in layer else "values"] for layer in layers])
    assert max((first - second).abs().max() for first, second in zip(*kept, strict=True)) > 1e-3


TEXTS = torch.randint(3, 90, (3, 2, 10), generator=torch.Generator().manual_seed(5))


@functools.lru_cache(maxsize=1)  # of three checks
def decoded(model_type: str) -> list[nn.Module]:
    """An adapted decoder, with and without propagation, as it is and merged; none for other models."""
    if model_type in EXAMPLES:
        return []
    models = []
    for propagation in ("mean", "none"):
        model = adapted(model_type, propagation=propagation)
        models += [model, copy.deepcopy(model).merge_and_unload()]
    return models


@torch.no_grad()
def prefix_moves(model: nn.Module, ids: torch.Tensor) -> float:
    """By how much the logits of six tokens change when others, or padding, follow; relative to the largest."""
    before = model(ids[:, :6]).logits
    mask = (torch.arange(10) < 6).long().expand(2, 10)
    after = model(ids).logits, model(ids * mask, attention_mask=mask).logits
    return distance(before, *(logits[:, :6] for logits in after))


@torch.no_grad()
def parts_differ(model: nn.Module, ids: torch.Tensor) -> float:
    """How far the logits of a text that is read in parts, with a KV cache, are from those read at once."""
    moved = []
    for mask in (None, (torch.arange(10) >= torch.tensor([[0], [3]])).long()):
        whole = model(ids, attention_mask=mask).logits
        read, cache = [], None
        for start, end in ((0, 4), (4, 8), (8, 9), (9, 10)):
            outputs = model(
                ids[:, start:end],
                attention_mask=None if mask is None else mask[:, :end],
                past_key_values=cache,
                use_cache=True,
            )
            cache = outputs.past_key_values
            read.append(outputs.logits)
        kept = torch.ones(2, 10, dtype=torch.bool) if mask is None else mask.bool()
        moved.append(distance(whole[kept], torch.cat(read, dim=1)[kept]))
    return float(torch.tensor(moved).max())  # NaN if one is


@torch.no_grad()
def packing_differs(model: nn.Module, ids: torch.Tensor) -> float:
    """How far the logits of two texts in one row are from those of the texts apart."""
    positions = torch.arange(10).repeat(2)[None]
    apart = torch.cat([model(row[None]).logits for row in ids], dim=1)
    packed = model(ids.flatten()[None], position_ids=positions, use_cache=False).logits  # no cache: nothing before
    return distance(apart, packed)


def stock_is_exact(model_type: str, differ: Callable[[nn.Module, torch.Tensor], float]) -> bool:
    """Whether the base model does itself what is asked of it, with all texts: hybrids may not read in parts, or know of
    packing, and what an indexer chooses of few tokens may depend on what follows."""
    model = tiny_model(model_type)
    try:
        return all(differ(model, ids) < 1e-4 for ids in TEXTS)
    except Exception:
        return False


def _check(model_type: str, differ: Callable[[nn.Module, torch.Tensor], float]) -> None:
    if model_type in EXAMPLES or not stock_is_exact(model_type, differ):
        return
    for model in decoded(model_type):
        found = differ(model, TEXTS[0])
        assert found < 1e-4, f"{type(model).__name__} differs by {found:.1e}"


def prefix(model_type: str) -> None:
    """Logits do not change when tokens, or padding, follow; without a mask, too."""
    _check(model_type, prefix_moves)


def parts(model_type: str) -> None:
    """Read in parts, with a KV cache, as at once: chunks, a second turn, single tokens; with left padding, too."""
    _check(model_type, parts_differ)


def packing(model_type: str) -> None:
    """Two texts in one row, with positions that start anew, as apart."""
    _check(model_type, packing_differs)


AS_STOCK = {"prefix": prefix_moves, "parts": parts_differ, "packing": packing_differs}


def padding(model_type: str) -> None:
    """A row of a padded batch gives what it gives alone."""
    inputs = tiny_inputs(model_type)
    if (
        model_type not in EXAMPLES
        or "attention_mask" not in inputs
        or EXAMPLES[model_type].output.startswith("logits_per_")
    ):
        return
    mask = inputs["attention_mask"]
    row = int(mask.sum(dim=1).argmin())
    alone = {name: value[row : row + 1] for name, value in inputs.items()}
    length = int(mask[row].sum())
    assert length < mask.shape[1]
    alone |= {
        name: alone[name][:, :length]
        for name in ("input_ids", "attention_mask", "bbox", "flattened_patches", "input_features")
        if name in alone
    }
    model = adapted(model_type)
    whole, single = logits(model, model_type), logits(model, model_type, alone)
    close(single, whole[row : row + 1][:, : single.shape[1]])


CHECKS: dict[str, Callable[[str], None]] = {
    check.__name__: check
    for check in (
        identity, skipping, standing_in, merging, prefix, parts, packing, generation, training, reloading, sizes,
        images, padding,
    )
}  # fmt: skip


def applies(name: str, model_type: str) -> bool:
    """Whether there is something to check."""
    if name in AS_STOCK:
        return model_type not in EXAMPLES and stock_is_exact(model_type, AS_STOCK[name])
    if name == "padding":
        return model_type in EXAMPLES and "attention_mask" in tiny_inputs(model_type)
    return (name != "images" or model_type in IMAGES | SOUNDS) and (name != "generation" or generates(model_type))


def run(model_type: str, checks: dict[str, Callable[[str], None]] = CHECKS) -> dict[str, str]:
    """`{check: ""}` or what went wrong."""
    results = {}
    for name, check in checks.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                check(model_type)
            results[name] = ""
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            results[name] = f"{type(error).__name__}: {str(error)[:200]} ({Path(where.filename).name}:{where.lineno})"
    return results

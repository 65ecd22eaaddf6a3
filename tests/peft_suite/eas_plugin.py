"""A pytest plugin that puts EAS in the place of the tuners of PEFT's tests, and local models in the place of the hub's.

A test concerns EAS if it is parametrised over tuners, or named in `REBOUND`; the others are deselected. What EAS can't
pass is in `XFAIL`, with the reason, and in docs/peft-test-suite.md. What PEFT itself skips for a tuner that is neither
LoRA nor prompt learning is in `SKIPPED`; any other skip counts as a failure, so that nothing goes untested unnoticed.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections import Counter
from typing import NamedTuple

import pytest
from peft import LoraConfig
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from peft_eas import EASConfig, EASType

# PEFT's tests import it, but only those of image models use it.
diffusers = types.ModuleType("diffusers")
diffusers.__spec__ = importlib.machinery.ModuleSpec("diffusers", loader=None)
diffusers.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
sys.modules["diffusers"] = diffusers

# Just layer 0 is skipped, because a test restricts the tuner to it by `layers_to_transform=[0]`.
VARIANTS = {
    "defaults": {"skip_layers": [0]},
    "propagation": {"skip_layers": [0], "propagation": "mean"},
    "branches": {"skip_layers": [0], "router": "static", "groups": 2, "use_bias": False},
    "unsearched": {},
}
# Likewise, in the only attention of that layer that both can spare.
ENCODER_DECODER_VARIANTS = {
    "defaults": {"skip_layers": ["decoder.0.cross"]},
    "propagation": {"skip_layers": ["decoder.0.cross"], "propagation": "mean", "use_bias": False},
    "unsearched": {},
}

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # so that what small adapters do can be seen in the logits
    "pad_token_id": 0,
    "bos_token_id": 3,
    "eos_token_id": 4,
}
SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 8}
DECODERS = {"llama": TINY, "mistral": TINY, "qwen2": TINY, "qwen3": TINY, "gemma3_text": TINY | SLIDING}
ENCODER_DECODERS = {
    "t5": {
        "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4,
        "decoder_start_token_id": 0, "initializer_factor": 2.0, "pad_token_id": 0, "eos_token_id": 4,
    },
    "bart": {
        "vocab_size": 64, "d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
        "init_std": 0.2, "decoder_start_token_id": 0, "pad_token_id": 0, "bos_token_id": 3, "eos_token_id": 4,
        "forced_eos_token_id": None,
    },
}  # fmt: skip


class Suite(NamedTuple):
    """A test file that runs models of one class."""

    task: str
    models: str  # name of its list of model ids
    auto_class: type
    families: dict[str, dict] = DECODERS
    variants: dict[str, dict] = VARIANTS

    @property
    def folders(self) -> dict[str, str]:
        """The folder of each family's model, relative to the current directory.

        A number, because the tests skip by words in a model's id: all merge tests of "llama" and "gemma3", whatever
        the tuner. Relative, because such a word may be in the path of this repository, too.
        """
        return {family: f"{self.task}/{i}" for i, family in enumerate(self.families)}


SUITES = {
    "test_decoder_models": Suite("CAUSAL_LM", "PEFT_DECODER_MODELS_TO_TEST", AutoModelForCausalLM),
    "test_feature_extraction_models": Suite("FEATURE_EXTRACTION", "PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST", AutoModel),
    "test_seq_classifier": Suite("SEQ_CLS", "PEFT_SEQ_CLS_MODELS_TO_TEST", AutoModelForSequenceClassification),
    "test_encoder_decoder_models": Suite(
        "SEQ_2_SEQ_LM",
        "PEFT_ENCODER_DECODER_MODELS_TO_TEST",
        AutoModelForSeq2SeqLM,
        ENCODER_DECODERS,
        ENCODER_DECODER_VARIANTS,
    ),
}

# Tests that name one tuner, though they mean any: what EAS is called in their file.
REBOUND = {
    "test_feature_extraction_models::test_load_model_low_cpu_mem_usage": {"LoraConfig": EASConfig},
    "test_config::test_from_peft_type": {"PeftType": EASType},
}


class Expected(NamedTuple):
    """Tests that are expected to fail, or to be skipped by PEFT."""

    reason: str
    tests: tuple[str, ...]
    variants: tuple[str, ...] = tuple(VARIANTS)
    raises: type[Exception] = AssertionError

    def covers(self, item: pytest.Function) -> bool:
        parameters = item.callspec.id.split("-") if hasattr(item, "callspec") else []
        return name_of(item) in self.tests and any(variant in parameters for variant in self.variants)


XFAIL = (
    Expected(
        "two EAS adapters can't be merged into one model, since each skips attentions of its own",
        ("test_decoder_models::test_merge_layers_multi",),
        raises=ValueError,
    ),
    Expected(
        "before the search has chosen, a layer has both its adapter and its PIA, and only one of them gets gradients",
        (
            "test_decoder_models::test_training_decoders",
            "test_decoder_models::test_training_decoders_layer_indexing",
            "test_decoder_models::test_training_decoders_gradient_checkpointing",
            "test_feature_extraction_models::test_training",
            "test_feature_extraction_models::test_training_layer_indexing",
            "test_feature_extraction_models::test_training_gradient_checkpointing",
            "test_encoder_decoder_models::test_training_encoder_decoders",
            "test_encoder_decoder_models::test_training_encoder_decoders_layer_indexing",
            "test_encoder_decoder_models::test_training_encoder_decoders_gradient_checkpointing",
        ),
        variants=("unsearched",),
    ),
)

SKIPPED = (
    Expected(
        "for prompt learning only",
        (
            "test_decoder_models::test_prompt_tuning_text_prepare_for_training",
            "test_decoder_models::test_prompt_tuning_sample_vocab_prepare_for_training",
            "test_decoder_models::test_training_prompt_learning_tasks",
            "test_decoder_models::test_set_requires_grad_prompt_learning_raises",
            "test_feature_extraction_models::test_training_prompt_learning_tasks",
            "test_feature_extraction_models::test_passing_input_embeds_works",
            "test_encoder_decoder_models::test_training_prompt_learning_tasks",
            "test_seq_classifier::test_prompt_tuning_text_prepare_for_training",
        ),
    ),
    Expected(
        "for LoRA and IA3 only: several adapters in one batch, weighted sums of adapters",
        (
            "test_decoder_models::test_mixed_adapter_batches",
            "test_decoder_models::test_generate_with_mixed_adapter_batches",
            "test_decoder_models::test_weighted_combination_of_adapters",
            "test_feature_extraction_models::test_weighted_combination_of_adapters",
            "test_encoder_decoder_models::test_mixed_adapter_batches",
            "test_encoder_decoder_models::test_generate_with_mixed_adapter_batches",
            "test_encoder_decoder_models::test_weighted_combination_of_adapters",
        ),
    ),
    Expected(
        "for tuners that can train the base model's biases",
        (
            "test_decoder_models::test_adding_multiple_adapters_with_bias_raises",
            "test_encoder_decoder_models::test_adding_multiple_adapters_with_bias_raises",
        ),
    ),
)


def name_of(item: pytest.Function) -> str:
    return f"{stem(item.module)}::{item.originalname}"


def stem(module: types.ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def concerns_eas(item: pytest.Function) -> bool:
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return name_of(item) in REBOUND or any(value is EASConfig for value in parameters)


def pytest_sessionstart() -> None:
    """Make the models, in the current directory."""
    disable_progress_bar()
    set_seed(0)
    for suite in SUITES.values():
        for family, folder in suite.folders.items():
            config = CONFIG_MAPPING[family](**suite.families[family])
            suite.auto_class.from_config(config).save_pretrained(folder)
    LoraConfig().save_pretrained("lora")  # some tests of configurations load one of another tuner


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Change the lists that a test is parametrised over, before pytest reads them."""
    module, marks = metafunc.module, metafunc.definition.own_markers
    suite = SUITES.get(stem(module))
    if suite is None:
        lists = [(module.ALL_CONFIG_CLASSES, [pytest.param(EASConfig, v, id=k) for k, v in VARIANTS.items()])]
    else:
        tuners = [pytest.param(EASConfig, {"task_type": suite.task} | v, id=k) for k, v in suite.variants.items()]
        models = [pytest.param(folder, id=family) for family, folder in suite.folders.items()]
        lists = [(module.ALL_CONFIGS, tuners), (getattr(module, suite.models), models)]
    for i, mark in enumerate(marks):
        if mark.name != "parametrize":
            continue
        names, values = mark.args
        ours = [EASConfig] if names == "config_class" else next((o for theirs, o in lists if values is theirs), values)
        marks[i] = pytest.mark.parametrize(names, ours).mark


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    chosen = [item for item in items if concerns_eas(item)]
    config.hook.pytest_deselected(items=[item for item in items if not concerns_eas(item)])
    items[:] = chosen
    for item in chosen:
        for name, value in REBOUND.get(name_of(item), {}).items():
            setattr(item.module, name, value)
        for expected in XFAIL:
            if expected.covers(item):
                item.add_marker(pytest.mark.xfail(reason=expected.reason, raises=expected.raises, strict=True))
    for module in {item.module for item in chosen}:  # what tests read from their file while they run
        suite = SUITES.get(stem(module))
        if suite is None:
            module.PEFT_MODELS_TO_TEST[:] = [("lora", None)]
        else:
            getattr(module, suite.models)[:] = suite.folders.values()
    stale = {test for e in XFAIL + SKIPPED for test in e.tests} - {name_of(item) for item in chosen}
    if stale:
        raise pytest.UsageError(f"PEFT has no such tests (any more): {sorted(stale)}")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Function):
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        report.eas_reason = next((expected.reason for expected in SKIPPED if expected.covers(item)), None)
        if report.eas_reason is None:
            report.outcome, report.longrepr = "failed", f"skipped, and not in SKIPPED: {report.longrepr[2]}"
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    stats = terminalreporter.stats
    deselected = Counter("not chosen" if concerns_eas(i) else "of other tuners" for i in stats.get("deselected", ()))
    terminalreporter.section("PEFT's tests with EAS")
    for outcome, counts in {
        "passed": {"": len(stats.get("passed", ()))},
        "failed": {"": len(stats.get("failed", ())) + len(stats.get("error", ()))},
        "xfailed": Counter(report.wasxfail for report in stats.get("xfailed", ())),
        "skipped": Counter(report.eas_reason for report in stats.get("skipped", ())),
        "deselected": deselected,
    }.items():
        for reason, count in counts.items():
            terminalreporter.line(f"{count:5} {outcome}{reason and ': '}{reason}")

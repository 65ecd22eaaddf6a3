"""One process of distributed trainings with searches, one after another; started by `test_distributed.py`.

accelerate launch --multi_gpu --num_processes 2 distributed_search.py OUT '{"NAME": {"gradient_checkpointing": true}}'
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import get_peft_model
from searches import charge
from torch import distributed
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from zoo import tiny
from zoo.training import collate, dataset, trainer

from peft_eas import EASCallback, EASConfig
from peft_eas.shards import is_shared_out

STEPS, SAVE = 14, 8  # at the end of an epoch: not every version of the Trainer resumes exactly within one


class Fail(TrainerCallback):
    """The second process fails in the middle of the search."""

    def on_step_end(self, args, state, control, **kwargs):
        if args.process_index == 1 and state.global_step == 4:
            raise RuntimeError("this process has had enough")


def allow_fsdp_on_cpus() -> None:
    """torch shards on CPUs, too; accelerate only lets accelerators do it."""
    init = AcceleratorState.__init__

    def patched(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState().distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = patched


def allow_deepspeed_on_cpus() -> None:
    """DeepSpeed trains on CPUs, too; accelerate only lets accelerators do it in several processes."""
    prepare = PartialState._prepare_backend
    PartialState._prepare_backend = lambda self, cpu=False, *args: prepare(self, True, *args)


def early(base: PreTrainedModel, out: Path) -> PreTrainedModel:
    """The same model, loaded after `TrainingArguments` are made: ZeRO-3 shares it out then."""
    folder = out / "base"
    base.save_pretrained(folder)  # by the first process
    distributed.barrier()
    arguments = TrainingArguments(str(out), per_device_train_batch_size=3)
    model = type(base).from_pretrained(folder)
    assert arguments.deepspeed_plugin is not None
    assert all(map(is_shared_out, model.parameters()))
    return model


def train(out: Path, batch_size: int, options: dict) -> tuple[Trainer, EASCallback]:
    unset_hf_deepspeed_config()  # that of the training before
    base = tiny.model("llama")
    if options.pop("early", False):
        base = early(base, out)
    torch.manual_seed(0)
    model = get_peft_model(base, EASConfig(num_skip=2, **options.pop("config", {})))
    tiny.shake(model, scale=0.05)
    if options.get("gradient_checkpointing"):
        model.enable_input_require_grads()
    callbacks = [Fail()] if options.pop("fail", False) else []
    resume = options.pop("resume", None)
    momentum = options.pop("momentum", None)
    settings = dict(warmup_steps=2, search_steps=8, interval=2, warm_start=options.pop("warm_start", None))
    if options.pop("exchange", False):  # of 5, which the search starts with, for 3, the only one that is cheaper
        charge(model, 1000.0, [0, 1, 2])
        charge(model, 1.0, [5])
        settings["warm_start"] = "depth"
    search = EASCallback(dataset(20), **settings)
    made = trainer(
        out, model, callbacks=[search, *callbacks], per_device_train_batch_size=batch_size, max_steps=STEPS,
        **dict(save_strategy="steps", save_steps=SAVE, logging_strategy="steps", logging_steps=1) | options,
    )  # fmt: skip
    if momentum is not None:
        made.optimizer_cls_and_kwargs = torch.optim.SGD, dict(lr=0.5, momentum=momentum, weight_decay=0.05)
    made.train(resume_from_checkpoint=resume)
    made.save_model(str(out / "final"))
    return made, search


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """What a model says to a batch, the same one in all processes."""
    return model.eval()(**collate(list(dataset(8)))).logits


def losses(made: Trainer) -> list[float]:
    """Those of the optimizer steps."""
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def merging(made: Trainer) -> str:
    """What merging in these processes is refused with, if it is."""
    try:
        made.model.merge_and_unload()
    except ValueError as error:
        return str(error)
    return ""


def main() -> None:
    if os.environ.get("ACCELERATE_USE_FSDP"):
        allow_fsdp_on_cpus()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED"):
        allow_deepspeed_on_cpus()
    for name, options in json.loads(sys.argv[2]).items():
        out = Path(sys.argv[1]) / name
        made, search = train(out, 3, options)
        evaluated = made.evaluate()["eval_loss"]
        (out / f"rank{made.args.process_index}.json").write_text(
            json.dumps(
                {
                    "report": search.report,
                    "skip_layers": made.model.skip_layers,
                    "eval_loss": evaluated,
                    "losses": losses(made),
                    "logits": logits(made.model).tolist(),
                    "sharded": any(is_shared_out(p) for p in made.model.parameters()),
                    "merging": merging(made),
                }
            )
        )
        distributed.barrier()
    os._exit(0)  # taking gloo's threads down in order hangs now and then


if __name__ == "__main__":
    main()

"""ONNX Runtime computes what the merged model computes."""

import pytest
import torch
from checks import skip_without_onnx
from peft import get_peft_model
from transformers import AutoTokenizer
from zoo import tiny
from zoo.exports import TEXT, byte_level, quietly, relative_error

from peft_eas import EASConfig


@torch.no_grad()
def test_onnxruntime_computes_what_the_merged_model_computes(tmp_path):
    skip_without_onnx()
    onnxruntime = pytest.importorskip("onnxruntime")
    family = "gemma3_text"  # sliding windows, norms everywhere
    small = {"num_hidden_layers": 3, "layer_types": tiny.MIXED[:3]}  # exporting a layer takes seconds
    model = get_peft_model(tiny.model(family, changes=small), EASConfig(skip_layers=[1]))
    tiny.shake(model)
    model, tokenizer = model.merge_and_unload().train(), byte_level()
    quietly(model, tmp_path / "out", "onnx", tokenizer)
    assert model.training
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    for rows, length in ((3, 11), (1, 1), (5, 40)):
        inputs = tiny.inputs(family, rows=rows, length=length, padding="left" if rows == 3 else None)
        (logits,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in inputs.items()})
        kept = inputs["attention_mask"].bool()
        assert relative_error(torch.tensor(logits)[kept], model.eval()(**inputs).logits[kept]) < 1e-5
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT).input_ids == tokenizer(TEXT).input_ids

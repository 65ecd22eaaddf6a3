"""Tensors that are not read yet."""

import pytest
import torch
from torch import nn

from peft_eas.unread import Recipe, Unread, meta_of


def unread(values):
    return Unread(Recipe(torch.empty_like(values, device="meta"), lambda: values))


@pytest.fixture
def values():
    return torch.arange(12.0).view(3, 4)


def test_what_is_computed_is_read_when_it_is_asked_for(values):
    read = []
    tensor = Unread(Recipe(torch.empty(3, 4, device="meta"), lambda: read.append(1) or values))
    parts = torch.cat([tensor.mT, tensor.mT.to(torch.float64)]).chunk(2)
    parameter = nn.Parameter(parts[1])
    assert isinstance(parameter, nn.Parameter)
    assert (parameter.shape, parameter.dtype, parameter.device.type) == ((4, 3), torch.float64, "cpu")
    assert not read
    assert torch.equal(parameter.recipe.read(), values.mT.double())
    assert len(read) == 2  # it is in it twice
    assert list(parameter.recipe.sources()) == [tensor.recipe, tensor.recipe]


def test_what_was_computed_before_a_change_is_as_it_was(values):
    tensor = unread(values)
    before = tensor + 1
    tensor.mul_(2)
    tensor.copy_(tensor)
    assert torch.equal(before.recipe.read(), values + 1)
    assert torch.equal(tensor.recipe.read(), values * 2)
    assert torch.equal(values, torch.arange(12.0).view(3, 4))


def test_names_of_one_tensor_change_together(values):
    parameter = nn.Parameter(unread(values))
    other = torch.ones(3, 4, dtype=torch.float16)
    parameter.data.copy_(other)
    assert torch.equal(parameter.recipe.read(), other.float())


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor[0].zero_(),
        lambda tensor: (tensor.mT, tensor.zero_()),
        lambda tensor: torch.zeros(3, 4).add_(tensor),
        lambda tensor: float(tensor.sum()),
        lambda tensor: bool(tensor.isnan().any()),
    ],
)
def test_what_can_t_be_kept_for_later_is_refused(change, values):
    with pytest.raises(NotImplementedError, match="not read yet"):
        change(unread(values))


def test_a_tensor_like_it_is_there_at_once(values):
    like = torch.empty_like(unread(values)).uniform_()
    assert type(like) is torch.Tensor
    assert like.device.type == "cpu"
    assert type(unread(values).new_zeros(5)) is torch.Tensor


def test_how_much_memory_reading_takes(values):
    tensor = unread(values)
    assert tensor.recipe.peak() == 48
    assert tensor.double().recipe.peak() == 48 + 96
    assert (tensor.double() + tensor.double()).recipe.peak() == 3 * 96
    assert meta_of(tensor.mT).stride() == (1, 4)

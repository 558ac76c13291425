"""The watch sees whatever makes rearranged weights wrong."""

import pytest
import torch
from torch.nn.utils import parametrize

from vivace.watch import Watch


def replace_child(model):
    model[0] = torch.nn.Linear(3, 3)


def replace_parameter(model):
    model[1].weight = torch.nn.Parameter(torch.zeros(3, 3))


def replace_data(model):
    model[1].weight.data = model[1].weight.data.clone()


def replace_processor(model):
    model[0].processor = object()


@pytest.mark.parametrize(
    "change",
    [
        replace_child,
        replace_parameter,
        replace_data,
        replace_processor,
        lambda model: model.double(),
        lambda model: model[1].register_forward_hook(lambda *_: None),
        lambda model: model[0].register_forward_pre_hook(lambda *_: None),
        lambda model: setattr(model[1], "forward", torch.relu),
        lambda model: parametrize.register_parametrization(model[1], "weight", torch.nn.Identity()),
    ],
)
def test_sees(change):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[0].processor = object()
    model[0].register_forward_pre_hook(lambda *_: None)
    watch = Watch(model)
    kept = [parameter.data for parameter in model.parameters()]
    assert not watch.changed()
    change(model)
    assert watch.changed()
    assert not Watch(model).changed()
    del kept


def test_values_changed_in_place_are_no_change():
    model = torch.nn.Linear(3, 3)
    watch = Watch(model)
    with torch.no_grad():
        model.weight.mul_(2)
    assert not watch.changed()


def test_what_is_spared_may_change_and_the_rest_may_not():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Sequential(torch.nn.Linear(3, 3)))
    watch = Watch(model)
    near = watch.sparing([model[1]])
    assert watch.sparing([model[1]]) is near
    stock = model[1][0]
    model[1][0].weight = torch.nn.Parameter(torch.zeros(3, 3))
    model[1][0] = torch.nn.Linear(3, 3)
    assert watch.changed()
    assert not near.changed()
    model[1][0] = stock
    model[0].weight = torch.nn.Parameter(torch.zeros(3, 3))
    assert near.changed()


def test_a_spared_module_itself_may_not_be_replaced():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    near = Watch(model).sparing([model[1]])
    assert not near.changed()
    model[1] = torch.nn.Linear(3, 3)
    assert near.changed()

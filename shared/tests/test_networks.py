"""Networks by name: what is built, and what is refused in one line."""

import pytest
from torch import nn

from shared.errors import InputError
from shared.networks import build_by_name

NETWORKS = {"linear": nn.Linear, "identity": nn.Identity}


def test_arguments_go_to_the_constructor_and_stay_as_they_were():
    arguments = {"name": "linear", "in_features": 3, "out_features": 2}
    assert build_by_name(arguments, NETWORKS).weight.shape == (2, 3)
    assert arguments["name"] == "linear"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "conv"}, "unknown network 'conv'; choose one of linear, identity"),
        ({}, "unknown network None"),
        ({"name": "linear", "width": 3}, "network linear takes no 'width'; choose from in_features, out_features"),
    ],
)
def test_what_does_not_exist_is_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        build_by_name(arguments, NETWORKS)

"""The borders of an SAE's class: a variant overrides its contract alone, and reads nothing of ranks."""

import ast
import inspect
import re

import pytest
import torch

from saeflow.batch import Batch
from saeflow.saes import SAE, VARIANTS, build, contract
from saeflow.saes.contract import Contract
from saeflow.saes.density import FollowsDensity
from saeflow.saes.per_input_k import PerInputK
from saeflow.saes.totals import Totals
from saeflow.saes.use import Usable

from .test_variants import CASES

CLASSES = sorted({FollowsDensity, PerInputK, *VARIANTS.values()}, key=lambda one: one.__name__)


@pytest.mark.parametrize("variant", CLASSES, ids=lambda one: one.__name__)
def test_a_variant_overrides_its_contract_alone(variant: type[SAE]) -> None:
    of_others = {n for c in (SAE, Usable, Totals) for n in vars(c) if not n.startswith("__")}
    assert not set(vars(variant)) & of_others


@pytest.mark.parametrize("variant", CLASSES, ids=lambda one: one.__name__)
def test_a_variant_reads_nothing_of_ranks(variant: type[SAE]) -> None:
    tree = ast.parse(inspect.getsource(inspect.getmodule(variant)))
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not {"ranks", "of_batch", "over_batch", "over_latents", "over_both"} & read


def test_the_checklist_names_parts_of_the_contract() -> None:
    assert contract.__doc__ is not None
    checklist = contract.__doc__.split("in this order:")[1].split("Everything else")[0]
    named = set(re.findall(r"`(\w+)`", checklist))
    known = {*vars(Contract), *Contract.__annotations__}
    assert {"activate", "losses", "select", "fold_scale"} <= named
    assert named - known == {"Forward", "Totals", "Moving"}


@pytest.mark.parametrize("name", CASES)
def test_weights_are_set_alike_from_a_batch_and_from_its_rows(name: str) -> None:
    variant, options = CASES[name]
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1)) + 1
    first, second = (build(variant, 8, 32, options) for _ in range(2))
    first.initialise(Batch.of(x), torch.Generator().manual_seed(0))
    second.initialise(x, torch.Generator().manual_seed(0))
    found = second.state_dict()
    for key, value in first.state_dict().items():
        assert torch.equal(found[key], value), key

"""Settings: limits, choices and help, declared once."""

import dataclasses
import json

import pytest

from personalize.trainers.errors import InputError
from personalize.trainers.methods import METHODS
from personalize.trainers.sites import PRESETS, ROLES, narrowest, sites
from tests.tiny import tiny_unet

FIELDS = [
    pytest.param(method.Settings, field, id=f"{name}.{field.name}")
    for name, method in METHODS.items()
    for field in dataclasses.fields(method.Settings)
]


@pytest.mark.parametrize("settings, field", FIELDS)
def test_every_setting_explains_itself_and_refuses_what_is_outside(settings, field):
    limits = field.metadata
    assert len(limits["help"]) > 10 and limits["help"].endswith(".")
    if "choices" in limits:
        assert field.default in limits["choices"]
        wrong = ["no such choice", ""]
    elif isinstance(field.default, bool):
        return
    else:
        assert limits["min"] <= field.default <= limits["max"]
        wrong = [limits["min"] - 1, limits["max"] + 1, float("nan"), float("inf")]
        edges = [limits["min"], limits["max"]]
        if field.name == "learning_rate":  # the page may show 0, but nothing learns at it
            wrong.append(edges.pop(0))
        for edge in edges:
            settings(**{"steps": 1_000_000, field.name: edge})
    for value in wrong:
        with pytest.raises(InputError, match=f"'{field.name}' is ") as error:
            settings(**{field.name: value})
        assert error.value.input_name == field.name


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_settings_are_plain_json_and_come_back(method):
    settings = method.Settings()
    assert method.Settings(**json.loads(json.dumps(settings.as_dict()))) == settings


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_settings_can_not_be_changed_after_they_were_checked(method):
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.Settings().steps = -1


def test_an_error_says_what_was_got_and_what_to_give():
    settings = METHODS["lora"].Settings
    with pytest.raises(InputError) as error:
        settings(steps=0)
    assert str(error.value) == "'steps' is 0; give a number from 1 to 1000000."
    with pytest.raises(InputError) as error:
        settings(schedule="cosin")
    assert str(error.value) == "'schedule' is 'cosin'; give one of constant, cosine, linear."


# Sites


def test_every_weight_of_the_layers_has_one_role():
    """A layer with weights belongs to one role."""
    unet, by_role = tiny_unet(), {}
    for role in ROLES:
        PRESETS_OF_ONE = {role: (role,)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(PRESETS, role, PRESETS_OF_ONE[role])
            by_role[role] = sites(unet, role)
    found = [site for group in by_role.values() for site in group]
    assert len(found) == len(set(found)) and all(by_role.values())
    layers = {n for n, m in unet.named_modules() if getattr(m, "weight", None) is not None}
    assert layers <= set(found)


def test_sites_of_a_base_without_such_layers_are_an_error():
    plain = tiny_unet(
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        mid_block_type=None,
    )
    with pytest.raises(InputError, match="'layers' is 'attention', but this base has no such"):
        sites(plain, "attention")


def test_the_narrowest_layer_bounds_the_rank():
    unet = tiny_unet()
    assert narrowest(unet, sites(unet, "attention")) == 32

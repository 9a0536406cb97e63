from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rankopt.errors import StudyFileError
from rankopt.layers import find_layers
from rankopt.space_file import Space, load_space, names, resolve, tied_groups
from rankopt.tables import offered


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.layer1 = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)))
        self.dw = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pw = nn.Conv2d(8, 16, 1)
        self.fc = nn.Linear(16, 10)
        self.unused = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pw(self.dw(self.layer1(self.conv1(x)))).mean((2, 3)))


LAYERS = find_layers(Net(), torch.zeros(1, 3, 8, 8))
BY_NAME = {layer.name: layer for layer in LAYERS}


@pytest.mark.parametrize("name", ["default", "full", "language", "mlp", "mobilenet", "resnet", "tensorized", "vgg"])
def test_ready_spaces_fit_any_model(name: str) -> None:
    assert name in names()
    space = load_space(name)
    assert space.description
    found = resolve(space, LAYERS)
    assert list(found) == [layer.name for layer in LAYERS if layer.skip is None]
    assert "unused" not in found
    for entry in found.values():
        assert all(0 < keep <= 1 for keep in entry.keeps)


def test_each_layer_of_a_mobilenet_finds_its_method() -> None:
    found = resolve(load_space("mobilenet"), LAYERS)
    assert found["dw"].methods == ("spatial_svd",)
    assert found["pw"].methods == ("svd",)
    assert offered(BY_NAME["dw"], found["dw"]) == (["spatial_svd"], None)
    assert offered(BY_NAME["unused"], None)[1] == BY_NAME["unused"].skip


def test_the_first_rule_that_matches_wins() -> None:
    space = load_space(
        {
            "methods": ["svd", "tucker2"],
            "keep": [0.5, 0.25, 0.5],
            "cap": {"macs": 0.8},
            "rules": [
                {"match": "conv1", "dense": True},
                {"match": ["re:layer1\\.[01]"], "methods": ["spatial_svd"], "rank_multiple": 8, "allow_dense": False},
                {"match": "layer1.*", "keep": {"min": 0.2, "max": 0.4, "levels": 3}, "cap": {"params": 0.5}},
                {"match": "kind:conv3d", "methods": ["svd"]},
            ],
        }
    )
    found = resolve(space, LAYERS)
    assert found["conv1"].dense
    assert found["layer1.1"].methods == ("spatial_svd",)
    assert found["layer1.1"].rank_multiple == 8
    assert not found["layer1.0"].allow_dense
    assert found["layer1.2"].keeps == (0.2, 0.3, 0.4)
    assert found["layer1.2"].cap == {"macs": 0.8, "params": 0.5}
    assert found["fc"].keeps == (0.25, 0.5)
    assert found["fc"].methods == ("svd", "tucker2")


def test_explicit_ranks_stand_alone_or_beside_methods() -> None:
    ranks = {"method": "svd", "ranks": {"rank": 4}}
    found = resolve(load_space({"rules": [{"match": "fc", "explicit": [ranks]}]}), LAYERS)
    assert found["fc"].methods == ()
    assert found["fc"].explicit == (ranks,)
    both = {"rules": [{"match": "fc", "explicit": [ranks], "methods": ["svd"]}]}
    assert resolve(load_space(both), LAYERS)["fc"].methods == ("svd",)


def test_optional_rules_may_match_nothing() -> None:
    space = load_space({"rules": [{"match": ["stem.*"], "dense": True, "optional": True}]})
    assert not any(entry.dense for entry in resolve(space, LAYERS).values())


def test_tied_groups() -> None:
    space = load_space({"tied": [["layer1.*"], "fc"]})
    assert tied_groups(space, LAYERS) == [["layer1.0", "layer1.1", "layer1.2"]]


def test_levels() -> None:
    assert load_space({}).keep.fractions()[0] == 0.1
    assert len(load_space({}).keep.fractions()) == 16
    assert load_space({"keep": {"min": 0.3, "max": 0.3}}).keep.fractions() == (0.3,)
    assert load_space({"keep": {"levels": 1}}).keep.fractions() == (0.9,)


def test_a_path_is_relative_to_the_study(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("methods: [svd]\n")
    assert load_space("mine.yaml", tmp_path).methods == ["svd"]
    assert load_space(tmp_path / "mine.yaml").methods == ["svd"]
    space = load_space({"methods": ["svd"]})
    assert isinstance(space, Space)
    assert load_space(space) is space


BAD: dict[str, tuple[Any, str]] = {
    "unknown key": ({"metods": ["svd"]}, "search space: unknown key 'metods'; did you mean 'methods'?"),
    "unknown rule key": (
        {"rules": [{"match": "fc", "keeps": 0.5}]},
        "rules.0: unknown key 'keeps'; did you",
    ),
    "keep above 1": ({"keep": {"max": 1.5}}, "keep.max: "),
    "keep 0": ({"keep": [0.5, 0.0]}, "keep.values.1: "),
    "keep nan": ({"keep": [float("nan")]}, "keep.values.0: "),
    "keep empty": ({"keep": []}, "keep.values: "),
    "min above max": ({"keep": {"min": 0.8, "max": 0.2}}, "keep: min 0.8 is above max 0.2"),
    "levels 0": ({"keep": {"levels": 0}}, "keep.levels: "),
    "rank multiple 0": ({"rank_multiple": 0}, "rank_multiple: "),
    "rank multiple true": ({"rank_multiple": True}, "rank_multiple: "),
    "no match": ({"rules": [{"dense": True}]}, "rules.0.match: is needed"),
    "empty match": ({"rules": [{"match": []}]}, "rules.0.match: "),
    "number to match": ({"rules": [{"match": [3]}]}, "rules.0.match.0: a pattern is a text, got 3"),
    "bad expression": ({"rules": [{"match": "re:conv("}]}, "rules.0.match.0: 're:conv(' is not a regular expression"),
    "unknown kind": ({"rules": [{"match": "kind:conv4d"}]}, "rules.0.match.0: unknown kind 'conv4d'; did you mean"),
    "cap above 1": ({"cap": {"macs": 2.0}}, "cap.macs: "),
    "rank 0": ({"rules": [{"match": "fc", "explicit": [{"method": "svd", "ranks": {"rank": 0}}]}]}, "ranks.rank: "),
    "rules a mapping": ({"rules": {"match": "fc"}}, "rules: "),
    "a list": (["svd"], "search space"),
    "unknown name": (
        "resnets",
        "called 'resnets' (a path ends in .yaml); did you mean 'resnet'?",
    ),
    "no file": ("nowhere.yaml", "nowhere.yaml: can't be read: No such file"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_space_is_one_line_that_names_the_key(name: str) -> None:
    given, expected = BAD[name]
    with pytest.raises(StudyFileError) as caught:
        load_space(given)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "no such layer": (
        {"rules": [{"match": ["fc", "conv2"], "dense": True}]},
        "rules.0.match.1: 'conv2' matches no layer; did you mean 'conv1'?",
    ),
    "unknown method": ({"methods": ["svd", "tucker3"]}, "methods.1: unknown method 'tucker3'; did you mean 'tucker"),
    "unknown rule method": ({"rules": [{"match": "fc", "methods": ["svdd"]}]}, "rules.0.methods.0: unknown method"),
    "rank too large": (
        {"rules": [{"match": "fc", "explicit": [{"method": "svd", "ranks": {"rank": 999}}]}]},
        "rules.0.explicit.0: fc: svd needs a whole number 1 <= rank <= 10",
    ),
    "rank name": (
        {"rules": [{"match": "fc", "explicit": [{"method": "svd", "ranks": {"rnk": 2}}]}]},
        "rules.0.explicit.0: fc: svd needs the ranks rank",
    ),
    "tied twice": ({"tied": [["layer1.*"], ["layer1.0", "layer1.1"]]}, "tied.1: layer1.0 is also in tied.0"),
    "tied unlike": ({"tied": [["conv1", "fc"]]}, "tied.0: conv1 (conv2d 8×3×3×3) and fc (linear 10×16) can't make one"),
    "tied to nothing": ({"tied": [["fc", "head"]]}, "tied.0.1: 'head' matches no layer"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_space_that_does_not_fit_the_model(name: str) -> None:
    given, expected = UNFIT[name]
    space = load_space(given)
    with pytest.raises(StudyFileError) as caught:
        tied_groups(space, LAYERS)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)

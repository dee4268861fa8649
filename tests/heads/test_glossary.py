import pytest

from cdit.heads.glossary import RULES, HeadType, explain_types, head_type

NOTHING = {
    "mass extra": 0.1,
    "correspondence lift": 1.0,
    "offset rows": 0,
    "offset columns": 0,
    "offset share": 0.1,
    "turning correlation": 0.0,
    "walking correlation": 0.0,
    "edge lift": 1.0,
    "mass frame -2": 0.3,
    "mass frame -1": 0.3,
    "mass frame 0": 0.3,
    "effective share": 0.2,
}

CASES = [
    ({"mass extra": 0.62}, "sink", "mass extra 0.62 ≥ 0.5"),
    ({"offset share": 0.7}, "same place", "offset share 0.70 ≥ 0.5"),
    ({"offset share": 0.7, "offset columns": -1}, "fixed offset", "offset share 0.70 ≥ 0.5"),
    ({"correspondence lift": 9.0}, "copy", "correspondence lift 9.00 ≥ 4"),
    ({"turning correlation": -0.8}, "turning", "turning correlation -0.80 ≤ -0.5"),
    ({"walking correlation": -0.8}, "walking", "walking correlation -0.80 ≤ -0.5"),
    ({"edge lift": 2.0}, "edge", "edge lift 2.00 ≥ 1.5"),
    ({"mass frame 0": 0.9}, "newest frame", "mass frame 0 0.90 ≥ 0.8"),
    ({"mass frame -1": 0.9}, "one frame", "mass frame -1 0.90 ≥ 0.8"),
    ({"mass frame -2": 0.9}, "oldest frame", "mass frame -2 0.90 ≥ 0.8"),
    ({"effective share": 0.9}, "broad", "effective share 0.90 ≥ 0.5"),
]


@pytest.mark.parametrize(("change", "name", "reason"), CASES)
def test_each_type_has_its_measure(change, name, reason):
    assert head_type(NOTHING | change) == HeadType(name, reason)


def test_a_head_without_any_trait_is_mixed():
    assert head_type(NOTHING).name == "mixed"
    assert head_type(dict.fromkeys(NOTHING, float("nan"))).name == "mixed"
    assert head_type({}).name == "mixed"


def test_moving_against_the_picture_is_no_following():
    assert head_type(NOTHING | {"turning correlation": 0.9, "walking correlation": 0.9}).name == "mixed"


def test_types_are_asked_in_order():
    traits = dict(NOTHING)
    for change, name, _ in reversed(CASES):
        if "columns" not in str(change) and "frame -" not in str(change):
            traits |= change
            assert head_type(traits).name == name


def test_every_type_is_explained_with_its_threshold():
    explained = explain_types([*(rule.name for rule in RULES), "mixed"])
    assert len(explained) == len(RULES) + 1
    assert all(f"{rule.threshold:g}" in explained[rule.name] for rule in RULES)


def test_the_bound_itself_counts():
    assert head_type(NOTHING | {"offset share": 0.5}).name == "same place"
    assert head_type(NOTHING | {"offset share": 0.49}).name == "mixed"


def test_one_frame_alone_is_no_choice():
    alone = {"mass frame 0": 1.0, "effective share": 0.2}
    assert head_type(alone).name == "mixed"

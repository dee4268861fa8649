import pytest

from cdit.common.errors import UserError
from cdit.doom.maps import FREEDOOM, MAPS, file_name, find_map, find_maps


def test_freedoom_has_68_maps():
    assert len(FREEDOOM) == 68
    assert next(iter(MAPS)) == "my_way_home"
    assert {"freedoom1/E1M1", "freedoom1/E4M9", "freedoom2/MAP01", "freedoom2/MAP32"} <= FREEDOOM.keys()


def test_unknown_map_is_refused_with_a_list_of_those_there_are():
    with pytest.raises(UserError, match=r"'nowhere'.*my_way_home.*freedoom1/E1M1.*freedoom2/MAP32"):
        find_map("nowhere")


def test_maps_are_named_in_lists_texts_or_by_game():
    assert find_maps("my_way_home,freedoom1/E1M1") == ["my_way_home", "freedoom1/E1M1"]
    assert find_maps(["freedoom2/MAP03", "freedoom2/MAP03"]) == ["freedoom2/MAP03"]
    assert find_maps(["freedoom1", "freedoom2"]) == list(FREEDOOM)
    assert find_maps([]) == []


def test_file_names_are_one_path_component():
    assert len({file_name(name) for name in MAPS}) == len(MAPS)
    assert not any("/" in file_name(name) for name in MAPS)

"""Pictures of scenes: what must hold for every combination of facts."""

from __future__ import annotations

import dataclasses
import random

import pytest

from embervlm.robots.facts import FACT_DOMAINS, SceneFacts, SceneObject, all_facts
from embervlm.robots.render import DISTANCES_M, WEIGHTS_KG, RenderedScene, overlap, render_scene

SAMPLE = random.Random(0).sample(list(all_facts()), 60)
BASE = SceneFacts(place="cliff", weather="clear", sky="noon", load="medium", flag="middle")


@pytest.fixture(scope="module")
def scenes() -> list[tuple[SceneFacts, RenderedScene]]:
    return [(facts, render_scene(facts, seed)) for seed, facts in enumerate(SAMPLE)]


def object_of(scene: RenderedScene, kind: str) -> SceneObject:
    (found,) = (item for item in scene.objects if item.kind == kind)
    return found


def test_equal_arguments_give_equal_scenes():
    for seed, facts in enumerate(SAMPLE[:12]):
        first, second = render_scene(facts, seed), render_scene(facts, seed)
        assert first.image.tobytes() == second.image.tobytes()
        assert (first.objects, first.details) == (second.objects, second.details)


def test_the_global_random_state_is_left_alone():
    before = random.getstate()
    render_scene(BASE, seed=3)
    assert random.getstate() == before


def test_another_seed_gives_another_picture():
    assert len({render_scene(BASE, seed).image.tobytes() for seed in range(8)}) == 8


@pytest.mark.parametrize("size", [72, 100, 224])
def test_picture_is_rgb_of_the_asked_size(size):
    image = render_scene(BASE, seed=1, size=size).image
    assert (image.mode, image.size) == ("RGB", (size, size))


def test_size_changes_neither_facts_nor_numbers():
    small, large = render_scene(BASE, seed=5, size=72), render_scene(BASE, seed=5, size=224)
    assert small.details == large.details
    assert [item.label for item in small.objects] == [item.label for item in large.objects]
    for item, other in zip(small.objects, large.objects):
        assert item.box == pytest.approx(other.box, abs=0.01)


def test_each_fact_has_one_object_and_the_rest_is_clutter(scenes):
    for facts, scene in scenes:
        for kind, value in facts.as_dict().items():
            assert object_of(scene, kind).label == value
        others = [item.kind for item in scene.objects if item.kind not in FACT_DOMAINS]
        assert others == ["clutter"] * len(others) and len(others) <= 5


def test_boxes_are_not_empty_and_inside_the_picture(scenes):
    for facts, scene in scenes:
        for item in scene.objects:
            left, top, right, bottom = item.box
            assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1, (facts.key, item)


def test_load_flag_and_clutter_do_not_overlap(scenes):
    for facts, scene in scenes:
        standing = [item for item in scene.objects if item.kind in ("load", "flag", "clutter")]
        for index, item in enumerate(standing):
            for other in standing[index + 1 :]:
                assert not overlap(item.box, other.box), (facts.key, item, other)


def test_sky_covers_enough_to_be_read(scenes):
    for facts, scene in scenes:
        left, top, right, bottom = object_of(scene, "sky").box
        assert (right - left) * (bottom - top) >= 0.18, facts.key
        assert object_of(scene, "weather").box == (left, top, right, bottom)


def test_a_farther_flag_is_clearly_smaller():
    for place in FACT_DOMAINS["place"]:
        for seed in range(3):
            heights = []
            for flag in ("far", "middle", "near"):
                _, top, _, bottom = object_of(render_scene(replace(place=place, flag=flag), seed), "flag").box
                heights.append(bottom - top)
            assert heights[0] * 1.4 < heights[1] < heights[2] / 1.4


def replace(**changes: str) -> SceneFacts:
    return dataclasses.replace(BASE, **changes)


@pytest.mark.parametrize("name", FACT_DOMAINS)
def test_every_value_of_a_fact_changes_the_picture(name):
    images = {render_scene(replace(**{name: value}), seed=7).image.tobytes() for value in FACT_DOMAINS[name]}
    assert len(images) == len(FACT_DOMAINS[name])


def test_numbers_agree_with_the_facts(scenes):
    for facts, scene in scenes:
        numbers = scene.details
        assert set(numbers) == {"weight_kg", "distance_m", "height_m", "depth_m"}
        for name, (low, high) in (("weight_kg", WEIGHTS_KG[facts.load]), ("distance_m", DISTANCES_M[facts.flag])):
            assert low <= numbers[name] <= high
        assert (numbers["depth_m"] > 0) == (facts.place in ("flooded tunnel", "open water"))
        assert (numbers["height_m"] > 0) == (facts.place in ("stairs", "rubble", "cliff"))

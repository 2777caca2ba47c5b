"""OpenMoji preparation: captions, rendering, styles, splits."""

import numpy as np
import pytest

import prepare_openmoji as recipe


@pytest.fixture(scope="module")
def built():
    return {
        style: recipe.build(32, style, seed=0, validation_share=0.1, wanted=["Food & Drink"])[0]
        for style in recipe.STYLES
    }


def test_captions_are_words():
    assert recipe.caption_of(":red_apple:") == "red apple"
    assert recipe.caption_of(":T-Rex:") == "T Rex"


def test_rendering_of_a_known_image():
    """OpenMoji's red apple: white corners, its red fill (#ea5a47) in the middle; the outline has neither red nor grey fill."""
    svg = recipe.svg_of("🍎")
    color, outline = (np.asarray(recipe.render(svg, 72, style)).astype(int) for style in recipe.STYLES)
    assert color[0, 0].tolist() == [255, 255, 255] and outline[0, 0].tolist() == [255, 255, 255]
    assert color[40, 30].tolist() == [0xEA, 0x5A, 0x47]
    assert outline[40, 30].tolist() == [255, 255, 255]
    assert np.ptp(outline, axis=-1).max() == 0  # greys only
    assert outline.min() == 0  # the line is there


def test_styles_agree_on_rows_and_splits(built):
    for split in ("train", "validation"):
        assert built["color"][split]["caption"] == built["outline"][split]["caption"]
    captions = [set(built["color"][split]["caption"]) for split in ("train", "validation")]
    assert not captions[0] & captions[1]
    assert "red apple" in captions[0] | captions[1]
    assert set(built["color"]["train"]["group"]) == {"Food & Drink"}


def test_more_groups_do_not_move_an_emoji_to_another_split(built):
    both, skipped = recipe.build(16, "outline", 0, 0.1, ["Food & Drink", "Activities"])
    held_out = set(both["validation"]["caption"])
    assert set(built["color"]["validation"]["caption"]) <= held_out
    assert not set(built["color"]["train"]["caption"]) & held_out
    assert skipped["skin tone variants"] > 1000

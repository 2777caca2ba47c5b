"""OpenMoji preparation: captions, rendering, styles, splits."""

from collections import Counter

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


def test_the_card_names_the_command(built, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "build", lambda *given: (built["color"], Counter()))
    recipe.main(
        ["--out", str(tmp_path), "--size", "32", "--groups", "Food & Drink", "Activities", "--min-subgroup", "2"]
    )
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert (
        "--size 32 --style color --seed 0\n--validation-share 0.1 --min-subgroup 2 --groups 'Food & Drink' Activities`"
        in card
    )


def test_subgroups_are_classes(built):
    """Unicode's own, so fruit and vegetables are two classes; small ones leave with their emoji."""
    rows = built["color"]["train"]
    names = rows.features["subgroup"].names
    assert names == sorted(names) and built["color"]["validation"].features["subgroup"].names == names
    found = {row["caption"]: names[row["subgroup"]] for split in built["color"].values() for row in split}
    assert found["red apple"] == "food-fruit" and found["carrot"] == "food-vegetable" and found["sushi"] == "food-asian"
    large, skipped = recipe.build(16, "color", 0, 0.1, ["Food & Drink"], min_subgroup=18)
    assert large["train"].features["subgroup"].names == ["drink", "food-fruit", "food-prepared", "food-vegetable"]
    kept = {row["caption"] for split in large.values() for row in split}
    assert kept == {
        name for name, group in found.items() if group in ("drink", "food-fruit", "food-prepared", "food-vegetable")
    }
    assert skipped["small subgroups"] == len(found) - len(kept) > 0
    with pytest.raises(ValueError, match="min_subgroup: no subgroup has 99 emoji, the largest has 34; lower it"):
        recipe.build(16, "color", 0, 0.1, ["Food & Drink"], min_subgroup=99)

"""A Gemma 4's config.json speaks both dialects, and every reader takes the same shapes from it."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_gemma4 import KINDS, SLIDING, WHOLE, tiny_gemma4
from transformers import AutoConfig

from core.errors import UserError
from core.gemma_config import family_of, write_both_dialects
from core.layer_shapes import layer_shapes

OLD = ("global_head_dim", "num_global_key_value_heads")


def written(kind: str, folder: Path, whole: bool = False) -> dict[str, Any]:
    """config.json as transformers writes it."""
    tiny_gemma4(kind, whole=whole).config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def shapes(config: dict[str, Any], folder: Path) -> list[Any]:
    """What transformers makes of it, layer by layer."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return layer_shapes(AutoConfig.from_pretrained(folder).get_text_config())


@pytest.mark.parametrize("kind", KINDS)
def test_either_dialect_becomes_both_and_none_changes_a_shape(kind: str, tmp_path: Path) -> None:
    new = written(kind, tmp_path)
    assert not any(name in new for name in OLD)
    both = write_both_dialects(new)
    old = {name: value for name, value in both.items() if name != "per_layer_config"}
    padded = {**new, "per_layer_config": {f"{int(n):04}": layer for n, layer in new["per_layer_config"].items()}}
    expected = shapes(new, tmp_path / "new")
    assert shapes(both, tmp_path / "both") == shapes(old, tmp_path / "old") == expected
    assert write_both_dialects(old) == write_both_dialects(padded) == write_both_dialects(both) == both
    assert both["global_head_dim"] == 32 and both["head_dim"] == 16
    full = [shape.kv_heads for shape in expected if shape.kind != SLIDING]
    assert both["num_global_key_value_heads"] in (full[0], None)
    assert (both["num_global_key_value_heads"] is None) == (not both["attention_k_eq_v"])


@pytest.mark.parametrize("kind", WHOLE)
def test_a_whole_models_text_part_speaks_both(kind: str, tmp_path: Path) -> None:
    both = write_both_dialects(written(kind, tmp_path, whole=True))
    assert both["text_config"]["global_head_dim"] == 32 and both["text_config"]["per_layer_config"]
    assert not any(name in both for name in (*OLD, "per_layer_config"))


def test_a_config_without_layers_named_has_the_published_pattern() -> None:
    given = {"model_type": "gemma4_text", "num_hidden_layers": 8, "head_dim": 256, "num_key_value_heads": 4}
    both = write_both_dialects(given)
    assert [n for n, kind in enumerate(both["layer_types"]) if kind != SLIDING] == [5, 7]
    assert both["per_layer_config"] == {"5": {"head_dim": 512}, "7": {"head_dim": 512}}


def test_what_the_old_dialect_cannot_say_is_refused(tmp_path: Path) -> None:
    config = written("31b", tmp_path)
    config["per_layer_config"]["2"] = {"head_dim": 8}
    with pytest.raises(UserError, match="per_layer_config"):
        write_both_dialects(config)


def test_other_families_stay_as_they_are() -> None:
    config = {"model_type": "gemma3_text", "num_hidden_layers": 2}
    assert write_both_dialects(config) == config


@pytest.mark.parametrize(
    ("config", "title"),
    [
        ({"model_type": "gemma"}, "Gemma 1"),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, "Gemma 3"),
        ({"model_type": "gemma4_unified", "text_config": {"model_type": "gemma4_unified_text"}}, "Gemma 4"),
    ],
)
def test_families_are_known_by_their_model_type(config: dict[str, Any], title: str) -> None:
    assert family_of(config, "it").title == title


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "gemma3n", "text_config": {"model_type": "gemma3n_text"}}, "four streams"),
        ({"model_type": "gemma3n_text"}, "four streams"),
        ({"model_type": "vaultgemma"}, "nothing here converts or serves it"),
        ({"model_type": "paligemma", "text_config": {"model_type": "gemma"}}, "'paligemma', which is unknown here"),
        ({"model_type": "gemma4_assistant"}, "unknown here"),
        ({}, "'None', which is unknown here"),
    ],
)
def test_other_families_are_refused_with_the_known_ones_named(config: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        family_of(config, "/my/model")
    assert "/my/model holds a" in str(error.value) and "gemma2, gemma3_text, gemma4_text" in str(error.value)

"""What a model takes next to text, by its config."""

from typing import Any

import pytest

from requant.libraries.modalities import Modalities, modalities


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"vision_config": {"depth": 2}}, (True, False)),
        ({"audio_config": {"layers": 2}}, (False, True)),
        ({"vision_config": {}}, (False, False)),  # mlx-vlm's converter writes it for text
        ({"thinker_config": {"audio_config": {"a": 1}, "vision_config": {"b": 1}}}, (True, True)),
        ({"text_config": {"hidden_size": 64}, "model_type": "llama"}, (False, False)),
    ],
)
def test_inputs_that_a_config_describes(config: dict[str, Any], expected: Modalities) -> None:
    assert modalities(config) == expected

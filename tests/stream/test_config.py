"""StreamConfig: what is refused and how, and the levels that each way of saying the steps gives."""

from __future__ import annotations

import pytest
import torch
from slipstream.core.schedules import DiscreteLevels, FlowLevels, scaled_linear_alphas_cumprod
from slipstream.stream import StreamConfig
from slipstream.stream.config import lcm_timesteps, stage_sigmas

LEVELS = DiscreteLevels(scaled_linear_alphas_cumprod())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"t_index_list": []}, "at least one index"),
        ({"t_index_list": "32,45"}, "list of at least one index"),
        ({"t_index_list": [45, 32]}, "ascend strictly"),
        ({"t_index_list": [32, 32]}, "ascend strictly"),
        ({"t_index_list": [50]}, "between 0 and 49, but got 50"),
        ({"t_index_list": [-1]}, "between 0 and 49, but got -1"),
        ({"t_index_list": [3.5]}, "integer"),
        ({"t_index_list": [30], "num_inference_steps": 25}, "between 0 and 24"),
        ({"num_inference_steps": 51}, "between 1 and 50"),
        ({"strength": 0.0}, "`strength`"),
        ({"strength": 1.5}, "`strength`"),
        ({"strength": 0.5, "steps": 0}, "`steps`"),
        ({"sigmas": [1.0, 2.0]}, "descend"),
        ({"sigmas": [0.0]}, "above 0"),
        ({"sigmas": [float("nan")]}, "`sigmas`"),
        ({"strength": 0.5, "t_index_list": [3]}, "Set one"),
        ({"guidance": "cfg"}, "`guidance`"),
        ({"cfg_scale": 0}, "1 switches guidance off"),
        ({"cfg_scale": -2.0}, "`cfg_scale`"),
        ({"cfg_scale": float("nan")}, "`cfg_scale`"),
        ({"delta": 3.0}, "Expected `delta` between 0 and 1, but got 3.0."),
        ({"delta": -0.1}, "`delta`"),
        ({"renoise": "sometimes"}, "`renoise`"),
        ({"seed": -1}, "`seed`"),
        ({"frame_group": 0}, "`frame_group`"),
        ({"feedback": 1.0}, "`feedback`"),
        ({"motion": 1.5}, "`motion`"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(settings, message) -> None:
    with pytest.raises(ValueError, match="Expected") as caught:
        StreamConfig(**settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_defaults_are_the_published_ones() -> None:
    config = StreamConfig()
    assert (config.t_index_list, config.guidance, config.cfg_scale, config.delta) == ((32, 45), "self", 1.2, 1.0)
    assert config.stages == 2
    assert (config.renoise, config.frame_group, config.seed) == ("fixed", 1, 2)
    assert (config.feedback, config.motion, config.cross_frame, config.consistency) == (0, 0, False, False)
    assert StreamConfig(guidance="initialize").guidance == "onetime"


def test_grid() -> None:
    assert lcm_timesteps()[:3] == [999, 979, 959]
    assert lcm_timesteps()[-1] == 19
    assert lcm_timesteps(25) == list(range(999, 0, -40))
    assert lcm_timesteps(4) == [999, 759, 499, 259]


def test_levels_by_index() -> None:
    sigmas = stage_sigmas(StreamConfig(t_index_list=[0, 16, 32, 45]), LEVELS)
    torch.testing.assert_close(sigmas, torch.tensor([14.6146, 3.0689, 1.0171, 0.3417]), rtol=1e-3, atol=0)


def test_strength_is_a_friendlier_index() -> None:
    by_index = stage_sigmas(StreamConfig(t_index_list=[32]), LEVELS)
    torch.testing.assert_close(stage_sigmas(StreamConfig(strength=0.36, steps=1), LEVELS), by_index)
    sigmas = stage_sigmas(StreamConfig(strength=1.0, steps=4), LEVELS)
    assert LEVELS.sigma_to_t(sigmas).tolist() == [999, 749, 500, 250]
    assert stage_sigmas(StreamConfig(strength=1.0, steps=2), FlowLevels()).tolist() == pytest.approx([0.999, 0.5])


def test_sigmas_from_a_scheduler_lose_their_end() -> None:
    config = StreamConfig(sigmas=torch.tensor([3.0, 1.0, 0.0]))
    assert config.stages == 2
    assert stage_sigmas(config, LEVELS).tolist() == [3.0, 1.0]


def test_a_new_way_to_say_the_steps_replaces_the_old() -> None:
    config = StreamConfig(t_index_list=[10, 20]).changed(strength=0.5, steps=3)
    assert config.stages == 3
    assert config.t_index_list is None
    assert config.changed(sigmas=[1.0]).stages == 1
    with pytest.raises(ValueError, match="Set both"):
        StreamConfig(t_index_list=[10]).changed(steps=2)
    with pytest.raises(ValueError, match="`speed`"):
        config.changed(speed=2)

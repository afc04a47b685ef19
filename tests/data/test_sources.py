"""Sources: Minari datasets, unions and names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from lit_diffrl.data import pointmaze, sources
from lit_diffrl.data.sources import load_source, prepare_source
from lit_diffrl.errors import ConfigError, DataError
from lit_diffrl.rollout.environments import check_env


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(sources, "_server_has_name", lambda: False)


def put(name: str, index: Any, value: Any, episode: int = 1):
    """An edit that writes one value into an array of one episode."""

    def edit(arrays: dict[str, Any], i: int) -> None:
        if i == episode:
            arrays[name] = np.array(arrays[name])
            arrays[name][index] = value

    return edit


# ---------------------------------------------------------------- Minari


def test_minari_becomes_episodes(make_minari):
    recorded = []
    name = make_minari(edit=lambda arrays, i: recorded.append(dict(arrays)))
    episodes, info = load_source(name)
    assert episodes.lengths.tolist() == [20, 20, 20] and episodes.obs.dtype == torch.float32
    for start, arrays in zip(episodes.starts.tolist(), recorded):
        part = slice(start, start + 20)
        obs = torch.tensor(arrays["observations"]).float()
        assert torch.equal(episodes.obs[part], obs[:-1]) and torch.equal(episodes.next_obs[part], obs[1:])
        assert torch.equal(episodes.action[part], torch.tensor(arrays["actions"]))
        assert torch.equal(episodes.reward[part], torch.tensor(arrays["rewards"]).float())
    assert episodes.truncated.nonzero().flatten().tolist() == [19, 39, 59] and not episodes.terminated.any()
    assert (info.action_low, info.action_high, info.dataset_ids) == ([-1.0, -1.0], [1.0, 1.0], [name])


def test_data_without_environment_or_references_loads(make_minari):
    _, info = load_source(make_minari())
    assert (info.env_spec, info.ref_min, info.ref_max, info.max_episode_steps) == (None,) * 4


def test_environment_and_references_come_from_the_metadata(make_minari):
    name = make_minari(obs_dim=11, action_dim=3, env="Hopper-v5", ref_min_score=-20.0, ref_max_score=3000.0)
    _, info = load_source(name)
    assert (info.ref_min, info.ref_max, info.max_episode_steps) == (-20.0, 3000.0, 1000)
    assert info.env_spec is not None and json.loads(info.env_spec)["id"] == "Hopper-v5"
    check_env(info.env_spec)


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, np.nan), (-np.inf, 1.0), (1.0, 0.0), ("0", 1.0), (0.0, [1.0]), ({}, 1.0)]
)
def test_reference_returns_that_give_no_scores_are_refused(make_minari, low, high):
    with pytest.raises(DataError, match=r"test/point-v0: ref_min_score is .* must be finite numbers"):
        load_source(make_minari(ref_min_score=low, ref_max_score=high))


@pytest.mark.parametrize(("low", "high"), [(None, 1.0), (2.0, None), (0.0, 0.0)])
def test_without_two_reference_returns_there_are_no_scores(make_minari, low, high):
    _, info = load_source(make_minari(ref_min_score=low, ref_max_score=high))
    assert (info.ref_min, info.ref_max) == (None, None)


def test_the_evaluation_environment_comes_first(make_minari):
    name = make_minari(obs_dim=11, action_dim=3, env="Hopper-v5", eval_env="Hopper-v4")
    assert json.loads(load_source(name)[1].env_spec or "{}")["id"] == "Hopper-v4"


def test_environments_of_older_gymnasiums_are_read(make_minari, minari_root):
    name = make_minari(obs_dim=11, action_dim=3, env="Hopper-v5")
    path = minari_root / name / "data" / "metadata.json"
    metadata = json.loads(path.read_text())
    old = metadata["env_spec"].replace('"kwargs"', '"apply_api_compatibility": false, "autoreset": false, "kwargs"')
    path.write_text(json.dumps({**metadata, "env_spec": old}))
    env_spec = load_source(name)[1].env_spec
    assert env_spec is not None and "autoreset" not in env_spec
    check_env(env_spec)


def test_dict_observations_are_flattened(make_minari):
    name = make_minari(dict_obs=True, goal=(1.0, -1.0))
    episodes, info = load_source(name)
    assert episodes.obs_dim == 4 and (info.obs_keys, info.goal_key) == (["observation"], "desired_goal")
    assert info.goal == [1.0, -1.0]
    wide, info = load_source(name, obs_keys=["achieved_goal", "observation"])
    assert wide.obs_dim == 6 and info.obs_keys == ["achieved_goal", "observation"]
    assert torch.equal(wide.obs, torch.cat([episodes.obs[:, :2], episodes.obs], dim=1))


def test_a_goal_that_changes_is_no_goal_of_the_data(make_minari):
    def move(arrays: dict[str, Any], i: int) -> None:
        arrays["observations"]["desired_goal"][-1] += i

    _, info = load_source(make_minari(dict_obs=True, edit=move))
    assert info.goal is None and info.goal_key == "desired_goal"


def test_a_goal_that_is_not_finite_is_no_goal_of_the_data(make_minari):
    _, info = load_source(make_minari(dict_obs=True, goal=(np.nan, 0.0)))
    assert info.goal is None and info.goal_key == "desired_goal"


def test_missing_keys_are_named_with_those_present(make_minari):
    with pytest.raises(DataError, match=r"achieved_goal, desired_goal, observation, not speed.*--data.obs_keys"):
        load_source(make_minari(dict_obs=True), obs_keys=["observation", "speed"])
    with pytest.raises(ConfigError, match="no dicts"):
        load_source(make_minari("test/flat-v0"), obs_keys=["observation"])


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (put("rewards", 3, np.nan), "episode 1, step 3: reward is nan"),
        (put("actions", (4, 1), np.inf), r"episode 1, step 4: action\[1\] is inf"),
        (put("observations", (0, 2), -np.inf), r"episode 1, step 0: obs\[2\] is -inf"),
        (put("observations", (20, 2), np.nan), r"episode 1, step 19: next_obs\[2\] is nan"),
        (put("actions", (4, 1), 1.01), r"episode 1, step 4: action\[1\] is 1.01, outside \[-1, 1\]"),
        (put("terminations", 6, True), "episode 1, step 6: terminated is set, but the episode goes on"),
        (
            lambda arrays, i: arrays.update(observations=arrays["observations"][:-1]),
            "episode 0: observations has shape",
        ),
        (
            lambda arrays, i: arrays.update(rewards=arrays["rewards"][:-1]),
            "episode 0: observations has shape .* for 19 rewards",
        ),
        (
            lambda arrays, i: i == 2 and arrays.update(observations=arrays["observations"][:, :3]),
            r"obs has rows of shape \(4,\) in episode 0 and \(3,\) in episode 2",
        ),
    ],
)
def test_malformed_episodes_are_located(make_minari, edit, words):
    with pytest.raises(DataError, match=r"test/point-v0.*" + words):
        load_source(make_minari(edit=edit))


def test_an_empty_episode_is_refused(make_minari, minari_root):
    import h5py

    name = make_minari()
    with h5py.File(minari_root / name / "data" / "main_data.hdf5", "a") as file:
        for key, value in list(file["episode_1"].items()):
            if isinstance(value, h5py.Dataset):
                rows = value[:1] if key == "observations" else value[:0]
                del file[f"episode_1/{key}"]
                file[f"episode_1/{key}"] = rows
    with pytest.raises(DataError, match="test/point-v0: episode 1 is empty.*remove that episode"):
        load_source(name)


def test_an_episode_that_just_stops_was_cut(make_minari):
    episodes, _ = load_source(make_minari(edit=put("truncations", -1, False)))
    assert episodes.truncated.nonzero().flatten().tolist() == [19, 39, 59]


@pytest.mark.parametrize("damage", ["truncated", "no data", "metadata"])
def test_damaged_datasets_are_refused(make_minari, minari_root, damage):
    name = make_minari()
    data = minari_root / name / "data"
    if damage == "truncated":
        content = (data / "main_data.hdf5").read_bytes()
        (data / "main_data.hdf5").write_bytes(content[: len(content) // 2])
    elif damage == "no data":
        (data / "main_data.hdf5").unlink()
    else:
        (data / "metadata.json").write_text("{")
    with pytest.raises(DataError, match="test/point-v0.*remove that folder and get the dataset again"):
        load_source(name)


@pytest.mark.parametrize(
    ("spaces", "words"),
    [
        ({"action_space": gym.spaces.Discrete(2)}, "actions are Discrete"),
        ({"observation_space": gym.spaces.Tuple([gym.spaces.Discrete(2)])}, "observations are Tuple"),
    ],
)
def test_other_spaces_are_refused(make_minari, minari_root, spaces, words):
    from minari.serialization import serialize_space

    name = make_minari()
    path = minari_root / name / "data" / "metadata.json"
    metadata = json.loads(path.read_text())
    path.write_text(json.dumps({**metadata, **{k: serialize_space(v) for k, v in spaces.items()}}))
    with pytest.raises(DataError, match=words):
        load_source(name)


# ---------------------------------------------------------------- unions


@pytest.mark.parametrize("form", ["joined", "list"])
def test_a_union_holds_all_episodes_in_order(make_minari, form):
    names = [make_minari("test/a-v0", n_episodes=2, ref_min_score=0.0, ref_max_score=1.0), make_minari("test/b-v0")]
    episodes, info = load_source("+".join(names) if form == "joined" else names)
    single = [load_source(name)[0] for name in names]
    assert info.dataset_ids == names and (info.ref_min, info.ref_max) == (0.0, 1.0)
    assert torch.equal(episodes.obs, torch.cat([part.obs for part in single]))
    assert episodes.lengths.tolist() == [20] * 5 and episodes.starts.tolist() == [0, 20, 40, 60, 80]


def test_a_union_keeps_only_a_common_goal(make_minari):
    names = [make_minari(f"test/{i}x-v0", dict_obs=True, goal=(g, 0.0)) for i, g in enumerate([1.0, 1.0, 2.0])]
    assert load_source(names[:2])[1].goal == [1.0, 0.0]
    assert load_source(names)[1].goal is None


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"obs_dim": 5}, "observation size 4 and 5"),
        ({"action_dim": 3}, "action size 2 and 3"),
        ({"action_space": gym.spaces.Box(-2, 2, (2,), np.float32)}, r"least action \[-1.0, -1.0\] and \[-2.0, -2.0\]"),
        ({"dict_obs": True}, "observation keys None and"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(make_minari, other, words):
    first, second = make_minari("test/a-v0"), make_minari("test/b-v0", **other)
    with pytest.raises(DataError, match=f"test/a-v0 and test/b-v0 cannot be joined: {words}"):
        load_source(f"{first}+{second}")


def test_parts_of_different_environments_are_refused(make_minari):
    names = [make_minari(f"test/{e}", 1, 5, 17, 6, env=e) for e in ("HalfCheetah-v5", "Walker2d-v5")]
    with pytest.raises(DataError, match=r"environment .*HalfCheetah-v5.*Walker2d-v5"):
        load_source(names)


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("act", [load_source, prepare_source])
@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("test/piont-v0", "test/point-v0"),
        ("test/point-v1", "test/point-v0"),
        ("lit_diffrl/pointmaze/umaz-v0", "lit_diffrl/pointmaze/umaze-v0"),
        ("lit_difrl/pointmaze/large-v0", "lit_diffrl/pointmaze/large-v0"),
        ("test/point-v0+test/point", "test/point-v0"),
    ],
)
def test_a_mistyped_id_costs_one_line_with_the_nearest(make_minari, offline, act, typed, meant):
    make_minari()
    with pytest.raises(ConfigError) as caught:
        act(typed)
    message = str(caught.value)
    assert typed.split("+")[-1] in message and f"did you mean '{meant}'" in message and "\n" not in message


def test_a_failed_download_costs_one_line(make_minari, monkeypatch):
    def fail(name: str, download: bool = False) -> None:
        raise ValueError(f"no {name}\non the server")

    make_minari()
    monkeypatch.setattr(sources, "_server_has_name", lambda: True)
    monkeypatch.setattr("minari.load_dataset", fail)
    with pytest.raises(ConfigError, match=r"not downloaded: ValueError: no test/point-v9 on the server.*did you mean"):
        prepare_source("test/point-v9")


def test_a_root_that_cannot_be_written_to_costs_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "file"))
    for act in (load_source, prepare_source):
        with pytest.raises(ConfigError, match="cannot be used .*file.*; set the environment variable MINARI_DATASETS"):
            act("lit_diffrl/pointmaze/umaze-v0")


def test_a_full_disk_while_a_maze_is_collected_costs_one_line(minari_root, monkeypatch):
    def fail(name: str) -> None:
        raise OSError(28, "No space left on device", "walk.hdf5")

    monkeypatch.setattr(pointmaze, "collect", fail)
    with pytest.raises(DataError, match=r"umaze-v0 is not collected: .*No space left on device: walk.hdf5"):
        prepare_source("lit_diffrl/pointmaze/umaze-v0")


def test_mazes_are_collected_once_and_only_if_missing(minari_root, make_minari, monkeypatch):
    collected: list[str] = []
    monkeypatch.setattr(pointmaze, "collect", lambda name: collected.append(make_minari(name)))
    for _ in range(2):
        prepare_source(["lit_diffrl/pointmaze/umaze-v0", "lit_diffrl/pointmaze/umaze-v0"])
    assert collected == ["lit_diffrl/pointmaze/umaze-v0"]
    assert load_source(collected[0])[0].num_episodes == 3


def test_options_apply_to_their_kind_of_data_only(make_minari, tmp_path):
    with pytest.raises(ConfigError, match="data.env 'hopper' applies to D4RL files"):
        load_source(make_minari(), env="hopper")
    with pytest.raises(ConfigError, match="data.obs_keys .* apply to Minari datasets only"):
        prepare_source(str(tmp_path / "x.hdf5"), obs_keys=["observation"])
    for empty in ("", [], "test/point-v0+"):
        with pytest.raises(ConfigError, match="empty part"):
            load_source(empty)


def test_a_folder_is_no_file(tmp_path: Path):
    (tmp_path / "hopper.hdf5").mkdir()
    with pytest.raises(ConfigError, match=r"hopper.hdf5 is a folder; give the path of a D4RL file"):
        prepare_source(str(tmp_path / "hopper.hdf5"))


def test_a_missing_file_is_named_with_its_neighbours(tmp_path: Path):
    (tmp_path / "hopper_medium-v2.hdf5").touch()
    with pytest.raises(ConfigError, match=r"hoper_medium-v2.hdf5 does not exist.*did you mean .*hopper_medium-v2.hdf5"):
        prepare_source(str(tmp_path / "hoper_medium-v2.hdf5"))

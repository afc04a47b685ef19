"""Episodes are seeded one by one, counted to their end, and leave no trace."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

from lit_diffrl.errors import ConfigError
from lit_diffrl.rollout.episodes import preserved_rng, run_episodes, summarize

ROOT = Path(__file__).parents[2]


def numbers(results):
    return [(r.seed, r.return_, r.score, r.length, r.terminated) for r in results]


@pytest.mark.parametrize("num_envs", [2, 5, 7, 50])
def test_results_do_not_depend_on_the_number_of_environments(toy_spec, noisy_agent, num_envs):
    one = run_episodes(toy_spec(), noisy_agent(), episodes=7, num_envs=1)
    many = run_episodes(toy_spec(), noisy_agent(), episodes=7, num_envs=num_envs)
    assert numbers(one) == numbers(many)
    assert len({r.length for r in one}) > 1


def test_episode_k_is_the_single_environment_reset_with_seed_base_plus_k(toy_spec, noisy_agent):
    agent = noisy_agent(scale=0.0)
    results = run_episodes(toy_spec(), agent, episodes=6, num_envs=4, seed=70)
    assert [r.seed for r in results] == agent.seeds == [70 + k for k in range(6)]
    for result in results:
        # Rewards after the end would add to the return; the environment pays 1 per step and asserts its own end.
        length = int(np.random.default_rng(np.random.SeedSequence(result.seed)).integers(2, 20))
        assert (result.length, result.return_, result.terminated) == (length, float(length), True)
        assert result.score == pytest.approx(5 * length)


def test_some_episodes_are_the_same_as_in_the_whole(toy_spec, noisy_agent):
    whole = run_episodes(toy_spec(), noisy_agent(), episodes=8, num_envs=3)
    parts = [run_episodes(toy_spec(), noisy_agent(), episodes=range(r, 8, 3), num_envs=2) for r in range(3)]
    assert numbers(sorted((r for part in parts for r in part), key=lambda r: r.seed)) == numbers(whole)


def test_long_and_short_episodes_count_alike(toy_spec, noisy_agent):
    results = run_episodes(toy_spec(), noisy_agent(scale=0.0), episodes=300, num_envs=10)
    assert summarize(results)["length"]["mean"] == pytest.approx(10.5, abs=0.9)  # uniform on 2 .. 19


def test_rows_that_have_ended_are_not_acted_on(toy_spec, noisy_agent):
    agent = noisy_agent()
    results = run_episodes(toy_spec(), agent, episodes=5, num_envs=5)
    assert sum(active for _, active in agent.batches) == sum(r.length for r in results)
    assert len(agent.batches) == max(r.length for r in results)


def test_actions_are_clipped_to_the_action_space(toy_spec, noisy_agent):
    results = run_episodes(toy_spec(), noisy_agent(scale=1e6), episodes=4, num_envs=2)  # the environment asserts
    assert all(abs(r.return_ - r.length) <= 0.5 * r.length for r in results)


def test_the_step_limit_truncates(toy_spec, noisy_agent):
    results = run_episodes(toy_spec(), noisy_agent(), episodes=20, num_envs=20, max_steps=6)
    assert max(r.length for r in results) == 6
    assert any(not r.terminated for r in results) and any(r.terminated for r in results)


def test_random_states_are_left_alone(toy_spec, noisy_agent):
    def draw():
        return torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()

    for evaluate in (False, True):
        torch.manual_seed(1), np.random.seed(1), random.seed(1)
        draw()
        if evaluate:
            run_episodes(toy_spec(), noisy_agent(), episodes=3, num_envs=2)
        after = draw()
        if not evaluate:
            expected = after
    assert after == expected
    with pytest.raises(RuntimeError), preserved_rng():
        torch.rand(1)
        raise RuntimeError
    assert draw() != expected


def test_recording_keeps_paths_plans_and_pictures(toy_spec, noisy_agent):
    class Planner(noisy_agent):
        def plan_trace(self):
            return [np.full((4, 2), row) for row in range(len(self.generators))]

    results = run_episodes(toy_spec(), Planner(), episodes=4, num_envs=3, record=2, render=True)
    assert results[0].path.shape == (results[0].length + 1, 2)
    np.testing.assert_array_equal(results[0].path[:, 0], np.arange(results[0].length, -1, -1))
    step, plan = results[1].plans[0]
    assert step == 0 and len(results[1].plans) == 1 and np.all(plan == 1)
    assert results[2].path is None and not results[2].plans
    assert len(results[0].frames) == results[0].length and not results[1].frames


def test_a_failing_renderer_costs_the_video_only(toy_spec, noisy_agent, monkeypatch, caplog):
    import lit_diffrl_toy_env

    def no_display(self):
        raise OSError("no display")

    monkeypatch.setattr("lit_diffrl.rollout.episodes._drawing_failed", False)
    monkeypatch.setattr(lit_diffrl_toy_env.Countdown, "render", no_display)
    for _ in range(2):  # MuJoCo would end the process at the second attempt
        results = run_episodes(toy_spec(), noisy_agent(), episodes=2, num_envs=2, render=True)
        assert len(results) == 2 and not results[0].frames
    assert caplog.text.count("MUJOCO_GL=egl") == 1


@pytest.mark.parametrize("more", [{}, {"MUJOCO_GL": "glfw"}])
def test_without_a_display_robots_are_drawn_by_egl(more):
    """In a process of its own: where EGL is missing or not allowed, so is the video, and nothing worse happens."""
    code = (
        "import gymnasium as gym, numpy as np\n"
        "from lit_diffrl.data.spec import DatasetSpec\n"
        "from lit_diffrl.rollout import run_episodes\n"
        "class Still:\n"
        "    def reset(self, mask=None, seeds=None): pass\n"
        "    def act(self, obs, active=None): return np.zeros((len(obs), 3), dtype=np.float32)\n"
        "spec = DatasetSpec(obs_dim=11, action_dim=3, action_low=[-1] * 3, action_high=[1] * 3, dataset_ids=[],\n"
        "    env_spec=gym.spec('Hopper-v5').to_json(), ref_min=None, ref_max=None, max_episode_steps=2,\n"
        "    obs_keys=None, goal_key=None, goal=None, obs_normalizer={}, action_normalizer={},\n"
        "    reward_max=1, reward_min=0)\n"
        "frames = [run_episodes(spec, Still(), episodes=1, render=True)[0].frames for _ in range(3)]\n"
        "assert [len(f) for f in frames] in ([2, 2, 2], [0, 0, 0])\n"
        "assert all(np.std(f) > 0 for f in frames if f)\n"
        "print(len(frames[0]))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL")}
    environment |= more
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert not more or done.stdout.split() == ["0"]


def test_gradients_work_for_the_agent_under_inference_mode(toy_spec, noisy_agent):
    class Guided(noisy_agent):
        def act(self, obs, active=None):
            with torch.inference_mode(False), torch.enable_grad():
                x = torch.zeros(len(obs), 1, requires_grad=True)
                (slope,) = torch.autograd.grad((0.25 * x).sum(), x)
            return slope.numpy()

    with torch.inference_mode():
        results = run_episodes(toy_spec(), Guided(), episodes=2, num_envs=2)
    assert all(r.return_ == pytest.approx(1.25 * r.length) for r in results)


def test_summary_numbers(toy_spec, noisy_agent):
    results = run_episodes(toy_spec(), noisy_agent(), episodes=5, num_envs=2)
    summary = summarize(results)
    returns = np.array([r.return_ for r in results])
    assert summary["episodes"] == 5
    assert summary["return"] == pytest.approx(
        {"mean": returns.mean(), "std": returns.std(), "min": returns.min(), "max": returns.max()}
    )
    assert 0 < summary["action_ms"] <= summary["call_ms"]
    assert summarize(run_episodes(toy_spec(ref_min=None, ref_max=None), noisy_agent(), episodes=1))["score"] is None


def test_the_real_simulator_agrees_with_a_plain_loop(toy_spec, noisy_agent):
    """InvertedPendulum, whose episodes end at different times, played one by one and side by side."""

    class Constant(noisy_agent):
        def act(self, obs, active=None):
            return 0.2 * obs[:, :1]

    env = gym.make("InvertedPendulum-v5")
    spec = toy_spec(env_spec=env.spec.to_json(), obs_dim=4, action_low=[-3.0], action_high=[3.0])
    results = run_episodes(spec, Constant(), episodes=5, num_envs=3, seed=5)
    for result in results:
        obs, _ = env.reset(seed=result.seed)
        total, length, done = 0.0, 0, False
        while not done:
            obs, reward, terminated, truncated, _ = env.step((0.2 * obs[:1]).astype(np.float32))
            total, length, done = total + float(reward), length + 1, terminated or truncated
        assert (result.return_, result.length) == (total, length)
    assert len({r.length for r in results}) > 1


class TestErrors:
    def test_no_environment(self, toy_spec, noisy_agent):
        with pytest.raises(ConfigError, match="toy/countdown-v0 names no environment"):
            run_episodes(toy_spec(env_spec=None), noisy_agent())

    def test_endless_episodes(self, toy_spec, noisy_agent):
        from gymnasium.envs.registration import EnvSpec

        endless = EnvSpec("Countdown-v0", entry_point="lit_diffrl_toy_env:Countdown").to_json()
        with pytest.raises(ConfigError, match=r"no time limit.*--rollout.max_steps"):
            run_episodes(toy_spec(env_spec=endless), noisy_agent())

    @pytest.mark.parametrize("action", [np.full((2, 1), np.nan), np.zeros((2, 3))])
    def test_impossible_actions(self, toy_spec, noisy_agent, action):
        class Broken(noisy_agent):
            def act(self, obs, active=None):
                return action

        with pytest.raises(ConfigError, match=r"seed 1000, step 0: Broken chose .* finite actions of shape \(1,\)"):
            run_episodes(toy_spec(), Broken(), episodes=2, num_envs=2)

    def test_discrete_actions(self, toy_spec, noisy_agent):
        spec = toy_spec(env_spec=gym.make("CartPole-v1").spec.to_json())
        with pytest.raises(ConfigError, match=r"CartPole-v1 has actions Discrete\(2\)"):
            run_episodes(spec, noisy_agent())

    def test_no_environments_at_once(self, toy_spec, noisy_agent):
        with pytest.raises(ConfigError, match="num_envs"):
            run_episodes(toy_spec(), noisy_agent(), num_envs=0)

"""A schedule in continuous time: its knots, its lines and where they end."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from printed import digits

from lit_diffrl.diffusion import Schedule
from lit_diffrl.diffusion.continuous import LogSNR
from lit_diffrl.errors import ConfigError


def test_linear_schedule_of_1000_steps_has_the_known_log_snr() -> None:
    snr = LogSNR(Schedule("linear", 1000))
    assert snr.lambda_(1) == digits("-5.05883659")
    assert snr.lambda_(1e-3) == digits("4.60512018")
    assert snr.alpha(0.5) == digits("0.28033416")
    assert snr.inverse_lambda(0) == digits("0.25909280")


@pytest.mark.parametrize(
    ("kind", "num_steps"), [("linear", 1000), ("linear", 100), ("vp", 5), ("cosine", 50), ("linear_unscaled", 100)]
)
def test_time_is_the_inverse_of_lambda_also_beyond_the_knots(kind: str, num_steps: int) -> None:
    snr = LogSNR(Schedule(kind, num_steps))
    times = [1 / num_steps + i / 777 * (1.02 - 1 / num_steps) for i in range(778)]
    values = [snr.lambda_(t) for t in times]
    assert all(a > b for a, b in pairwise(values))
    # the noise is all but complete at the end of a cosine schedule: lambda itself is good to fewer digits there
    assert max(abs(snr.inverse_lambda(v) - t) for v, t in zip(values, times)) < (1e-12 if kind != "cosine" else 1e-10)


@pytest.mark.parametrize("num_steps", [2, 5, 100, 1000])
def test_the_network_sees_the_indices_of_training_at_the_steps(num_steps: int) -> None:
    schedule = Schedule("vp", num_steps)
    snr = LogSNR(schedule)
    for k in range(1, num_steps + 1):
        assert snr.net_input(k / num_steps) == k - 1
        assert snr.alpha(k / num_steps) == pytest.approx(schedule.value("signal", k), rel=1e-12)
        assert snr.sigma(k / num_steps) == pytest.approx(schedule.value("noise", k), rel=1e-10)


def test_between_two_steps_the_logarithm_of_the_signal_is_a_line() -> None:
    snr = LogSNR(Schedule("cosine", 20))
    middle = (snr.log_alpha(0.25) + snr.log_alpha(0.3)) / 2
    assert snr.log_alpha(0.275) == pytest.approx(middle, rel=1e-12)
    assert snr.alpha(0.275) ** 2 + snr.sigma(0.275) ** 2 == pytest.approx(1, abs=1e-12)
    assert snr.lambda_(0.275) == pytest.approx(math.log(snr.alpha(0.275) / snr.sigma(0.275)), rel=1e-12)


def test_a_time_with_more_signal_than_clean_data_is_refused_with_the_one_to_use() -> None:
    snr = LogSNR(Schedule("linear", 100))
    for function in (snr.log_alpha, snr.alpha, snr.sigma, snr.lambda_):
        with pytest.raises(ConfigError, match=r"time 0.001 .* linear schedule with K = 100.* t_end = 1/K = 0.01"):
            function(1e-3)
    assert snr.log_alpha(0.009) < 0  # a little before the first step the line is still below 0


def test_a_single_step_defines_no_line() -> None:
    with pytest.raises(ConfigError, match="continuous schedule must be in"):
        LogSNR(Schedule("vp", 1))

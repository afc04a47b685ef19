"""Freed memory is kept, and nobody's own settings are overruled."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROBE = """
import resource, sys
import torch
torch.set_num_threads(1)
from lit_diffrl.memory import keep_freed_memory
{call}
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20): torch.ones(1 << 20).exp()
before = faults()
for _ in range(100): torch.ones(1 << 20).exp()
print(faults() - before)
"""


def page_faults(call: str, **environment: str) -> int:
    command = [sys.executable, "-c", PROBE.format(call=call)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_tensors_that_come_and_go_are_not_faulted_in_again() -> None:
    own = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}
    plain = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    assert page_faults("keep_freed_memory()", **plain) < 1_000
    assert page_faults("keep_freed_memory()", **own) > 50_000, "1,024 pages, twice, a hundred times"

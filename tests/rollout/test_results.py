"""Files are whole or absent, and plain."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

import pytest

from lit_diffrl.rollout.results import duration, table, write_bytes, write_json


def test_json_holds_options_of_every_kind(tmp_path):
    @dataclass
    class Sampler:
        name: str = "ddim"
        steps: tuple[int, ...] = (5, 10)

    path = tmp_path / "new" / "folder" / "x.json"
    write_json(path, {"sampler": Sampler(), "limit": float("inf"), "_private": 1, "none": None, "path": path})
    assert json.loads(path.read_text()) == {
        "sampler": {"name": "ddim", "steps": [5, 10]}, "limit": "inf", "none": None, "path": str(path),
    }  # fmt: skip


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_bytes(path, b"old")

    def full(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_table_lines_up():
    lines = table([("a", "1"), ("longer", "22")]).splitlines()
    assert lines[1:3] == ["  a       1", "  longer  22"] and lines[0] == lines[3]


@pytest.mark.parametrize(("seconds", "text"), [(42.4, "42 s"), (185, "3 min 5 s"), (7_805, "2 h 10 min")])
def test_durations(seconds, text):
    assert duration(seconds) == text

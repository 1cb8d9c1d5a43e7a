"""The comparison of two commits: one bit is enough, and what only one of them has is no difference."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch


@pytest.fixture(scope="module")
def same(pack):
    spec = importlib.util.spec_from_file_location("same_under_test", pack.root / "checks" / "same.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def case(absent=None, log=(), **outputs):
    return {"absent": absent, "log": list(log), "outputs": outputs}


def test_equal_bits_are_the_same_and_one_bit_is_not(same):
    video = torch.tensor([0.0, 1.0, float("nan"), float("inf")])
    (row,) = same.compare({"a": case(video=video)}, {"a": case(video=video.clone())})
    assert row == same.Row("a", "video", same.SAME) and not row.differs
    for place, value in ((0, -0.0), (1, 1.0 + 2**-23)):
        other = video.clone()
        other[place] = value
        (row,) = same.compare({"a": case(video=video)}, {"a": case(video=other)})
        assert row.differs and "in 1 of 4 values" in row.verdict
    other = video.to(torch.bfloat16)
    assert "bfloat16" in same.difference(video, other) and "[2, 2]" in same.difference(
        video, video.view(2, 2)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool])
def test_any_type_of_number(same, dtype):
    one = torch.tensor([[0, 1], [1, 0]]).to(dtype)
    other = one.clone()
    other[0, 1] = 0
    assert same.difference(one, one.t()) == same.SAME
    assert same.difference(one, other) == "differs by up to 1 in 1 of 4 values"


def test_what_is_no_tensor(same):
    assert same.difference(float("nan"), float("nan")) == same.difference("text", "text") == same.SAME
    assert same.difference(1, 1.0) != same.SAME
    rows = same.compare({"a": case(error="ValueError: one")}, {"a": case(error="ValueError: two")})
    assert rows[0].differs and "two" in rows[0].verdict
    rows = same.compare({"a": case(error="ValueError: one")}, {"a": case(video=torch.zeros(1))})
    assert [(row.output, row.verdict) for row in rows] == [("error", "only in OLD"), ("video", "only in NEW")]
    assert all(row.differs for row in rows)


def test_what_only_one_commit_has_is_listed_and_no_difference(same):
    old = {"a": case(absent="no node LowRank"), "b": case(video=torch.zeros(1))}
    new = {"a": case(video=torch.zeros(1)), "c": case(video=torch.zeros(1))}
    rows = {row.case: row for row in same.compare(old, new)}
    assert not any(row.differs for row in rows.values())
    assert rows["a"].verdict == "not in OLD: no node LowRank"
    assert rows["b"].verdict == "not in NEW: no such case" and rows["c"].verdict == "not in OLD: no such case"


def test_log_lines(same):
    old, new = (
        {"a": case(log=["one", "two"]), "b": case(log=["x"])},
        {"a": case(log=["one"]), "b": case(log=["x"])},
    )
    assert same.compare_logs(old, new) == ["a", "  - two"]
    assert same.compare_logs(new, new) == []

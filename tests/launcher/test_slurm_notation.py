from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.backends import slurm_notation as notation


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("node1", "node1"),
        ("node[1-3]", "node1 node2 node3"),
        ("node[1-2,7],login", "node1 node2 node7 login"),
        ("n[08-11]", "n08 n09 n10 n11"),  # the width of the first number holds for the range
        ("n[8-11]", "n8 n9 n10 n11"),
        ("n[099-101,5]", "n099 n100 n101 n5"),
        ("rack[1-2]n[1-2]", "rack1n1 rack1n2 rack2n1 rack2n2"),
        ("n[1-2]-ib,x[3]", "n1-ib n2-ib x3"),
        ("b,a,c", "b a c"),  # never sorted: the order is that of the ranks
        ("", ""),
        ("(null)", ""),
        ("None assigned", ""),
    ],
)
def test_hosts(text, expected):
    assert notation.hosts(text) == tuple(expected.split())


@pytest.mark.parametrize("text", ["n[1-", "n1]", "n[3-1]", "n[a-c]", "n[]", "a,,b", "a b", "n[1-2", "n[[1-2]]"])
def test_no_hosts(text):
    with pytest.raises(ValueError, match="list of"):
        notation.hosts(text)


@pytest.mark.parametrize(
    ("text", "indices", "throttle"),
    [
        ("0-3", (0, 1, 2, 3), None),
        ("7", (7,), None),
        ("0-9%4", tuple(range(10)), 4),
        ("0-6:3,9%2", (0, 3, 6, 9), 2),
        ("5,1-2,2", (5, 1, 2), None),  # an index given twice is one element
        ("0-5:2", (0, 2, 4), None),
    ],
)
def test_array(text, indices, throttle):
    assert notation.array_indices(text) == (indices, throttle)


@pytest.mark.parametrize(
    "text", ["", "a", "3-1", "1-4:0", "1-", "-1", "1,,2", "0-3%0", "0-3%", "0-3%x", "0 - 3", "1%2%3"]
)
def test_no_array(text):
    with pytest.raises(ValueError, match=r"array|range|at once"):
        notation.array_indices(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12", ("12",)),
        ("12_3", ("12_3",)),
        ("12+1", ("12+1",)),
        ("1_[2-4%2]", ("1_2", "1_3", "1_4")),
        ("14_[0-8:4]", ("14_0", "14_4", "14_8")),
    ],
)
def test_job_ids(text, expected):
    assert notation.job_ids(text) == expected


@pytest.mark.parametrize("text", ["", "x", "12_", "12_[0-1", "12.batch", "1_[...]", "15_[0-1,3..."])
def test_no_job_id(text):
    # The last one is what Slurm writes without SLURM_BITSTR_LEN=0: half a list must not pass for the whole.
    with pytest.raises(ValueError, match=r"job id|array"):
        notation.job_ids(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("10:00", 600),
        ("0:30", 30),
        ("00:10:00", 600),
        ("1:30:05", 5405),
        ("2-12", 216_000),
        ("2-12:30", 217_800),
        ("1-02:03:04", 93_784),
        ("365-00:00:00", 31_536_000),
        ("UNLIMITED", None),
        ("Partition_Limit", None),
        ("N/A", None),
        ("", None),
    ],
)
def test_duration(text, seconds):
    assert notation.duration(text) == seconds


@pytest.mark.parametrize("text", ["1h", "1:2:3:4", "-5", "1-", "-", "1.5", "2-1:2:3:4", " 5"])
def test_no_duration(text):
    with pytest.raises(ValueError, match="days-hours"):
        notation.duration(text)


@given(st.integers(min_value=0, max_value=10**9))
def test_durations_come_back(seconds):
    assert notation.duration(notation.format_duration(seconds)) == seconds


@pytest.mark.parametrize(
    ("text", "expected"), [("1795252799", 1795252799.0), ("Unknown", None), ("0", None), ("N/A", None)]
)
def test_moment(text, expected):
    assert notation.moment(text) == expected


def test_a_time_in_the_reader_s_own_format_is_refused():
    with pytest.raises(ValueError, match="SLURM_TIME_FORMAT"):
        notation.moment("2026-11-21T09:17:40")


def test_exit_code():
    assert notation.exit_code("3:0") == (3, 0)
    assert notation.exit_code("0:9") == (0, 9)
    with pytest.raises(ValueError, match="exit code"):
        notation.exit_code("3")

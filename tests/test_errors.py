"""Errors of the system in words."""

from __future__ import annotations

import errno

import pytest
import torch

from pithwood.errors import explain_failure, explain_os_error, is_out_of_memory, naming, promising, size_text

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("number", "words", "code"),
    [
        (errno.ENOSPC, "free some space", 3),
        (errno.EDQUOT, "of this user", 3),
        (errno.EROFS, "mounted for writing", 2),
        (errno.EMFILE, "ulimit -n", 2),
    ],
)
def test_a_file_error_names_the_file_and_a_remedy(number, words, code):
    told = explain_failure(OSError(number, "reason", "some/file"))
    assert told is not None
    assert told[0].startswith("reason: some/file; ")
    assert words in told[0]
    assert told[1] == code


def test_an_explained_error_is_not_explained_again():
    once = explain_os_error(OSError(errno.ENOSPC, "No space left on device", "a"))
    assert explain_os_error(OSError(errno.ENOSPC, once, "b")) == once


def test_a_write_that_failed_names_its_file_and_one_that_is_named_keeps_its_name():
    with pytest.raises(OSError, match="reason") as unnamed, naming("some/file"):
        raise OSError(errno.ENOSPC, "reason")
    assert (unnamed.value.errno, unnamed.value.filename) == (errno.ENOSPC, "some/file")
    with pytest.raises(OSError, match="reason") as named, naming("some/file"):
        raise OSError(errno.ENOSPC, "reason", "other")
    assert named.value.filename == "other"


def test_a_full_disk_says_what_is_safe_once():
    for error in (OSError(errno.ENOSPC, "reason", "a"), OSError(errno.ENOSPC, "reason; a is intact; free some space")):
        with pytest.raises(OSError, match="reason") as told, promising("all else is intact"):
            raise error
        explained = explain_failure(told.value)
        assert explained is not None
        assert explained[0].count(" intact") == 1
        assert explained[1] == 3
    with pytest.raises(PermissionError) as other, promising("all else is intact"):
        raise PermissionError(errno.EACCES, "reason", "a")
    assert "intact" not in str(other.value)


def test_the_allocator_of_torch_is_known_by_what_it_says():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(refused.value)


def test_errors_of_the_program_are_left_alone():
    assert explain_failure(RuntimeError("shapes differ")) is None
    assert explain_failure(KeyError("a")) is None


@pytest.mark.parametrize(
    ("num_bytes", "words"),
    [(400, "0.40 kB"), (1_835_008, "1.84 MB"), (1_500_000_000, "1.50 GB"), (2.64e12, "2,640.00 GB")],
)
def test_a_size_is_told_in_a_unit_that_shows_it(num_bytes, words):
    assert size_text(num_bytes) == words

"""Where processes are: neighbours on a host, stores between them, and what torchrun's restarts need."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from dataclasses import replace

import pytest

from pithwood.parallel.places import connect, find_neighbour, open_store, own_place, torchrun_store

pytestmark = pytest.mark.quick


def test_the_neighbour_is_the_next_process_of_the_host_and_is_seen_to_end():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        own = own_place(0, 0)
        places = [own, replace(own, space="elsewhere"), replace(own, pid=other.pid)]
        found = find_neighbour(places, 0)
        assert found is not None
        rank, handle = found
        assert rank == 2
        assert not select.select([handle], [], [], 0)[0]
        other.kill()
        assert select.select([handle], [], [], 5)[0]
        os.close(handle)


def test_a_process_alone_on_its_host_has_no_neighbour():
    own = own_place(0, 0)
    assert find_neighbour([own, replace(own, space="elsewhere")], 0) is None
    assert find_neighbour([replace(own, space=""), replace(own, space="")], 0) is None


def test_a_store_is_reached_by_the_place_of_its_process():
    store = open_store(5.0)
    own = own_place(0, store.port)
    store.set("word", "here")
    assert connect(own, own, 5.0).get("word") == b"here"
    # over the network's address, as from another host
    assert connect(replace(own, host="another"), replace(own, address="127.0.0.1"), 5.0).get("word") == b"here"


def test_restarts_by_torchrun_on_several_hosts_need_a_store_of_their_own(monkeypatch):
    assert torchrun_store(16) is None
    for name, value in (("USE_AGENT_STORE", "True"), ("MAX_RESTARTS", "2"), ("RESTART_COUNT", "0")):
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ValueError, match="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        torchrun_store(16)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    assert torchrun_store(16) is None


def test_attempts_on_one_host_do_not_see_each_other(monkeypatch):
    server = open_store(5.0)
    for name, value in (("USE_AGENT_STORE", "True"), ("MAX_RESTARTS", "2"), ("RESTART_COUNT", "0")):
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    for name, value in (("LOCAL_WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", str(server.port))):
        monkeypatch.setenv(name, value)
    first = torchrun_store(2)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    second = torchrun_store(2)
    assert first is not None
    assert second is not None
    first.set("address", "gone")
    assert first.check(["address"])
    assert not second.check(["address"])

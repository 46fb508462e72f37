"""The test bench itself: its guards must hold, or the other tests prove less than they say."""

import socket
import urllib.request

import pytest
import torch

from conftest import NetworkBlockedError


def test_other_machines_cannot_be_reached():
    with pytest.raises(NetworkBlockedError, match=r"192\.0\.2\.1"), socket.socket() as client:
        client.connect(("192.0.2.1", 80))


def test_names_of_other_machines_stay_unresolved():
    with pytest.raises(NetworkBlockedError, match=r"example\.org"):
        urllib.request.urlopen("http://example.org/", timeout=1)


def test_this_machine_can_be_reached():
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(("localhost", server.getsockname()[1]), timeout=5).close()


def test_one_thread():
    assert torch.get_num_threads() == 1

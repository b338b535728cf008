"""Replies that are large are checked beside the reading of the next: one after the other, and nothing is lost."""

import threading

import numpy as np
import pytest
from flwr.app import Message
from flwr.app.message import make_message
from flwr.common import Metadata

from cloister_server.rounds import _LARGE, collect
from cloister_shared.errors import ReplyRejected
from cloister_shared.wire import ReplyHeader, pack, pack_vectors

SENT = {f"m{number}": f"site-{number}" for number in range(4)}


def reply(to: str, octets: int) -> Message:
    content = pack(ReplyHeader(run="r", round=1, site="s"), pack_vectors({"update": np.zeros(octets // 4, np.float32)}))
    metadata = Metadata(1, "reply", 1, 2, to, "1", 0.0, 1.0, "train")
    return make_message(metadata, content=content)


class OneByOne:
    """A grid whose replies come in order."""

    def __init__(self, octets: int) -> None:
        self.octets, self.pulled = octets, 0
        self.on_pull = lambda: None

    def pull_messages(self, waiting):
        for name in waiting:
            self.pulled += 1
            self.on_pull()
            yield reply(name, self.octets)


@pytest.mark.parametrize("octets", [_LARGE, 400])
def test_each_is_accepted_once_in_order_and_by_itself(octets):
    accepted, inside = [], threading.Lock()

    def accept(site, message):
        assert inside.acquire(blocking=False), "two at once would add to one sum"
        accepted.append(site)
        inside.release()

    assert collect(OneByOne(octets), SENT, 5, accept) == {}
    assert accepted == list(SENT.values())


def test_a_large_one_is_accepted_while_the_next_is_pulled():
    grid, seen = OneByOne(_LARGE), []
    second = threading.Event()

    def accept(site, message):
        if not seen:
            assert second.wait(10), "the second was not pulled while the first was accepted"
        seen.append(site)

    grid.on_pull = lambda: grid.pulled > 1 and second.set()
    collect(grid, SENT, 5, accept)
    assert len(seen) == 4


@pytest.mark.parametrize("octets", [_LARGE, 400])
@pytest.mark.parametrize("at", [0, 3])
def test_an_odd_one_is_named_and_a_fault_comes_out(octets, at):
    def odd(site, message):
        if site == f"site-{at}":
            raise ReplyRejected("odd")

    assert collect(OneByOne(octets), SENT, 5, odd) == {f"site-{at}": "odd"}

    def broken(site, message):
        if site == f"site-{at}":
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        collect(OneByOne(octets), SENT, 5, broken)

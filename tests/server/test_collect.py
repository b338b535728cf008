"""Replies are accepted as they come, one after the other and one in memory, and nothing is lost."""

import weakref

import numpy as np
import pytest
from flwr.app import Message
from flwr.app.message import make_message
from flwr.common import Metadata

from cloister_server.rounds import collect
from cloister_shared.errors import ReplyRejected
from cloister_shared.wire import ReplyHeader, pack, pack_vectors

SENT = {f"m{number}": f"site-{number}" for number in range(4)}


def reply(to: str) -> Message:
    content = pack(ReplyHeader(run="r", round=1, site="s"), pack_vectors({"update": np.zeros(100, np.float32)}))
    metadata = Metadata(1, "reply", 1, 2, to, "1", 0.0, 1.0, "train")
    return make_message(metadata, content=content)


class OneByOne:
    """A grid whose replies come in order; it sees to it that the one before was let go of."""

    def pull_messages(self, waiting):
        before = None
        for name in waiting:
            assert before is None or before() is None, "two replies are held"
            made = reply(name)
            before = weakref.ref(made)
            yield made
            del made


def test_each_is_accepted_once_in_order_and_let_go():
    accepted = []
    assert collect(OneByOne(), SENT, 5, lambda site, _: accepted.append(site)) == {}
    assert accepted == list(SENT.values())


@pytest.mark.parametrize("at", [0, 3])
def test_an_odd_one_is_named_and_a_fault_comes_out(at):
    def odd(site, message):
        if site == f"site-{at}":
            raise ReplyRejected("odd")

    assert collect(OneByOne(), SENT, 5, odd) == {f"site-{at}": "odd"}

    def broken(site, message):
        if site == f"site-{at}":
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        collect(OneByOne(), SENT, 5, broken)

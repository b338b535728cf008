"""The two messages that carry an object are Flower's to the last octet, and a large object is not copied for them."""

import os
import random

import pytest
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import PullObjectResponse, PushObjectRequest
from flwr.proto.node_pb2 import Node
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from cloister_shared.carried import Download, Upload, attach, attached, download, found, upload

SIZES = [1, 127, 128, 2**14, 5 * 2**20]


# --- to the coordinator --------------------------------------------------------------------------------------
def test_an_upload_is_the_same_however_it_is_cut():
    request = PushObjectRequest(
        node=Node(node_id=2**63),
        run_id=2**64 - 1,
        object_id="ab" * 32,
        object_content=os.urandom(70_000),
        session_id="s",
    )
    octets, dice = request.SerializeToString(), random.Random(1)
    for _ in range(50):
        upload, content, at = Upload(), b"", 0
        while at < len(octets):
            step = dice.choice([1, 7, 100, 30_000])
            content += upload.feed(octets[at : at + step])
            at += step
        assert upload.whole
        assert content == request.object_content
        said = upload.request
        said.object_content = content
        assert said == request
    with pytest.raises(ValueError, match="other fields"):
        Upload().feed(PushObjectRequest(object_id="a" * 5000).SerializeToString())


@pytest.mark.parametrize("size", [0, *SIZES])
def test_an_upload_is_flowers(size):
    terms = {"node": Node(node_id=2**63), "run_id": 7, "object_id": "ab" * 32, "session_id": "s"}
    content = os.urandom(size)
    sent = upload(PushObjectRequest(**terms), content)
    assert PushObjectRequest.FromString(b"".join(sent)) == PushObjectRequest(**terms, object_content=content)
    assert sent[1] is content


# --- to a hospital -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", SIZES)
def test_the_answer_that_carries_an_object_is_flowers(size):
    answer = PullObjectResponse.FromString(b"".join(found(memoryview(bytes(size)))))
    assert answer == PullObjectResponse(object_found=True, object_available=True, object_content=bytes(size))


@pytest.mark.parametrize("size", SIZES)
def test_an_answer_is_read_where_it_lies(size):
    answer = b"".join(found(content := os.urandom(size)))
    read = download(answer)
    assert (read.found, read.content) == (True, content)
    assert read.content is not None
    assert read.content.obj is answer


@given(st.booleans(), st.booleans(), st.binary())
def test_any_answer_of_flowers_is_read(is_found, available, content):
    said = PullObjectResponse(object_found=is_found, object_available=available, object_content=content)
    assert download(said.SerializeToString()) == Download(is_found, memoryview(content) if available else None)


@pytest.mark.parametrize("cut", [1, 4, 5, 6, 100])
def test_an_answer_that_ends_early_is_none(cut):
    answer = b"".join(found(bytes(200)))
    with pytest.raises(DecodeError):
        download(answer[:-cut])


def test_an_answer_that_says_more_is_read_as_flower_reads_it():
    answer = b"".join(found(b"content"))
    assert download(answer + bytes([2 << 3, 0])) == Download(True, None), "the last of two values counts"


# --- along with an announcement ------------------------------------------------------------------------------
def test_small_objects_go_along_and_flower_does_not_see_them():
    bare = PushMessagesRequest(node=Node(node_id=7), clientapp_runtime_list=[0.5])
    said = PushMessagesRequest.FromString(bare.SerializeToString())
    objects = [b"", b"one", memoryview(bytes(2**16)), bytes(2**16 + 1), b"two"]
    attach(said, objects)
    came = PushMessagesRequest.FromString(said.SerializeToString())
    assert attached(came) == [bytes(content) for content in objects if len(content) <= 2**16]
    assert (came.node, came.clientapp_runtime_list) == (bare.node, bare.clientapp_runtime_list)
    came.DiscardUnknownFields()
    assert came == bare


def test_of_many_small_objects_no_more_go_along_than_a_request_may_hold():
    said = PushMessagesRequest()
    attach(said, [bytes(2**16)] * 50)
    assert len(attached(said)) == 4


def test_another_field_that_flower_does_not_have_is_no_object():
    assert attached(PushMessagesRequest.FromString(bytes([0xA0, 0x06, 5, 0xAA, 0x06, 1, 65]))) == []

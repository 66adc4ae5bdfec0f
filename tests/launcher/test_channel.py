"""Frames over a socket: whole or not at all, descriptors with their own message, strangers turned away."""

from __future__ import annotations

import os
import socket
import struct
import threading
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.channel import Channel, pair

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    a, b = pair()
    yield a, b
    a.close()
    b.close()


@settings(max_examples=50, deadline=None)
@given(
    messages=st.lists(
        st.dictionaries(st.text(max_size=5), st.text(st.characters(), max_size=50), max_size=4), max_size=6
    ),
    cut=st.integers(1, 7),
)
def test_messages_arrive_whole_however_they_are_cut(messages: list[dict[str, str]], cut: int) -> None:
    messages = [{k: v for k, v in m.items() if k != "fds"} for m in messages]
    out_near, out_far = socket.socketpair()
    sender, raw = Channel(out_near), out_far
    receiver, feed = pair()
    with raw:
        for message in messages:
            sender.send(message)
        sender.close()
        data = b""
        while part := raw.recv(65536):
            data += part
    got = []
    for start in range(0, len(data), cut):
        feed.sock.sendall(data[start : start + cut])
        got += receiver.receive()
    assert got == messages
    assert not receiver.closed
    feed.close()
    assert receiver.receive() == []
    assert receiver.closed
    receiver.close()


def test_what_was_complete_is_read_before_the_end(ends) -> None:
    a, b = ends
    a.send({"n": 1})
    a.send({"n": 2})
    a.sock.sendall(b"\0\0\0\x20half")
    a.close()
    assert b.receive() == [{"n": 1}, {"n": 2}]
    assert b.closed
    with pytest.raises(ConnectionError):
        b.send({"n": 3})


def test_a_frame_larger_than_every_buffer(ends) -> None:
    a, b = ends
    text = "x" * (8 << 20)
    sender = threading.Thread(target=a.send, args=({"text": text},))
    sender.start()
    got = []
    while not got:
        got = b.receive()
    sender.join()
    assert got == [{"text": text}]


def test_descriptors_belong_to_their_message(ends) -> None:
    """Also when several frames are read at once, and what nobody took is closed with the channel."""
    a, b = ends
    pipes = [os.pipe() for _ in range(4)]
    for index, (_, write) in enumerate(pipes[:3]):
        a.send({"n": index}, (write, pipes[3][1])[: index + 1 if index < 2 else 0])
    messages = b.receive()
    assert [m.get("fds", None) is None for m in messages] == [False, False, True]
    assert [len(m.get("fds", ())) for m in messages] == [1, 2, 0]
    for message, (read, _) in zip(messages, pipes, strict=False):
        for fd in message.get("fds", ())[:1]:
            os.write(fd, b"to " + str(message["n"]).encode())
            assert os.read(read, 10) == b"to " + str(message["n"]).encode()
    for message in messages:
        for fd in message.get("fds", ()):
            os.close(fd)
    for fds in pipes:
        for fd in fds:
            os.close(fd)


@pytest.mark.parametrize(
    "stranger",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack("!I", 1 << 31),
        struct.pack("!I", 4) + b"{no}",
        struct.pack("!I", 2) + b"[]",
        struct.pack("!I", 2) + b"\xff\xfe",
        struct.pack("!I", 9) + b'{"fds":1}',
        struct.pack("!I", 11) + b'{"fds":"x"}',
        struct.pack("!I", 20000) + b"[" * 20000,
    ],
    ids=["http", "huge", "no json", "no object", "no text", "no descriptor", "odd descriptor", "deep"],
)
def test_strangers_are_turned_away(ends, stranger: bytes) -> None:
    a, b = ends
    a.sock.sendall(stranger)
    assert b.receive() == []
    assert b.closed

"""A bad cable: carries frames between two network interfaces, late and not all of them.

    python tests/lab/wire.py INTERFACE INTERFACE DELAY_S LOSS

It stands in for tc's netem, which not every kernel has. Frames come and go with the kernel's own notes on them
(PACKET_VNET_HDR), so that checksums and large segments, which virtual interfaces leave open, stay right.
"""

from __future__ import annotations

import collections
import contextlib
import random
import select
import socket
import sys
import time

_SOL_PACKET, _PACKET_VNET_HDR, _PACKET_OUTGOING, _ALL = 263, 15, 4, 3


def carry(one: str, other: str, delay_s: float, loss: float) -> None:
    ends = []
    for name in (one, other):
        end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL))
        end.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        end.bind((name, _ALL))
        ends.append(end)
    to = {ends[0]: ends[1], ends[1]: ends[0]}
    under_way: collections.deque[tuple[float, socket.socket, bytes]] = collections.deque()
    sys.stdout.write("carries\n")
    sys.stdout.flush()
    while True:
        wait_s = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        for end in select.select(ends, [], [], wait_s)[0]:
            try:
                frame, where = end.recvfrom(1 << 17)
            except OSError:
                continue  # the interface was down
            if where[2] != _PACKET_OUTGOING and random.random() >= loss:
                under_way.append((time.monotonic() + delay_s, to[end], frame))
        while under_way and under_way[0][0] <= time.monotonic():
            _, end, frame = under_way.popleft()
            with contextlib.suppress(OSError):  # the interface is down
                end.send(frame)


if __name__ == "__main__":
    carry(sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4]))

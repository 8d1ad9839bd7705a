"""Passes packets between the TUN devices of all namespaces: one half-duplex medium of a rate, with a delay.

relay.py COUNT RATE DELAY (devices, bit/s, seconds) prints "up" when it is. Packets of 9,000 bytes, so that Python keeps
up.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import select
import struct
import subprocess
import sys
import time

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
MTU, LONGEST = 9000, 0.2  # bytes; seconds of queue before packets are dropped


def tun(device: int) -> int:
    """A TUN device in a namespace."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    name = f"air{device}"
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TUN | IFF_NO_PI))
    for command in (
        f"ip link set {name} netns d{device}",
        f"ip -n d{device} link set {name} name air",
        f"ip -n d{device} link set air mtu {MTU} up",
        f"ip -n d{device} addr add 10.77.0.{device + 1}/24 dev air",
    ):
        subprocess.run(command.split(), check=True)
    return fd


def main(count: int, rate: float, delay: float) -> None:
    """Until it is killed."""
    fds = [tun(i) for i in range(count)]
    print("up", flush=True)
    free, serial = 0.0, 0
    waiting: list[tuple[float, int, int, bytes]] = []  # when to hand over, what to whom
    while True:
        until = max(0.0, waiting[0][0] - time.monotonic()) if waiting else 1.0
        for fd in select.select(fds, [], [], until)[0]:
            packet = os.read(fd, MTU + 64)
            now = time.monotonic()
            to = packet[19] - 1  # last byte of the destination's address
            if packet[0] >> 4 == 4 and 0 <= to < count and free - now < LONGEST:
                free, serial = max(free, now) + len(packet) * 8 / rate, serial + 1
                heapq.heappush(waiting, (free + delay, serial, fds[to], packet))
        while waiting and waiting[0][0] <= time.monotonic():
            *_, fd, packet = heapq.heappop(waiting)
            os.write(fd, packet)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))

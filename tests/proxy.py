"""A link that can be slow and can be cut: passes TCP connections on, asleep most of the time."""

from __future__ import annotations

import contextlib
import socket
import threading
import time


class Proxy:
    """Passes on to `target` ("host:port") what comes to `port`.

    Args:
        rate: bytes/s in each direction of a connection.

    Attributes:
        connections: how many were accepted.
    """

    def __init__(self, target: str, rate: float):
        host, _, port = target.rpartition(":")
        self.target, self.rate, self.connections = (host, int(port)), rate, 0
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Breaks all connections; new ones are let in."""
        for s in self._open:
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)
            s.close()
        self._open = []

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
                far = socket.create_connection(self.target, timeout=5)
            except OSError:
                return
            far.settimeout(None)
            self.connections += 1
            for s in (near, far):
                s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
            self._open += [near, far]
            for a, b in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(a, b), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        free = time.monotonic()
        try:
            while piece := source.recv(1 << 14):
                free = max(free, time.monotonic()) + len(piece) / self.rate
                time.sleep(max(0.0, free - time.monotonic()))
                sink.sendall(piece)
        except OSError:
            pass
        for s in (source, sink):
            s.close()

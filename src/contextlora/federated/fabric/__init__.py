"""What carries one device's messages to its peers (`zenoh`). A simulation moves those of all devices at once (`local`).

fabric.send(["bee", "cat"], message, deadline=fabric.now() + 2.0)
missing = {"bee", "cat"}
for sender, message in fabric.receive(deadline=fabric.now() + 2.0):
    missing.discard(sender)
    if not missing:
        break                    # all that was expected is here; else it ends at the deadline
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Arrival(NamedTuple):
    """A whole message, as it was sent.

    Attributes:
        sender: who handed it to the fabric, authenticated by the fabric. Whose words they are its signature says.
        message: the bytes.
    """

    sender: str
    message: bytes


@dataclass
class Traffic:
    """What has gone to and come from one peer: content of frames, without what carries them (zenoh, TLS, TCP).

    Attributes:
        sent: bytes.
        received: bytes.
        chunks: how many were sent, repeated ones each time.
    """

    sent: int = 0
    received: int = 0
    chunks: int = 0


class Fabric(Protocol):
    """One device's end. Time is that of `now`, in seconds: a real clock's, or a simulation's.

    Attributes:
        name: the device's own.
        refused: what was not let in, by error code.
        traffic: by peer.
    """

    name: str
    refused: Counter[str]
    traffic: dict[str, Traffic]

    def now(self) -> float:
        """The time by which deadlines are meant; it never goes back."""

    def alive(self) -> frozenset[str]:
        """The others that can be reached, as far as is known now. One that comes back is there again."""

    def send(self, to: Sequence[str], message: bytes, deadline: float) -> None:
        """Returns at once. Delivery is attempted until the deadline, also to peers that come back before it.

        A message is delivered once: the same bytes again are not, while a receiver remembers them.

        Raises PeerError E657 for an unknown peer or once closed, E634 for a message that none can carry.
        """

    def receive(self, deadline: float) -> Iterator[Arrival]:
        """Messages as they arrive, until the deadline. Whoever has enough stops; the rest waits for the next call."""

    def goodput(self) -> Mapping[str, float]:
        """Bit/s to each peer as last measured, with the sender's air to itself; for `MeasuredChannel.record`."""

    def close(self) -> None:
        """Says goodbye and lets go of everything; what is under way is lost. Closing again does nothing."""

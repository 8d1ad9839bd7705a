"""A peer as a process of its own: peer_process.py FOLDER NAME FIRST

It says something to everybody three times a second, from round FIRST on.
"""

import sys
import time
from pathlib import Path

from peers import fabric, message_of

folder, name, first = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
with fabric(folder, name) as device:
    print("up", flush=True)
    for round_ in range(first, first + 200):
        device.send(sorted(device.alive()), message_of(name, round_, 100_000), device.now() + 0.3)
        time.sleep(0.3)

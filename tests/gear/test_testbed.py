"""The benchmark's emulated devices: rates, delays, padding, bytes; and one tiny comparison from end to end."""

from __future__ import annotations

import csv
import importlib.util
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import small
import torch

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "gear"


def load(name):
    spec = importlib.util.spec_from_file_location(f"gear_benchmark_{name}", BENCHMARK / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


testbed, padding = load("testbed"), load("padding")


def python(code, timeout=120, **more):
    """Runs code that has `testbed` at hand; what it printed."""
    head = f"import sys, time, socket, threading; sys.path.insert(0, {str(BENCHMARK)!r}); import testbed\n"
    (script := more.pop("folder") / "script.py").write_text(head + code)
    return subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=timeout, **more)


@pytest.fixture(scope="session")
def isolated(tmp_path_factory):
    """Skips where this machine has no namespaces for us; else a folder for scripts."""
    folder = tmp_path_factory.mktemp("isolated")
    code = "why = testbed.isolate()\nif not why:\n    with testbed.network(2, 1e8): pass\nprint(why or 'yes')"
    done = python(code, folder=folder)
    if done.stdout.strip() != "yes":
        pytest.skip(f"no network namespaces here: {(done.stdout + done.stderr).strip().splitlines()[-1]}")
    return folder


# --- networks --------------------------------------------------------------------------------------------------------

SENDS = """
assert not testbed.isolate()
def flows(net, pairs, size, rank):
    # every pair's first device sends `size` bytes to its second; seconds until all that is mine is done
    began, peers = time.perf_counter(), []
    mine = [p for p in pairs if rank in p]
    servers = {p: socket.create_server((net.address(rank), 6000 + i)) for i, p in enumerate(pairs) if p[1] == rank}
    time.sleep(0.5)
    began = time.perf_counter()
    out = [socket.create_connection((net.address(b), 6000 + pairs.index((a, b)))) for a, b in mine if a == rank]
    into = [servers[p].accept()[0] for p in mine if p[1] == rank]
    before = net.sent()
    def give(s):
        s.sendall(bytes(size)); s.shutdown(socket.SHUT_WR)
    for s in out:
        threading.Thread(target=give, args=(s,)).start()  # who sends must read meanwhile
    for s in into:
        while s.recv(1 << 16): pass
        s.close()
    for s in out:
        s.recv(1)  # until all of it has arrived
    return time.perf_counter() - began, net.sent() - before
def take(net, devices, pairs, size):
    from functools import partial
    seen = testbed.together(net, range(devices), partial(flows, net, pairs, size))
    print(max(s for s, _ in seen), *(b for _, b in seen))
"""


def test_all_share_the_medium_and_interfaces_count_their_bytes(isolated):
    """1 MB on 20 Mbit/s is 0.4 s; two at once are 0.8 s, whoever sends."""
    code = f"{SENDS}\nwith testbed.network(3, 20e6) as net:\n    assert net.how == 'medium'\n"
    code += "    take(net, 3, [(0, 1)], 1_000_000)\n    take(net, 3, [(0, 1), (2, 0)], 1_000_000)"
    one, two = (line.split() for line in python(code, folder=isolated).stdout.splitlines())
    assert 0.4 < float(one[0]) < 0.75
    assert 0.8 < float(two[0]) < 1.6
    assert 1e6 < int(one[1]) < 1.1e6  # headers too
    assert int(one[3]) < 1e4


def test_links_have_a_rate_each(isolated):
    """Both directions at once, and another pair at half the rate."""
    code = f"{SENDS}\nlinks = {{(i, j): 10e6 if 2 in (i, j) else 20e6 for i in range(3) for j in range(3)}}\n"
    code += "with testbed.network(3, 20e6, links=links) as net:\n    take(net, 3, [(0, 1), (1, 0)], 1_000_000)\n"
    code += "    take(net, 3, [(0, 2)], 1_000_000)"
    both, slow = (float(line.split()[0]) for line in python(code, folder=isolated).stdout.splitlines())
    assert 0.4 < both < 0.75  # one after another would be 0.8
    assert 0.8 < slow < 1.6


def test_the_relay_delays_and_limits(isolated):
    code = f"{SENDS}\nwith testbed.network(2, 20e6, delay=0.02) as net:\n    assert net.how == 'relay'\n"
    code += "    take(net, 2, [(0, 1)], 1)\n    take(net, 2, [(0, 1)], 1_000_000)"
    tiny, one = (float(line.split()[0]) for line in python(code, folder=isolated).stdout.splitlines())
    assert 0.06 < tiny < 0.4  # there and back to connect, and one byte there
    assert 0.4 < one < 1.2


def test_nothing_is_left_however_it_ends(isolated):
    code = "testbed.isolate()\nwith testbed.network(2, 1e7):\n    print('up', flush=True)\n    time.sleep(60)"
    (isolated / "long.py").write_text(
        f"import sys, time; sys.path.insert(0, {str(BENCHMARK)!r}); import testbed\n{code}"
    )
    before = subprocess.run(["ip", "-br", "link"], capture_output=True, text=True).stdout
    with subprocess.Popen([sys.executable, str(isolated / "long.py")], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "up\n"
        process.kill()
        assert process.stdout.read() == ""  # ends only when the program inside has gone as well
    assert subprocess.run(["ip", "-br", "link"], capture_output=True, text=True).stdout == before


def test_paced_sockets_are_slow_and_counted():
    """The degraded network, which needs nothing: 1 MB at 20 Mbit/s."""
    with testbed.network(2, 20e6) as net, socket.create_server(("127.0.0.1", 0)) as server:
        assert net.how == "paced"
        with socket.create_connection(server.getsockname()) as out, server.accept()[0] as into:
            passed(out, into)  # a connection's first packets are never paced
            net.pace()
            before, began = net.sent(), time.perf_counter()
            passed(out, into)
            assert 0.3 < time.perf_counter() - began < 0.75
            assert net.sent() - before == 1_000_000


def passed(out, into, size=1_000_000):
    sender = threading.Thread(target=out.sendall, args=(bytes(size),))
    sender.start()
    while size:
        size -= len(into.recv(size))
    sender.join()


def test_a_device_that_fails_ends_the_others_and_says_why():
    def work(rank):
        if rank:
            raise ValueError("board on fire")
        time.sleep(60)

    with testbed.network(2, 1e9) as net, pytest.raises(RuntimeError, match=r"on device 1(.|\n)*board on fire"):
        testbed.together(net, (0, 1), work)


# --- padding ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def device():
    made = padding.Device(small.problem(1, 6, lowest=2, seed=1), "d0", scale=10.0)
    made.on, made.samples = True, 2
    return made


def test_units_take_the_profiles_seconds_in_both_directions(device):
    p, weight = device.problem, torch.ones(3, requires_grad=True)
    for unit in (1, 2, 3):  # below, at and above the lowest with blocks
        run = padding.padded(lambda x: x * weight, device, unit, 2)
        began = time.perf_counter()
        out = run(torch.ones(2, 3))
        middle = time.perf_counter()
        out.sum().backward()
        end = time.perf_counter()
        assert middle - began == pytest.approx(p.forward("d0", unit, unit + 1, 2) / 10, abs=0.02)
        back = p.backward("d0", unit, unit + 1, 2) / 10 if unit == 2 else 0.0  # above, the gradient ends in the leaf
        assert end - middle == pytest.approx(back, abs=0.02)


def test_the_next_unit_makes_up_for_one_that_was_late(device):
    began = time.perf_counter()
    for work in (0.3, 0.0, 0.0):
        device.begin()
        time.sleep(work)
        device.end(0.2)
    assert time.perf_counter() - began == pytest.approx(0.6, abs=0.03)
    assert device.late == pytest.approx(0.1, abs=0.03)


def test_a_device_that_had_to_wait_has_caught_up(device):
    device.begin()
    time.sleep(0.2)
    device.end(0.1)  # 0.1 late
    time.sleep(0.2)  # for another device
    began = time.perf_counter()
    device.begin()
    device.end(0.2)
    assert time.perf_counter() - began == pytest.approx(0.2, abs=0.03)


# --- from end to end -------------------------------------------------------------------------------------------------


def compare(folder, *arguments):
    """Rows by method of a quick comparison."""
    command = [sys.executable, str(BENCHMARK), "--quick", "--csv", str(folder / "gear.csv"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "\n| exact" in done.stdout  # on a busy machine it says so behind the name
    with (folder / "gear.csv").open() as f:
        return {row["method"]: row for row in csv.DictReader(f)}, done.stdout


SLICES = 4 * (4 * 2 * 4096 + 3 * (4096 + 11008)) * 32 * 16  # float32, 32 ranks on the linears of LLaVA-7B's upper half


def check(rows, headers):
    """Gradients alike, bytes as closed forms have them: an all-reduce of two sends the slices twice."""
    for row in rows.values():
        assert not row["failed"]
        assert float(row["apart"]) < 1e-4
        assert float(row["seconds"]) > 0
    assert float(rows["ddp-by-speed"]["gigabytes"]) == pytest.approx(2 * SLICES / 1e9, rel=headers)
    activations = 8 * 640 * 4096 * 2 / 1e9  # once, over a boundary without gradients
    assert activations * 0.99 < float(rows["1f1b"]["gigabytes"]) < 2 * activations * (1 + headers)


def test_a_comparison_without_namespaces(tmp_path):
    rows, said = compare(tmp_path, "--no-namespaces", "--scale", "60")
    assert "paced sockets" in said
    check(rows, 0.06)


@pytest.mark.slow
def test_a_comparison_in_namespaces(tmp_path, isolated):
    rows, _ = compare(tmp_path, "--scale", "60")
    assert rows["exact"]["network"] == "medium"
    check(rows, 0.12)

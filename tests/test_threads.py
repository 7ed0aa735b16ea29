"""The worker pool as users meet it: Python threads, forks, interrupts, busy cores."""

import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from ostinato import nn


@pytest.fixture(autouse=True)
def two_threads():
    """Run with a pool of two, and end in a traceback instead of a hang."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    faulthandler.dump_traceback_later(300, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
    torch.set_num_threads(before)


def large_enough(steps=20, batch=4, size=64):
    """Return a layer and an input that are worth a team, and the output of one thread."""
    layer, x = nn.GRU(size, size), torch.randn(steps, batch, size)
    torch.set_num_threads(1)
    with torch.no_grad():
        expected = layer(x)[0]
    torch.set_num_threads(2)
    return layer, x, expected


def test_eight_python_threads_call_one_layer():
    layer, x, expected = large_enough()
    wrong = []

    def work():
        with torch.no_grad():
            for _ in range(1000):
                if not torch.equal(layer(x)[0], expected):
                    wrong.append(threading.get_ident())
                    return

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_python_threads_train_at_once():
    layer, x, _ = large_enough()
    parameters = list(layer.parameters())
    expected = torch.autograd.grad(layer(x)[0].sum(), parameters)
    results = [None] * 4

    def work(i):
        for _ in range(50):
            results[i] = torch.autograd.grad(layer(x)[0].sum(), parameters)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        assert all(map(torch.equal, result, expected))


class Sequences(torch.utils.data.Dataset):
    """A data set that runs a layer in its workers."""

    def __init__(self, layer, x):
        self.layer, self.x = layer, x

    def __len__(self):
        return 4

    def __getitem__(self, index):
        torch.set_num_threads(2)  # DataLoader sets 1 in its workers; the pool is what is tested
        with torch.no_grad():
            return self.layer(self.x)[0]


# Forking a process that has threads is exactly what DataLoader does.
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_forked_data_loader_workers_call_a_layer():
    layer, x, expected = large_enough()
    layer(x)  # the parent's pool is up
    loader = torch.utils.data.DataLoader(
        Sequences(layer, x),
        batch_size=1,
        num_workers=2,
        multiprocessing_context="fork",
        timeout=60,
    )
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == 4
        assert all(torch.equal(batch[0], expected) for batch in batches)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_fork_while_other_threads_hold_the_pool():
    layer, x, expected = large_enough()
    stop = threading.Event()

    def keep_busy():
        with torch.no_grad():
            while not stop.is_set():
                layer(x)

    busy = threading.Thread(target=keep_busy)
    busy.start()
    context = multiprocessing.get_context("fork")

    def child(connection):
        with torch.no_grad():
            connection.send(all(torch.equal(layer(x)[0], expected) for _ in range(20)))

    try:
        for _ in range(3):
            here, there = context.Pipe()
            process = context.Process(target=child, args=(there,))
            process.start()
            assert here.poll(60), "the forked child hangs"
            assert here.recv() is True
            process.join(60)
            assert process.exitcode == 0
    finally:
        stop.set()
        busy.join()


def test_an_interrupt_during_a_long_call_leaves_the_pool_working():
    layer, x, expected = large_enough()
    long = torch.randn(4000, 16, 64)

    def interrupt(*_):
        raise KeyboardInterrupt

    def many_calls():
        for _ in range(100):
            layer(long)

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with torch.no_grad():
            layer(long)
            for _ in range(3):
                signal.setitimer(signal.ITIMER_REAL, 0.002)
                # The engine holds no Python lock: the signal is taken when the call returns.
                with pytest.raises(KeyboardInterrupt):
                    many_calls()
                assert torch.equal(layer(x)[0], expected)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("threads", ["0", "-1", "two", "1000"])
def test_a_wrong_number_of_threads_in_the_environment_is_refused(threads):
    run = subprocess.run(
        [sys.executable, "-c", "import ostinato.numpy"],
        env={**os.environ, "OSTINATO_NUM_THREADS": threads},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    assert f"OSTINATO_NUM_THREADS must be a number from 1 to 256, got {threads}" in run.stderr


def test_the_environment_overrides_the_number_of_threads():
    code = "from ostinato import ops; print(ops._threads())"
    for value, expected in (("3", 3), ("", torch.get_num_threads())):
        program = f"import torch; torch.set_num_threads({torch.get_num_threads()}); {code}"
        run = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "OSTINATO_NUM_THREADS": value},
            capture_output=True,
            text=True,
            check=True,
        )
        assert int(run.stdout) == expected


def test_busy_cores_cost_no_more_than_working_alone():
    layer, x = nn.GRU(128, 128), torch.randn(50, 8, 128)

    def seconds(threads, calls=40):
        torch.set_num_threads(threads)
        with torch.no_grad():
            layer(x)
            start = time.perf_counter()
            for _ in range(calls):
                layer(x)
        return time.perf_counter() - start

    spinners = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                "import time\nend = time.time() + 30\nwhile time.time() < end: pass",
            ]
        )
        for _ in range(os.cpu_count())
    ]
    try:
        time.sleep(0.3)
        pairs = [(seconds(1), seconds(2)) for _ in range(5)]
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()
    # The kernel's time slices are some milliseconds: single pairs scatter, so the best one speaks.
    # A barrier that waits for a sleeping thread at every step was seen to cost a factor of 40.
    ratio = min(two / one for one, two in pairs)
    print(f"two threads / one thread on busy cores: {ratio:.2f}")
    assert ratio < 3

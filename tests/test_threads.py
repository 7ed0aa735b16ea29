"""Threads, processes and signals: right numbers and no hang, whoever else uses the machine.

Every wait here has an end: what hangs fails by its own timeout and says where.
"""

import concurrent.futures
import contextlib
import ctypes
import multiprocessing
import os
import platform
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from ostinato import _core, nn

# Seconds after which something that takes one or two has hung, on a machine that others load too.
TIMEOUT = 120
# Python says so of any fork beside threads, and this is what is tested.
forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def in_threads(count, body):
    """Run body(index) in threads; raise what one of them raised; fail where one does not end."""
    errors = []
    barrier = threading.Barrier(count, timeout=TIMEOUT)

    def run(index):
        barrier.wait()
        try:
            body(index)
        except BaseException as error:
            errors.append(error)
            raise

    # Daemons, so that one that hangs fails the test and not the end of the process.
    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + TIMEOUT
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if errors:
        raise errors[0]


def layer_of(hidden=128, size=64, cls=nn.GRU, **options):
    """A layer whose calls are worth two threads (csrc/cpu/dispatch.cpp, kWorthATeam)."""
    torch.manual_seed(0)
    return cls(size, hidden, **options)


def same(actual, expected):
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def all_equal(actual, expected):
    """Compare bits, in any mode, without torch: its own loops hang in a child that lacks OpenMP."""
    pairs = zip(actual, expected, strict=True)
    return all(a.numpy().tobytes() == e.numpy().tobytes() for a, e in pairs)


# ---- Python threads ----


@pytest.mark.parametrize("shape", ["one row", "rows"])
def test_eight_threads_call_one_layer_a_thousand_times_each(shape):
    module = layer_of()
    steps, batch = (8, 1) if shape == "one row" else (2, 12)
    inputs = [torch.randn(steps, batch, 64) for _ in range(8)]
    with torch.no_grad():
        expected = [module(x) for x in inputs]

        def body(index):
            # Grad mode belongs to a thread.
            with torch.no_grad():
                for _ in range(1000):
                    same(module(inputs[index]), expected[index])

        in_threads(8, body)
        # The pool is still one.
        same(module(inputs[0]), expected[0])


def gradients(module, x):
    x = x.detach().requires_grad_()
    output, h_n = module(x)
    # Cotangents made without an operator of torch's that would be a parallel region itself.
    seeds = output.detach(), h_n.detach()
    grads = torch.autograd.grad((output, h_n), [x, *module.parameters()], seeds)
    return [output.detach(), *grads]


@pytest.mark.parametrize("cls", [nn.GRU, nn.RNN])
def test_forward_and_backward_in_several_threads(cls):
    module = layer_of(cls=cls, bidirectional=True)
    inputs = [torch.randn(9, 6, 64) for _ in range(6)]
    expected = [gradients(module, x) for x in inputs]

    def body(index):
        for _ in range(60):
            same(gradients(module, inputs[index]), expected[index])

    in_threads(6, body)


@pytest.mark.parametrize("threads", [3, 4])
@pytest.mark.parametrize("where", ["main thread", "another thread"])
def test_more_threads_than_cores_walk_together(threads, where):
    """Members that lose the processor close the relay; the caller then completes it alone."""
    torch.manual_seed(0)
    module = nn.LSTM(7, 130, dtype=torch.float64)
    x = torch.randn(120, 5, 7, dtype=torch.float64)
    torch.set_num_threads(1)
    with torch.no_grad():
        expected, _ = module(x)

    def body(_):
        torch.set_num_threads(threads)
        until = time.monotonic() + 1.5
        with torch.no_grad():
            for turn in range(10_000):
                # The next call's output takes this memory: what is left undone shows.
                poison = torch.full_like(expected, float("nan"))
                del poison
                output, _ = module(x)
                assert torch.equal(output, expected), f"call {turn}"
                if time.monotonic() > until:
                    break

    if where == "main thread":
        body(0)
    else:
        in_threads(1, body)


def test_different_layers_in_different_threads():
    modules = [layer_of(hidden, bidirectional=hidden % 2 == 1) for hidden in (65, 128, 200, 31)]
    inputs = [torch.randn(5 + i, 1 + 4 * i, 64) for i in range(4)]
    expected = [gradients(m, x) for m, x in zip(modules, inputs, strict=True)]

    def body(index):
        # Every thread has other settings, which must not show.
        torch.set_num_threads(1 + index % 3)
        for _ in range(60):
            same(gradients(modules[index], inputs[index]), expected[index])

    in_threads(4, body)


def test_threads_that_come_and_go():
    module, x = layer_of(), torch.randn(8, 3, 64)
    expected = gradients(module, x)
    for _ in range(20):
        in_threads(2, lambda _: same(gradients(module, x), expected))


# ---- the floating-point mode ----

# The smallest normal number of float32.
SMALLEST = 2.0**-126
# fesetround's numbers for upward, by processor.
UPWARD = {"x86_64": 0x800, "AMD64": 0x800, "aarch64": 0x400000, "arm64": 0x400000}


def flush_to_zero(on):
    assert torch.set_flush_denormal(on)


def round_upward(on):
    assert ctypes.CDLL(None).fesetround(UPWARD[platform.machine()] if on else 0) == 0


@pytest.fixture
def usual_mode():
    yield
    torch.set_flush_denormal(False)
    round_upward(False)


def everywhere(where, body):
    """Run body() where torch's OpenMP workers carry the phases, or where our own do."""
    if where == "main thread":
        return body()
    found = []
    in_threads(1, lambda _: found.append(body()))
    return found[0]


def by_threads(module, x, threads):
    """Return what a layer and its gradient give on so many threads."""
    torch.set_num_threads(threads)
    with torch.enable_grad():
        return gradients(module, x)


@pytest.mark.skipif(platform.machine() not in UPWARD, reason="no number for this processor")
@pytest.mark.parametrize("where", ["main thread", "another thread"])
@pytest.mark.parametrize("mode", [flush_to_zero, round_upward])
def test_workers_compute_in_the_callers_mode(mode, where, usual_mode):
    torch.manual_seed(0)
    # A task of several time slices: then the pool is asked though others hold the cores.
    module = nn.RNN(8, 256, nonlinearity="relu", bias=False)
    x = torch.randn(300, 64, 8) * (1e-38 if mode is flush_to_zero else 1)

    def body():
        torch.set_flush_denormal(False)
        usual = by_threads(module, x, 1)
        for on in (True, False):
            mode(on)
            expected = by_threads(module, x, 1)
            # The mode shows, so the workers' could.
            assert all_equal(expected, usual) == (not on)
            assert all_equal(by_threads(module, x, 2), expected)
        return usual

    usual = everywhere(where, body)
    if mode is flush_to_zero:
        is_denormal = (usual[0] != 0) & (usual[0].abs() < SMALLEST)
        assert is_denormal.float().mean() > 0.1


def test_torchs_workers_have_their_own_mode_again(usual_mode):
    """They carry our phases, and torch's loops before and after."""
    module, x = nn.RNN(8, 256, nonlinearity="relu"), torch.randn(300, 64, 8)
    torch.set_num_threads(2)
    numbers = torch.full((1 << 20,), SMALLEST / 4)
    assert all_equal([numbers * 0.5 * 2], [numbers])
    with torch.no_grad():
        for _ in range(5):
            flush_to_zero(True)
            module(x)
            flush_to_zero(False)
            assert all_equal([numbers * 0.5 * 2], [numbers])


# ---- processes ----


class Rows(Dataset):
    """A data set that runs a layer where the worker is."""

    def __init__(self, module, inputs):
        self.module, self.inputs = module, inputs

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        with torch.no_grad():
            return self.module(self.inputs[index])[0]


def use_two_threads(_):
    # A loader gives its workers one thread, with which they would not need the pool.
    torch.set_num_threads(2)


@forks
@pytest.mark.parametrize("init", [None, use_two_threads])
def test_a_forked_data_loader_worker(init):
    module = layer_of()
    inputs = [torch.randn(8, 2, 64) for _ in range(12)]
    with torch.no_grad():
        # The parent's pool has been at work, and has workers that the child will not have.
        expected = [module(x)[0] for x in inputs]
    for _ in range(2):
        loader = DataLoader(
            Rows(module, inputs),
            batch_size=None,
            num_workers=2,
            multiprocessing_context="fork",
            worker_init_fn=init,
            timeout=TIMEOUT,
        )
        same(list(loader), expected)
        # The parent's pool is still its own.
        with torch.no_grad():
            same([module(x)[0] for x in inputs], expected)


def in_child(body):
    """Fork; return whether body() returned true in the child within the timeout."""
    sys.stdout.flush()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        # Nothing of pytest may run in the child, whatever happens.
        answer = b"raised"
        try:
            answer = b"right" if body() else b"wrong"
        finally:
            os.write(writer, answer)
            os._exit(0)
    os.close(writer)
    ready, _, _ = select.select([reader], [], [], TIMEOUT)
    answer = os.read(reader, 16) if ready else b"hangs"
    os.close(reader)
    if not ready:
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return answer.decode()


@forks
def test_a_fork_before_the_first_use_of_the_pool():
    """Torch's OpenMP workers are the parent's, whether or not the parent ran a layer on them."""
    script = """
        import os, select, signal, sys
        import torch
        from ostinato import nn

        torch.set_num_threads(2)
        torch.randn(2_000_000).exp_()  # OpenMP has workers now
        nn.GRU(4, 4)(torch.randn(2, 1, 4))  # too small to be shared
        module, x = nn.GRU(128, 128), torch.randn(64, 16, 128)
        pid = os.fork()
        if pid == 0:
            torch.set_num_threads(1)  # OSTINATO_NUM_THREADS still says two
            with torch.no_grad():
                module(x)
            os._exit(7)
        signal.alarm(%d)
        _, status = os.waitpid(pid, 0)
        sys.exit(0 if os.waitstatus_to_exitcode(status) == 7 else 1)
    """
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script % TIMEOUT)],
        env={**os.environ, "OSTINATO_NUM_THREADS": "2"},
        timeout=TIMEOUT + 30,
        check=True,
    )


def in_a_new_process(body):
    """Run a function of this module in a process that is small, and has run nothing before."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        pool.submit(body).result(TIMEOUT)


@forks
def test_a_forked_child_and_its_child():
    in_a_new_process(fork_twice)


def fork_twice():
    torch.set_num_threads(2)
    module, x = layer_of(), torch.randn(8, 3, 64)
    expected = gradients(module, x)

    def child():
        mine = all(all_equal(gradients(module, x), expected) for _ in range(20))
        return mine and in_child(lambda: all_equal(gradients(module, x), expected)) == "right"

    assert in_child(child) == "right"
    same(gradients(module, x), expected)


@forks
def test_a_fork_while_other_threads_compute():
    """The child may inherit a pool that is in use, whose user it does not inherit."""
    module, x = layer_of(), torch.randn(8, 3, 64)
    expected = gradients(module, x)
    stop = threading.Event()

    def body(index):
        if index:
            while not stop.is_set():
                same(gradients(module, x), expected)
            return
        try:
            with torch.no_grad():
                answers = {in_child(lambda: all_equal(module(x), module(x))) for _ in range(10)}
        finally:
            stop.set()
        assert answers == {"right"}

    in_threads(3, body)


def test_a_spawned_data_loader_worker():
    module = layer_of()
    inputs = [torch.randn(8, 2, 64) for _ in range(4)]
    with torch.no_grad():
        expected = [module(x)[0] for x in inputs]
    loader = DataLoader(
        Rows(module, inputs),
        batch_size=None,
        num_workers=1,
        multiprocessing_context="spawn",
        timeout=TIMEOUT,
    )
    same(list(loader), expected)


# ---- signals ----


def test_a_keyboard_interrupt_leaves_the_pool_working():
    module = layer_of(hidden=192)
    # Long enough that the signal comes in the middle of a call.
    long, short = torch.randn(400, 16, 64), torch.randn(8, 2, 64)
    expected = gradients(module, short)
    main = threading.main_thread().ident

    def call_until_interrupted(delay):
        until, resend = time.monotonic() + TIMEOUT, 0.0
        while (now := time.monotonic()) < until:
            # Python drops an interrupt that comes in a finalizer: then another one is sent.
            if now > resend:
                threading.Timer(delay, signal.pthread_kill, (main, signal.SIGINT)).start()
                resend = now + delay + 5
            gradients(module, long)

    # Libraries that other tests load may have put a handler of their own there.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for delay in (0.005, 0.02, 0.05, 0.1, 0.2):
            with pytest.raises(KeyboardInterrupt):
                call_until_interrupted(delay)
            same(gradients(module, short), expected)
    finally:
        signal.signal(signal.SIGINT, before)
    in_threads(2, lambda _: same(gradients(module, short), expected))


# ---- the number of threads ----


def in_process(code, **environment):
    """Run a Python program; return what it printed and what it said to stderr."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    return result.stdout.split(), result.stderr


# How many threads the process has before and after calls that are worth many.
COUNT = """
    import os, torch
    from ostinato import _core, nn
    torch.set_num_threads({threads})
    count = lambda: len(os.listdir("/proc/self/task"))
    module, x = nn.GRU(64, 128), torch.randn(40, 24, 64)
    before = count()
    with torch.no_grad():
        for _ in range(5):
            module(x)
    print(_core.forced_threads, count() - before)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="no /proc to count threads in")
@pytest.mark.parametrize(
    ("forced", "threads", "expected"),
    [("", 1, ["0", "0"]), ("", 3, ["0", "2"]), ("1", 3, ["1", "0"]), ("4", 1, ["4", "3"])],
)
def test_the_number_of_threads(forced, threads, expected):
    out, err = in_process(COUNT.format(threads=threads), OSTINATO_NUM_THREADS=forced)
    assert out == expected, err


@pytest.mark.parametrize(
    "value", ["0", "-1", "257", "two", "1.5", "2x", " ", "99999999999999999999"]
)
def test_a_wrong_number_of_threads_is_refused(value):
    out, err = in_process("import ostinato._core; print('imported')", OSTINATO_NUM_THREADS=value)
    assert not out
    assert "OSTINATO_NUM_THREADS must be a number from 1 to 256" in err


def test_a_wrong_instruction_set_is_refused():
    out, err = in_process("import ostinato._core; print('imported')", OSTINATO_ISA="sse9")
    assert not out
    known = ", ".join(_core.instruction_sets())
    assert f"OSTINATO_ISA must be one of {known} on this processor, got sse9" in err
    with pytest.raises(ValueError, match=f"instruction set must be one of {known}"):
        _core.set_isa("sse9")
    code = "from ostinato import _core; print(_core.isa())"
    last = _core.instruction_sets()[-1]
    assert in_process(code, OSTINATO_ISA=last)[0] == [last]
    assert in_process(code, OSTINATO_ISA="")[0] == [_core.instruction_sets()[0]]


# ---- a crowded machine ----


@contextlib.contextmanager
def every_core_taken():
    """Run a busy process on every core, for a few seconds at most."""
    code = "import time; end = time.monotonic() + 30\nwhile time.monotonic() < end: pass"
    cores = len(os.sched_getaffinity(0))
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(cores)]
    try:
        # They take a moment to start.
        time.sleep(0.3)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait(TIMEOUT)


def milliseconds(call, seconds=0.7):
    """Return the time of a call, the mean of as many as there are in these seconds."""
    started, calls = time.perf_counter(), 0
    while (passed := time.perf_counter() - started) < seconds:
        call()
        calls += 1
    return 1e3 * passed / calls


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs sched_getaffinity")
@pytest.mark.parametrize("shape", [(100, 1), (20, 16)])
def test_a_crowded_machine(shape, capsys):
    module, x = layer_of(hidden=256), torch.randn(*shape, 64)
    expected = gradients(module, x)
    # Eight are more than there is any use for; whoever comes last must not be waited for.
    times = {1: [], 2: [], 8: []}
    with every_core_taken():
        for threads in [*times] * 3:
            torch.set_num_threads(threads)
            times[threads].append(milliseconds(lambda: gradients(module, x)))
            same(gradients(module, x), expected)
    one, two, eight = (sum(spent) / len(spent) for spent in times.values())
    with capsys.disabled():
        print(f"\n{shape} in 1, 2, 8 threads, every core taken: {one:.1f} {two:.1f} {eight:.1f} ms")
    # Generous: the scheduler decides who waits. A barrier that waits for a sleeping thread at every
    # step was seen to cost a factor of 2,000.
    assert two < 4 * one

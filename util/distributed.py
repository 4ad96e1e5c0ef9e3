"""The processes that torchrun starts, and the signals that ask a run to stop."""
import atexit
import contextlib
import datetime
import os
import signal

import torch
import torch.distributed as dist

STOPPING = b"\nstopping after this step; a second signal stops at once\n"


def join_processes():
    """Lets the processes that torchrun started communicate: by NCCL what is on a GPU, by gloo
    what is on a CPU. Without torchrun, or after the first time, this does nothing."""
    started_by_torchrun = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if started_by_torchrun and not dist.is_initialized():
        dist.init_process_group(timeout=datetime.timedelta(minutes=10))
        atexit.register(dist.destroy_process_group)             # a second run needs it, too


@contextlib.contextmanager
def one_after_another():
    """A context that the first process leaves before the others enter it."""
    if world_size() == 1:
        yield
        return
    decoding_a_large_set = datetime.timedelta(hours=12)         # for which the others wait
    group = dist.new_group(timeout=decoding_a_large_set, backend="gloo")
    if rank() > 0:
        dist.barrier(group)
    yield
    if rank() == 0:
        dist.barrier(group)


def rank() -> int:
    """The number of this process among those of torchrun; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes that torchrun started; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def largest(number: int) -> int:
    """The largest of all processes' numbers."""
    number = torch.tensor(number)
    if world_size() > 1:
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def any_rank(signals: list) -> bool:
    """Whether any process has received a signal. If so, each process then has its number in
    its list `signals`, in the same step. One that comes meanwhile counts in the next step."""
    received = largest(signals[0] if signals else 0)
    if received and not signals:
        signals.append(received)
    return bool(received)


@contextlib.contextmanager
def signals_noted():
    """A context with a list to which Ctrl-C, SIGTERM, SIGHUP (the end of the terminal) and SIGUSR1
    (of a batch system) append their number. A second signal of any of these ends the process at
    once.

    Under torchrun it does not: it repeats a Ctrl-C that each process has received already.
    """
    received = []
    handlers_before = {}

    def note(number, frame):
        received.append(number)
        if world_size() == 1:
            for noted in handlers_before:
                signal.signal(noted, signal.SIG_DFL)
            with contextlib.suppress(OSError):
                os.write(2, STOPPING)                           # print is not safe here

    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        number = getattr(signal, name, None)                    # Windows lacks the last two
        if number is None:
            continue
        handler = signal.getsignal(number)
        if handler != signal.SIG_IGN:                           # else nohup ignores it
            handlers_before[number] = handler
            signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in handlers_before.items():
            signal.signal(number, handler)

"""Codes that are changed on their way into model.bin, by several processes: Python's threads compute in turns."""
import multiprocessing
import os
import signal
from multiprocessing.connection import wait

from refusal import Refused

SHARE_BYTES = 8 << 20                   # of codes, that a process has at a time
MOST_PROCESSES = 16
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Share:
    """Rows [first, end) of codes, and where in the file the first of them goes."""

    def __init__(self, codes, at, first, end):
        self.codes, self.at, self.first, self.end = codes, at, first, end

    def write(self, fd):
        """Returns how many bytes there were."""
        at = self.at
        for piece in self.codes.pieces(self.first, self.end):
            piece = memoryview(piece)
            while piece:
                n = os.pwrite(fd, piece, at)
                at, piece = at + n, piece[n:]
        return at - self.at


def shares_of(codes, at):
    """All rows of `codes`, of which the first goes to `at`."""
    step = max(SHARE_BYTES // codes.row_bytes, 1)
    return [Share(codes, at + first * codes.row_bytes, first, min(first + step, codes.rows))
            for first in range(0, codes.rows, step)]


def processors():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write_shares(fd, shares, progress, meanwhile):
    """Write all shares, as many at a time as there are processors, and do what `meanwhile` does. Of shares that fail the first
    one's error is raised."""
    n = min(processors(), len(shares), MOST_PROCESSES)
    if n < 2:
        meanwhile()
        for share in shares:
            progress.add(share.write(fd))
        return
    children = {}
    try:
        for i in range(n):
            start_child(fd, shares, i, n, children)
        meanwhile()
        failures = listen(children, progress)
    finally:
        for pid in children.values():
            os.kill(pid, signal.SIGKILL)        # those that have ended are still there to wait for
            os.waitpid(pid, 0)
    if failures:
        raise min(failures, key=lambda failure: failure[0])[1]


def start_child(fd, shares, first, step, children):
    """A process for every step-th share, into `children`. Signals wait until it is there: who is not would be left behind."""
    receiver, sender = multiprocessing.Pipe(False)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        pid = os.fork()
        if pid == 0:
            run_child(fd, shares, first, step, sender, (receiver, *children), before)
        children[receiver] = pid
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    sender.close()


def listen(children, progress):
    """What the children say until all have ended: [(which share, error)] of those that failed."""
    failures, open_ends = [], list(children)
    while open_ends:
        for receiver in wait(open_ends):
            try:
                share, done, error = receiver.recv()
            except EOFError:
                raise Refused("a process that copies was ended by somebody else (is memory short?)")
            if error is not None:
                failures.append((share, error))
            if done is None or error is not None:
                open_ends.remove(receiver)
            else:
                progress.add(done)
    return failures


def run_child(fd, shares, first, step, sender, receivers, mask):
    """Writes every step-th share, tells how it went, and does not return. It closes the receivers: to tell fails then when its
    parent is gone."""
    status = 1
    try:
        for receiver in receivers:
            receiver.close()
        for each in ENDING[:2]:                 # its parent says that it was interrupted
            signal.signal(each, signal.SIG_DFL)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for i in range(first, len(shares), step):
            try:
                done, error = shares[i].write(fd), None
            except Exception as failed:
                done, error = None, failed
            sender.send((i, done, error))
            if error is not None:
                break
        else:
            sender.send((len(shares), None, None))
        status = 0
    finally:
        os._exit(status)


if __name__ == "__main__":
    print(__doc__)

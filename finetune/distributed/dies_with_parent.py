"""Runs a command that cannot outlive the process that started it (Linux):

    python dies_with_parent.py PARENT_PID COMMAND...

A worker whose agent was killed would go on holding its GPU. The kernel keeps the wish over exec, so nothing of this
file stays in the worker.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, *command = sys.argv[1:]
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it died before the wish was known
        sys.exit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()

"""Peak memory of a program run in a fresh process, so that nothing else in this one is counted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from ..core import InputError

# The high-water mark of a process is read in the process itself: the mark that wait4 gives a parent also counts what
# the parent held when it forked.
_TAIL = """
import json as _json, sys as _sys
def _peak():
    try:
        with open("/proc/self/status") as f:
            for line in f:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if _sys.platform == "darwin" else peak * 1024
_sys.stdout.flush()
print("\\n@@peak " + _json.dumps({"bytes": _peak(), "result": globals().get("RESULT")}))
"""


def peak_memory_of(
    code: str, arguments: Sequence[str] = (), *, timeout_s: float = 120, python: str = sys.executable
) -> tuple[int, Any]:
    """Run Python code in a fresh process; its peak resident memory in bytes, and the JSON value it left in `RESULT`.

    Args:
        code: Python source; `sys.argv[1:]` are the arguments.

    Raises:
        InputError: the code failed or ran out of time; the message ends with its last error lines.

    Example:
        >>> peak, result = peak_memory_of("RESULT = 1 + 1")
        >>> peak > 1_000_000, result
        (True, 2)
    """
    command = [python, "-c", code + _TAIL, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as e:
        raise InputError(f"the measured program ran longer than {timeout_s:g} s; give it more with timeout_s.") from e
    if done.returncode != 0:
        raise InputError(f"the measured program failed (exit {done.returncode}): {done.stderr.strip()[-800:]}")
    _, found, last = done.stdout.rstrip().rpartition("@@peak ")
    if not found:
        raise InputError("the measured program ended before its last line, so its peak memory is not known.")
    data = json.loads(last)
    return int(data["bytes"]), data["result"]

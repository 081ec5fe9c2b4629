"""What the process that runs a repository's files may do, from inside.

`fence` comes before the heavy imports, `confine` after them and before a file of the repository is
opened: importing may start programs (`ldconfig`), which is over by then.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import struct
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FILE_LIMIT = 16 << 20
"""Bytes of a file that the process writes."""
OPEN_FILES = 4096

_KILL_PROCESS, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_EACCES, _ENOSYS = 13, 38
_LOAD, _EQUAL, _AT_LEAST, _SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENT = 0, 4, 16  # where they are in struct seccomp_data
_CLONE_THREAD = 0x10000
_X32 = 0x40000000
_PDEATHSIG, _NO_NEW_PRIVS = 1, 38

# Audit architecture and the numbers of syscalls, from the kernel's tables.
_MACHINES: dict[str, tuple[int, dict[str, int]]] = {
    "x86_64": (
        0xC000003E,
        {
            "socket": 41, "clone": 56, "fork": 57, "vfork": 58, "execve": 59, "kill": 62,
            "ptrace": 101, "rt_sigqueueinfo": 129, "pivot_root": 155, "chroot": 161, "acct": 163,
            "mount": 165, "umount2": 166, "swapon": 167, "swapoff": 168, "reboot": 169,
            "init_module": 175, "delete_module": 176, "tkill": 200, "tgkill": 234,
            "kexec_load": 246, "add_key": 248, "request_key": 249, "keyctl": 250, "unshare": 272,
            "rt_tgsigqueueinfo": 297, "perf_event_open": 298, "prlimit64": 302,
            "open_by_handle_at": 304, "setns": 308, "process_vm_readv": 310,
            "process_vm_writev": 311, "finit_module": 313, "seccomp": 317, "kexec_file_load": 320,
            "bpf": 321, "execveat": 322, "userfaultfd": 323,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "umount2": 39, "mount": 40, "pivot_root": 41, "chroot": 51, "acct": 89, "unshare": 97,
            "kexec_load": 104, "init_module": 105, "delete_module": 106, "ptrace": 117,
            "kill": 129, "tkill": 130, "tgkill": 131, "rt_sigqueueinfo": 138, "reboot": 142,
            "socket": 198, "add_key": 217, "request_key": 218, "keyctl": 219, "clone": 220,
            "execve": 221, "swapon": 224, "swapoff": 225, "rt_tgsigqueueinfo": 240,
            "perf_event_open": 241, "prlimit64": 261, "open_by_handle_at": 265, "setns": 268,
            "process_vm_readv": 270, "process_vm_writev": 271, "finit_module": 273,
            "seccomp": 277, "bpf": 280, "execveat": 281, "userfaultfd": 282,
            "kexec_file_load": 294,
        },
    ),
}  # fmt: skip
# The same everywhere.
_NEW = {
    "pidfd_send_signal": 424, "io_uring_setup": 425, "io_uring_enter": 426,
    "io_uring_register": 427, "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431,
    "fsmount": 432, "fspick": 433, "pidfd_open": 434, "clone3": 435, "pidfd_getfd": 438,
    "process_madvise": 440, "mount_setattr": 442,
}  # fmt: skip
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
# Writing, removing and making files, by the Landlock version that knows it: refer is 2, truncate 3.
_WRITES = 0b1_1111_1111_0010
_WRITES_SINCE = {2: 1 << 13, 3: 1 << 14}
_WRITES_TO_A_FILE = 1 << 1 | 1 << 14


def fence(parent: int, gpu: bool) -> tuple[list[str], list[str]]:
    """What is enforced from here on, and what this machine cannot enforce.

    The process dies with `parent`, gains no privileges, and changes no file outside TMPDIR. To be
    called before other threads exist, as Landlock holds only for the thread that asks for it.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform != "linux":
        return [], ["no writes outside its folder (needs Linux)"]
    libc = _libc()
    libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)
    libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0)
    what = "no writes outside its folder"
    # Not all of /dev without need: the user's terminals are there.
    if _landlock(libc, [tempfile.gettempdir(), "/dev" if gpu else "/dev/null"]):
        return [f"{what} (landlock)"], []
    return [], [f"{what} (this kernel has no landlock)"]


def confine(memory: int, gpu: bool) -> tuple[list[str], list[str]]:
    """What is enforced from here on, and what this machine cannot enforce.

    No network, no new programs or processes, no reach into other processes or into the kernel's
    more dangerous parts, and on a CPU no more than `memory` bytes.
    """
    enforced, missing = [], []
    _lower(resource.RLIMIT_FSIZE, FILE_LIMIT)
    _lower(resource.RLIMIT_NOFILE, OPEN_FILES)
    limit = f"memory <= {memory / (1 << 30):.1f} GiB"
    if gpu:
        # CUDA reserves address space for all of the memory of host and devices.
        missing.append(f"{limit} (on a GPU)")
    elif sys.platform != "linux":
        missing.append(f"{limit} (needs Linux)")
    else:
        # Not RLIMIT_AS: it counts libraries, reservations of malloc and pages of files that are
        # only read, of which there are gigabytes. RLIMIT_DATA counts private writable memory.
        # safetensors files are mapped as that, so the limit has to have room for them as well.
        _lower(resource.RLIMIT_DATA, memory)
        enforced.append(limit)
    wanted = ["no network", "no new programs", "no new processes"]
    if sys.platform == "linux" and _seccomp(gpu):
        enforced += [f"{what} (seccomp)" for what in wanted]
    else:
        refuse_in_python()
        missing += [f"{what} (no seccomp here; refused to Python code only)" for what in wanted]
    return enforced, missing


def refuse_in_python() -> None:
    """None; from here on Python code is refused sockets and new processes, as a belt."""
    refused = ("socket.", "subprocess.", "os.exec", "os.system", "os.posix", "os.fork", "pty.")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(refused):
            raise PermissionError(_EACCES, f"{event} is not allowed here")

    sys.addaudithook(hook)


def _lower(which: int, value: int) -> None:
    hard = resource.getrlimit(which)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    libc.syscall.restype = ctypes.c_long
    return libc


def _landlock(libc: ctypes.CDLL, writable: Sequence[str]) -> bool:
    """Whether this thread, and what it starts, can now write there and below only."""
    version = _call(libc, _LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        return False
    rights = _WRITES
    for since, right in _WRITES_SINCE.items():
        rights |= right if version >= since else 0
    ruleset = _call(libc, _LANDLOCK_CREATE, struct.pack("=Q", rights), 8, 0)
    if ruleset < 0:
        return False
    try:
        for path in writable:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            allowed = rights if Path(path).is_dir() else rights & _WRITES_TO_A_FILE
            rule = struct.pack("=Qi", allowed, descriptor)
            added = _call(libc, _LANDLOCK_ADD, ruleset, 1, rule, 0)
            os.close(descriptor)
            if added:
                return False
        return _call(libc, _LANDLOCK_RESTRICT, ruleset, 0) == 0
    finally:
        os.close(ruleset)


def _seccomp(gpu: bool) -> bool:
    """Whether all threads of this process are now under the filter."""
    machine = _MACHINES.get(platform.machine())
    if machine is None or struct.calcsize("P") != 8 or sys.byteorder != "little":
        return False
    architecture, numbers = machine
    program = _filter(architecture, numbers | _NEW, gpu)
    # struct sock_fprog: the number of instructions, then a pointer to them.
    code = ctypes.create_string_buffer(program, len(program))
    fprog = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    libc = _libc()
    libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0)
    everywhere = 1  # SECCOMP_FILTER_FLAG_TSYNC: imported libraries have started threads
    return _call(libc, numbers["seccomp"], 1, everywhere, fprog) == 0


def _call(libc: ctypes.CDLL, number: int, *arguments: int | bytes | None) -> int:
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result: int = libc.syscall(ctypes.c_long(number), *wide)
    return result


def _filter(architecture: int, numbers: Mapping[str, int], gpu: bool) -> bytes:
    """The BPF program: which syscalls are refused with EACCES, and which kill."""
    me = os.getpid()
    # Allowed with this first argument only. Without a GPU not even AF_UNIX, by which one reaches
    # services that do anything; its driver talks to its own by that.
    if_first = {"kill": me, "tgkill": me, "prlimit64": 0, **({"socket": 1} if gpu else {})}
    code = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER),
    ]
    if architecture == _MACHINES["x86_64"][0]:
        code += [(_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _KILL_PROCESS)]
    for name, number in numbers.items():
        test, value = _EQUAL, if_first.get(name)
        if name == "clone":
            test, value = _SET, _CLONE_THREAD
        if value is not None:
            code += [
                (_EQUAL, 0, 4, number),
                (_LOAD, 0, 0, _ARGUMENT),
                (test, 0, 1, value),
                (_RETURN, 0, 0, _ALLOW),
                (_RETURN, 0, 0, _ERRNO | _EACCES),
            ]
        elif name != "seccomp":
            # The flags of clone3 cannot be seen from here; without it libraries use clone.
            error = _ENOSYS if name == "clone3" else _EACCES
            code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | error)]
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *line) for line in code)

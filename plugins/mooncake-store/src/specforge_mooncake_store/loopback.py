# SPDX-License-Identifier: Apache-2.0
"""Keeps a process's ports on loopback though it would open them to everybody. Linux, x86-64 and ARM.

The vendor's library listens on every address and has no setting for it. So the kernel is asked (seccomp, user
notification) to report each ``bind`` of the process to the one that started it, which puts the loopback address in the
place of "any" before the call goes on. What then listens really listens there; nothing is filtered afterwards.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import select
import socket
import struct
from contextlib import suppress

_BIND_NUMBER = {"x86_64": 49, "aarch64": 200}
_SECCOMP_NUMBER = {"x86_64": 317, "aarch64": 277}
_PR_SET_NO_NEW_PRIVS = 38
_SET_MODE_FILTER, _NEW_LISTENER = 1, 8
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_NOTIFY, _ALLOW = 0x7FC00000, 0x7FFF0000
_RECEIVE, _SEND, _CONTINUE = 0xC0502100, 0xC0182101, 1
_NOTIFICATION, _ANSWER = struct.Struct("=QIIiIQ6Q"), struct.Struct("=QqiI")
_LOOPBACK_4 = socket.inet_pton(socket.AF_INET, "127.0.0.1")
_LOOPBACK_6 = socket.inet_pton(socket.AF_INET6, "::ffff:127.0.0.1")  # a socket of both families stays reachable


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def report_binds(supervisor: socket.socket) -> None:
    """From now on, for every thread started later too: each ``bind`` waits for the process at the other end.

    :raises OSError: the kernel does not do that, or not on this kind of machine.
    """
    machine = platform.machine()
    if machine not in _BIND_NUMBER:
        raise OSError(f"not on {machine}")
    instructions = (
        (_LOAD, 0, 0, 0),  # the number of the system call
        (_JUMP_IF_EQUAL, 0, 1, _BIND_NUMBER[machine]),
        (_RETURN, 0, 0, _NOTIFY),
        (_RETURN, 0, 0, _ALLOW),
    )
    buffer = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in instructions))
    program = _Program(len(instructions), ctypes.addressof(buffer))
    library = ctypes.CDLL(None, use_errno=True)
    library.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    listener = library.syscall(_SECCOMP_NUMBER[machine], _SET_MODE_FILTER, _NEW_LISTENER, ctypes.byref(program))
    if listener < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    socket.send_fds(supervisor, [b"l"], [listener])
    os.close(listener)


def answer_binds(listener: int) -> None:
    """Let each reported ``bind`` go on, on loopback; returns when the process has ended."""
    watched = select.poll()
    watched.register(listener, select.POLLIN)
    while watched.poll()[0][1] & select.POLLIN:
        notification = bytearray(_NOTIFICATION.size)
        with suppress(OSError):  # it ended meanwhile
            fcntl.ioctl(listener, _RECEIVE, notification)
            number, thread, *_, arguments = (*_NOTIFICATION.unpack(notification)[:6], notification[32:])
            try:
                _put_on_loopback(thread, *struct.unpack_from("=QQQ", arguments))
                answer = _ANSWER.pack(number, 0, 0, _CONTINUE)
            except OSError:  # its memory may not be written: refused, not left waiting, and not open to everybody
                answer = _ANSWER.pack(number, 0, -errno.EPERM, 0)
            fcntl.ioctl(listener, _SEND, answer)


def _put_on_loopback(thread: int, _: int, address: int, length: int) -> None:
    with open(f"/proc/{thread}/mem", "r+b", buffering=0) as memory:
        given = os.pread(memory.fileno(), min(length, 28), address)
        family = int.from_bytes(given[:2], "little")
        if family == socket.AF_INET and given[4:8] == bytes(4):
            os.pwrite(memory.fileno(), _LOOPBACK_4, address + 4)
        elif family == socket.AF_INET6 and given[8:24] == bytes(16):
            os.pwrite(memory.fileno(), _LOOPBACK_6, address + 8)

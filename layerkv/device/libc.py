"""The libc calls that Python's mmap module cannot express: mapping at a fixed address, and giving pages back."""

from __future__ import annotations

import ctypes
import mmap
import os
from functools import cache

_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MADV_DONTNEED = 4
_MADV_HUGEPAGE = 14
_MADV_NOHUGEPAGE = 15
_FAILED = ctypes.c_void_p(-1).value

HUGE_PAGE_BYTES = 2 << 20
"""What the kernel gives back of a huge page is all of it or nothing."""


@cache  # loading it takes longer than giving a huge page back
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    ]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


def reserve(num_bytes: int, alignment_bytes: int = 1) -> int:
    """Map a zero, private range that gets memory when it is first touched, in huge pages where the kernel has them.

    With pages of 4 KiB, copies of single blocks spend much of their time on address translation.

    Returns:
        Its address, a multiple of ``alignment_bytes``.

    Raises:
        MemoryError: the kernel refused.
    """
    if alignment_bytes > mmap.PAGESIZE:
        whole = reserve(num_bytes + alignment_bytes)
        before = -whole % alignment_bytes
        if before:
            unmap(whole, before)
        unmap(whole + before + num_bytes, alignment_bytes - before)
        return whole + before
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    address = _libc().mmap(None, num_bytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    if address in (None, _FAILED):
        raise MemoryError(f"cannot map {num_bytes} bytes: {os.strerror(ctypes.get_errno())}")
    _libc().madvise(address, num_bytes, _MADV_HUGEPAGE)  # a kernel without them refuses, and nothing is lost
    return int(address)


def map_shared_at(address: int, num_bytes: int, fd: int, offset: int) -> None:
    """Replace a page-aligned part of a range reserved before by a shared mapping of a file.

    Raises:
        MemoryError: the kernel refused; the range is as before.
    """
    flags = mmap.MAP_SHARED | _MAP_FIXED
    got = _libc().mmap(address, num_bytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, offset)
    if got in (None, _FAILED):
        raise MemoryError(f"cannot alias {num_bytes} bytes: {os.strerror(ctypes.get_errno())}")


def unmap(address: int, num_bytes: int) -> None:
    """Give a range back, aliased parts included."""
    _libc().munmap(address, num_bytes)


def use_small_pages(address: int, num_bytes: int) -> None:
    """Pages of 4 KiB for a range: parts of a huge page that are given back are not free before all of it is."""
    _libc().madvise(address, num_bytes, _MADV_NOHUGEPAGE)  # a kernel without huge pages refuses, and nothing is lost


def give_back(address: int, num_bytes: int) -> None:
    """The memory behind part of a private range is free, and the range reads as zero until it is touched again.

    Raises:
        MemoryError: the kernel refused.
    """
    if _libc().madvise(address, num_bytes, _MADV_DONTNEED):
        raise MemoryError(f"cannot give {num_bytes} bytes back: {os.strerror(ctypes.get_errno())}")


def protect(address: int, num_bytes: int, *, may_access: bool) -> None:
    """Whether this process may read and write part of a range; if it does so where it may not, it is killed.

    Raises:
        MemoryError: the kernel refused.
    """
    if _libc().mprotect(address, num_bytes, mmap.PROT_READ | mmap.PROT_WRITE if may_access else 0):
        raise MemoryError(f"cannot protect {num_bytes} bytes: {os.strerror(ctypes.get_errno())}")

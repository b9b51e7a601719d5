"""Memory that is freed stays with the process: the next tensor lies on pages that it has already."""

import ctypes
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, sys, torch, sparse_adv

class Information(ctypes.Structure):  # mallinfo2 of glibc's malloc.h
    names = "arena ordblks smblks hblks mapped usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Information
if sys.argv[1] == "kept":
    assert sparse_adv.keep_freed_memory()
before = mallinfo2()
tensor = torch.ones(1 << 26)  # 256 MB
during = mallinfo2()
del tensor
after = mallinfo2()
print(during.mapped - before.mapped, after.arena - before.arena)
"""


def growth(kind: str) -> list[int]:
    """Bytes mapped for one large tensor, and bytes that the heap keeps after it is freed."""
    run = subprocess.run([sys.executable, "-c", PROGRAM, kind], capture_output=True, text=True, check=True)
    return list(map(int, run.stdout.split()))


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="no mallinfo2: not glibc 2.33 or later")
def test_large_tensors_come_from_a_heap_that_does_not_shrink():
    mapped, kept = growth("kept")
    assert mapped == 0 and kept > 1 << 27
    mapped, kept = growth("as usual")
    assert mapped > 1 << 27 and kept < 1 << 27

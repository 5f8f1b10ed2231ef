"""How the C library treats freed memory, in a process of its own (it is set per process), and huge pages."""

import json
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mlm_train.utils.host_memory import HUGE_PAGE, use_huge_pages

SCRIPT = """
import json, resource, psutil, torch
from mlm_train.utils.host_memory import give_back, keep_freed

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        blocks = [torch.empty(2**20, dtype=torch.float32).fill_(1.0) for _ in range(8)]  # 4 MiB each
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed()
faults()
again, held = faults(), psutil.Process().memory_info().rss
give_back()
print(json.dumps([again, held - psutil.Process().memory_info().rss]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_freed_memory_stays_until_it_is_given_back() -> None:
    found = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True)
    again, given = json.loads(found.stdout)
    assert again < 1000, "20 rounds of 32 MiB are 160,000 pages"
    assert given > 24 * 2**20


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="no huge pages here")
def test_the_system_is_asked_for_huge_pages() -> None:
    weight, small = torch.empty(8 * HUGE_PAGE, dtype=torch.uint8), torch.empty(64, dtype=torch.uint8)
    use_huge_pages(weight.data_ptr(), weight.nbytes)
    use_huge_pages(small.data_ptr(), small.nbytes)
    assert "hg" in flags(weight.data_ptr()) and "hg" in flags(weight.data_ptr() + weight.nbytes - 1)
    assert "hg" not in flags(small.data_ptr())


def flags(address: int) -> list[str]:
    """Of the mapping in which an address is, as Linux lists them."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError("no such address")

"""How the C library treats freed memory, in a process of its own, since the setting is per process."""

import json
import platform
import subprocess
import sys

import pytest

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

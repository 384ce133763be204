"Shared by the contracts in tests/: where the repository is, and a copy of it to change."
import os, shutil, subprocess
from pathlib import Path
import pytest

# Before anything imports torch or the hub: one thread, so that workers do not fight, and no network.
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('HF_HUB_OFFLINE', '1')

ROOT = Path(__file__).resolve().parents[1]

@pytest.fixture(scope='session')
def root(): return ROOT

@pytest.fixture(scope='session')
def tracked():
    "Every file git tracks or would add, relative to the root; links as links."
    command = ['git', 'ls-files', '--cached', '--others', '--exclude-standard', '-z']
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split('\0')
    return sorted({Path(name) for name in names if name and os.path.lexists(ROOT/name)})

@pytest.fixture(scope='module')
def checkout(tmp_path_factory, tracked):
    "A copy of the tracked files that a test may change."
    copy = tmp_path_factory.mktemp('checkout')
    for name in tracked:
        (copy/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT/name, copy/name, follow_symlinks=False)
    return copy

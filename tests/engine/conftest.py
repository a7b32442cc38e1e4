import os
import subprocess
import sys

import pytest

IN_NAMESPACE = "FASTMUM_TEST_IN_NAMESPACE"


@pytest.fixture
def small_disk(tmp_path, request):
    """A tmpfs of the size `request.param`; without the right to mount it, the test runs again in a namespace."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "none", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode == 0:
        yield folder
        subprocess.run(["umount", "-l", str(folder)], check=True)
        return
    if IN_NAMESPACE in os.environ or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs, or unshare -rm")
    test = f"{request.node.path}::{request.node.name}"
    command = ["unshare", "-rm", sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    ran = subprocess.run(command, env={**os.environ, IN_NAMESPACE: "1"}, capture_output=True, text=True)
    if ran.returncode != 0 or "1 passed" not in ran.stdout:
        pytest.fail(ran.stdout[-3000:])
    pytest.skip("passed in a separate namespace")

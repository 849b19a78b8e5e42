"""The rule worker as its container confines it: no network but its own, a read-only root, and an empty /tmp.

The kernel's namespaces stand for the container's: what docker-compose.yml and the manifests ask for, this does. The
worker runs, and a rule that wants out or wants to write cannot.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.compose import ROOT

RULE = '''
import pathlib, socket

def escapes(messages, response, reference, metadata):
    """0 for what the container does not allow."""
    try:
        if response == "write":
            pathlib.Path(metadata["where"]).write_text("x")
        else:
            socket.create_connection((metadata["where"], 443), timeout=3).close()
    except OSError:
        return 0.0
    return 1.0
'''

INSIDE = """
mount --bind {root} /mnt
mount -o remount,bind,ro /mnt
mount -o remount,bind,ro /
mount -t tmpfs tmpfs /tmp
# A checkout below /tmp is hidden by now.
mkdir -p {root}
mount --bind /mnt {root}
mount -o remount,bind,ro {root}
{python} -c 'import fcntl,socket,struct; s=socket.socket(); \
fcntl.ioctl(s,0x8914,struct.pack("16sh",b"lo",0x49))'
printf '%s' "$RULE" > /tmp/rule.py
{router} worker --rule /tmp/rule.py:escapes --port 8000 >/tmp/log 2>&1 &
{python} - <<'END'
import json, time, urllib.request
items = [
    {{"prompt": "p", "responses": ["write"], "metadata": {{"where": "{root}/written"}}}},
    {{"prompt": "p", "responses": ["connect"], "metadata": {{"where": "1.1.1.1"}}}},
    {{"prompt": "p", "responses": ["write"], "metadata": {{"where": "/tmp/written"}}}},
]
body = json.dumps({{"items": items}}).encode()
for _ in range(600):
    try:
        request = urllib.request.Request("http://127.0.0.1:8000/score", body, {{"content-type": "application/json"}})
        print(urllib.request.urlopen(request, timeout=30).read().decode())
        break
    except urllib.error.URLError:
        time.sleep(0.1)
else:
    print(open("/tmp/log").read())
END
kill $!
"""


def test_a_rule_neither_writes_nor_connects_where_its_container_confines_it() -> None:
    namespaces = ["unshare", "--user", "--map-root-user", "--net", "--mount", "--propagation", "private"]
    if (
        not shutil.which("unshare")
        or subprocess.run([*namespaces, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("needs user namespaces")
    python = sys.executable
    router = Path(python).parent / "reward-router"
    done = subprocess.run(
        [*namespaces, "sh", "-ec", INSIDE.format(python=python, router=router, root=ROOT)],
        env={"PATH": os.environ["PATH"], "RULE": RULE, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    results = json.loads(done.stdout)["results"]
    # The root, the internet; /tmp alone may be written to.
    assert [result["rewards"] for result in results] == [[0.0], [0.0], [1.0]]

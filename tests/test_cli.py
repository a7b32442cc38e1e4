"""The `fastmum` command and the files that it finds by name."""

import os
import re
import signal
import subprocess
import sys

import pytest

from fastmum import cli
from fastmum.config.load import config_names, find_config
from fastmum.errors import FastmumError
from fastmum.files import resource_dir


def test_help_lists_every_command_and_imports_no_torch():
    code = "import sys; from fastmum.cli import main; main(['--help']); print('torch' in sys.modules)"
    *lines, has_torch = subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()
    assert has_torch == "False"
    assert all(any(line.startswith(f"  {name} ") for line in lines) for name in [*cli.MODULES, "launch"])


@pytest.mark.parametrize("name", cli.MODULES)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_commands_run_their_module(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pytest"])
    with pytest.raises(SystemExit) as stopped:
        cli.main([*name.split(), "--help"])
    assert stopped.value.code == 0
    assert cli.MODULES[name][0] in capsys.readouterr().out


def test_exit_codes(capsys):
    for words, code in (([], 2), (["--version"], 0), (["trian"], 2), (["data"], 2), (["data", "-h"], 0)):
        assert cli.main(words) == code
        assert any(capsys.readouterr())


def test_launch_scripts_start_with_this_python_and_keep_existing_files(tmp_path, capsys):
    script = tmp_path / "run.sh"
    for launcher in cli.LAUNCHERS:
        assert cli.main(["launch", launcher]) == 0
        assert f"PYTHON=${{PYTHON:-{sys.executable}}}\n" in capsys.readouterr().out
        subprocess.run(["bash", "-n", resource_dir("launch") / f"{launcher}.sh"], check=True)
    assert cli.main(["launch", "slurm", "--out", str(script)]) == 0
    assert os.access(script, os.X_OK)
    assert cli.main(["launch", "slurm", "--out", str(script)]) == 2


@pytest.mark.parametrize(("handler", "handled"), [(signal.SIG_DFL, True), (signal.SIG_IGN, False)])
def test_torchrun_leaves_a_hangup_ignored_under_nohup(handler, handled):
    words = ["bash", resource_dir("launch") / "torchrun.sh"]
    before = signal.signal(signal.SIGHUP, handler)
    try:
        printed = subprocess.check_output(words, env=os.environ | {"PYTHON": "echo"}, text=True)
    finally:
        signal.signal(signal.SIGHUP, before)
    (signals,) = re.findall("--signals-to-handle=(\\S+)", printed)
    assert {"SIGTERM", "SIGUSR1"} <= set(signals.split(","))
    assert ("SIGHUP" in signals) == handled


def test_configurations_are_found_by_name_or_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {"quickstart", "mum_vitl16", "evidence/mum"} <= set(config_names())
    assert find_config("evidence/mum") == resource_dir("configs") / "evidence/mum.yaml"
    (tmp_path / "quickstart").write_text("run: {}")
    assert find_config("quickstart").resolve() == tmp_path / "quickstart"  # files come first
    with pytest.raises(FastmumError, match=r"did you mean 'mum_vitl16'.*evidence/mae, evidence/mum"):
        find_config("mum_vitl15")

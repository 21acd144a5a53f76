import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "tpu_scripts"
SLICE = ("--name", "sae-1", "--project", "my-project", "--zone", "us-east5-a")
TYPE = ("--type", "v5p-16")
PLACE = ("sae-1", "--project", "my-project", "--zone", "us-east5-a")


@pytest.fixture
def pod(tmp_path):
    """Run the script where no gcloud is, with only the given settings in the environment."""

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [str(FOLDER / "pod.sh"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", **environment}, timeout=60, cwd=tmp_path)

    return run


@pytest.fixture
def training(tmp_path) -> tuple[str, ...]:
    """Options that say what is trained."""
    (tmp_path / "run.yaml").write_text("steps: 1\n")
    return ("--config", "run.yaml", "--install", "git+https://example.org/qscope.git", "--out", "/mnt/runs/one")


@pytest.fixture
def dry(pod):
    """The commands of a dry run, as lists of words; remarks are strings."""

    def run(*arguments: object, **environment: str) -> list[list[str] | str]:
        done = pod(*arguments, "--dry-run", **environment)
        assert done.returncode == 0 and not done.stderr, done.stderr
        return [line if line.startswith("#") else shlex.split(line) for line in done.stdout.splitlines()]

    return run


def remote(words: list[str]) -> str:
    """What an ssh command runs on a worker."""
    (command,) = [word.removeprefix("--command=") for word in words if word.startswith("--command=")]
    return command


def is_shell(command: str) -> bool:
    return subprocess.run(["bash", "-n", "-c", command], capture_output=True, timeout=60).returncode == 0


def test_create_requests_the_slice_and_waits(dry):
    create, remark, describe = dry("create", *SLICE, *TYPE, "--spot", "--wait", "5")
    beginning = ["gcloud", "compute", "tpus", "queued-resources"]
    assert create == [*beginning, "create", *PLACE, "--node-id", "sae-1", "--accelerator-type", "v5p-16", "--runtime-version", "v2-alpha-tpuv5",
                      "--spot"]  # fmt: skip
    assert "ACTIVE, at most 5 minutes" in remark
    assert describe == [*beginning, "describe", *PLACE, "--format=value(state.state)"]


@pytest.mark.parametrize(
    ("kind", "runtime"),
    [("v4-16", "tpu-ubuntu2204-base"), ("v5litepod-16", "v2-alpha-tpuv5-lite"), ("v6e-8", "v2-alpha-tpuv6e"), ("v5p-8", "v2-alpha-tpuv5")],
)
def test_each_kind_of_chip_has_its_software_version(dry, kind, runtime):
    create = dry("create", *SLICE, "--type", kind)[0]
    assert create[create.index("--runtime-version") + 1] == runtime and "--spot" not in create
    chosen = dry("create", *SLICE, "--type", kind, "--runtime", "other-1.0")[0]
    assert chosen[chosen.index("--runtime-version") + 1] == "other-1.0"


def test_run_copies_installs_and_starts_on_every_worker(dry, training):
    copy, setup, install, start = dry("run", *SLICE, *training, "--setup", "mount 'that' folder")
    assert copy == ["gcloud", "compute", "tpus", "tpu-vm", "scp", "run.yaml", "sae-1:qscope.yaml", *PLACE[1:], "--worker=all"]
    for step in (setup, install, start):
        assert step[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh"] and "--worker=all" in step and is_shell(remote(step))
    assert remote(setup) == "mount 'that' folder"
    assert "qscope-jax[tpu] @ git+https://example.org/qscope.git" in remote(install)
    assert "qscope train-sae --config ~/qscope.yaml --out /mnt/runs/one --resume" in remote(start)


def test_a_wheel_is_copied_and_installed(dry, training, tmp_path):
    (tmp_path / "qscope_jax-1-py3-none-any.whl").touch()
    _, copy, install, _ = dry("run", *SLICE, *training, "--install", "qscope_jax-1-py3-none-any.whl")
    assert copy[4:7] == ["scp", "qscope_jax-1-py3-none-any.whl", "sae-1:qscope_jax-1-py3-none-any.whl"]
    assert "'./qscope_jax-1-py3-none-any.whl[tpu]'" in remote(install)


def test_watch_shows_the_log_of_worker_0(dry):
    (watch,) = dry("watch", *SLICE)
    assert "--worker=0" in watch and remote(watch) == "tail -n 50 -F ~/qscope.log"


def test_status_asks_for_the_slice_and_the_training(dry):
    describe, ask = dry("status", *SLICE)
    assert "describe" in describe and "--worker=all" in ask and is_shell(remote(ask))


def test_resume_deletes_what_a_preemption_left_requests_again_and_starts(dry, training):
    words = [line for line in dry("resume", *SLICE, *TYPE, *training) if isinstance(line, list)]
    assert [line[4] for line in words] == ["describe", "delete", "create", "describe", "ssh", "scp", "ssh", "ssh"]
    assert words[1][-2:] == ["--force", "--quiet"] and "kill -TERM" in remote(words[4]) and "--resume" in remote(words[-1])


def test_delete_lets_the_training_save_first(dry):
    words = [line for line in dry("delete", *SLICE) if isinstance(line, list)]
    assert [line[4] for line in words] == ["describe", "ssh", "delete"]
    assert "kill -TERM" in remote(words[1]) and is_shell(remote(words[1])) and words[2][-2:] == ["--force", "--quiet"]


def test_settings_may_come_from_the_environment_and_flags_win(dry):
    environment = {"QSCOPE_POD_NAME": "other", "QSCOPE_POD_PROJECT": "my-project", "QSCOPE_POD_ZONE": "us-east5-a", "QSCOPE_POD_TYPE": "v6e-8",
                   "QSCOPE_POD_SPOT": "1"}  # fmt: skip
    create = dry("create", "--name", "sae-1", **environment)[0]
    assert create[4:6] == ["create", "sae-1"] and "v6e-8" in create and create[-1] == "--spot"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "no command given"),
        (("begin",), "unknown command 'begin'"),
        (("watch", "--nmae", "x"), "unknown option '--nmae'"),
        (("watch", "--name"), "--name needs a value"),
        (("watch",), "name is missing; give --name"),
        (("watch", *SLICE, "--name", "Big"), "--name is 'Big', expected"),
        (("watch", *SLICE, "--name", "a; rm -r x"), "--name is 'a; rm -r x', expected"),
        (("watch", *SLICE, "--zone", "here"), "--zone is 'here', expected a zone"),
        (("create", *SLICE), "type is missing; give --type"),
        (("create", *SLICE, "--type", "h100-8"), "--type is 'h100-8', expected an accelerator type"),
        (("create", *SLICE, *TYPE, "--wait", "soon"), "--wait is 'soon', expected minutes"),
        (("run", *SLICE), "config is missing"),
        (("run", *SLICE, "--config", "nothing.yaml"), "nothing.yaml: no such file"),
        (("run", *SLICE, "--config", "run.yaml", "--out", "runs"), "--out is 'runs', expected an absolute path"),
        (("run", *SLICE, "--config", "run.yaml", "--out", "/runs"), "install is missing"),
        (("run", *SLICE, "--config", "run.yaml", "--out", "/runs", "--install", "qscope"), "--install is 'qscope', expected a wheel or git"),
        (("run", *SLICE, "--config", "run.yaml", "--out", "/runs", "--install", "git+https://x'y"), "without blanks or quotes"),
        (("run", *SLICE, "--config", "run.yaml", "--out", "/runs", "--install", "a.whl"), "a.whl: no such file"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(pod, training, arguments, said):
    done = pod(*arguments, "--dry-run") if arguments else pod()
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and not done.stdout and line.startswith("pod.sh: error: ") and said in line


def test_without_gcloud_nothing_is_tried(pod, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "env", "cat"):
        (tools / tool).symlink_to(Path("/usr/bin") / tool if (Path("/usr/bin") / tool).exists() else Path("/bin") / tool)
    done = pod("watch", *SLICE, PATH=str(tools))
    assert done.returncode == 2 and "gcloud is not installed" in done.stderr


def test_a_real_run_gives_gcloud_what_the_dry_run_printed(pod, dry, training, tmp_path):
    tools, log = tmp_path / "bin", tmp_path / "log"
    tools.mkdir()
    (tools / "gcloud").write_text(f'#!/bin/bash\nprintf "%s\\0" "$@" >>{shlex.quote(str(log))}; printf "\\0" >>{shlex.quote(str(log))}\n')
    (tools / "gcloud").chmod(0o755)
    path = f"{tools}:{os.defpath}"
    done = pod("run", *SLICE, *training, PATH=path)
    assert done.returncode == 0, done.stderr
    real = [["gcloud", *call.split("\0")] for call in log.read_text().split("\0\0") if call]
    assert real == dry("run", *SLICE, *training)


def test_the_jobset_runs_the_same_command():
    jobset = yaml.safe_load((FOLDER / "jobset.yaml").read_text())
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert (jobset["kind"], job["backoffLimit"], pod["restartPolicy"]) == ("JobSet", 0, "Never")
    assert job["parallelism"] == job["completions"] and pod["terminationGracePeriodSeconds"] >= 600
    assert container["command"][:3] == ["qscope", "train-sae", "--config"] and "--resume" in container["command"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}

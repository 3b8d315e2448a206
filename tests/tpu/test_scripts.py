"""The launch scripts, with fake gcloud, xpk, kubectl and docker commands that record their calls."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TPU = ROOT / "tpu"
SCRIPTS = sorted(TPU.glob("*.sh"))
GPU = TPU.parent / "benchmarks" / "gpu.sh"
PLACE = ["--zone=us-east5-b", "--project=my-project"]
SETTINGS = {
    "TPU_NAME": "mapo",
    "TPU_TYPE": "v6e-16",
    "TPU_ZONE": "us-east5-b",
    "TPU_PROJECT": "my-project",
    "TPU_IMAGE": "us-east5-docker.pkg.dev/my-project/mapo/mapo_jax:1",
}
RUN = ["--config", "configs/a.yaml", "run.directory=gs://my-bucket/runs/a", "rollout.system_prompt=Say less."]

# Answers are lines of $FAKE/state and $FAKE/worker: each is used once, the last one repeatedly.
STAND_IN = r"""#!/bin/bash
printf '%s\x1f' "$(basename "$0")" "$@" >>"$FAKE/calls"
printf '\x1e' >>"$FAKE/calls"
answer() {
  head -n 1 "$FAKE/$1" 2>/dev/null
  if [ "$(wc -l <"$FAKE/$1")" -gt 1 ]; then sed -i 1d "$FAKE/$1"; fi
}
while read -r words; do case "$*" in *"$words"*) exit 1 ;; esac; done <"$FAKE/fail"
case "$*" in
  *"queued-resources describe"*) answer state ;;
  *"worker.sh status"*) answer worker ;;
  *"projects describe"*) echo 123456 ;;
esac
"""


class Machine:
    """Runs scripts with a PATH of fake commands, and reads the recorded calls."""

    def __init__(self, folder):
        self.folder, self.tools = folder, folder / "tools"
        self.tools.mkdir()
        for name in ("gcloud", "xpk", "kubectl", "docker"):
            (self.tools / name).write_text(STAND_IN)
            (self.tools / name).chmod(0o755)
        self.answers()

    def answers(self, state=(), worker=(), fail=()):
        for name, lines in (("state", state), ("worker", worker), ("fail", fail)):
            (self.folder / name).write_text("".join(f"{line}\n" for line in lines))
        (self.folder / "calls").write_text("")

    def run(self, script, *arguments, **settings):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TPU_")}
        environment |= SETTINGS | {
            "PATH": f"{self.tools}:{os.environ['PATH']}",
            "FAKE": str(self.folder),
            "TPU_POLL_SECONDS": "0",
        }
        return subprocess.run(
            ["bash", str(TPU / script), *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            env=environment | settings,
            cwd=ROOT,
        )

    @property
    def calls(self):
        """The words of every recorded call."""
        text = (self.folder / "calls").read_text()
        return [call.split("\x1f")[:-1] for call in text.split("\x1e")[:-1]]


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def commands(printed):
    """The words of printed commands, only those of faked programs."""
    return [words for line in printed.splitlines() if (words := shlex.split(line))[0] != "git"]


# --- All scripts. ---


@pytest.mark.parametrize("script", [*SCRIPTS, GPU], ids=lambda script: script.name)
def test_shellcheck_has_nothing_to_say(script):
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = shutil.which("shellcheck") or str(Path(sys.executable).with_name("shellcheck"))
    found = subprocess.run([shellcheck, "--external-sources", script], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("script", ["vm.sh", "gke.sh", "worker.sh", "xla_flags.sh"])
def test_help_needs_nothing_and_names_every_command(machine, script):
    found = machine.run(script, "--help", TPU_NAME="", TPU_TYPE="", TPU_ZONE="", TPU_PROJECT="")
    assert found.returncode == 0 and "usage" in found.stdout
    told = set(re.findall(r"^  ([a-z]+) ", found.stdout, re.MULTILINE))
    body = (TPU / script).read_text().rpartition("case $command in\n")[2]
    assert told == set(re.findall(r"^    ([a-z]+)\)", body, re.MULTILINE))
    assert machine.calls == []


# --- Commands that are run. ---

VM = {
    "bucket": (
        ["gs://my-bucket"],
        [
            ["gcloud", "storage", "buckets", "create", "gs://my-bucket", "--project=my-project",
             "--location=us-east5", "--uniform-bucket-level-access"],
            ["gcloud", "projects", "describe", "my-project", "--format=value(projectNumber)"],
            ["gcloud", "storage", "buckets", "add-iam-policy-binding", "gs://my-bucket",
             "--role=roles/storage.objectAdmin",
             "--member=serviceAccount:123456-compute@developer.gserviceaccount.com"],
        ],
    ),
    "smoke": (
        ["--bucket", "gs://my-bucket"],
        [["gcloud", "compute", "tpus", "tpu-vm", "ssh", "mapo", *PLACE, "--worker=all",
          "--command=cd mapo_jax && ../mapo_venv/bin/python tpu/smoke.py --storage gs://my-bucket/smoke"]],
    ),
    "run": (
        RUN,
        [["gcloud", "compute", "tpus", "tpu-vm", "ssh", "mapo", *PLACE, "--worker=all",
          "--command=bash mapo_jax/tpu/worker.sh start v6e-16 --config configs/a.yaml "
          "run.directory=gs://my-bucket/runs/a 'rollout.system_prompt=Say less.'"]],
    ),
    "status": (
        [],
        [["gcloud", "compute", "tpus", "queued-resources", "describe", "mapo", *PLACE,
          "--format=value(state.state)"],
         ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "mapo", *PLACE, "--worker=all",
          "--command=bash mapo_jax/tpu/worker.sh status"]],
    ),
    "logs": (
        ["--worker", "2"],
        [["gcloud", "compute", "tpus", "tpu-vm", "ssh", "mapo", *PLACE, "--worker=2",
          "--command=bash mapo_jax/tpu/worker.sh logs"]],
    ),
    "stop": (
        [],
        [["gcloud", "compute", "tpus", "tpu-vm", "ssh", "mapo", *PLACE, "--worker=all",
          "--command=bash mapo_jax/tpu/worker.sh stop"]],
    ),
    "delete": (
        [],
        [["gcloud", "compute", "tpus", "queued-resources", "delete", "mapo", *PLACE, "--force", "--quiet"]],
    ),
    "ssh": (
        ["df -h | tail -n 1"],
        [["gcloud", "compute", "tpus", "tpu-vm", "ssh", "mapo", *PLACE, "--worker=all",
          "--command=df -h | tail -n 1"]],
    ),
}  # fmt: skip

GKE_PLACE = ["--cluster=mapo", *PLACE]
GKE = {
    "create": (
        ["--spot"],
        [["xpk", "cluster", "create", *GKE_PLACE, "--tpu-type=v6e-16", "--num-slices=1", "--spot"]],
    ),
    "image": (
        [],
        [["docker", "build", f"--file={TPU}/Dockerfile", f"--tag={SETTINGS['TPU_IMAGE']}", str(ROOT)],
         ["docker", "push", SETTINGS["TPU_IMAGE"]]],
    ),
    "run": (
        ["--job", "first", "--grace", "120", *RUN],
        [["xpk", "workload", "create", *GKE_PLACE, "--workload=first", "--tpu-type=v6e-16", "--num-slices=1",
          f"--docker-image={SETTINGS['TPU_IMAGE']}", "--max-restarts=50", "--restart-on-exit-codes=3",
          "--termination-grace-period-seconds=120",
          "--command=bash tpu/worker.sh exec v6e-16 --config configs/a.yaml "
          "run.directory=gs://my-bucket/runs/a 'rollout.system_prompt=Say less.'"]],
    ),
    "status": ([], [["xpk", "workload", "list", *GKE_PLACE]]),
    "logs": (
        [],
        [["gcloud", "container", "clusters", "get-credentials", "mapo", "--location=us-east5",
          "--project=my-project"],
         ["kubectl", "logs", "--follow", "--prefix", "--max-log-requests=64", "--tail=100",
          "--selector=jobset.sigs.k8s.io/jobset-name=mapo"]],
    ),
    "stop": ([], [["xpk", "workload", "delete", *GKE_PLACE, "--workload=mapo", "--force"]]),
    "delete": ([], [["xpk", "cluster", "delete", *GKE_PLACE, "--force"]]),
}  # fmt: skip


@pytest.mark.parametrize(
    "script, command, arguments, expected",
    [("vm.sh", name, *case) for name, case in VM.items()]
    + [("gke.sh", name, *case) for name, case in GKE.items()],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_commands_are_these_and_a_dry_run_prints_the_same(machine, script, command, arguments, expected):
    found = machine.run(script, command, *arguments)
    assert found.returncode == 0, found.stderr
    assert machine.calls == expected
    machine.answers()
    printed = machine.run(script, command, "--dry-run", *arguments)
    assert printed.returncode == 0, printed.stderr
    assert machine.calls == []
    assert commands(printed.stdout.replace("PROJECT_NUMBER", "123456")) == expected


def asks_for(slice_name, image, *more):
    return ["gcloud", "compute", "tpus", "queued-resources", "create", "mapo", *PLACE, "--node-id=mapo",
            f"--accelerator-type={slice_name}", f"--runtime-version={image}", *more]  # fmt: skip


@pytest.mark.parametrize(
    "slice_name, image",
    [
        ("v6e-8", "v2-alpha-tpuv6e"),
        ("v5p-64", "v2-alpha-tpuv5"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v4-8", "tpu-ubuntu2204-base"),
    ],
)
def test_create_asks_for_the_slice_with_its_image_and_waits(machine, slice_name, image):
    machine.answers(state=["", "WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    found = machine.run("vm.sh", "create", "--type", slice_name, "--spot", "--", "--internal-ips")
    assert found.returncode == 0, found.stderr
    asked = asks_for(slice_name, image, "--spot", "--internal-ips")
    kinds = [" ".join(call[3:5]) for call in machine.calls]
    looks = ["queued-resources describe"] * 4
    assert kinds == [
        "queued-resources describe", "tpu-vm accelerator-types", "queued-resources create", *looks
    ]  # fmt: skip
    assert machine.calls[2] == asked
    said = found.stderr.splitlines()
    assert said == ["mapo: WAITING_FOR_RESOURCES", "mapo: PROVISIONING", "mapo: ACTIVE"]
    machine.answers()
    printed = machine.run(
        "vm.sh", "create", "--type", slice_name, "--spot", "--dry-run", "--", "--internal-ips"
    )
    assert asked in commands(printed.stdout) and machine.calls == []


def test_setup_sends_the_commit_to_every_worker(machine):
    found = machine.run("vm.sh", "setup")
    assert found.returncode == 0, found.stderr
    copy, install = machine.calls
    assert copy[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "scp"]
    assert copy[6:] == [*PLACE, "mapo:mapo_jax.tar.gz", "--worker=all"]
    assert "worker.sh setup" in install[-1] and install[-2] == "--worker=all"
    assert not Path(copy[5]).exists()  # the archive was deleted


# --- Bad input. ---


@pytest.mark.parametrize(
    "script, arguments, settings, words",
    [
        ("vm.sh", ["create"], {"TPU_PROJECT": ""}, "no project; give --project PROJECT or set TPU_PROJECT"),
        ("vm.sh", ["create", "--project", "My Project"], {}, "'My Project' is no project ID"),
        ("vm.sh", ["create"], {"TPU_ZONE": ""}, "no zone; give --zone ZONE"),
        ("vm.sh", ["create", "--zone", "us-east5"], {}, "zones look like us-east5-b"),
        ("vm.sh", ["create"], {"TPU_TYPE": ""}, "no slice; give --type TYPE"),
        ("vm.sh", ["create", "--type", "v6e-9"], {}, "there is no slice 'v6e-9'; a v6e slice has 1, 4, 8"),
        ("vm.sh", ["create", "--type", "v5e-8"], {}, "slice 'v5e-8' is called v5litepod-8"),
        ("vm.sh", ["create", "--type", "v5p-12"], {}, "counts cores, two per chip"),
        ("vm.sh", ["create", "--type", "h100"], {}, "there is no slice 'h100'; slices are v5litepod-N"),
        ("vm.sh", ["create", "--type", "tpu7x-16"], {}, "available only through GKE; use tpu/gke.sh"),
        ("vm.sh", ["create", "--name", "My_TPU"], {}, "name 'My_TPU' must be at most 40 lower-case letters"),
        ("vm.sh", ["create"], {"TPU_NAME": ""}, "no name; give --name NAME or set TPU_NAME"),
        ("vm.sh", ["create", "--name"], {}, "--name needs a value"),
        ("vm.sh", ["create", "--wait", "soon"], {}, "--wait is 'soon'; it must be whole minutes"),
        ("vm.sh", ["bucket", "my-bucket"], {}, "'my-bucket' is no bucket; write gs://NAME"),
        ("vm.sh", ["smoke", "--bucket", "gs://B"], {}, "'gs://B' is no bucket"),
        ("vm.sh", ["run", "--config", "a.yaml"], {}, "add run.directory=gs://BUCKET/runs/NAME"),
        ("vm.sh", ["babysit", "run.directory=runs/a"], {}, "the run must lie in a bucket"),
        ("vm.sh", ["logs", "--worker", "first"], {}, "it must be a worker's number, or all"),
        ("vm.sh", ["ssh", "df", "-h"], {}, "give the command as one word"),
        ("vm.sh", ["launch"], {}, "unknown command 'launch'"),
        ("vm.sh", [], {}, "no command; see --help"),
        ("gke.sh", ["create"], {}, "give one of --spot, --on-demand, --reservation NAME"),
        ("gke.sh", ["create", "--spot", "--on-demand"], {}, "give one of --spot, --on-demand"),
        ("gke.sh", ["run", *RUN], {"TPU_IMAGE": ""}, "no image; give --image IMAGE"),
        ("gke.sh", ["run", "--job", "a_b", *RUN], {}, "job 'a_b' must be"),
        (
            "gke.sh",
            ["run", "--image", "mapo", *RUN],
            {},
            "image 'mapo' is no image; write it as us-east5-docker",
        ),
        ("gke.sh", ["run", "a=b"], {}, "add run.directory=gs://BUCKET/runs/NAME"),
        ("gke.sh", ["fly"], {}, "unknown command 'fly'"),
        ("xla_flags.sh", ["v6e-3"], {}, "there is no slice 'v6e-3'"),
        ("xla_flags.sh", [], {}, "no slice"),
        ("worker.sh", ["start", "v6e-3"], {}, "there is no slice 'v6e-3'"),
        ("worker.sh", ["start"], {}, "no slice"),
        ("worker.sh", ["fly"], {}, "unknown command 'fly'"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_done(machine, script, arguments, settings, words):
    found = machine.run(script, *arguments, **settings)
    assert found.returncode == 2
    (line,) = found.stderr.splitlines()
    assert line.startswith("error: ") and words in line
    assert found.stdout == "" and machine.calls == []


@pytest.mark.parametrize(
    "script, arguments, missing, remedy",
    [
        ("vm.sh", ["create"], "gcloud", "cloud.google.com/sdk"),
        ("gke.sh", ["status"], "xpk", "pip install xpk"),
        ("gke.sh", ["logs"], "kubectl", "gcloud components install kubectl"),
        ("gke.sh", ["image"], "docker", "docs.docker.com"),
    ],
)
def test_a_missing_program_is_named_with_where_to_get_it(machine, script, arguments, missing, remedy):
    (machine.tools / missing).unlink()
    for tool in ("bash", "dirname", "env"):
        (machine.tools / tool).symlink_to(shutil.which(tool))
    found = machine.run(script, *arguments, PATH=str(machine.tools))
    (line,) = found.stderr.splitlines()
    assert found.returncode == 2 and f"{missing} is not installed" in line and remedy in line
    assert machine.calls == []


def test_nothing_is_asked_for_where_the_slice_is_not_to_be_had_or_the_name_is_taken(machine):
    machine.answers(fail=["accelerator-types describe"])
    found = machine.run("vm.sh", "create")
    assert found.returncode == 2 and "there is no v6e-16 in us-east5-b for project my-project" in found.stderr
    machine.answers(state=["ACTIVE"])
    again = machine.run("vm.sh", "create")
    assert again.returncode == 2 and "mapo exists already in us-east5-b and is ACTIVE" in again.stderr
    assert not any("create" in call for call in machine.calls)


def test_create_stops_waiting_when_the_slice_will_not_come(machine):
    machine.answers(state=["", "PROVISIONING", "FAILED"])
    found = machine.run("vm.sh", "create")
    assert found.returncode == 2 and "mapo is FAILED and will not become active" in found.stderr
    machine.answers(state=["", "WAITING_FOR_RESOURCES"])
    found = machine.run("vm.sh", "create", "--wait", "0")
    assert found.returncode == 2 and "not there after 0 minutes; it stays in the queue" in found.stderr


# --- Babysitting. ---


def did(machine):
    """The calls that changed the slice or the run, in order, without queries."""
    done = []
    for call in machine.calls:
        text = " ".join(call)
        for words, name in (
            ("queued-resources create", "create"),
            ("queued-resources delete", "delete"),
            ("worker.sh setup", "setup"),
            ("worker.sh start", "start"),
            ("worker.sh stop", "stop"),
        ):
            if words in text:
                done.append(name)
    return done


def test_babysit_asks_for_a_slice_that_was_taken_away_and_goes_on(machine):
    machine.answers(
        # no slice; create queries twice; two queries; preempted; create queries again; until the end
        state=["", "", "ACTIVE", "ACTIVE", "ACTIVE", "SUSPENDED", "", "ACTIVE"],
        worker=["running", "running", "running", "ended 0"],
    )
    found = machine.run("vm.sh", "babysit", "--spot", *RUN)
    assert found.returncode == 0, found.stderr
    assert did(machine) == ["create", "setup", "start", "delete", "create", "setup", "start"]
    assert all(call[-1] == "--spot" for call in machine.calls if "create" in call)
    assert "mapo is SUSPENDED; asking for it" in found.stderr and "the run is done" in found.stderr


def test_babysit_starts_a_run_again_that_was_killed_and_leaves_bad_input_alone(machine):
    machine.answers(state=["ACTIVE"], worker=["none", "running", "ended 143", "running", "ended 0"])
    found = machine.run("vm.sh", "babysit", *RUN)
    assert found.returncode == 0 and did(machine) == ["start", "stop", "start"]

    machine.answers(state=["ACTIVE"], worker=["bare", "running", "ended 124"])
    found = machine.run("vm.sh", "babysit", *RUN)
    assert found.returncode == 0 and "stopped at its deadline" in found.stderr
    assert did(machine) == ["setup", "start"]

    machine.answers(state=["ACTIVE"], worker=["ended 2"])
    found = machine.run("vm.sh", "babysit", *RUN)
    assert found.returncode == 2 and "refuses its input" in found.stderr and did(machine) == []


def test_babysit_gives_up_after_so_many_tries(machine):
    machine.answers(state=["ACTIVE"], worker=["ended 1"])
    found = machine.run("vm.sh", "babysit", "--restarts", "2", *RUN)
    assert found.returncode == 2 and "gave up after 2 more tries" in found.stderr
    assert did(machine).count("start") == 3
    machine.answers(fail=["accelerator-types"])
    found = machine.run("vm.sh", "babysit", "--restarts", "1", *RUN)
    assert found.returncode == 2 and "there is no v6e-16 in us-east5-b" in found.stderr
    assert did(machine) == []


# --- On the worker, with real processes. ---

STAND_IN_RUN = """#!/bin/bash
echo "flags: $LIBTPU_INIT_ARGS"
echo "arguments: $*"
trap 'echo saving; exit 143' TERM
case "$*" in *end=*) exit "${@: -1:1}" ;; esac
while :; do sleep 0.05; done
"""


@pytest.fixture
def worker(machine):
    python = machine.folder / "python"
    python.write_text(STAND_IN_RUN)
    python.chmod(0o755)
    state = machine.folder / "worker-state"

    def call(*arguments):
        return machine.run("worker.sh", *arguments, MAPO_PYTHON=str(python), MAPO_STATE=str(state))

    yield call
    if (state / "pid").exists() and not (state / "status").exists():
        os.kill(int((state / "pid").read_text()), signal.SIGKILL)


def eventually(look, wanted):
    until = time.monotonic() + 20
    while (seen := look()) != wanted and time.monotonic() < until:
        time.sleep(0.05)
    assert seen == wanted


def test_a_worker_starts_one_run_and_stops_it_by_a_signal(worker, machine):
    assert worker("status").stdout == "none\n"
    started = worker("start", "v6e-8", "--config", "a.yaml", "x=a b")
    assert started.returncode == 0 and "started on" in started.stdout
    assert worker("status").stdout == "running\n"
    second = worker("start", "v6e-8", "--config", "a.yaml")
    assert second.returncode == 2 and "a run is going on here" in second.stderr
    log = machine.folder / "worker-state" / "log"
    eventually(lambda: "arguments: -u -m mapo_jax.train --config a.yaml x=a b" in log.read_text(), True)
    assert "--xla_tpu_scoped_vmem_limit_kib=98304" in log.read_text()
    stopped = worker("stop", "20")
    assert stopped.returncode == 0 and "ended 143" in stopped.stdout
    assert worker("status").stdout == "ended 143\n" and log.read_text().endswith("saving\n")
    assert "nothing is running" in worker("stop").stdout


def test_a_worker_knows_how_a_run_ended(worker, machine):
    worker("start", "v5p-8", "end=", "3")
    eventually(lambda: worker("status").stdout, "ended 3\n")
    assert worker("start", "v5p-8", "end=", "0").returncode == 0  # a new run may start
    eventually(lambda: worker("status").stdout, "ended 0\n")


def test_exec_stays_in_the_foreground_and_hands_on_the_status(worker):
    found = worker("exec", "tpu7x-16", "end=", "7")
    assert found.returncode == 7 and "flags: \n" in found.stdout


def test_a_worker_prints_what_it_would_run(worker, machine):
    printed = worker("--dry-run", "start", "v5litepod-8", "a=b").stdout
    words = shlex.split(printed)
    assert words[0] == "env" and words[-5:] == [
        str(machine.folder / "python"),
        "-u",
        "-m",
        "mapo_jax.train",
        "a=b",
    ]
    setup = worker("--dry-run", "setup").stdout
    assert "uv pip install" in setup and "requirements-tpu.txt" in setup
    assert not (machine.folder / "worker-state").exists()


@pytest.mark.parametrize(
    "slice_name, overlap, memory",
    [("v6e-64", True, True), ("v5p-8", True, False), ("v5litepod-4", True, False), ("v4-8", False, False)],
)
def test_flags_follow_the_generation(machine, slice_name, overlap, memory):
    flags = machine.run("xla_flags.sh", slice_name).stdout.split()
    assert ("--xla_tpu_overlap_compute_collective_tc=true" in flags) == overlap
    assert ("--xla_tpu_scoped_vmem_limit_kib=98304" in flags) == memory
    assert len(flags) == 5 * overlap + memory


@pytest.mark.aot
@pytest.mark.parametrize(
    "slice_name, topology",
    [("v6e-8", "v6e:2x4"), ("v5litepod-8", "v5e:2x4"), ("v5p-8", "v5p:2x2x1")],
)
def test_the_compiler_knows_the_flags(machine, slice_name, topology):
    """The compiler ends the process for an unknown flag."""
    pytest.importorskip("libtpu")
    program = f"""
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
devices = topologies.get_topology_desc(platform="tpu", topology_name={topology!r}).devices
sharding = NamedSharding(Mesh(np.array(devices).reshape(-1), ("x",)), PartitionSpec("x"))
x = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=sharding)
jax.jit(lambda x: (x @ x).sum()).trace(x).lower(lowering_platforms=("tpu",)).compile()
"""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_LOG_DIR": "disabled",
        "LIBTPU_INIT_ARGS": machine.run("xla_flags.sh", slice_name).stdout.strip(),
    }
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300, env=environment)


# --- Documents and other files. ---


def test_the_readmes_commands_are_accepted(machine):
    """Every launch command in the code blocks of the documents, with --dry-run."""
    found = 0
    for page in sorted(TPU.glob("*.md")):
        blocks = re.findall(r"```(?:bash|console)\n(.*?)```", page.read_text(), re.DOTALL)
        for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] not in (["tpu/vm.sh"], ["tpu/gke.sh"]):
                continue
            settings = {"TPU_TYPE": "v6e-16"}
            done = machine.run(words[0].removeprefix("tpu/"), words[1], "--dry-run", *words[2:], **settings)
            assert done.returncode == 0, (line, done.stderr)
            found += 1
    assert found >= 10 and machine.calls == []


def test_the_dockerfile_copies_what_there_is():
    text = (TPU / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.split(None, 1) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    known = {"FROM", "ARG", "ENV", "WORKDIR", "COPY", "RUN", "ENTRYPOINT", "CMD"}
    assert lines[0][0] == "FROM" and {name for name, _ in lines} <= known
    copied = [source for name, rest in lines if name == "COPY" for source in rest.split()[:-1]]
    assert all((ROOT / source).exists() for source in copied)
    assert {"mapo_jax", "configs", "tpu"} <= set(copied)
    installed = re.findall(r"-r (\S+)", text)
    needed = {*installed, *re.findall(r"^-r (\S+)", (ROOT / installed[0]).read_text(), re.MULTILINE)}
    assert needed <= set(copied)
    assert lines[-1] == ["CMD", '["python", "tpu/smoke.py"]']

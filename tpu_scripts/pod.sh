#!/usr/bin/env bash
# Train SAEs on a TPU slice of Google Cloud, held as a queued resource. See tpu_scripts/README.md; pod.sh --help prints the usage.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: tpu_scripts/pod.sh COMMAND [OPTIONS]

commands
  create   request the slice and wait until it is there
  run      install qscope_jax on every worker and start (or continue) the training in the background
  watch    show the log of worker 0 as it grows
  status   say whether the slice is there, and on which workers the training runs
  resume   continue from the newest checkpoint; after a preemption what is left is deleted and the slice requested again
  delete   let the training save a checkpoint, then give the slice back

options (each may be set in the environment instead)
  --name NAME      QSCOPE_POD_NAME     name of the queued resource and its node
  --project ID     QSCOPE_POD_PROJECT  Google Cloud project
  --zone ZONE      QSCOPE_POD_ZONE     zone, such as us-east5-a
  --type TYPE      QSCOPE_POD_TYPE     accelerator type, such as v5p-16 (create, resume)
  --runtime NAME   QSCOPE_POD_RUNTIME  TPU software version; by default the usual one of the type
  --spot           QSCOPE_POD_SPOT=1   cheaper, may be preempted
  --wait MINUTES   QSCOPE_POD_WAIT     how long create and resume wait for the slice; by default 1440
  --config FILE    QSCOPE_POD_CONFIG   YAML of qscope train-sae (run, resume)
  --install WHAT   QSCOPE_POD_INSTALL  a wheel, or git+https://... of the repository (run, resume)
  --out FOLDER     QSCOPE_POD_OUT      run folder: the same one, shared by all workers, that outlives them (run, resume)
  --setup COMMAND  QSCOPE_POD_SETUP    what every worker runs first, such as mounting that folder
  --dry-run                            print the commands and run none

Mistakes are answered with one line and exit status 2.
TEXT
}

die() {
  printf 'pod.sh: error: %s\n' "$1" >&2
  exit 2
}

command="${1:-}"
case "$command" in
  create | run | watch | status | resume | delete) shift ;;
  -h | --help)
    usage
    exit 0
    ;;
  "") die "no command given; expected create, run, watch, status, resume or delete (see pod.sh --help)" ;;
  *) die "unknown command '$command'; expected create, run, watch, status, resume or delete" ;;
esac

name="${QSCOPE_POD_NAME:-}"
project="${QSCOPE_POD_PROJECT:-}"
zone="${QSCOPE_POD_ZONE:-}"
type="${QSCOPE_POD_TYPE:-}"
runtime="${QSCOPE_POD_RUNTIME:-}"
spot="${QSCOPE_POD_SPOT:-0}"
wait_minutes="${QSCOPE_POD_WAIT:-1440}"
config="${QSCOPE_POD_CONFIG:-}"
install="${QSCOPE_POD_INSTALL:-}"
out="${QSCOPE_POD_OUT:-}"
setup="${QSCOPE_POD_SETUP:-}"
dry_run=0

while [ $# -gt 0 ]; do
  flag="$1"
  case "$flag" in
    --spot) spot=1 && shift && continue ;;
    --dry-run) dry_run=1 && shift && continue ;;
    -h | --help) usage && exit 0 ;;
    --name | --project | --zone | --type | --runtime | --wait | --config | --install | --out | --setup) ;;
    *) die "unknown option '$flag' (see pod.sh --help)" ;;
  esac
  [ $# -ge 2 ] && [[ "$2" != --* ]] || die "$flag needs a value"
  case "$flag" in
    --name) name="$2" ;;
    --project) project="$2" ;;
    --zone) zone="$2" ;;
    --type) type="$2" ;;
    --runtime) runtime="$2" ;;
    --wait) wait_minutes="$2" ;;
    --config) config="$2" ;;
    --install) install="$2" ;;
    --out) out="$2" ;;
    --setup) setup="$2" ;;
  esac
  shift 2
done

# What a value must look like: NAME VALUE PATTERN HINT.
check() {
  [ -n "$2" ] || die "$1 is missing; give --$1, $4"
  [[ "$2" =~ ^($3)$ ]] || die "--$1 is '$2', expected $4"
}

check_slice() {
  check type "$type" 'v4-[0-9]+|v5p-[0-9]+|v5litepod-[0-9]+|v6e-[0-9]+' "an accelerator type such as v4-16, v5p-16, v5litepod-16 or v6e-16"
  check wait "$wait_minutes" '[0-9]{1,6}' "minutes"
  [[ "$spot" =~ ^[01]$ ]] || die "QSCOPE_POD_SPOT is '$spot', expected 0 or 1"
  if [ -z "$runtime" ]; then
    case "$type" in
      v4-*) runtime=tpu-ubuntu2204-base ;;
      v5p-*) runtime=v2-alpha-tpuv5 ;;
      v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
      v6e-*) runtime=v2-alpha-tpuv6e ;;
    esac
  fi
  check runtime "$runtime" '[a-z0-9][a-z0-9.-]*' "a TPU software version such as v2-alpha-tpuv5"
}

check_training() {
  [ -n "$config" ] || die "config is missing; give --config, a YAML such as configs/sae/qwen3_1.7b_w32k_l0_50.yaml"
  [ -f "$config" ] || die "$config: no such file; expected a YAML of qscope train-sae"
  check out "$out" '/[A-Za-z0-9._/-]+' "an absolute path that all workers share, such as /mnt/runs/qwen3_1.7b"
  [ -n "$install" ] || die "install is missing; give --install, a wheel or git+https://... of the repository"
  case "$install" in
    *.whl) [ -f "$install" ] || die "$install: no such file; build the wheel with: python -m pip wheel --no-deps ." ;;
    git+https://*) [[ "$install" =~ ^[A-Za-z0-9+:/._@~-]+$ ]] || die "--install is '$install', expected git+https://... without blanks or quotes" ;;
    *) die "--install is '$install', expected a wheel or git+https://..." ;;
  esac
}

check name "$name" '[a-z]([a-z0-9-]{0,38}[a-z0-9])?' "up to 40 lower-case letters, digits and dashes"
check project "$project" '[a-z][a-z0-9.:-]{4,62}[a-z0-9]' "the id of a Google Cloud project"
check zone "$zone" '[a-z]+-[a-z]+[0-9]+-[a-z]' "a zone such as us-east5-a"
case "$command" in create | resume) check_slice ;; esac
case "$command" in run | resume) check_training ;; esac
[ "$dry_run" = 1 ] || command -v gcloud >/dev/null || die "gcloud is not installed; see https://cloud.google.com/sdk/docs/install"

quoted_quote="'\\''"

# Run a command, or print it as a shell would read it.
run() {
  if [ "$dry_run" = 0 ]; then
    "$@"
    return
  fi
  local word line=""
  for word in "$@"; do
    [[ "$word" =~ ^[A-Za-z0-9_./:=@+,~-]+$ ]] || word="'${word//\'/$quoted_quote}'"
    line="$line$word "
  done
  printf '%s\n' "${line% }"
}

# In a dry run, say under which condition what follows happens.
note() {
  if [ "$dry_run" = 1 ]; then printf '# %s\n' "$1"; else printf 'pod.sh: %s\n' "$1" >&2; fi
}

where=(--project "$project" --zone "$zone")

queued() {
  local verb="$1"
  shift
  run gcloud compute tpus queued-resources "$verb" "$name" "${where[@]}" "$@"
}

ssh_to() {
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" "--worker=$1" "--command=$2"
}

copy_to_all() {
  run gcloud compute tpus tpu-vm scp "$1" "$name:$2" "${where[@]}" --worker=all
}

# State of the queued resource, MISSING where there is none.
state() {
  queued describe '--format=value(state.state)' 2>/dev/null || echo MISSING
}

request() {
  local kind=()
  [ "$spot" = 0 ] || kind=(--spot)
  queued create --node-id "$name" --accelerator-type "$type" --runtime-version "$runtime" ${kind[@]+"${kind[@]}"}
}

wait_until_active() {
  if [ "$dry_run" = 1 ]; then
    note "every 30 seconds, until it says ACTIVE, at most $wait_minutes minutes:"
    queued describe '--format=value(state.state)'
    return
  fi
  local now deadline=$((SECONDS + 60 * wait_minutes))
  while now="$(state)" && [ "$now" != ACTIVE ]; do
    case "$now" in
      FAILED | SUSPENDED | SUSPENDING) die "$name is $now; look at it with pod.sh status, and begin again with pod.sh resume" ;;
    esac
    [ "$SECONDS" -lt "$deadline" ] || die "$name is still $now after $wait_minutes minutes; wait on with pod.sh resume, or give up with pod.sh delete"
    printf 'pod.sh: %s is %s\n' "$name" "$now" >&2
    sleep 30
  done
}

# What follows runs on the workers, whose shell expands the variables.
# shellcheck disable=SC2016
start_training() {
  copy_to_all "$config" qscope.yaml
  local package="qscope-jax[tpu] @ $install"
  if [[ "$install" == *.whl ]]; then
    copy_to_all "$install" "$(basename "$install")"
    package="./$(basename "$install")[tpu]"
  fi
  [ -z "$setup" ] || ssh_to all "$setup"
  # The machines' own Python is older than 3.11; uv brings one.
  ssh_to all 'set -e; command -v ~/.local/bin/uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh; '"test -x ~/qscope/bin/python || ~/.local/bin/uv venv --python 3.11 ~/qscope; ~/.local/bin/uv pip install --python ~/qscope/bin/python --reinstall-package qscope-jax '$package'"
  ssh_to all 'if test -f ~/qscope.pid && kill -0 "$(cat ~/qscope.pid)" 2>/dev/null; then echo "already running"; else nohup ~/qscope/bin/qscope train-sae --config ~/qscope.yaml --out '"$out"' --resume --no-progress --distributed >>~/qscope.log 2>&1 </dev/null & echo $! >~/qscope.pid; fi'
}

# shellcheck disable=SC2016
stop_training() {
  ssh_to all 'pid="$(cat ~/qscope.pid 2>/dev/null)" || exit 0; kill -TERM "$pid" 2>/dev/null || exit 0; for _ in $(seq 900); do kill -0 "$pid" 2>/dev/null || exit 0; sleep 1; done; kill -KILL "$pid"; echo "killed: it was still saving after 15 minutes; the checkpoint before stays"'
}

case "$command" in
  create)
    request
    wait_until_active
    ;;
  run)
    start_training
    ;;
  watch)
    ssh_to 0 'tail -n 50 -F ~/qscope.log'
    ;;
  status)
    queued describe '--format=value(state.state)'
    # shellcheck disable=SC2016
    ssh_to all 'if kill -0 "$(cat ~/qscope.pid 2>/dev/null)" 2>/dev/null; then echo "$(hostname): training"; else echo "$(hostname): not training"; tail -n 3 ~/qscope.log; fi'
    ;;
  resume)
    if [ "$dry_run" = 1 ]; then
      queued describe '--format=value(state.state)'
      now=SUSPENDED
      note "if that says SUSPENDED, SUSPENDING or FAILED:"
    else
      now="$(state)"
    fi
    case "$now" in SUSPENDED | SUSPENDING | FAILED) queued delete --force --quiet ;; esac
    if [ "$dry_run" = 1 ]; then note "then, and if there is no such queued resource:"; fi
    case "$now" in SUSPENDED | SUSPENDING | FAILED | MISSING) request ;; esac
    wait_until_active
    # All workers start together or not at all: one that went on alone would wait for the others for ever.
    if [ "$dry_run" = 1 ]; then note "if it had said ACTIVE, the training is stopped first:"; fi
    if [ "$dry_run" = 1 ] || [ "$now" = ACTIVE ]; then stop_training; fi
    if [ "$dry_run" = 1 ]; then note "then:"; fi
    start_training
    ;;
  delete)
    if [ "$dry_run" = 1 ]; then
      queued describe '--format=value(state.state)'
      note "if that says ACTIVE:"
    fi
    if [ "$dry_run" = 1 ] || [ "$(state)" = ACTIVE ]; then
      stop_training || note "the training could not be asked to stop; its newest checkpoint stays"
    fi
    if [ "$dry_run" = 1 ]; then note "then:"; fi
    queued delete --force --quiet
    ;;
esac

#!/usr/bin/env bash
# Set up once, then train. `./run.sh help` says how.
set -euo pipefail

HERE=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
VENV=$HERE/.venv
STAMP=$VENV/setup.stamp # what was installed; holds 'unfinished' while an installation is under way
LOG=$VENV/setup.log
REQUIREMENTS=$HERE/requirements.txt
CPU_INDEX=https://download.pytorch.org/whl/cpu
OLDEST_PYTHON=3.10 # for which requirements.txt has versions
OLDEST_TORCH=2.11  # that train_gpt.py runs on
export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 # 'user = true' in a pip.conf would bypass the environment

usage() {
    cat <<'TEXT'
usage: ./run.sh [TRACK] [--name=value ...]    train; the flags go to train_gpt.py (--help lists them)
       ./run.sh test [pytest arguments]       run the tests (no GPU needed)
       ./run.sh help

tracks (tiny if none is named):
  tiny     bytes of Python's own documentation: no GPU, no download, minutes
  sprint   480 steps of a quarter of the batch of short, to compare two ideas on one GPU
  short    FineWeb to 3.28 validation loss, GPT-2 small
  medium   FineWeb to 2.92 validation loss, GPT-2 medium

The first run installs requirements.txt into .venv beside this script; later runs find it there. One process
is started per visible NVIDIA GPU, or one on the CPU. The track's data is made or fetched, unless --data= or
--checkpoint= is given.

environment:
  NPROC=n                  start n processes
  PYTHON=path              interpreter to build .venv with (python3)
  CUDA_VISIBLE_DEVICES     as everywhere
TEXT
}

die() {
    printf 'run.sh: %s\n' "$*" >&2
    exit 2
}

# ----------------------------------------------------------------------------------------------------
# Child processes

# Runs a command and returns its exit status. A signal to this script is passed on exactly once: the child has a
# process group of its own (set -m), else Ctrl-C would reach it from the terminal and again from here, and a second
# interrupt can cut off the saving that the first one began. (exec would do as well, but nothing could be timed.)
SIGNALLED=0
stop_on_signals() { trap 'exit 130' INT; trap 'exit 143' TERM; trap 'exit 129' HUP; }
run_child() {
    local child='' early='' status=0 again=1
    trap 'pass_on INT 130' INT # before the start: a child without these traps could outlive this script
    trap 'pass_on TERM 143' TERM
    trap 'pass_on HUP 129' HUP
    set -m
    if [[ -t 0 ]]; then "$@" </dev/null & else "$@" <&0 & fi # a background group that reads the terminal is stopped
    child=$!
    set +m
    [[ -z $early ]] || kill "-$early" "$child" 2>/dev/null || true
    while ((again)); do # a signal ends `wait` early, with the child still at work
        again=0
        wait "$child" 2>/dev/null && status=0 || status=$?
    done
    stop_on_signals
    return "$status"
}

# $1: the signal, for run_child's child, or for later if there is none yet; $2: the exit status that goes with it.
pass_on() {
    again=1 SIGNALLED=$2
    if [[ -n $child ]]; then kill "-$1" "$child" 2>/dev/null || true; else early=$1; fi
}

# The same for a step on the way to the goal: after a signal there is no going on.
run_step() {
    local status=0
    run_child "$@" || status=$?
    ((!SIGNALLED)) || exit "$SIGNALLED"
    return "$status"
}

# ----------------------------------------------------------------------------------------------------
# GPUs and processes

# Sets ALL_GPUS (in the machine) and GPUS (those that CUDA_VISIBLE_DEVICES shows; CUDA stops at the first bad entry).
count_gpus() {
    local id
    ALL_GPUS=$({ nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU ' || true)
    GPUS=$ALL_GPUS
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]] && ((ALL_GPUS)); then
        GPUS=0
        for id in ${CUDA_VISIBLE_DEVICES//,/ }; do
            if [[ $id =~ ^[0-9]+$ ]]; then ((10#$id < ALL_GPUS)) || break
            elif [[ $id != GPU-* && $id != MIG-* ]]; then break
            fi
            GPUS=$((GPUS + 1))
        done
    fi
}

# Sets PROCESSES: NPROC if given, else one per GPU; of these as many as the batch can be shared out to.
count_processes() {
    local asked=${NPROC:-$GPUS}
    [[ $asked =~ ^[0-9]{1,6}$ ]] || die "NPROC must be a whole number, not '$asked': try NPROC=1"
    asked=$((10#$asked))
    if [[ -n ${NPROC:-} ]]; then
        ((asked)) || die "NPROC must be at least 1, not '$NPROC': try NPROC=1"
        ((!GPUS || asked <= GPUS)) ||
            die "NPROC=$asked, but the visible GPUs are $GPUS: lower it, or hide them with CUDA_VISIBLE_DEVICES="
    fi
    if ((asked >= 8)); then PROCESSES=$((asked - asked % 8))
    elif ((asked >= 4)); then PROCESSES=4
    elif ((asked >= 2)); then PROCESSES=2
    else PROCESSES=1
    fi
    ((asked <= PROCESSES)) ||
        echo "run.sh: $PROCESSES processes instead of $asked: a batch splits into 1, 2, 4 or a multiple of 8"
}

# ----------------------------------------------------------------------------------------------------
# Set-up

# Sets PY, the interpreter that everything below uses. $@: modules that this command needs.
setup() {
    local start=$SECONDS how
    # torch's CUDA build runs without a GPU too: a login node and a GPU node that share this folder keep one .venv
    KIND=cpu
    if ((ALL_GPUS)) || grep -qs '^gpu ' "$STAMP"; then KIND=gpu; fi
    if venv_is_ready; then
        PY=$VENV/bin/python
        how="already installed"
    else
        find_python
        if install; then
            PY=$VENV/bin/python
            how="installed torch $(torch_of "$PY"), python $(version_of "$PY")"
        elif own_torch "$@"; then
            PY=$OUTER
            how="$FAILURE; using $OWN of $OUTER"
        else
            die "$FAILURE, and $OUTER cannot serve instead ($OWN; torch >= $OLDEST_TORCH is needed):" \
                "connect to a package index, or set PYTHON=path to a python that has what is missing"
        fi
    fi
    echo "setup: $((SECONDS - start)) s ($how)"
}

version_of() { "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null; }
torch_of() { "$1" -c 'from importlib.metadata import version; print(version("torch"))'; }

# The stamp of a finished installation: what kind it is, and all that was asked for.
wanted_stamp() {
    printf '%s python %s\n' "$KIND" "$(version_of "${PYTHON:-$VENV/bin/python}")"
    cat -- "$REQUIREMENTS"
}

venv_is_ready() {
    [[ -x $VENV/bin/python && -e $STAMP && $(cat -- "$STAMP") == "$(wanted_stamp)" ]]
}

# Sets OUTER, the interpreter outside .venv (even where .venv is activated and python3 means that one).
find_python() {
    local name=${PYTHON:-python3} version
    version=$(version_of "$name") ||
        die "'$name' does not run: install Python $OLDEST_PYTHON or newer, or set PYTHON=path to one"
    OUTER=$("$name" - "$VENV" "$OLDEST_PYTHON" 2>/dev/null <<'PY'
import os, sys
venv, oldest = sys.argv[1:]
if sys.version_info[:2] < tuple(map(int, oldest.split("."))):
    sys.exit(1)
inside = os.path.realpath(sys.prefix) == os.path.realpath(venv)
print(sys._base_executable if inside else sys.executable)
PY
    ) || die "'$name' is Python $version, but $OLDEST_PYTHON or newer is needed: set PYTHON=path to a newer one"
}

# Makes .venv whole, or returns 1 with the reason in FAILURE.
FAILURE=''
install() {
    local status=0
    index_answers || return 1
    mkdir -p -- "$VENV" 2>/dev/null && [[ -w $VENV ]] || { FAILURE="cannot write to $VENV"; return 1; }
    lock
    if ! venv_is_ready; then # else another run.sh did it while this one waited
        echo "setup: installing into $VENV, once: about a minute, more with a GPU (log: $LOG)"
        show_progress
        if prepare_venv && install_packages && check_packages; then write_stamp || status=1; else status=1; fi
        hide_progress
    fi
    exec 9>&- # unlock
    return "$status"
}

# A rename, so that there is a whole stamp or none; and the last thing done, so that it stands for everything.
write_stamp() {
    { wanted_stamp >"$STAMP.new" && mv -f -- "$STAMP.new" "$STAMP"; } || { FAILURE="cannot write $STAMP"; return 1; }
}

# Two first runs at once take turns. The lock dies with its holder; systems without flock do without.
lock() {
    exec 9>>"$VENV/.lock"
    if command -v flock >/dev/null && ! flock -n 9; then
        echo "setup: another run.sh is installing; waiting for it"
        flock 9 2>/dev/null || true # not every network file system has locks
    fi
}

# Fetches one small file through pip, with a limit: offline, pip alone would try again for minutes.
index_answers() {
    "$OUTER" -m pip --version >/dev/null 2>&1 || return 0 # no pip to try with yet; .venv will have one
    FAILURE=$("$OUTER" - "$(grep '^tqdm==' "$REQUIREMENTS")" 2>/dev/null <<'PY'
import subprocess, sys, tempfile
with tempfile.TemporaryDirectory() as folder:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--retries", "0", "--timeout", "5"]
    try:
        result = subprocess.run(command + ["-d", folder, sys.argv[1]], capture_output=True, text=True, timeout=15)
    except subprocess.TimeoutExpired:
        sys.exit(print("pip cannot install (no answer from the package index within 15 s)") or 1)
    if result.returncode:
        errors = [line[7:] for line in result.stderr.splitlines() if line.startswith("ERROR: ")]
        sys.exit(print(f"pip cannot install ({(errors or ['it says nothing'])[-1]})") or 1)
PY
    )
}

# An empty environment, unless what is there is whole and only the requirements changed, or the user made it by hand.
prepare_venv() {
    local before='' after
    if [[ -e $STAMP ]]; then before=$(head -n 1 -- "$STAMP"); fi
    if [[ -x $VENV/bin/python ]]; then
        after=$(wanted_stamp | head -n 1)
        if [[ ! -e $STAMP || $before == "$after" ]]; then
            if [[ -n $before ]]; then echo unfinished >"$STAMP"; fi
            "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || "$VENV/bin/python" -m ensurepip >"$LOG" 2>&1 ||
                { FAILURE="$VENV has no pip (delete that folder to have it made anew)"; return 1; }
            : >"$LOG"
            return 0
        fi
    fi
    echo unfinished >"$STAMP"
    find "$VENV" -mindepth 1 -maxdepth 1 ! -name .lock ! -name "${STAMP##*/}" -exec rm -rf -- {} +
    run_step "$OUTER" -m venv "$VENV" >"$LOG" 2>&1 ||
        { FAILURE="'$OUTER -m venv' fails (on Debian and Ubuntu: apt install python3-venv)"; return 1; }
}

install_packages() {
    local torch
    torch=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' "$REQUIREMENTS")
    if [[ $KIND == cpu && $(uname -s) == Linux ]]; then
        # PyPI's torch brings gigabytes of CUDA libraries; a machine without GPU wants the +cpu build. pip may be set
        # up to find one; else PyTorch's own index has it, if it answers (if not, pip would retry for over a minute).
        if pip_install "torch==$torch+cpu" -r "$REQUIREMENTS"; then return 0; fi
        if url_answers "$CPU_INDEX/torch/"; then pip_install --index-url "$CPU_INDEX" "torch==$torch+cpu" || true; fi
    fi
    pip_install -r "$REQUIREMENTS" || { FAILURE="pip cannot install requirements.txt: $(last_error)"; return 1; }
}

# Byte-compiling everything takes a third of the time and serves torch.compile, which only GPUs use; else
# check_packages compiles what is imported.
pip_install() {
    local compile=--compile
    if [[ $KIND == cpu ]]; then compile=--no-compile; fi
    run_step "$VENV/bin/python" -m pip install --no-input "$compile" "$@" >>"$LOG" 2>&1
}
last_error() { { grep '^ERROR: ' "$LOG" || tail -n 1 "$LOG"; } | tail -n 1; }

url_answers() {
    local code='import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)'
    run_step "$VENV/bin/python" -c "$code" "$1" 2>/dev/null
}

check_packages() {
    PYTHONDONTWRITEBYTECODE='' run_step "$VENV/bin/python" -c \
        'import torch, numpy, safetensors, tqdm, pytest, xdist, scipy.stats, matplotlib.pyplot
import torch.distributed.run' \
        >>"$LOG" 2>&1 ||
        { FAILURE="the installed packages do not import: $(last_error)"; return 1; }
}

# On a terminal: one line, rewritten each second, with what pip is doing.
TICKER=''
show_progress() {
    [[ -t 1 ]] || return 0
    trap hide_progress EXIT
    while sleep 1 && kill -0 $$; do
        printf '\r\033[K%4d s  %s' "$SECONDS" "$(tail -n 1 -- "$LOG" | cut -c 1-90)"
    done 2>/dev/null &
    TICKER=$!
}
hide_progress() {
    [[ -n $TICKER ]] || return 0
    kill "$TICKER" 2>/dev/null || true
    wait "$TICKER" 2>/dev/null || true
    TICKER=''
    printf '\r\033[K'
}

# Where pip cannot install: does the outer python have what is needed? Sets OWN to its torch, or to what it lacks.
own_torch() {
    OWN=$("$OUTER" - "$OLDEST_TORCH" "$@" 2>/dev/null <<'PY'
import importlib, re, sys
oldest, names, missing = sys.argv[1], sys.argv[2:], []
for name in names:
    try:
        importlib.import_module(name)
    except Exception:
        missing.append(name)
if missing:
    sys.exit(print("no", ", ".join(missing)) or 1)
version = sys.modules["torch"].__version__
print("torch", version)
first_two = lambda text: [int(number) for number in re.findall(r"\d+", text)[:2]]
sys.exit(first_two(version) < first_two(oldest))
PY
    )
}

# ----------------------------------------------------------------------------------------------------
# Commands

# Makes or fetches the track's data, unless the flags bring their own.
prepare_data() {
    local track=$1
    case $track in
        tiny) run_step "$PY" "$HERE/data/sample.py" ;;
        sprint) run_step "$PY" "$HERE/data/fineweb.py" 1 ;;
        short) run_step "$PY" "$HERE/data/fineweb.py" 9 ;;
        medium) run_step "$PY" "$HERE/data/fineweb.py" 22 ;;
    esac
}

# The user's working directory is kept: relative paths in the flags mean what they meant. train_gpt.py knows its own.
launch() {
    local track=$1
    shift
    if ((PROCESSES == 1)); then
        run_child "$PY" "$HERE/train_gpt.py" "--track=$track" "$@"
    else
        # bad flags or data: one line from one process, not a traceback from each
        run_step "$PY" "$HERE/train_gpt.py" --check "--track=$track" "$@" || return
        # torchrun would choose one thread and say so in five lines
        local cores
        cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
        export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > PROCESSES ? cores / PROCESSES : 1))}"
        # as a module: the torchrun executable need not be on PATH
        run_child "$PY" -m torch.distributed.run --standalone "--nproc_per_node=$PROCESSES" \
            "$HERE/train_gpt.py" "--track=$track" "$@"
    fi
}

train() {
    local track=$1 arg start own_data='' one='' status=0
    shift
    for arg in "$@"; do
        case $arg in
            --track=*) die "the track is the first word, not a flag: ./run.sh ${arg#--track=}" ;;
            --data=*) own_data=1 ;;
            --checkpoint=*) own_data=1 one=1 ;;
            --help | -h) own_data=1 one=1 ;;
            --check) one=1 ;;
            -*) ;;
            *) die "unexpected argument '$arg': after the track come flags, --name=value" ;;
        esac
    done
    count_gpus
    if [[ -n $one ]]; then PROCESSES=1; else count_processes; fi
    setup torch numpy safetensors tqdm
    start=$SECONDS
    if [[ -z $own_data ]]; then prepare_data "$track" || exit; fi
    launch "$track" "$@" || status=$?
    echo "run: $((SECONDS - start)) s"
    exit "$status"
}

run_tests() {
    count_gpus
    setup torch numpy safetensors tqdm pytest
    cd -- "$HERE"
    # All of them: in two processes, a file in one of them, for what its tests share; each computes with one thread.
    if ((!$#)) && "$PY" -c 'import xdist' 2>/dev/null; then set -- -n 2 --dist loadfile --no-loadscope-reorder; fi
    run_child "$PY" -m pytest -q --rootdir="$HERE" tests "$@"
}

main() {
    local word=tiny
    case ${1-} in
        help | -h | --help) usage && exit ;;
    esac
    if (($#)) && [[ $1 != --* ]]; then
        word=$1
        shift
    fi
    case $word in
        tiny | sprint | short | medium) train "$word" "$@" ;;
        test) run_tests "$@" ;;
        *) die "unknown command '$word': use tiny, sprint, short, medium, test or help" ;;
    esac
}

stop_on_signals
main "$@"
